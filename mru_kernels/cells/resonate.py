"""The resonate-and-fire neuron without a reset: the scan of PRF (arXiv 2410.03530)."""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends, checks, ops
from ..scalars import SURROGATE_SCALE, Scalar
from . import spikes
from .call import call, step
from .spikes import SURROGATES


class Mode(NamedTuple):
    """How a call works. The kernels get its number, the index in the list of all modes."""

    tie: bool
    surrogate: str
    membrane: bool  # h is the membrane


_FLAG = (False, True)
_MODES = [Mode(tie, surrogate, membrane) for membrane, surrogate, tie in product(_FLAG, SURROGATES, _FLAG)]
_NUMBERS = {mode: float(number) for number, mode in enumerate(_MODES)}


def mode_of(number: float) -> Mode:
    return _MODES[int(number)]


def _gates(x, p):
    input, decay, gain, threshold = x
    # A NaN threshold makes the state NaN.
    return torch.where(threshold.isnan(), threshold, decay), gain.real * input.real


def _step(gates, u, p):
    decay, update = gates
    rotated = decay * u
    # Real and imaginary part apart: torch's complex sum makes one part NaN if the other is infinite.
    return torch.complex(rotated.real + update, rotated.imag)


def _output(x, u, p):
    mode = mode_of(p[0])
    return u.real if mode.membrane else spikes.emitted(u.real, x[3].real, mode.tie, mode.surrogate, p[1])


CELL = ops.add_cell(
    ops.Cell(
        name="resonate",
        inputs=(
            ops.Input("input"),
            ops.Input("decay", "channel", complex=True),
            ops.Input("gain", "channel"),
            ops.Input("threshold", "channel"),
        ),
        scalars=(Scalar("mode", 0.0, len(_MODES) - 1.0), SURROGATE_SCALE),
        complex_state=True,
        plain=ops.Plain(_step, _gates, _output),
    )
)


def number_of(tie: bool = True, surrogate: str = "atan", membrane: bool | str = False, **_: Any) -> float:
    """The number of the mode of a call, from its arguments. The error for a wrong argument names it."""
    checks.flag("tie", tie)
    try:
        return _NUMBERS[Mode(tie, surrogate, membrane == "only")]
    except (KeyError, TypeError):
        spikes.check_surrogate(surrogate)
        raise


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
    membrane: bool | str = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: Tensor | None = None,
    chunk_size: int | None = backends.CHUNK,
    return_boundaries: bool = False,
    backend: str | None = None,
) -> tuple[Any, ...]:
    """Scan resonate-and-fire neurons over time. Their state is complex, and a spike does not reset it.

    ::

        u_t = decay u_{t-1} + gain input_t
        spike_t = H(Re u_t - threshold)

    H is the unit step, with a surrogate derivative in the backward pass. A NaN membrane Re u_t stays NaN, and so do its
    spikes. A NaN threshold makes its channel NaN.

    Args:
        input: `[B, T, D]`; float32, float64, bfloat16 or float16. Strides over B and T may be any.
        decay: `[D]`, complex64, or complex128 for float64 streams. A state decays where its modulus is below 1.
        gain, threshold: `[D]`, in the input's dtype or float32.
        initial_state: `[B, D]` (`[N, D]` with `cu_seqlens`), the state before the first step scanned, in the dtype of
            `decay`; zeros if None.
        tie: whether a neuron at its threshold fires.
        surrogate: the derivative of H, by name: "atan", "fast_sigmoid", "sigmoid", "triangle" or "straight_through";
            see `lif`.
        surrogate_scale: k > 0 of the surrogate derivative.
        membrane: whether to return the membranes Re u_t too. Then the scan runs twice, once for each output. With
            "only" the output is the membranes instead of the spikes, at the cost of one scan.
        reverse: scan from the last step to the first.
        cu_seqlens: int32 or int64 `[N + 1]`, offsets of N sequences packed along T of streams with B = 1.
        resets: bool `[B, T]` (`[1, total]` with `cu_seqlens`), true where a new episode begins: before that step, in
            scan order, the state becomes `reset_state`.
        reset_state: `[D]`, `[B, D]` or, with `cu_seqlens`, `[N, D]`, in the dtype of `decay`; zeros if None.
        chunk_size: the largest number of steps between two checkpoints, as for `linear_recurrence`.
        return_boundaries: whether to return the state after every `chunk_size` steps too.
        backend: None chooses; a name (see `available_backends`) runs or raises.

    Returns:
        The spikes `[B, T, D]`, 0 or 1 in the input's dtype, and the final state `[B, D]` (`[N, D]`) in the dtype of
        `decay`. With `membrane=True` the first is `(spikes, membranes)`, both `[B, T, D]` in the input's dtype, with
        gradients. Layouts are those of `bmru`. With `return_boundaries` a third result, as for `linear_recurrence`.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        RuntimeError: the backend cannot run this call.

    Example::

        >>> decay = torch.polar(torch.full((64,), 0.99), torch.linspace(0.0, 1.0, 64))
        >>> spikes, state = mk.resonate(torch.randn(8, 100, 64), decay, torch.full((64,), 0.1), torch.ones(64))
        >>> spikes.shape, state.shape, state.dtype
        (torch.Size([8, 100, 64]), torch.Size([8, 64]), torch.complex64)
    """

    def scan(membranes: bool) -> tuple[Tensor, ...]:
        number = number_of(tie, surrogate, "only" if membranes else False)
        return call(
            CELL, (input, decay, gain, threshold), (number, surrogate_scale), initial_state, reverse=reverse,
            cu_seqlens=cu_seqlens, resets=resets, reset_state=reset_state, chunk_size=chunk_size,
            return_boundaries=return_boundaries, backend=backend,
        )  # fmt: skip

    return spikes.outputs(scan, membrane)


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
    return step(CELL, (input, decay, gain, threshold), (number_of(tie), 1.0), state, state_indices)
