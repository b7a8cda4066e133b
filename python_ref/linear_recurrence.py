"""The linear recurrence, real or complex."""

from __future__ import annotations

import torch
from torch import Tensor

from .scan import scan


def linear_recurrence(
    decay: Tensor,
    update: Tensor,
    initial_state: Tensor | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Scan the recurrence over time, one step after the other.

    ::

        s_t = a_t s_{t-1} + w_t

    Args:
        decay: a `[B, T, D]` or `[D]`.
        update: w `[B, T, D]`, real or complex; all that is complex is cast to `dtype`'s complex counterpart.
        initial_state: s_0 `[B, D]`, `[N, D]` with `cu_seqlens`; zeros if None.
        reverse: from the last step to the first.
        cu_seqlens: `[N + 1]` offsets of sequences packed along T, with B = 1.
        dtype: of the arithmetic and the results.

    Returns:
        s `[B, T, D]` and the final state `[B, D]` or `[N, D]`. Gradients come in the arguments' own dtypes.
    """
    if update.is_complex():
        dtype = dtype.to_complex()
    a, w = decay.to(dtype), update.to(dtype)
    if initial_state is None:
        sequences = w.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        initial_state = w.new_zeros(sequences, w.shape[2])
    streams = (a.expand_as(w), w)
    return scan(lambda s, a, w: a * s + w, streams, initial_state.to(dtype), reverse=reverse, cu_seqlens=cu_seqlens)
