"""Leaky integrate-and-fire neuron; see csrc/cells/lif.h.

Modes are scalars of a call, which select: a kernel serves all of them. No operation of a step is fused with another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ....cells.lif import mode_of
from ..cell import Implementation, cell
from ..kernels.rows import when
from ..spike import emit, fires, slopes, times_slope

# Places of p after those of `slopes`.
DECAYED, SUBTRACTS, TO_ZERO, LOSES, FOLLOWS, MEMBRANE = (tl.constexpr(i) for i in range(6, 12))


def scalars(values: Sequence[float], state: torch.dtype) -> tuple[float, ...]:
    """(mode, surrogate_scale) as p: of spikes, then flags of the reset, whether gradients follow it, of the output."""
    mode = mode_of(values[0])
    to_zero = mode.reset in ("zero", "zero_input")
    flags = (
        mode.reset == "subtract_decayed", mode.reset == "subtract", to_zero, mode.reset == "zero_input",
        not mode.detach_reset and mode.reset != "none", mode.membrane,
    )  # fmt: skip
    return (*slopes(mode.surrogate, mode.tie, values[1], state), *map(float, flags))


@triton.jit
def step(x, s, p):
    input, beta, theta = x
    spike = fires(s, theta, p)
    fall = tl.where(spike, theta, 0.0)
    moved = beta * (s - tl.where(p[DECAYED] != 0, fall, 0.0)) + input
    moved = moved - tl.where(p[SUBTRACTS] != 0, fall, 0.0)
    return tl.where(when(p[TO_ZERO] != 0, spike), tl.where(when(p[LOSES] != 0, input == input), 0.0, input), moved)


@triton.jit
def output(x, s, after, p):
    return tl.where(p[MEMBRANE] != 0, after, emit(after, x[2], p))


@triton.jit
def of_output(x, after, g, p):
    """What g, the gradient of h, gives to that of the state after."""
    return tl.where(p[MEMBRANE] != 0, g, times_slope(g, after, x[2], p))


@triton.jit
def cotangent(x, s, after, g, m, p):
    return of_output(x, after, g, p) + m


@triton.jit
def through_spike(x, s, m, p):
    """What s gives to the state after through its spike, negative, times m."""
    input, beta, theta = x
    slope = times_slope(tl.full(s.shape, 1.0, s.dtype), s, theta, p)
    drop = tl.where(p[DECAYED] != 0, beta * theta, theta)
    drop = tl.where(p[TO_ZERO] != 0, beta * s + tl.where(p[LOSES] != 0, input, 0.0), drop)
    return tl.where(when(p[FOLLOWS] != 0, slope != 0), drop * slope * m, 0.0)  # an infinite s has no slope


@triton.jit
def pulled(x, s, m, through, p):
    _, beta, theta = x
    return tl.where(when(p[TO_ZERO] != 0, fires(s, theta, p)), 0.0, beta * m) - through


@triton.jit
def vjp(x, s, after, g, m, p):
    _, beta, theta = x
    q = of_output(x, after, g, p)
    lam = q + m
    through = through_spike(x, s, lam, p)
    spike = fires(s, theta, p)
    kept = s - tl.where(when(p[DECAYED] != 0, spike), theta, 0.0)
    kept = tl.where(when(p[TO_ZERO] != 0, spike), 0.0, kept)
    of_fall = tl.where(p[DECAYED] != 0, beta * lam, tl.where(p[SUBTRACTS] != 0, lam, 0.0))
    of_theta = through - tl.where(spike, of_fall, 0.0) - tl.where(p[MEMBRANE] != 0, 0.0, q)
    of_input = tl.where(when(p[LOSES] != 0, spike), 0.0, lam)
    return pulled(x, s, lam, through, p), (of_input, lam * kept, of_theta)


@triton.jit
def enter(x, s):
    """A NaN decay or threshold makes its channel NaN, which no reset hides."""
    return tl.where(x[2] == x[2], tl.where(x[1] == x[1], s, x[1]), x[2])


CELL = Implementation(
    cell(step, None, vjp, output=output, cotangent=cotangent, enter=enter, adjoint_sees_state=True), scalars=scalars
)
