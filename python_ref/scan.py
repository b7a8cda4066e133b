"""The time loop that every cell's step plugs into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor


def scan(
    step: Callable[..., Tensor],
    streams: Sequence[Tensor],
    initial_state: Tensor,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run `state = step(state, *(x[:, t] for x in streams))` over time.

    Args:
        step: takes the state `[B, D]` and each stream's row `[B, D]`, returns the next state `[B, D]`.
        streams: each `[B, T, D]`; with `cu_seqlens` `[1, total, D]`.
        initial_state: `[B, D]`; with `cu_seqlens` `[N, D]`.
        reverse: from the last step to the first; `initial_state` is then the state after the last step.
        cu_seqlens: `[N + 1]` offsets of packed sequences, each scanned on its own. Empty ones are allowed.

    Returns:
        The states `[B, T, D]`, in the order of time, and the state after the last step scanned, which is the
        initial state where there is no step.
    """
    no_steps = sum(x[:, :0] for x in streams)  # depends on them: their gradients are zeros, not missing
    if cu_seqlens is not None:
        sequences = [
            scan(step, [x[:, start:stop] for x in streams], initial_state[n : n + 1], reverse=reverse)
            for n, (start, stop) in enumerate(pairwise(cu_seqlens.tolist()))
        ]
        return (
            torch.cat([no_steps, *(states for states, _ in sequences)], 1),
            torch.cat([initial_state[:0], *(final for _, final in sequences)], 0),
        )

    rows = list(zip(*(x.unbind(1) for x in streams), strict=True))
    state, states = initial_state, []
    for row in reversed(rows) if reverse else rows:
        state = step(state, *row)
        states.append(state)
    return torch.stack(states[::-1] if reverse else states, 1) if states else no_steps, state
