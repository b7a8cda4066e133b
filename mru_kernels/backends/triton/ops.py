"""The ops `mru::*.triton`; see mru_kernels.ops for their arguments and results."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ... import checks, ops
from .. import CHUNK
from .. import triton as backend
from .cell import DEFINED, Implementation, find
from .kernels.arguments import Saved
from .launch import Call, real
from .tuning import CHUNK_SIZES, ceil_div, tile

_library = torch.library.Library("mru", "IMPL")


KEYS = ("CUDA", "CPU") if os.environ.get("TRITON_INTERPRET") == "1" else ("CUDA",)


def register() -> None:
    """Register the ops of every cell that Triton has."""
    for cell in ops.CELLS.values():
        if find(cell.name) is not None:
            _register(cell)


def add(cell: ops.Cell, implementation: Implementation) -> None:
    """Register the ops of a cell that is no file of the folder `cells`."""
    DEFINED[cell.name] = implementation
    _register(cell)


def _register(cell: ops.Cell) -> None:
    for key in KEYS:
        _library.impl(f"{cell.name}.triton", partial(forward, cell), key)
        _library.impl(f"{cell.name}_backward.triton", partial(backward, cell), key)
        _library.impl(f"{cell.name}_step.triton", partial(step, cell), key)
        _library.impl(f"{cell.name}_step_slots.triton", partial(step_slots, cell), key)
        _library.impl(f"{cell.name}_map.triton", partial(compose, cell), key)


def _check(
    cell, inputs, given, packed, numbers, initial_state, cu_seqlens, resets, reset_state, chunk, segment
) -> None:  # fmt: skip
    ops.check(cell, inputs, given, packed, initial_state, cu_seqlens, resets, reset_state)
    ops.check_numbers(cell, inputs, numbers, chunk, segment, CHUNK_SIZES)


def forward(
    cell: ops.Cell, inputs, given, packed, numbers, initial_state, cu_seqlens, resets, reset_state, reverse, chunk,
    segment, save,
) -> list[Tensor]:  # fmt: skip
    _check(cell, inputs, given, packed, numbers, initial_state, cu_seqlens, resets, reset_state, chunk, segment)
    results = ops.allocate(cell, inputs, given, packed, cu_seqlens, chunk, segment, save)
    codes = results[3] if save else ops.allocate_codes(cell, inputs, given, packed, cu_seqlens, segment)
    spare = ops.spare_rows(segment)
    segment = backend.forward_segment(segment, *_sizes(inputs, packed, cu_seqlens)) if cell.composes else 0
    if save and spare > 0:
        results[2][-spare:].zero_()
        codes[-spare if segment > 0 else 0 :].zero_()
    if save and cu_seqlens is not None:
        results[2].zero_()  # there are rows between the sequences
    call = Call(
        cell, inputs, given, packed, numbers, initial_state, cu_seqlens, resets, reset_state, reverse, chunk, segment,
        saved=save,
    )  # fmt: skip
    h, final_state, *saved = map(real, results)
    checkpoints = saved[0] if save else call.nothing
    own = {"h": call.stream(h), "final_state": final_state, "checkpoints": checkpoints, "codes": codes}
    call.scan("forward", own, "entries", "final_state")
    return results


def _sizes(inputs, packed: int, cu_seqlens) -> tuple[tuple[int, int, int], int, torch.device]:
    """What the choice of a segment depends on."""
    batch, time, channels = inputs[0].shape
    sizes = (ops.sequences_of(inputs, cu_seqlens), batch * time, channels // (packed.bit_count() or 1))
    return sizes, inputs[0].dtype.itemsize, inputs[0].device


def step(cell: ops.Cell, inputs, given, packed, numbers, state) -> tuple[Tensor, Tensor]:
    streams = ops.as_streams(inputs)
    h, after = forward(cell, streams, given, packed, numbers, state, None, None, None, False, CHUNK, 0, False)
    return h.squeeze(1), after


def step_slots(cell: ops.Cell, inputs, given, packed, numbers, state, state_indices) -> Tensor:
    streams = ops.as_streams(inputs)
    _check(cell, streams, given, packed, numbers, None, None, None, None, CHUNK, 0)
    first = ops.first_stream(streams, packed)
    checks.slots(state, state_indices, first.squeeze(1), cell.state_dtype(first.dtype))
    if state.device.type == "cpu":
        checks.slot_values(state_indices, state.shape[0])
    h = first.new_zeros(first.shape)  # the kernel writes no row of a sequence that it skips
    call = Call(
        cell, streams, given, packed, numbers, state, None, None, None, False, CHUNK, 0, saved=False,
        slots=state_indices,
    )  # fmt: skip
    nothing = {"checkpoints": call.nothing, "codes": call.nothing}
    call.launch("forward", call.sequences, h=call.stream(real(h)), final_state=call.arguments["initial"], **nothing)
    return h.squeeze(1)


def compose(
    cell: ops.Cell, inputs, given, packed, numbers, cu_seqlens, resets, reset_state, reverse, segment
) -> tuple[Tensor, Tensor]:
    """The op `mru::<cell>_map`."""
    if not cell.composes:
        raise RuntimeError("map: expected a cell whose steps compose; those of this one do not")
    _check(cell, inputs, given, packed, numbers, None, cu_seqlens, resets, reset_state, CHUNK, segment)
    time = inputs[0].shape[1]
    segment = backend.forward_segment(segment, *_sizes(inputs, packed, cu_seqlens))
    segment = segment or ceil_div(max(time, 1), CHUNK) * CHUNK
    call = Call(
        cell, inputs, given, packed, numbers, None, cu_seqlens, resets, reset_state, reverse, CHUNK, segment
    )  # fmt: skip
    codes = ops.allocate_codes(cell, inputs, given, packed, cu_seqlens, segment)
    factor, offset = (_as_states(t, call.parts) for t in call.compose(codes))
    if resets is not None:
        factor.masked_fill_(_has_reset(resets, cu_seqlens).unsqueeze(-1), 0)
    return factor, offset


def _has_reset(resets: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Whether each sequence has a reset, `[N]`."""
    if cu_seqlens is None:
        return resets.any(1)
    before = torch.nn.functional.pad(resets[0].cumsum(0), (1, 0))
    return before[cu_seqlens.clamp(0, resets.shape[1]).long()].diff() > 0


def _as_states(t: Tensor, parts: int) -> Tensor:
    """Rows of real numbers as states of as many parts."""
    return torch.view_as_complex(t.unflatten(-1, (-1, 2))) if parts == 2 else t


def backward(
    cell: ops.Cell, grad_h, grad_final, grad_checkpoints, inputs, given, packed, numbers, initial_state, cu_seqlens,
    resets, reset_state, reverse, chunk, segment, checkpoints, codes, wanted,
) -> list[Tensor]:  # fmt: skip
    _check(cell, inputs, given, packed, numbers, initial_state, cu_seqlens, resets, reset_state, chunk, segment)
    first = inputs[0]
    batch, time, channels = first.shape
    channels //= packed.bit_count() or 1
    sequences = ops.sequences_of(inputs, cu_seqlens)
    checks.like("grad_h", grad_h, first, (batch, time, channels), "[batch, time, channels]")
    sizes = (sequences, channels)
    if grad_final is None:
        grad_final = first.new_zeros(sizes, dtype=cell.state_dtype(first.dtype))
    checks.like("grad_final", grad_final, first, sizes, "[sequences, channels]", cell.complex_state)
    if checkpoints is None and codes is None:
        again = (
            inputs, given, packed, numbers, initial_state, cu_seqlens, resets, reset_state, reverse, chunk, segment
        )  # fmt: skip
        *_, checkpoints, codes = forward(cell, *again, True)
    if checkpoints is None or codes is None:
        raise ValueError("checkpoints, codes: expected both or neither")
    rows = ops.checkpoint_rows(first, chunk, segment), ops.code_rows(cell, inputs, given, cu_seqlens, segment)
    segment = backend.backward_segment(segment, *_sizes(inputs, packed, cu_seqlens)) if cell.composes else 0
    grad_h = grad_h.to(first.dtype)
    grad_h = real(grad_h if channels <= 1 or grad_h.stride(-1) == 1 else grad_h.contiguous())
    if grad_checkpoints is not None:
        _check_rows("grad_checkpoints", grad_checkpoints, (rows[0], channels), cell.state_dtype(first.dtype), first)
        grad_checkpoints = real(grad_checkpoints).contiguous()
    call = Call(
        cell, inputs, given, packed, numbers, initial_state, cu_seqlens, resets, reset_state, reverse, chunk, segment,
        grad_h=grad_h, grad_checkpoints=grad_checkpoints,
    )  # fmt: skip
    results = ops.allocate_backward(cell, inputs, initial_state, reset_state)
    written = [real(t) for t in results]
    to_initial = written[-1 if reset_state is None else -2] if initial_state is not None else None
    in_place = to_initial if to_initial is not None and to_initial.dtype == call.state else None
    grad_initial = call.rows(call.sequences) if in_place is None else in_place
    grads = _gradients(call, cell, written, given, packed, chunk)
    checkpoints, codes = _saved(call, checkpoints, codes, rows)
    states = call.rows(call.segments * (min(call.time, chunk) // tile("backward", call.reads)))
    grad_final = call.vector(grad_final)
    own = {
        "codes": codes,
        "grad_h": call.stream(grad_h),
        "grad_final": grad_final,
        "grads": tuple(map(call.stream, grads)),
        "grad_initial": grad_initial,
        "saved": Saved(call.arguments["initial"], codes, checkpoints, states),
    }
    if reset_state is not None:
        grad_reset = call.sums(chunk)
        own["resets"] = call.arguments["resets"]._replace(grads=grad_reset)
    call.scan("backward", own, "grad_final", "grad_initial", adjoint_of=grad_final)
    _add_up_chunks(grads, ops.places(cell, given, packed), written)
    if to_initial is not None and in_place is None:
        to_initial.copy_(grad_initial)
    if reset_state is not None:
        written[-1].copy_(call.total(grad_reset, chunk))
    return results


def _gradients(call: Call, cell: ops.Cell, written, given: int, packed: int, chunk: int) -> list[Tensor | None]:
    """Where the kernel writes the gradient of each input: `[B, T, D]`, or sums over chunks `[rows, D]`; else None."""
    gates = iter(ops.split_gates(written[0], packed.bit_count()) if packed else written[:1])
    grads: list[Tensor | None] = []
    for t, place in zip(call.arrays, ops.places(cell, given, packed), strict=False):
        if t is None or place is None:
            grads.append(None)
        elif t.dim() == 1:
            grads.append(call.sums(chunk))
        else:
            grads.append(next(gates) if place == 0 else written[place])
    return grads


def _add_up_chunks(grads: Sequence[Tensor | None], places: Sequence[int | None], written: Sequence[Tensor]) -> None:
    """Write the gradients of the per-channel inputs: of each, the sum of its rows, which are sums over chunks."""
    for t, place in zip(grads, places, strict=False):
        if t is not None and place is not None and t.dim() == 2:
            total = t.sum(0, dtype=torch.float64)  # in a fixed order
            written[place].copy_(total[::2] if written[place].shape < total.shape else total)


def _saved(call: Call, checkpoints: Tensor, codes: Tensor, rows: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The saved tensors as kernels take them. ValueError unless shape, dtype and device are this call's."""
    _check_rows("checkpoints", real(checkpoints), (rows[0], call.channels), call.state, call.first)
    _check_rows("codes", codes, (rows[1], call.channels // call.parts), torch.int32, call.first)
    return real(checkpoints).contiguous(), codes.contiguous()


def _check_rows(name: str, t: Tensor, expected: tuple[int, int], dtype: torch.dtype, first: Tensor) -> None:
    if t.shape != expected or t.dtype != dtype or t.device != first.device:
        came = f"{list(t.shape)}, {t.dtype} on {t.device}"
        raise ValueError(f"{name}: expected {list(expected)}, {dtype} on {first.device}, got {came}")
