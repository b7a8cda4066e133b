"""The backend "torch": the recurrence as a loop over time in plain torch, on any device, differentiated by autograd.

csrc/softmax/step.h states the step; this has the same order of operations. Tensors of a head are `[B, H, 1]`, those of
its channels `[B, H, G]`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.plain import read_offsets
from ..checks import state_dtype
from .layout import split_gates
from .state import empty_state, join_state, split_state


class _Past(NamedTuple):
    """The mean `[B, H, G]` and the weight e^(m + c) q `[B, H, 1]` of the steps so far."""

    mean: Tensor
    q: Tensor
    m: Tensor
    c: Tensor


def scan(
    score: Tensor,
    value: Tensor | None,
    heads: int,
    decay: Tensor | None,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """What the op `mru::softmax_recurrence` computes: y `[B, T, D]` and the final state `[N, D + 2 H]`."""
    score, value = split_gates(score, heads) if value is None else (score, value)
    dtype, heads = state_dtype(score.dtype), score.shape[-1]
    offsets = None if cu_seqlens is None else read_offsets(cu_seqlens, score.shape[1])
    if initial_state is None:
        sequences = score.shape[0] if offsets is None else len(offsets) - 1
        initial_state = empty_state(score, sequences, value.shape[-1], heads)
    s, v, state = score.to(dtype), value.to(dtype), initial_state.to(dtype)
    decay, bonus = (t if t is None else t.to(dtype) for t in (decay, bonus))
    if offsets is None:
        y, final = _loop(s, v, decay, bonus, state, reverse, chunk)
        return y.to(value.dtype), final
    parts = []
    for n, (start, stop) in enumerate(((0, 0), *pairwise(offsets)), -1):  # the first: there may be no sequence
        of_state = state[max(n, 0) : n + 1]
        decays = decay[:, start:stop] if decay is not None and decay.dim() == 3 else decay
        parts.append(_loop(s[:, start:stop], v[:, start:stop], decays, bonus, of_state, reverse, chunk))
    ys, finals = zip(*parts, strict=True)
    return torch.cat(ys, 1).to(value.dtype), torch.cat(finals)


def _loop(score, value, decay, bonus, state: Tensor, reverse: bool, chunk: int) -> tuple[Tensor, Tensor]:
    """Return y `[B, T, D]` and the final state of sequences that all have T steps."""
    heads, time = score.shape[-1], score.shape[1]
    if time == 0 or heads == 0:
        mean, high, low = split_state(state, heads)
        return value + score.sum() * 0, join_state(mean, high + (low - low.detach()), low.detach())
    past, outputs = _open(state, heads), []
    bonus = None if bonus is None else bonus.unsqueeze(-1)
    for position in range(time):
        if position and position % chunk == 0:
            past = _open(_close(past), heads)
        t = time - 1 - position if reverse else position
        s, v = score[:, t].unsqueeze(-1), value[:, t].unflatten(-1, (heads, -1))
        decays = None if decay is None else (decay if decay.dim() == 1 else decay[:, t]).unsqueeze(-1)
        y, past = _step(s, v, decays, bonus, past)
        outputs.append(y.flatten(1))
    return torch.stack(outputs[::-1] if reverse else outputs, 1), _close(past)


def _step(s: Tensor, v: Tensor, decay: Tensor | None, bonus: Tensor | None, past: _Past) -> tuple[Tensor, _Past]:
    m, c = past.m, past.c
    if decay is not None:
        low = decay + c
        m = past.m + low
        c = torch.where(m.isinf(), 0.0, low - (m - past.m))
    gap = _distance(s, m, c)
    newer = gap > 0
    k, q = _share(gap, past.q)
    after = _Past(_mix(k, newer, past.mean, v), q, torch.where(newer, s, m), torch.where(newer, 0.0, c))
    if bonus is None:
        return after.mean, after
    gap = _distance(s, past.m, past.c) + bonus
    k, _ = _share(gap, past.q)
    return _mix(k, gap > 0, past.mean, v), after


def _distance(s: Tensor, high: Tensor, low: Tensor) -> Tensor:
    return torch.where(s == -torch.inf, s.detach(), (s - high) - low)


def _share(gap: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """The smaller part of the whole, negative if it is the past's; and the whole weight, the larger of both being 1."""
    e, newer = (-gap.abs()).exp(), gap > 0
    past = torch.where(newer, e, 1.0) * q
    own = torch.where(newer, 1.0, e)
    total = past + own
    r = torch.where(total == 0, 0.0, 1 / torch.where(total == 0, 1.0, total))
    return torch.where(newer, -(past * r), own * r), total


def _mix(k: Tensor, newer: Tensor, mean: Tensor, v: Tensor) -> Tensor:
    return torch.where(newer, v, mean) + k * (v - mean)


def _open(state: Tensor, heads: int) -> _Past:
    mean, high, low = split_state(state, heads)
    empty = high == -torch.inf
    high = torch.where(empty, high.detach(), high)
    q = torch.where(empty, 0.0, torch.ones_like(high))
    mean = mean.unflatten(-1, (heads, -1))
    mean = torch.where(empty.unsqueeze(-1), mean.detach(), mean)
    return _Past(mean, *(t.unsqueeze(-1) for t in (q, high, low)))


def _close(past: _Past) -> Tensor:
    q = torch.where(past.q == 0, 1.0, past.q).log()
    w = past.c + torch.where(past.q == 0, -torch.inf, q)
    high = past.m + w
    low = w - (high - past.m)
    low = torch.where(low.isfinite(), low, 0.0)
    return join_state(past.mean.flatten(1), high.squeeze(-1), low.squeeze(-1))
