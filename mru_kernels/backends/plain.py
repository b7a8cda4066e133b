"""The backend "torch": every cell in plain torch, as a loop over time, on any device and for any exporter.

It has no ops and no kernels. A call runs `Cell.plain`, and autograd differentiates it, so autograd saves every step.
In a program that is exported for any T, the loop is one `torch.ops.higher_order.scan`. Otherwise it is unrolled.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from .. import checks, ops
from .. import torch_private as private
from ..scalars import Scalar, has_value
from . import CHUNK

CHUNK_SIZES = (16, sys.maxsize)  # any: there are no checkpoints
Scalars = Sequence[float | Tensor]


def load() -> None:
    """Compute the cached properties of all cells, as torch.compile cannot. There are no ops to register."""
    for cell in ops.CELLS.values():
        _ = cell.names, cell.scheduled, cell.required, cell.numbers


def scan(
    cell: ops.Cell, inputs, given, packed, numbers, initial_state, cu_seqlens, resets, reset_state, reverse,
    every: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What the op `mru::<cell>` computes: h `[B, T, D]` and the final state `[N, D]`.

    `mru_kernels.ops` describes the arguments. With `every`, there is a third result: the states after every `every`
    steps, as the checkpoints of the op.

    Raises:
        RuntimeError: the cell has no plain torch, or the values of `cu_seqlens` are not known while the call is traced.
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    plain = cell.plain
    if plain is None:
        raise RuntimeError(f"backend: 'torch' cannot run this call: it does not have the cell {cell.name}")
    if not torch.compiler.is_dynamo_compiling():  # the caller has checked them
        ops.check(cell, inputs, given, packed, initial_state, cu_seqlens, resets, reset_state)
        ops.check_numbers(cell, inputs, numbers, CHUNK, 0, CHUNK_SIZES)
    inputs = [_with_dense_gradient(t) if t.dim() == 3 else t for t in inputs]
    first = ops.first_stream(inputs, packed)
    state = ops.state_dtype(first.dtype)
    arrays = ops.arrays(cell, inputs, given, packed)
    x = [None if t is None else t.to(state).expand(first.shape) for t in arrays]
    scheduled = inputs[len(inputs) - len(cell.scheduled) :]
    p = [*(_value(*pair) for pair in zip(cell.scheduled, scheduled, strict=True)), *numbers]

    def entering(given: Tensor | None) -> Tensor:
        if given is None:
            return first.new_zeros((ops.sequences_of(inputs, cu_seqlens), first.shape[-1]), dtype=state)
        return _with_dense_gradient(given).to(state)

    s, gates = entering(initial_state), plain.gates(x, p)
    if resets is not None:
        plain = replace(plain, step=_after_resets(plain.step))
        gates = [*gates, resets.unsqueeze(-1).expand(first.shape).to(state)]
        p = [*p, entering(reset_state)]
    offsets = None if cu_seqlens is None else read_offsets(cu_seqlens, first.shape[1])
    if offsets is None:
        states, final = _loop(plain, gates, s, p, reverse)
    else:
        states, final = _loops(plain, gates, s, p, reverse, offsets)
    h = _laid_out(plain.output(x, states, p).to(first.dtype), ops.is_time_major(first))
    last = final.contiguous() if torch.compiler.is_compiling() else _WithZeroGradient.apply(final, h)
    return (h, last) if every is None else (h, last, _boundaries(states, reverse, every, offsets))


def step(cell: ops.Cell, inputs, given, packed, numbers, state) -> tuple[Tensor, Tensor]:
    """What the op `mru::<cell>_step` computes: h `[B, D]` and the state after the step `[B, D]`."""
    h, after = scan(cell, ops.as_streams(inputs), given, packed, numbers, state, None, None, None, False)
    return h.squeeze(1), after


def step_slots(cell: ops.Cell, inputs, given, packed, numbers, state, state_indices) -> Tensor:
    """What the op `mru::<cell>_step_slots` computes: h `[B, D]`; it updates rows of `state [slots, D]` in place.

    h of a skipped sequence is 0.
    """
    streams = ops.as_streams(inputs)
    first = ops.first_stream(streams, packed).squeeze(1)
    checks.slots(state, state_indices, first)

    def run(before: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        h, after = step(cell, inputs, given, packed, numbers, before[0])
        return h, [after]

    exists = (state_indices >= 0) & (state_indices < state.shape[0])
    return ops.slots.step(run, [state], state_indices).masked_fill(~exists.unsqueeze(1), 0)


# ------------------------------------------------------------------------------------------ loops


def _loop(plain: ops.Plain, gates: Sequence[Tensor], s: Tensor, p: Scalars, reverse: bool) -> tuple[Tensor, Tensor]:
    """The states after all steps `[B, T, D]`, and the state after the last step `[B, D]`."""
    if isinstance(gates[0].shape[1], torch.SymInt):
        return _loop_of_any_length(plain, gates, s, p, reverse)
    states = []
    rows = list(zip(*(g.unbind(1) for g in gates), strict=True))
    for row in reversed(rows) if reverse else rows:
        s = plain.step(row, s, p)
        states.append(s)
    if not states:  # T = 0: empty sums, so that every input has a gradient of zeros
        none = sum(gates, start=s.sum(0))
        return none, s + none.sum(1)
    return torch.stack(states[::-1] if reverse else states, 1), s


def _loops(
    plain: ops.Plain, gates: Sequence[Tensor], s: Tensor, p: Scalars, reverse: bool, offsets: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """`_loop` over each of the sequences that `offsets` separate; the final states are `[N, D]`."""
    parts = [_loop(plain, [g[:, :0] for g in gates], s[:0], p, reverse)]  # there may be no sequence
    for n, (start, stop) in enumerate(pairwise(offsets)):
        of_sequence = [v[n : n + 1] if isinstance(v, Tensor) and v.dim() == 2 else v for v in p]
        parts.append(_loop(plain, [g[:, start:stop] for g in gates], s[n : n + 1], of_sequence, reverse))
    states, finals = zip(*parts, strict=True)
    return torch.cat(states, 1), torch.cat(finals)


def _after_resets(step):
    """`step` after a reset where the last gate is not 0, to the state that is the last scalar."""

    def reset_and_step(gates, s, p):
        *gates, reset = gates
        *p, reset_state = p
        return step(gates, torch.where(reset != 0, reset_state, s), p)

    return reset_and_step


def _boundaries(states: Tensor, reverse: bool, every: int, offsets: Sequence[int] | None) -> Tensor:
    """The states after every `every` steps of a sequence, from those after all steps `[B, T, D]`."""
    time = states.shape[1]
    rows = max(time - 1, 0) // every
    in_order = states.flip(1) if reverse else states
    if offsets is None:
        return in_order[:, every - 1 :: every][:, :rows].contiguous()
    positions: list[int | None] = [None] * rows
    for start, stop in pairwise([time - o for o in reversed(offsets)] if reverse else offsets):
        for k in range(1, (stop - start - 1) // every + 1):
            positions[start // every + k - 1] = start + k * every - 1
    found = [torch.zeros_like(states[:, 0]) if t is None else in_order[:, t] for t in positions]
    return torch.stack(found, 1) if found else states[:, :0]


def _loop_of_any_length(
    plain: ops.Plain, gates: Sequence[Tensor], s: Tensor, p: Scalars, reverse: bool
) -> tuple[Tensor, Tensor]:
    """`_loop` as one op on real tensors, because exporters support few ops on complex tensors."""
    traced = [v for v in p if isinstance(v, Tensor)]
    real, back = (torch.view_as_real, torch.view_as_complex) if s.is_complex() else (torch.Tensor.clone, _itself)

    def body(s, x, *traced):
        known = iter(traced)
        row = [back(x[i]) for i in range(len(gates))]
        after = real(plain.step(row, back(s), [next(known) if isinstance(v, Tensor) else v for v in p]))
        return after, after.clone()  # results may not share memory

    # One input, as there is one state: torch 2.13 writes a wrong ONNX Scan if there are more inputs than states.
    x = real(torch.stack(list(gates)).movedim(2, 0))
    final, states = private.scan_op(body, [real(s)], [x.flip(0) if reverse else x], tuple(traced))
    return back(states.flip(0) if reverse else states).movedim(0, 1), back(final)


def _itself(t: Tensor) -> Tensor:
    return t


# ------------------------------------------------------------------------------------------ arguments


def _value(scalar: Scalar, t: Tensor) -> float | Tensor:
    """The value of a scheduled scalar, or `t` itself if the call is traced and the value is not known."""
    if torch.compiler.is_dynamo_compiling():
        within = (t >= scalar.least) & (t <= scalar.most)
        torch._assert_async(within, f"{scalar.name}: expected a value in [{scalar.least:g}, {scalar.most:g}]")
        return t
    if private.is_tracing() or not has_value(t):
        return t
    with private.disable_modes():
        return t.item()


def read_offsets(cu_seqlens: Tensor, total: int) -> list[int]:
    """The checked values of `cu_seqlens`. A meta tensor has none; any will do, as shapes do not depend on them."""
    if cu_seqlens.is_meta:
        return [0] * (cu_seqlens.numel() - 1) + [total]
    if torch.compiler.is_compiling() or private.is_tracing() or not has_value(cu_seqlens):
        raise RuntimeError("backend: 'torch' cannot run this call: it reads cu_seqlens, whose values are not known yet")
    on_cpu = cu_seqlens.cpu()
    checks.offsets(on_cpu, total)
    return on_cpu.tolist()


# ------------------------------------------------------------------------------------------ layouts


def _laid_out(t: Tensor, time_major: bool) -> Tensor:
    """A dense copy of `t [B, T, D]`, or `t` itself; `[T, B, D]` in memory if `time_major`."""
    return t.transpose(0, 1).contiguous().transpose(0, 1) if time_major else t.contiguous()


class _WithDenseGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(t, time_major):
        return t.view_as(t)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.time_major = inputs

    @staticmethod
    def backward(ctx, grad):
        return _laid_out(grad, ctx.time_major), None

    @staticmethod
    def jvp(ctx, dt, _):
        with private.enable_forward_gradients(True):  # see private.primals
            return dt.view_as(dt)


class _WithZeroGradient(torch.autograd.Function):
    """A copy of the final state, in whose gradient all inputs of `h` are zeros: alpha changes h only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(final, h):
        return final.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.shape, ctx.dtype = inputs[1].shape, inputs[1].dtype

    @staticmethod
    def backward(ctx, grad):
        return grad, grad.new_zeros((), dtype=ctx.dtype).expand(ctx.shape)

    @staticmethod
    def jvp(ctx, d_final, _):
        with private.enable_forward_gradients(True):
            return d_final.clone()


def _with_dense_gradient(t: Tensor) -> Tensor:
    """The stream `[B, T, D]` or state `t`, with a gradient in the layout that `dense_like` gives."""
    if torch.compiler.is_compiling() or not (t.requires_grad or private.transforms_active()):
        return t
    if t.is_conj() or t.is_neg():
        t = t.resolve_conj().resolve_neg()
    has_units = t.shape[-1] <= 1 or t.stride(-1) == 1
    return _WithDenseGradient.apply(t, t.dim() == 3 and has_units and ops.is_time_major(t))
