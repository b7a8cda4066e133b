"""Leaky integrate-and-fire neurons with five resets and five surrogate derivatives; see csrc/cells/lif.h."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends, checks, ops
from ..scalars import SURROGATE_SCALE, Scalar
from . import spikes
from .call import call, step
from .spikes import SURROGATES
from .write_or_hold import select

#: What a spike does to the membrane; the index of a name is its code in the kernels.
RESETS = ("none", "subtract", "subtract_decayed", "zero", "zero_input")


class Mode(NamedTuple):
    """How a call works. The kernels get its number, the index in the list of all modes."""

    reset: str
    tie: bool
    surrogate: str
    detach_reset: bool
    membrane: bool  # h is the membrane


_FLAG = (False, True)
_MODES = [Mode(r, t, s, d, m) for m, d, s, t, r in product(_FLAG, _FLAG, SURROGATES, _FLAG, RESETS)]
_NUMBERS: dict[tuple, float] = {mode: float(number) for number, mode in enumerate(_MODES)}
_MODE = Scalar("mode", 0.0, len(_MODES) - 1.0)


def mode_of(number: float) -> Mode:
    return _MODES[int(number)]


def _gates(x: Sequence[Any], p: Sequence[Any]) -> Sequence[Tensor]:
    input, beta, threshold = x
    # A NaN beta or threshold makes the membrane NaN, and no reset hides it.
    return input, torch.where(threshold.isnan(), threshold, beta), torch.where(beta.isnan(), beta, threshold)


def _step(gates: Sequence[Tensor], U: Tensor, p: Sequence[Any]) -> Tensor:  # noqa: N803
    input, beta, threshold = gates
    mode = mode_of(p[0])
    zero = torch.zeros_like(U)
    fired = spikes.fires(U, threshold, mode.tie)
    if mode.detach_reset:

        def where_fired(one: Tensor, other: Tensor) -> Tensor:
            return torch.where(fired, one, other)
    else:
        S = spikes.spike(U, threshold, mode.tie, mode.surrogate, p[1])  # noqa: N806

        def where_fired(one: Tensor, other: Tensor) -> Tensor:
            return select(S, one, other)

    if mode.reset == "subtract_decayed":
        return beta * (U - where_fired(threshold, zero)) + input
    if mode.reset in ("zero", "zero_input"):  # no gradient from an infinite membrane that is reset
        U = U.masked_fill(U.isinf() & fired, 0)  # noqa: N806
    kept = beta * U
    match mode.reset:
        case "none":
            return kept + input
        case "subtract":
            return kept + input - where_fired(threshold, zero)
        case "zero":
            return where_fired(zero, kept) + input
    return where_fired(zero.masked_fill(input.isnan(), math.nan), kept + input)


def _output(x: Sequence[Any], U: Tensor, p: Sequence[Any]) -> Tensor:  # noqa: N803
    mode = mode_of(p[0])
    return U if mode.membrane else spikes.emitted(U, x[2], mode.tie, mode.surrogate, p[1])


def _numbers_of_states(numbers: Sequence[float]) -> list[float]:
    mode, scale = numbers
    return [_NUMBERS[mode_of(mode)._replace(membrane=True)], scale]


CELL = ops.add_cell(
    ops.Cell(
        name="lif",
        inputs=(ops.Input("input"), ops.Input("beta", "channel"), ops.Input("threshold", "channel")),
        scalars=(_MODE, SURROGATE_SCALE),
        plain=ops.Plain(_step, _gates, _output),
        numbers_of_states=_numbers_of_states,
    )
)


def number_of(
    reset: str = "subtract", tie: bool = False, surrogate: str = "atan", detach_reset: bool = True,
    membrane: bool | str = False, **_: Any,
) -> float:  # fmt: skip
    """The number of the mode of a call, from its arguments. The error for a wrong argument names it."""
    try:
        return _NUMBERS[reset, tie, surrogate, detach_reset, membrane == "only"]
    except (KeyError, TypeError):
        if not isinstance(reset, str):
            raise TypeError(f"reset: expected a name, got {type(reset).__name__}") from None
        if reset not in RESETS:
            raise ValueError(f"reset: expected one of {', '.join(RESETS)}, got {reset!r}") from None
        spikes.check_surrogate(surrogate)
        checks.flag("tie", tie)
        checks.flag("detach_reset", detach_reset)
        raise


def lif(
    input: Tensor,
    beta: Tensor,
    threshold: Tensor,
    initial_state: Tensor | None = None,
    *,
    reset: str = "subtract",
    tie: bool = False,
    surrogate: str = "atan",
    surrogate_scale: float = 1.0,
    detach_reset: bool = True,
    membrane: bool | str = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: Tensor | None = None,
    chunk_size: int | None = backends.CHUNK,
    return_boundaries: bool = False,
    backend: str | None = None,
) -> tuple[Any, ...]:
    """Scan leaky integrate-and-fire neurons over time.

    The membrane `U_t`, before its own reset, is the state. A neuron spikes when its membrane is above the threshold,
    and the spike resets the membrane in the next step::

        U_t = next(U_{t-1}, S_{t-1}, input_t)
        S_t = H(U_t - threshold)    S_0 = H(U_0 - threshold)

        reset               next(U, S, I)
        "none"              beta U + I
        "subtract"          beta U + I - threshold S
        "subtract_decayed"  beta (U - threshold S) + I
        "zero"              I if S else beta U + I
        "zero_input"        0 if S else beta U + I

    Each operation rounds in this order and none are fused, so spikes and membranes in float32 and float64 equal those
    of a loop over time in torch bit for bit, on every backend. "subtract" and "zero" are resets of `snntorch.Leaky`,
    "zero_input" the reset "zero" of `snntorch.Lapicque`, and "subtract_decayed" with `tie=True` that of
    `spikingjelly.activation_based.neuron.LIFNode` with `v_reset=None`.

    In gradients and in forward mode the derivative of H at x = U - threshold is that of a surrogate, with k the
    `surrogate_scale`. It is 0 at infinite x, except for "straight_through"::

        "atan"              k / (1 + (pi k x)^2)
        "fast_sigmoid"      1 / (1 + k |x|)^2
        "sigmoid"           k e / (1 + e)^2, e = exp(-k |x|)
        "triangle"          max(0, k - k^2 |x|)
        "straight_through"  1

    Args:
        input: `[B, T, D]`, the current; float32, float64, bfloat16 or float16. Strides over B and T may be any.
        beta, threshold: `[D]`, decay and threshold of each channel, in the input's dtype or float32.
        initial_state: `[B, D]` (`[N, D]` with `cu_seqlens`), the membrane before the first step scanned, in the input's
            or the state dtype; zeros if None. If it fires, the first step resets it.
        reset: what a spike does to the membrane, by name.
        tie: whether a membrane equal to the threshold spikes. It does not in snnTorch, it does in SpikingJelly.
        surrogate: the derivative of a spike, by name.
        surrogate_scale: k > 0 of the surrogate derivative, any finite value. Gradients out of range become infinite
            or 0.
        detach_reset: whether gradients treat the spike that resets as a constant, as in snnTorch. With False they also
            flow through that spike.
        membrane: whether to return the membranes too. Then the scan runs twice, once for each output. With "only"
            the output is the membranes instead of the spikes, at the cost of one scan.
        reverse: scan from the last step to the first.
        cu_seqlens: int32 or int64 `[N + 1]`, offsets of N sequences packed along T of streams with B = 1.
        resets: bool `[B, T]` (`[1, total]` with `cu_seqlens`), true where a new episode begins: before that step, in
            scan order, the membrane becomes `reset_state`.
        reset_state: `[D]`, `[B, D]` or, with `cu_seqlens`, `[N, D]`, in a dtype that `initial_state` may have; zeros if
            None.
        chunk_size: the largest number of steps between two checkpoints, a multiple of 16 that the backend supports.
            Checkpoints are membranes that the forward pass saves for the backward pass, which recomputes those between
            them. With None the forward pass saves none, and the backward pass first scans all steps again.
        return_boundaries: whether to return the membrane after every `chunk_size` steps too.
        backend: None chooses; a name (see `available_backends`) runs or raises.

    Returns:
        `spikes [B, T, D]`, 0 or 1 in the input's dtype, and the final membrane `[B, D]` (`[N, D]`), float64 for float64
        streams, else float32. With `membrane=True` the first is `(spikes, membranes)`, both `[B, T, D]` in the
        input's dtype; spikes are decided before a membrane is rounded to it. After a NaN input the
        membrane is NaN. A NaN membrane stays NaN, and so do its spikes. Layouts are those of `bmru`.

        With `return_boundaries` a third result, `[B, floor((T - 1) / chunk_size), D]` in the state dtype: the membrane
        after every `chunk_size` steps, before a reset of `resets` there. With `cu_seqlens`, the membrane after k
        chunks of a sequence whose first step has the scan position p is in row `floor(p / chunk_size) + k - 1`;
        other rows are zeros.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        RuntimeError: the backend cannot run this call.
        NotImplementedError: a second derivative is taken.

    Example::

        >>> beta, threshold = torch.full((64,), 0.9), torch.ones(64)
        >>> spikes, membrane = mk.lif(torch.rand(8, 100, 64), beta, threshold)
        >>> spikes.shape, membrane.shape
        (torch.Size([8, 100, 64]), torch.Size([8, 64]))
    """

    def scan(membranes: bool) -> tuple[Tensor, ...]:
        number = number_of(reset, tie, surrogate, detach_reset, "only" if membranes else False)
        return call(
            CELL, (input, beta, threshold), (number, surrogate_scale), initial_state, reverse=reverse,
            cu_seqlens=cu_seqlens, resets=resets, reset_state=reset_state, chunk_size=chunk_size,
            return_boundaries=return_boundaries, backend=backend,
        )  # fmt: skip

    return spikes.outputs(scan, membrane)


def lif_step(
    input: Tensor,
    beta: Tensor,
    threshold: Tensor,
    state: Tensor,
    *,
    reset: str = "subtract",
    tie: bool = False,
    state_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of `lif`, for streaming inference.

    Args:
        input: `[B, D]`.
        beta, threshold, reset, tie: as for `lif`.
        state: `[B, D]`, the membrane before the step; with `state_indices` slots `[slots, D]`, as for `bmru_step`.
        state_indices: int32 or int64 `[B]`, the slot of each sequence, or -1; see `bmru_step`.

    Returns:
        `spikes [B, D]` and the membrane after the step `[B, D]`, equal to `lif` with T = 1; with `state_indices` the
        second is `state`, updated in place.

    Raises:
        TypeError, ValueError, RuntimeError: as `lif` and `bmru_step`.

    Example::

        >>> beta, threshold = torch.full((64,), 0.9), torch.ones(64)
        >>> spikes, membrane = mk.lif_step(torch.rand(8, 64), beta, threshold, torch.zeros(8, 64))
        >>> spikes.shape
        torch.Size([8, 64])
    """
    return step(CELL, (input, beta, threshold), (number_of(reset, tie), 1.0), state, state_indices)
