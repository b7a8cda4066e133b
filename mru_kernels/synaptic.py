"""Spiking neurons with a synaptic current, made of two calls of `lif`."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from . import backends, checks
from .cells.lif import lif, lif_step


def synaptic(
    input: Tensor,
    alpha: Tensor,
    beta: Tensor,
    threshold: Tensor,
    initial_state: tuple[Tensor | None, Tensor | None] | None = None,
    *,
    reset: str = "subtract",
    tie: bool = False,
    surrogate: str = "atan",
    surrogate_scale: float = 1.0,
    detach_reset: bool = True,
    membrane: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: tuple[Tensor | None, Tensor | None] | None = None,
    chunk_size: int | None = backends.CHUNK,
    backend: str | None = None,
) -> tuple[Any, tuple[Tensor, Tensor]]:
    """Scan leaky integrate-and-fire neurons with a synaptic current over time.

    ::

        Y_t = alpha Y_{t-1} + input_t                               the current
        U_t = beta U_{t-1} + Y_t - threshold S_{t-1}                the membrane, with reset="subtract"
        S_t = H(U_t - threshold)                                    the spikes

    A reset acts on the membrane only. The membrane is that of `lif` with the input Y, so `lif` describes the resets,
    the surrogates, the tie and the derivatives. The reset "zero" of `snntorch.Synaptic` is "zero_input" here. Spikes,
    currents and membranes are those of `snntorch.Synaptic` bit for bit in float32 and float64.

    With half precision Y is in float32 between the two scans.

    Args:
        input: `[B, T, D]`; float32, float64, bfloat16 or float16.
        alpha, beta, threshold: `[D]`, in the input's dtype or float32.
        initial_state: the current and the membrane before the first step scanned, a pair of `[B, D]` (`[N, D]` with
            `cu_seqlens`) in the input's or the state dtype, or None for zeros.
        reset_state: with `resets`, the pair of states at a reset, each `[D]`, `[B, D]` or None for zeros.
        membrane: whether to return the currents and the membranes of every step too.
        reset, tie, surrogate, surrogate_scale, detach_reset, reverse, cu_seqlens, resets, chunk_size, backend: as
            for `lif`.

    Returns:
        The spikes `[B, T, D]`, or with `membrane` the triple of spikes, currents and membranes, all in the input's
        dtype. Then the final state, the pair of current and membrane `[B, D]` (`[N, D]`) in the state dtype.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        RuntimeError: the backend cannot run this call.

    Example::

        >>> alpha, beta, threshold = torch.full((64,), 0.8), torch.full((64,), 0.9), torch.ones(64)
        >>> spikes, (current, membrane) = mk.synaptic(torch.randn(8, 100, 64), alpha, beta, threshold)
        >>> spikes.shape, current.shape, membrane.shape
        (torch.Size([8, 100, 64]), torch.Size([8, 64]), torch.Size([8, 64]))
    """
    checks.streams({"input": input}, checks.STREAM_DTYPES)
    checks.like("alpha", alpha, input, (input.shape[2],), "[channels]")
    first = _pair("initial_state", (None, None) if initial_state is None else initial_state)
    start = _pair("reset_state", (None, None) if reset_state is None else reset_state)
    half = checks.autocast_dtype(input.device) if input.dtype != torch.float64 else None
    dtype = half or input.dtype
    scan: dict[str, Any] = {
        "reverse": reverse, "cu_seqlens": cu_seqlens, "resets": resets, "chunk_size": chunk_size, "backend": backend
    }  # fmt: skip
    with torch.autocast(input.device.type, enabled=False) if half else nullcontext():
        currents, current = leaky(input, alpha, first[0], reset_state=start[0], **scan)
        fired, voltage = lif(
            currents, _wide(beta), _wide(threshold), first[1], reset_state=start[1], reset=reset, tie=tie,
            surrogate=surrogate, surrogate_scale=surrogate_scale, detach_reset=detach_reset, membrane=membrane, **scan,
        )  # fmt: skip
    state = (current, voltage)
    if not membrane:
        return fired.to(dtype), state
    spikes, membranes = fired
    return (spikes.to(dtype), currents.to(dtype), membranes.to(dtype)), state


def synaptic_step(
    input: Tensor,
    alpha: Tensor,
    beta: Tensor,
    threshold: Tensor,
    state: tuple[Tensor, Tensor],
    *,
    reset: str = "subtract",
    tie: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One step of `synaptic`, for streaming inference.

    Args:
        input: `[B, D]`.
        alpha, beta, threshold: `[D]`.
        state: the current and the membrane before the step, a pair of `[B, D]`.
        reset, tie: as for `synaptic`.

    Returns:
        The spikes `[B, D]` and the state after the step, equal to `synaptic` with T = 1.

    Raises:
        TypeError, ValueError, RuntimeError: as `synaptic` and `lif_step`.

    Example::

        >>> vectors = torch.full((64,), 0.8), torch.full((64,), 0.9), torch.ones(64)
        >>> state = torch.zeros(8, 64), torch.zeros(8, 64)
        >>> spikes, state = mk.synaptic_step(torch.randn(8, 64), *vectors, state)
        >>> spikes.shape
        torch.Size([8, 64])
    """
    checks.tensor("input", input, 2, "[batch, channels]")
    checks.like("alpha", alpha, input, (input.shape[1],), "[channels]")
    current, voltage = _pair("state", state)
    vectors = _wide(alpha), _wide(beta), _wide(threshold)
    _, current = lif_step(_wide(input), vectors[0], vectors[2], current, reset="none")
    spikes, voltage = lif_step(current, *vectors[1:], voltage, reset=reset, tie=tie)
    return spikes.to(input.dtype), (current, voltage)


def leaky(input: Tensor, decay: Tensor, initial_state: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """The states `[B, T, D]` of a leaky integrator and the last one, with the rounding of a loop over time.

    `linear_recurrence` may scan parts of time in parallel, which rounds differently. Both results have the state dtype.
    """
    decay = _wide(decay)
    unused = decay.detach()  # the threshold
    return lif(_wide(input), decay, unused, _wide(initial_state), reset="none", membrane="only", **options)


def _wide(value: Any) -> Any:
    """A tensor in the dtype of the states; other values unchanged, for `lif` to refuse."""
    return value.float() if isinstance(value, Tensor) and value.dtype in checks.HALF_DTYPES else value


def _pair(name: str, value: Any) -> tuple[Any, Any]:
    """A current and a membrane, in the dtype of the states."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        came = f"{len(value)} values" if isinstance(value, (tuple, list)) else type(value).__name__
        raise TypeError(f"{name}: expected a pair of current and membrane, got {came}")
    return _wide(value[0]), _wide(value[1])
