"""The resonate-and-fire neuron without a reset: the scan of PRF (arXiv 2410.03530)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import backends, checks
from .linear_recurrence import linear_recurrence, linear_recurrence_step

SURROGATES = ("atan",)


def resonate(
    input: Tensor,
    decay: Tensor,
    gain: Tensor,
    threshold: Tensor,
    initial_state: Tensor | None = None,
    *,
    tie: bool = True,
    surrogate: str = "atan",
    surrogate_scale: float = 1.0,
    membrane: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: Tensor | None = None,
    chunk_size: int | None = backends.CHUNK,
    return_boundaries: bool = False,
    backend: str | None = None,
) -> tuple[Any, ...]:
    """Scan resonate-and-fire neurons, whose state is complex and is never reset by a spike, over time.

    ::

        u_t = decay u_{t-1} + gain input_t
        spike_t = H(Re u_t - threshold)

    H is the unit step, with a surrogate derivative in the backward pass. Where the membrane Re u_t - threshold is NaN,
    so is the spike.

    Args:
        input: `[B, T, D]`; float32, float64, bfloat16 or float16. Strides over B and T may be any.
        decay: `[D]`, complex64, or complex128 for float64 streams. A state decays where its modulus is below 1.
        gain, threshold: `[D]`, in the input's dtype or float32.
        initial_state: `[B, D]` (`[N, D]` with `cu_seqlens`), the state before the first step scanned, in the dtype of
            `decay`; zeros if None.
        tie: whether a neuron at its threshold fires.
        surrogate: the derivative of H at v: "atan", k / (1 + (pi k v)^2).
        surrogate_scale: k > 0 of the derivative.
        membrane: whether to return the membranes Re u_t too.
        reverse: scan from the last step to the first.
        cu_seqlens: int32 or int64 `[N + 1]`, offsets of N sequences packed along T of streams with B = 1.
        resets: bool `[B, T]` (`[1, total]` with `cu_seqlens`), true where a new episode begins: before that step, in
            scan order, the state becomes `reset_state`.
        reset_state: `[D]`, `[B, D]` or, with `cu_seqlens`, `[N, D]`, in the dtype of `decay`; zeros if None.
        chunk_size: steps between two checkpoints, as for `linear_recurrence`.
        return_boundaries: whether to return the state after every `chunk_size` steps too.
        backend: None chooses; a name (see `available_backends`) runs or raises.

    Returns:
        The spikes `[B, T, D]`, 0 or 1 in the input's dtype, and the final state `[B, D]` (`[N, D]`) in the dtype of
        `decay`. With `membrane` the first result is a pair, spikes and membranes, both with gradients. Under autocast
        streams are cast to the autocast dtype. With `return_boundaries` a third result, as for `linear_recurrence`.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        RuntimeError: the backend cannot run this call.

    Example::

        >>> decay = torch.polar(torch.full((64,), 0.99), torch.linspace(0.0, 1.0, 64))
        >>> spikes, state = mk.resonate(torch.randn(8, 100, 64), decay, torch.full((64,), 0.1), torch.ones(64))
        >>> spikes.shape, state.shape, state.dtype
        (torch.Size([8, 100, 64]), torch.Size([8, 64]), torch.complex64)
    """
    number = _mode(tie, surrogate, checks.flag("membrane", membrane))
    if membrane and isinstance(input, Tensor) and input.dtype in checks.STREAM_DTYPES:
        # Spikes are decided before a membrane is rounded to half precision.
        dtype = checks.autocast_dtype(input.device) if input.dtype != torch.float64 else None
        dtype, input = dtype or input.dtype, input.to(checks.state_dtype(input.dtype))
    with torch.autocast(...):
        pass
def resonate_step(
    input: Tensor,
    decay: Tensor,
    gain: Tensor,
    threshold: Tensor,
    state: Tensor,
    *,
    tie: bool = True,
    state_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of `resonate`, for streaming inference.

    Args:
        input: `[B, D]`.
        decay, gain, threshold: `[D]`, as for `resonate`.
        state: complex `[B, D]`, the state before the step; with `state_indices` slots `[slots, D]`, as for `bmru_step`.
        tie: as for `resonate`.
        state_indices: int32 or int64 `[B]`, the slot of each sequence, or -1; see `bmru_step`.

    Returns:
        The spikes `[B, D]` and the state after the step `[B, D]`, equal to `resonate` with T = 1; with `state_indices`
        the second is `state`, updated in place.

    Raises:
        TypeError, ValueError, RuntimeError: as `resonate` and `bmru_step`.

    Example::

        >>> decay, ones = torch.full((64,), 0.9 + 0.1j), torch.ones(64)
        >>> spikes, state = mk.resonate_step(torch.randn(8, 64), decay, ones, ones, torch.zeros(8, 64) + 0j)
        >>> spikes.shape
        torch.Size([8, 64])
    """
    checks.flag("tie", tie)
    first, update = _update(input, decay, gain, threshold, 2)
    _check_dtype("state", state, update.dtype)
    u, after = linear_recurrence_step(decay, update, state, state_indices=state_indices)
    fired = spikes(u.real - threshold.to(u.real.dtype), tie).to(first)
    if state_indices is not None:  # u of a skipped sequence is 0
        fired = fired.masked_fill((state_indices < 0).unsqueeze(1), 0)
    return fired, after


def spikes(v: Tensor, tie: bool = True, scale: float = 1.0) -> Tensor:
    """H(v), NaN where v is NaN, with the derivative scale / (1 + (pi scale v)^2)."""
    fired = torch.where(v.isnan(), v.detach(), ((v >= 0) if tie else (v > 0)).to(v.dtype))
    # A function with that derivative, less its value. torch.compile traces no autograd.Function with a `jvp`.
    smooth = (math.pi * scale * v).atan() / math.pi
    return fired + (smooth - smooth.detach())


def _update(input: Tensor, decay: Tensor, gain: Tensor, threshold: Tensor, rank: int) -> tuple[torch.dtype, Tensor]:
    """The dtype of the streams, and the complex update of the recurrence."""
    checks.tensor("input", input, rank, "[batch, time, channels]" if rank == 3 else "[batch, channels]")
    dtype = input.dtype
    if dtype not in checks.STREAM_DTYPES:
        raise TypeError(f"input: expected a floating dtype, got {dtype}")
    if dtype != torch.float64:
        dtype = checks.autocast_dtype(input.device) or dtype
    real = checks.state_dtype(dtype)
    for name, value in (("gain", gain), ("threshold", threshold), ("decay", decay)):
        checks.tensor(name, value, 1, "[channels]")
        if value.shape[0] != input.shape[-1]:
            raise ValueError(f"{name}: expected shape [{input.shape[-1]}] [channels], got {list(value.shape)}")
        if value.device != input.device:
            raise ValueError(f"{name}: expected the input's device {input.device}, got {value.device}")
        if name == "decay":
            _check_dtype(name, value, checks.complex_dtype(real))
        elif value.dtype not in (input.dtype, real, torch.float32):
            raise TypeError(f"{name}: expected dtype {input.dtype} or {real}, got {value.dtype}")
    return dtype, (gain.to(real) * input.to(dtype).to(real)).to(checks.complex_dtype(real))


def _check_dtype(name: str, value: Tensor | None, dtype: torch.dtype) -> None:
    if isinstance(value, Tensor) and value.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {value.dtype}")


def _check_surrogate(surrogate: str, scale: float) -> None:
    if surrogate not in SURROGATES:
        raise ValueError(f"surrogate: expected one of {', '.join(SURROGATES)}, got {surrogate!r}")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"surrogate_scale: expected a float, got {type(scale).__name__}")
    if not 0.0 < scale < math.inf:
        raise ValueError(f"surrogate_scale: expected a positive finite number, got {scale}")
