"""Single steps of the units, for streaming inference, also on states in slots."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks, ops
from .. import torch_private as private
from .arguments import check_resets
from .scan import UnitScan


class UnitSteps(UnitScan):
    """The method `step` of all units. `MRUBase` has what it shares with whole sequences."""

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
            with private.NoGrad():
                return self.step(input, hx, resets=resets, state_indices=state_indices)
        if private.has_hooks(self):
            return self(input, hx, resets=resets, _one_step=True, _state_indices=state_indices)
        return self._forward_step(input, hx, resets, state_indices)

    def _forward_step(
        self, input: Tensor, hx: Tensor | None, resets: Tensor | None, state_indices: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if resets is None and state_indices is None and not torch.compiler.is_compiling():
            try:  # checks take as long as a short step: they run if it fails
                if hx is None or hx.dtype not in checks.HALF_DTYPES:
                    return self._run_step(input, hx, None, None)
            except Exception:
                self._check_step(input, hx, None, None)
                raise
        self._check_step(input, hx, resets, state_indices)
        if hx is not None and resets is not None and state_indices is not None:
            return self._step_in_reset_slots(input, hx, resets, state_indices)
        return self._run_step(input, hx, resets, state_indices)

    def _check_step(
        self, input: Tensor, hx: Tensor | None, resets: Tensor | None, state_indices: Tensor | None
    ) -> None:
        self._check_shape(input, (2,), "[batch, features]")
        self._check_match(input, self._parameters_by_scan()[0])
        check_resets(resets, input, "[batch]")
        if state_indices is None:
            self._check_hx(hx, input, batch=(input.shape[0],))
        else:
            self._check_slots(hx, input)
            checks.slot_indices(state_indices, input)

    def _run_step(
        self, x: Tensor, hx: Tensor | None, resets: Tensor | None, state_indices: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        output, finals = self._step_layers(x, None if hx is None else hx.unbind(), resets, state_indices)
        if hx is not None and state_indices is not None:
            return output, hx
        return output, finals[0].unsqueeze(0) if len(finals) == 1 else torch.stack(finals)

    def _step_layers(
        self, x: Tensor, states: Sequence[Tensor | None] | None, resets: Tensor | None, state_indices: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """The output of a step and the states after it, from those before it, both one `[B, D]` a layer."""
        parameters = self._parameters_by_scan()
        finals: list[Tensor] = []
        for p, given in zip(parameters, states or [None] * len(parameters), strict=True):
            if finals and self.dropout > 0.0 and self.training:
                x = F.dropout(x, self.dropout)
            gates = self._project(x, p)
            state = self._initial_state(given, x.shape[0], p)
            start = self._start(p) if state is None or resets is not None else None
            if state is None:
                dtype = self._state_dtypes(gates.dtype)[-1]
                state = gates.new_zeros((x.shape[0], self._columns), dtype=dtype) if start is None else start
                state = state.to(dtype).expand(x.shape[0], -1)
            if resets is not None:
                state = torch.where(resets.unsqueeze(1), 0.0 if start is None else start.to(state.dtype), state)
            h, final = self._step(gates, state, state_indices, **self._vectors(p))
            finals.append(final)
            x = self._output(h, x, p)
        return x, finals

    def step_in_block(self, input: Tensor, state: Tensor | None, resets: Tensor | None) -> tuple[Tensor, Tensor]:
        """`step` without gradients on the state `[B, D]` of the only layer. It saves the views of `hx`, 4 us."""
        is_half = state is not None and state.dtype in checks.HALF_DTYPES
        is_quick = resets is None and not is_half and len(self._names_by_scan) == 1
        if not is_quick or torch.compiler.is_compiling() or private.has_hooks(self):
            output, h_n = self.step(input, None if state is None else state.unsqueeze(0), resets=resets)
            return output, h_n.squeeze(0)
        try:
            output, (after,) = self._step_layers(input, (state,), None, None)
        except Exception:
            self._check_step(input, None if state is None else state.unsqueeze(0), None, None)
            raise
        return output, after

    def _step_in_reset_slots(
        self, input: Tensor, hx: Tensor, resets: Tensor, state_indices: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`_forward_step` where some sequences begin anew, in slots."""

        def run(before: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
            output, after = self._forward_step(input, torch.stack(before), resets, None)
            return output, after.unbind()

        return ops.slots.step(run, hx.unbind(), state_indices), hx

    def _check_slots(self, hx: Tensor | None, input: Tensor) -> None:
        if not isinstance(hx, Tensor):
            raise TypeError(f"hx: expected a tensor, as state_indices are given, got {type(hx).__name__}")
        checks.dense("hx", hx, "a PackedSequence")
        if hx.dim() != 3 or hx.shape[0] != self.num_layers or hx.shape[2] != self._columns:
            expected = f"[layers, slots, {self.state_columns}], [{self.num_layers}, slots, {self._columns}]"
            raise ValueError(f"hx: expected shape {expected}, got {list(hx.shape)}")
        if hx.device != input.device:
            raise ValueError(f"hx: expected the input's device {input.device}, got {hx.device}")
        dtype = self._state_dtypes(self._gates_dtype(input))[-1]
        if hx.dtype != dtype:
            raise TypeError(f"hx: expected dtype {dtype}, got {hx.dtype}")
        if not hx.is_contiguous():
            raise ValueError(f"hx: expected a contiguous tensor, got strides {list(hx.stride())}")
