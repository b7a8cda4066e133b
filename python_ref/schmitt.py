"""The first-quadrant bistable memory recurrent unit, a Schmitt trigger (arXiv 2605.15216)."""

from __future__ import annotations

import torch
from torch import Tensor

from .surrogate import unit_step
from .write_or_hold import write_or_hold


def schmitt(
    candidate: Tensor,
    low: Tensor,
    high: Tensor,
    initial_state: Tensor | None = None,
    *,
    epsilon: float | Tensor = 0.0,
    alpha: Tensor | None = None,
    surrogate_scale: float = 1.0,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Scan the unit over time, one step after the other.

    ::

        L_t = H(c_t - low)
        U_t = H(c_t - high)
        hold_t = L_t (1 - U_t)
        s_t = hold_t s_{t-1} + (1 - hold_t) (U_t + epsilon s_{t-1})
        h_t = alpha s_t

    Args:
        candidate: c `[B, T, D]`, any floating dtype; it is cast to `dtype`, and so is all that follows.
        low, high: `[D]`.
        initial_state: s_0 `[B, D]`, `[N, D]` with `cu_seqlens`; zeros if None.
        epsilon: share of the old state that a write keeps.
        alpha: `[D]`; 1 if None.
        surrogate_scale: k of the surrogate derivative.
        reverse: from the last step to the first.
        cu_seqlens: `[N + 1]` offsets of sequences packed along T, with B = 1.
        dtype: of the arithmetic and the results.

    Returns:
        h `[B, T, D]` and the final state `[B, D]` or `[N, D]`. Gradients come in the arguments' own dtypes.
    """
    c, low, high = candidate.to(dtype), low.to(dtype), high.to(dtype)
    scale = c.new_ones(()) if alpha is None else alpha.to(dtype)

    L = unit_step(c, low, surrogate_scale)  # noqa: N806 as in the equations
    U = unit_step(c, high, surrogate_scale)  # noqa: N806
    hold = L * (1 - U)
    nan = c.isnan() | low.isnan() | high.isnan() | scale.isnan()  # in a stream or in a per-channel parameter
    s, final_state = write_or_hold(1 - hold, U, nan, initial_state, epsilon, reverse=reverse, cu_seqlens=cu_seqlens)
    return scale * s, final_state
