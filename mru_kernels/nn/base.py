"""The base class of all units: layers and directions of one projection and one scan each.

The projection is one matrix product, which computes all gates of the unit, `[B, T, k D]`. The scan reads the gates and
returns the output and the final state. A unit defines its gates, its per-channel inputs and its scan.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence

from .. import checks
from . import traces
from .arguments import check_resets
from .steps import UnitSteps
from .wrappers import fx_node

UNITS: dict[str, type[torch.nn.Module]] = {"gru": torch.nn.GRU}
"""The units that `MRUBlock` and `MRUNetwork` know by name; `MRUBase` adds its subclasses.

A block makes a unit as `unit(input_size, hidden_size, batch_first=True, **options)`. "gru" is torch's own unit, for
comparisons; `torch.compile(fullgraph=True)` does not support it.
"""


class MRUBase(UnitSteps):
    """Base class of the recurrent modules. `BMRU` describes their arguments, calls and results.

    A subclass defines `gates` and `_scan`, and overrides `per_channel`, `initial_state_values` and `dtypes` where the
    defaults do not fit. With the class argument `names` it becomes a unit of `MRUBlock` and `MRUNetwork`, as in
    `class BMRU(WriteOrHold, names=("bmru",))`; a class with the name of an earlier one replaces it.

    Parameters of layer k, where D is `hidden_size`. Those of its second direction have the suffix `_reverse`:

        weight_ih_l{k}      [gates * D, input_size or directions * D]
        bias_ih_l{k}        [gates * D], without the gates that `bias=False` leaves without a bias
        {name}_l{k}         [D], for each name in `per_channel`
        initial_state_l{k}  [D], unless `learn_initial_state` is False

    Raises:
        TypeError, ValueError: an argument is not as described in `BMRU`; the message names it.

    Example::

        >>> class LeakyIntegrator(mk.nn.MRUBase):
        ...     gates = {"update": None}
        ...     per_channel = {"decay": 0.9}
        ...
        ...     def _scan(self, gates, initial_state, *, decay, **options):
        ...         return mk.linear_recurrence(decay, gates, initial_state, **options)
        >>> output, h_n = LeakyIntegrator(3, 8, bidirectional=True)(torch.randn(2, 10, 3))
        >>> output.shape, h_n.shape
        (torch.Size([2, 10, 16]), torch.Size([2, 2, 8]))
    """

    def __init_subclass__(cls, *, names: tuple[str, ...] = (), **options: Any) -> None:
        super().__init_subclass__(**options)
        if "_scan" in vars(cls) and "_step" not in vars(cls):  # the `_step` of a base class is that of another scan
            cls._step = UnitSteps._step  # type: ignore[method-assign]
        UNITS.update(dict.fromkeys(names, cls))

    def flatten_parameters(self) -> None:
        """Do nothing. Code for `nn.GRU` calls this method; the parameters here need no rearranging."""

    def __prepare_scriptable__(self):  # called by torch.jit.script
        raise RuntimeError(
            f"{type(self).__name__}: torch.jit.script cannot compile this module; use torch.jit.trace, torch.compile or"
            " torch.export"
        )

    # ------------------------------------------------------------------------------------------------ forward

    @overload
    def forward(
        self, input: Tensor, hx: Tensor | None = None, *, resets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(self, input: PackedSequence, hx: Tensor | None = None) -> tuple[PackedSequence, Tensor]: ...
    def forward(
        self, input: Any, hx: Tensor | None = None, *, resets: Tensor | None = None, return_boundaries: bool = False,
        _parallel: Any = None, _one_step: bool = False, _state_indices: Tensor | None = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        """Run all layers; `BMRU` describes the arguments, results and errors of a call."""
        if isinstance(input, Proxy):
            return fx_node(self, input, hx, resets)
        if _one_step:
            return self._forward_step(input, hx, resets, _state_indices)
        if isinstance(input, PackedSequence):
            if resets is not None:
                raise ValueError("resets: expected None with a PackedSequence, whose sequences begin anew, got a mask")
            if return_boundaries:
                raise ValueError("return_boundaries: expected False with a PackedSequence, got True")
            return self._forward_packed(input, hx)
        parameters = self._parameters_by_scan()
        scan = self._scan
        if _parallel is not None:  # a call of `distributed.SequenceParallel` or `MemoryCache`
            parameters = _parallel.parameters(parameters)
            scan = functools.partial(_parallel.scan, self._scan)
        if checks.flag("return_boundaries", return_boundaries) and self.chunk_size is None:
            raise ValueError("return_boundaries: expected False for a module whose chunk_size is None, got True")
        order = "[batch, time, features]" if self.batch_first else "[time, batch, features]"
        self._check_shape(input, (2, 3), f"{order} or [time, features]")
        self._check_match(input, parameters[0])
        if input.dim() == 2:
            self._check_hx(hx, input, batch=())
            check_resets(resets, input, "[time]")
            output, *states = self._layers(
                input.unsqueeze(0), None if hx is None else hx.unsqueeze(1), 1, parameters, scan,
                resets=None if resets is None else resets.unsqueeze(0), boundaries=return_boundaries,
            )  # fmt: skip
            return output.squeeze(0), *(t.squeeze(1) for t in states)
        batch = input.shape[0 if self.batch_first else 1]
        self._check_hx(hx, input, batch=(batch,))
        check_resets(resets, input, "[batch, time]" if self.batch_first else "[time, batch]")
        if resets is not None and not self.batch_first:
            resets = resets.T
        return self._layers(
            input, hx, batch, parameters, scan, resets=resets, boundaries=return_boundaries,
            time_first=not self.batch_first,
        )  # fmt: skip

    def _forward_packed(self, input: PackedSequence, hx: Tensor | None) -> tuple[PackedSequence, Tensor]:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        parameters = self._parameters_by_scan()
        self._check_shape(data, (2,), "packed data [total, features]")
        self._check_match(data, parameters[0])
        order, cu_seqlens = _by_sequence(batch_sizes)
        order, cu_seqlens = order.to(data.device), cu_seqlens.to(data.device)
        sequences = cu_seqlens.shape[0] - 1
        self._check_hx(hx, data, batch=(sequences,))
        if hx is not None and sorted_indices is not None:
            hx = hx.index_select(1, sorted_indices)
        x = data.index_select(0, order).unsqueeze(0)
        output, h_n = self._layers(x, hx, sequences, parameters, self._scan, cu_seqlens=cu_seqlens)
        output = output.squeeze(0)
        output = torch.empty_like(output).index_copy_(0, order, output)
        if unsorted_indices is not None:
            h_n = h_n.index_select(1, unsorted_indices)
        return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), h_n

    def _layers(
        self,
        x: Tensor,
        hx: Tensor | None,
        sequences: int,
        parameters: list[dict[str, Tensor]],
        scan: Callable[..., tuple[Tensor, ...]],
        *,
        time_first: bool = False,
        cu_seqlens: Tensor | None = None,
        resets: Tensor | None = None,
        boundaries: bool = False,
    ) -> tuple[Tensor, ...]:
        """Run all scans over `x [B, T, features]`, or `[T, B, features]`.

        Returns:
            The last layer's output, `h_n` and, with `boundaries`, those of every scan.
        """
        outputs: list[Tensor] = []
        finals: list[Tensor] = []
        of_boundaries: list[Tensor] = []
        recorder = traces.active.recorder
        for i, p in enumerate(parameters):
            reverse = self.bidirectional and i % 2 == 1
            if i > 0 and not reverse:
                x, outputs = _concatenated(outputs), []
                if self.dropout > 0.0 and self.training:
                    x = F.dropout(x, self.dropout)
            gates = self._project(x, p)
            if recorder is not None:
                scan = recorder.scan_of(self, i, x.transpose(0, 1) if time_first else x, p)
            h, *states = scan(
                gates.transpose(0, 1) if time_first else gates,
                self._initial_state(None if hx is None else hx[len(finals)], sequences, p),
                reverse=reverse,
                cu_seqlens=cu_seqlens,
                chunk_size=self.chunk_size,
                **self._vectors(p),
                **self._resets(resets, reverse, p),
                **({"return_boundaries": True} if boundaries else {}),
            )
            outputs.append(self._output(h.transpose(0, 1) if time_first else h, x, p))
            finals.append(states[0])
            of_boundaries += states[1:]
        h_n = finals[0].unsqueeze(0) if len(finals) == 1 else torch.stack(finals)
        return (_concatenated(outputs), h_n, *((torch.stack(of_boundaries),) if boundaries else ()))


def _concatenated(outputs: list[Tensor]) -> Tensor:
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def _by_sequence(batch_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """How to reorder a PackedSequence's data, interleaved by time, into one sequence after another.

    Returns:
        The index `[total]` of each step in the data, and the offsets `cu_seqlens [N + 1]` of the reordered sequences.
    """
    sequence = torch.arange(int(batch_sizes[0]), device=batch_sizes.device).unsqueeze(1)
    present = sequence < batch_sizes  # [N, T]: sequence n has a step t
    order = (batch_sizes.cumsum(0) - batch_sizes + sequence)[present]
    return order, F.pad(present.sum(1).cumsum(0), (1, 0))
