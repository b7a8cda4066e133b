"""The base class of all units: layers and directions of one projection and one scan each.

The projection is one matrix product, which computes all gates of the unit, `[B, T, k D]`. The scan reads the gates and
returns the output and the final state. A unit defines its gates, its per-channel inputs and its scan.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence

from .. import checks, ops
from .. import torch_private as private
from . import traces
from .arguments import check_input_dtype, check_resets
from .parameters import UnitParameters
from .wrappers import fx_node

UNITS: dict[str, type[torch.nn.Module]] = {"gru": torch.nn.GRU}
"""The units that `MRUBlock` and `MRUNetwork` know by name; `MRUBase` adds its subclasses.

A block makes a unit as `unit(input_size, hidden_size, batch_first=True, **options)`. "gru" is torch's own unit, for
comparisons; `torch.compile(fullgraph=True)` does not support it.
"""


class MRUBase(UnitParameters):
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
            cls._step = MRUBase._step  # type: ignore[method-assign]
        UNITS.update(dict.fromkeys(names, cls))

    def flatten_parameters(self) -> None:
        """Do nothing. Code for `nn.GRU` calls this method; the parameters here need no rearranging."""

    def __prepare_scriptable__(self):  # called by torch.jit.script
        raise RuntimeError(
            f"{type(self).__name__}: torch.jit.script cannot compile this module; use torch.jit.trace, torch.compile or"
            " torch.export"
        )

    def _scan(
        self,
        gates: Tensor,
        initial_state: Tensor | None,
        *,
        reverse: bool,
        cu_seqlens: Tensor | None,
        chunk_size: int | None,
        **per_channel: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Scan gates `[B, T, k D]` from the initial state `[B, D]`: the output `[B, T, D]` and final state `[B, D]`.

        With `cu_seqlens [N + 1]`, B is 1 and states are `[N, D]`. A call with resets has two more options, `resets
        [B, T]` and `reset_state`, `[D]` or None.
        """
        raise NotImplementedError

    def _step(
        self, gates: Tensor, state: Tensor, state_indices: Tensor | None, **per_channel: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`_scan` of one step without gradients, of gates `[B, k D]`: the output `[B, D]` and the state after it.

        With `state_indices [B]`, `state` is slots `[slots, D]`, which it updates in place.
        """

        def run(before: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            h, after = self._scan(
                gates.unsqueeze(1), before[0], reverse=False, cu_seqlens=None, chunk_size=self.chunk_size, **per_channel
            )
            return h.squeeze(1), [after]

        if state_indices is None:
            h, (after,) = run([state])
            return h, after
        return ops.slots.step(run, [state], state_indices), state

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
        self._check_match(input, parameters[0]["weight_ih"])
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

    def step(
        self, input: Tensor, hx: Tensor | None = None, *, resets: Tensor | None = None,
        state_indices: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """One step of `forward`, for streaming inference, without gradients.

        Args:
            input: `[B, input_size]`.
            hx: as for `forward`, `[num_layers, B, D]`. With `state_indices` it has slots for the states of many
                sequences: `[num_layers, slots, D]`, contiguous, in the dtype of `h_n`.
            resets: bool `[B]`, true for sequences that begin anew with this step.
            state_indices: int32 or int64 `[B]`, the slot of each sequence, all different; -1 skips the sequence.

        Returns:
            The output `[B, D]` and the states after the step `[num_layers, B, D]`, equal to those of `forward` with
            T = 1. With `state_indices` the second is `hx` itself: its slots are updated in place. The output of a
            skipped sequence has no meaning.

        Raises:
            RuntimeError: the module is bidirectional.
            TypeError, ValueError: as `forward`, and as `bmru_step` for `state_indices`.

        Example::

            >>> unit = mk.BMRU(3, 8)
            >>> hx = None
            >>> for x in torch.randn(10, 2, 3):
            ...     output, hx = unit.step(x, hx)
            >>> output.shape, hx.shape
            (torch.Size([2, 8]), torch.Size([1, 2, 8]))
            >>> slots = torch.zeros(1, 100, 8)
            >>> _, h_n = unit(torch.randn(2, 5, 3))  # two sequences begin
            >>> slots[:, [7, 3]] = h_n.detach()
            >>> output, slots = unit.step(torch.randn(2, 3), slots, state_indices=torch.tensor([7, 3]))
            >>> output.shape, slots.shape
            (torch.Size([2, 8]), torch.Size([1, 100, 8]))
        """
        if self.bidirectional:
            raise RuntimeError(
                "step: not supported by a bidirectional module, whose second direction starts at the last step"
            )
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.step(input, hx, resets=resets, state_indices=state_indices)
        if private.has_hooks(self):
            return self(input, hx, resets=resets, _one_step=True, _state_indices=state_indices)
        return self._forward_step(input, hx, resets, state_indices)

    def _forward_step(
        self, input: Tensor, hx: Tensor | None, resets: Tensor | None, state_indices: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        parameters = self._parameters_by_scan()
        self._check_shape(input, (2,), "[batch, features]")
        self._check_match(input, parameters[0]["weight_ih"])
        check_resets(resets, input, "[batch]")
        batch = input.shape[0]
        if state_indices is None:
            self._check_hx(hx, input, batch=(batch,))
        else:
            self._check_slots(hx, input)
            checks.slot_indices(state_indices, input)
            if resets is not None and hx is not None:
                return self._step_in_reset_slots(input, hx, resets, state_indices)
        finals: list[Tensor] = []
        x = input
        for i, p in enumerate(parameters):
            if i > 0 and self.dropout > 0.0 and self.training:
                x = F.dropout(x, self.dropout)
            gates = self._project(x, p)
            state = self._initial_state(None if hx is None else hx[i], batch, p)
            if state is None:
                state = gates.new_zeros((batch, self.hidden_size), dtype=self._state_dtypes(gates.dtype)[-1])
            if resets is not None:
                start = self._learned_state(p).to(state.dtype) if self.learn_initial_state else 0.0
                state = torch.where(resets.unsqueeze(1), start, state)
            h, final = self._step(gates, state, state_indices, **self._vectors(p))
            finals.append(final)
            x = self._output(h, x, p)
        if hx is not None and state_indices is not None:
            return x, hx
        return x, finals[0].unsqueeze(0) if len(finals) == 1 else torch.stack(finals)

    def _step_in_reset_slots(
        self, input: Tensor, hx: Tensor, resets: Tensor, state_indices: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`_forward_step` where some sequences begin anew, in slots."""

        def run(before: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
            output, after = self._forward_step(input, torch.stack(before), resets, None)
            return output, after.unbind()

        return ops.slots.step(run, hx.unbind(), state_indices), hx

    def _forward_packed(self, input: PackedSequence, hx: Tensor | None) -> tuple[PackedSequence, Tensor]:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        parameters = self._parameters_by_scan()
        self._check_shape(data, (2,), "packed data [total, features]")
        self._check_match(data, parameters[0]["weight_ih"])
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

    def _project(self, x: Tensor, p: dict[str, Tensor]) -> Tensor:
        """All gates of one scan, `[*, gates * D]`, from one matrix product."""
        return F.linear(x, *self._gate_weights(p))

    def _gate_weights(self, p: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The weight `[gates * D, features]` and bias `[gates * D]` of the map from a scan's input to its gates."""
        bias = p.get("bias_ih")
        if bias is not None and self._gates_without_bias:
            bias = F.pad(bias, (self._gates_without_bias * self.hidden_size, 0))
        return p["weight_ih"], bias

    def _vectors(self, p: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors `[D]` that `_scan` gets by name. Complex states need complex ones."""
        return {name: p[name] for name in self.per_channel}

    def _output(self, h: Tensor, x: Tensor, p: dict[str, Tensor]) -> Tensor:
        """The output `[*, D]` of one layer and direction, from the result `h` of its scan and its input `x`."""
        return h

    def _learned_state(self, p: dict[str, Tensor]) -> Tensor:
        return p["initial_state"]

    def _resets(self, resets: Tensor | None, reverse: bool, p: dict[str, Tensor]) -> dict[str, Tensor | None]:
        """The options of `_scan` for resets `[B, T]` before the steps where episodes begin; none without resets."""
        if resets is None:
            return {}
        if reverse:  # the state passes from the first step of an episode to the last one of the episode before
            resets = torch.cat([resets[:, 1:], resets.new_zeros(resets.shape[0], 1)], 1)
        return {"resets": resets, "reset_state": self._learned_state(p) if self.learn_initial_state else None}

    def _initial_state(self, given: Tensor | None, sequences: int, p: dict[str, Tensor]) -> Tensor | None:
        if not self.learn_initial_state:
            return given
        learned = self._learned_state(p)
        if given is None:
            return learned.expand(sequences, -1)
        if not torch.is_grad_enabled():
            return given
        # DistributedDataParallel waits for a gradient of every parameter, so that of `learned` is zero, not absent.
        return torch.where(given.new_ones((), dtype=torch.bool), given, learned)

    # ------------------------------------------------------------------------------------------------ checks

    def _check_shape(self, input: Tensor, ranks: tuple[int, ...], expected: str) -> None:
        if not isinstance(input, Tensor):
            kinds = "a tensor or a PackedSequence" if 3 in ranks else f"a tensor {expected}"
            raise TypeError(f"input: expected {kinds}, got {type(input).__name__}")
        checks.dense("input", input, "a PackedSequence")
        if input.dim() not in ranks:
            raise ValueError(f"input: expected {expected}, got shape {list(input.shape)}")
        if input.shape[-1] != self.input_size:
            raise ValueError(f"input: expected {self.input_size} features, got shape {list(input.shape)}")

    def _check_match(self, input: Tensor, weight: Tensor) -> None:
        self._check_dtype(weight.dtype)  # `Module.to` may have changed it
        if input.device != weight.device:
            raise ValueError(f"input: expected the module's device {weight.device}, got {input.device}")
        check_input_dtype(input, weight.dtype)

    def _check_hx(self, hx: Tensor | None, input: Tensor, batch: tuple[int, ...]) -> None:
        if hx is None:
            return
        if not isinstance(hx, Tensor):
            raise TypeError(f"hx: expected a tensor or None, got {type(hx).__name__}")
        checks.dense("hx", hx, "a PackedSequence")
        expected = (self.num_layers * self.num_directions, *batch, self.hidden_size)
        if hx.shape != expected:
            letters = f"[layers * directions, {'batch, ' * len(batch)}hidden_size]"
            raise ValueError(f"hx: expected shape {list(expected)} {letters}, got {list(hx.shape)}")
        if hx.device != input.device:
            raise ValueError(f"hx: expected the input's device {input.device}, got {hx.device}")
        stream = input.dtype
        if stream != torch.float64:
            stream = checks.autocast_dtype(input.device) or stream
        allowed = self._state_dtypes(stream)
        if hx.dtype not in allowed:
            raise TypeError(f"hx: expected dtype {' or '.join(map(str, dict.fromkeys(allowed)))}, got {hx.dtype}")
        if hx.dtype in checks.HALF_DTYPES and not torch.compiler.is_compiling() and self._accumulates():
            warnings.warn(
                f"hx: expected {ops.state_dtype(stream)}, the dtype of h_n, got {hx.dtype}, which rounds away what"
                f" {type(self).__name__} accumulates; under FSDP2 use MixedPrecisionPolicy(cast_forward_inputs=False)",
                stacklevel=2,
            )

    def _check_slots(self, hx: Tensor | None, input: Tensor) -> None:
        if not isinstance(hx, Tensor):
            raise TypeError(f"hx: expected a tensor, as state_indices are given, got {type(hx).__name__}")
        checks.dense("hx", hx, "a PackedSequence")
        if hx.dim() != 3 or hx.shape[0] != self.num_layers or hx.shape[2] != self.hidden_size:
            expected = f"[layers, slots, hidden_size], [{self.num_layers}, slots, {self.hidden_size}]"
            raise ValueError(f"hx: expected shape {expected}, got {list(hx.shape)}")
        if hx.device != input.device:
            raise ValueError(f"hx: expected the input's device {input.device}, got {hx.device}")
        stream = input.dtype
        if stream != torch.float64:
            stream = checks.autocast_dtype(input.device) or stream
        dtype = self._state_dtypes(stream)[-1]
        if hx.dtype != dtype:
            raise TypeError(f"hx: expected dtype {dtype}, got {hx.dtype}")
        if not hx.is_contiguous():
            raise ValueError(f"hx: expected a contiguous tensor, got strides {list(hx.stride())}")

    def _accumulates(self) -> bool:
        """Whether small steps add up in the state, so that rounding the state at every call changes the result."""
        return True

    def _state_dtypes(self, stream: torch.dtype) -> tuple[torch.dtype, ...]:
        """The dtypes that `hx` may have where the gates have dtype `stream`."""
        return stream, ops.state_dtype(stream)


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
