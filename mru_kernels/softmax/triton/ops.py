"""The functions of `mru::softmax_recurrence.triton` and `mru::softmax_recurrence_backward.triton`."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ... import checks
from ...backends.triton.ops import KEYS
from ...backends.triton.tuning import ceil_div, multiprocessors_of
from ..layout import allocate, allocate_backward, border_rows, check, check_cut, sizes, split_gates, unit_channels
from .launch import Call, heads_of_program

_WHOLE = 9  # programs for each multiprocessor from which on time is not cut
_PROGRAMS = 16  # for each multiprocessor if it is
_LEAST = 256  # steps of a sequence that is worth cutting


_library = torch.library.Library("mru", "IMPL")


@cache
def register() -> None:
    """Register the kernels of both ops."""
    for key in KEYS:
        _library.impl("softmax_recurrence.triton", forward, key)
        _library.impl("softmax_recurrence_backward.triton", backward, key)


def segment(sequences: int, steps: int, heads: int, group: int, device: torch.device) -> int:
    """Steps of a segment, from sizes and the number of multiprocessors only; 0 if sequences are scanned whole.

    `steps` is the total of all sequences, and a head has `group` channels.
    """
    programs = sequences * ceil_div(heads, heads_of_program(group))
    multiprocessors = multiprocessors_of(device)
    if programs == 0 or programs >= _WHOLE * multiprocessors or steps < _LEAST * sequences:
        return 0
    return ceil_div(steps, sequences * (_PROGRAMS * multiprocessors // programs))


def _call(
    score, value, heads, decay, bonus, initial_state, cu_seqlens, reverse, chunk, steps, others=(), saved=False
) -> Call:  # fmt: skip
    if value is None:
        score, value = split_gates(unit_channels(score), heads)
    score, value = unit_channels(score), unit_channels(value)
    decay = unit_channels(decay) if decay is not None and decay.dim() == 3 else decay
    batch, time, heads = score.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if steps < 0:
        steps = segment(sequences, batch * time, heads, value.shape[2] // max(heads, 1), score.device)
    steps = ceil_div(steps, chunk) * chunk
    return Call(score, value, decay, bonus, initial_state, cu_seqlens, reverse, chunk, steps, others, saved)


def _check(score, value, heads, decay, bonus, initial_state, cu_seqlens, chunk, segment) -> None:
    check(score, value, heads, decay, bonus, initial_state, cu_seqlens)
    check_cut("triton", chunk, segment)


def forward(
    score: Tensor, value: Tensor | None, heads: int, decay: Tensor | None, bonus: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, reverse: bool, chunk: int, segment: int, save: bool,
) -> list[Tensor]:  # fmt: skip
    """y, the final state and, with `save`, the borders; see mru_kernels/softmax/layout.py.

    `segment` is the number of steps that one program scans: 0 scans sequences whole, and a negative one is chosen.
    """
    _check(score, value, heads, decay, bonus, initial_state, cu_seqlens, chunk, segment)
    results = allocate(score, value, heads, cu_seqlens, chunk, save)
    y, final_state = results[:2]
    if save and cu_seqlens is not None:
        results[2].zero_()  # there are rows between the sequences
    call = _call(
        score, value, heads, decay, bonus, initial_state, cu_seqlens, reverse, chunk, segment, (y,), save
    )  # fmt: skip
    call.forward(y, final_state, results[2] if save else call.nothing)
    return results


def backward(
    grad_y: Tensor, grad_final: Tensor, score: Tensor, value: Tensor | None, heads: int, decay: Tensor | None,
    bonus: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None, reverse: bool, chunk: int,
    segment: int, borders: Tensor,
) -> list[Tensor]:  # fmt: skip
    """The gradients of score, value, decay, bonus and initial_state: of those that are given. Gates have one gradient.

    `borders` are those of a forward pass with the same arguments; `segment` may be another.
    """
    _check(score, value, heads, decay, bonus, initial_state, cu_seqlens, chunk, segment)
    batch, time, _ = score.shape
    of_heads, channels = sizes(score, value, heads)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    columns, state = channels + 2 * of_heads, checks.state_dtype(score.dtype)
    checks.like("grad_y", grad_y, score, (batch, time, channels), "[batch, time, channels]")
    checks.like("grad_final", grad_final, score, (sequences, columns), "[sequences, channels + 2 heads]")
    expected = (batch, border_rows(time, chunk), columns)
    if borders.shape != expected or borders.dtype != state or borders.device != score.device:
        came = f"{list(borders.shape)}, {borders.dtype} on {borders.device}"
        raise ValueError(f"borders: expected {list(expected)}, {state} on {score.device}, got {came}")
    results = allocate_backward(score, value, decay, bonus, initial_state)
    rest = iter(results[1 if value is None else 2 :])
    grad_score, grad_value = split_gates(results[0], heads) if value is None else results[:2]
    of_decay = next(rest) if decay is not None else None
    of_bonus = next(rest) if bonus is not None else None
    grad_y = unit_channels(grad_y.to(score.dtype))
    others = (grad_y, grad_score, grad_value, *([of_decay] if of_decay is not None and of_decay.dim() == 3 else []))
    call = _call(score, value, heads, decay, bonus, initial_state, cu_seqlens, reverse, chunk, segment, others)
    sums = {t: call.sums() for t in (of_decay, of_bonus) if t is not None and t.dim() == 1}
    grad_initial = call.rows(call.sequences, 2)
    grads = {
        "grad_y": call.stream(grad_y),
        "grad_score": call.stream(grad_score),
        "grad_value": call.stream(grad_value),
        "grad_decay": call.stream(call.nothing if of_decay is None else sums.get(of_decay, of_decay)),
        "grad_bonus": call.nothing if of_bonus is None else sums[of_bonus],
        "borders": borders.contiguous(),
    }
    call.backward(grads, call.vector(grad_final), grad_initial)
    for t, rows in sums.items():
        t.copy_(rows.sum(0, dtype=torch.float64))  # in a fixed order
    if initial_state is not None:
        results[-1].copy_(grad_initial)
    return results
