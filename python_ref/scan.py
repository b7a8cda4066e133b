"""The time loop that every cell's step plugs into, and what brings any call to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

Tensors = list[Tensor]


def scan(step: Callable[..., Tensor], streams: Sequence[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    """Run `state = step(state, *(x[:, t] for x in streams))` over time.

    Args:
        step: takes the state `[B, D]` and each stream's row `[B, D]`, returns the next state `[B, D]`.
        streams: each `[B, T, D]`.
        state: `[B, D]`, the state before the first step.

    Returns:
        The states `[B, T, D]`, and the state after the last step, which is the initial state where there is no step.
    """
    states = []
    for row in zip(*(x.unbind(1) for x in streams), strict=True):
        state = step(state, *row)
        states.append(state)
    # Without a step the result still depends on the streams: their gradients are zeros, not missing.
    return torch.stack(states, 1) if states else sum(x[:, :0] for x in streams), state


def positions(time: int, reverse: bool, cu_seqlens: Tensor | None, every: int) -> list[tuple[int, int]]:
    """Where the states after every `every` steps of a sequence are.

    Returns:
        (row, t) for each such state: its row among the boundaries `[B, floor((time - 1) / every), D]`, and its time.
    """
    bounds = [0, time] if cu_seqlens is None else cu_seqlens.tolist()
    found = []
    for start, stop in pairwise(bounds):
        first = time - stop if reverse else start
        for k in range(1, (stop - start - 1) // every + 1):
            found.append((first // every + k - 1, stop - k * every if reverse else start + k * every - 1))
    return found


def boundaries_of(s: Tensor, reverse: bool, cu_seqlens: Tensor | None, every: int) -> Tensor:
    """The states `[B, floor((T - 1) / every), D]` after every `every` steps of a sequence, from all states."""
    time = s.shape[1]
    rows = [torch.zeros_like(s[:, 0]) for _ in range(max(time - 1, 0) // every)]
    for row, t in positions(time, reverse, cu_seqlens, every):
        rows[row] = s[:, t]
    return torch.stack(rows, 1) if rows else s[:, :0]


def reset_mask_and_state(
    resets: Tensor | None, reset_state: Tensor | None, like: Tensor, shape: torch.Size
) -> tuple[Tensor, Tensor]:
    """The mask of resets `[B, T, 1]`, and the state after one, in the dtype of the states `like [N, D]`."""
    mask = torch.zeros(shape[:2], dtype=torch.bool, device=like.device) if resets is None else resets
    state = torch.zeros_like(like) if reset_state is None else reset_state.to(like.dtype).expand_as(like)
    return mask.unsqueeze(-1), state


def over_sequences(
    one: Callable[[Tensors, Tensors], tuple[Tensors, Tensors]],
    streams: Tensors,
    states: Tensors,
    reverse: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensors, Tensors]:
    """Apply `one` to each sequence in scan order.

    Args:
        one: takes streams `[B, T, D]` and states `[B, D]` in scan order, returns streams and states.
        streams: each `[B, T, D]`; with `cu_seqlens` `[1, total, D]`.
        states: each `[B, D]`; with `cu_seqlens` `[N, D]`.
        reverse: from the last step to the first.
        cu_seqlens: `[N + 1]` offsets of packed sequences. Empty ones are allowed.

    Returns:
        The streams, in the order of time, and the states that `one` returns, of all sequences.
    """
    if cu_seqlens is None:
        if not reverse:
            return one(streams, states)
        stream_results, state_results = one([x.flip(1) for x in streams], states)
        return [x.flip(1) for x in stream_results], state_results
    empty = [x[:, :0] for x in streams], [torch.cat([x[:0], x.new_zeros(1, x.shape[1])]) for x in states]
    parts = [one(*empty)]  # something to join where there is no sequence
    for n, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        sequence = [x[:, start:stop] for x in streams], [x[n : n + 1] for x in states]
        parts.append(over_sequences(one, *sequence, reverse, None))
    stream_parts, state_parts = zip(*parts, strict=True)
    return (
        [torch.cat(x, 1) for x in zip(*stream_parts, strict=True)],
        [torch.cat(x, 0)[1:] for x in zip(*state_parts, strict=True)],
    )
