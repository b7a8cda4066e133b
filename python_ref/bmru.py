"""The bistable memory recurrent unit and its cumulative form (arXiv 2601.09495, arXiv 2605.11855)."""

from __future__ import annotations

import torch
from torch import Tensor

from .surrogate import sgn, unit_step
from .write_or_hold import write_or_hold


def bmru(
    candidate: Tensor,
    threshold: Tensor,
    initial_state: Tensor | None = None,
    *,
    epsilon: float | Tensor = 0.0,
    alpha: Tensor | None = None,
    amplitude: Tensor | None = None,
    surrogate_scale: float = 1.0,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Scan the unit over time, one step after the other.

    ::

        z_t = H(|c_t| - |b_t|)
        v_t = m_t sgn(c_t)
        s_t = z_t (v_t + epsilon s_{t-1}) + (1 - z_t) s_{t-1}
        h_t = alpha s_t

    Args:
        candidate: c `[B, T, D]`, any floating dtype; it is cast to `dtype`, and so is all that follows.
        threshold: b `[B, T, D]` or `[D]`.
        initial_state: s_0 `[B, D]`, `[N, D]` with `cu_seqlens`; zeros if None.
        epsilon: 0 is bistable, 1 cumulative.
        alpha: `[D]`; 1 if None.
        amplitude: m `[B, T, D]`; 1 if None.
        surrogate_scale: k of the surrogate derivatives.
        reverse: from the last step to the first.
        cu_seqlens: `[N + 1]` offsets of sequences packed along T, with B = 1.
        dtype: of the arithmetic and the results.

    Returns:
        h `[B, T, D]` and the final state `[B, D]` or `[N, D]`. Gradients come in the arguments' own dtypes.
    """
    k = surrogate_scale
    c, b = candidate.to(dtype), threshold.to(dtype)
    m = c.new_ones(()) if amplitude is None else amplitude.to(dtype)
    scale = c.new_ones(()) if alpha is None else alpha.to(dtype)

    z = unit_step(c.abs(), b.abs(), k)  # a tie writes
    v = m * sgn(c, k)  # 0.0 and -0.0 write +1
    nan = c.isnan() | b.isnan() | m.isnan() | scale.isnan()  # in a stream or in a per-channel parameter
    s, final_state = write_or_hold(z, v, nan, initial_state, epsilon, reverse=reverse, cu_seqlens=cu_seqlens)
    return scale * s, final_state
