"""The step that the bistable cells share: a gate writes a value, or the state is held."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .scan import scan
from .surrogate import select


def write_or_hold(
    z: Tensor,
    v: Tensor,
    nan: Tensor,
    initial_state: Tensor | None,
    epsilon: float | Tensor,
    *,
    reverse: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Scan `s_t = z_t (v_t + epsilon s_{t-1}) + (1 - z_t) s_{t-1}`.

    Args:
        z, v, nan: `[B, T, D]`: the gate, the value that is written, and where an input is NaN.
        initial_state: s_0 `[B, D]`, `[N, D]` with `cu_seqlens`; zeros if None.
        epsilon: share of the old state that a write keeps.
        reverse, cu_seqlens: as for `scan`.

    Returns:
        The states s `[B, T, D]` and the final state, in z's dtype.
    """
    epsilon = float(epsilon)
    if initial_state is None:
        sequences = z.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        initial_state = z.new_zeros(sequences, z.shape[2])
    z, v = z.masked_fill(nan, 1), v.masked_fill(nan, math.nan)  # is written, so that no hold hides it

    def step(s: Tensor, z: Tensor, v: Tensor) -> Tensor:
        if epsilon == 0:  # nothing is multiplied by 0, and no write undoes a NaN
            return select(z, torch.where(s.isnan(), s, v), s)
        return select(z, v + epsilon * s, s)

    return scan(step, (z, v), initial_state.to(z.dtype), reverse=reverse, cu_seqlens=cu_seqlens)
