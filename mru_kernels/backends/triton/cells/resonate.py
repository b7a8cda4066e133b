"""Resonate-and-fire neuron; see csrc/cells/resonate.h. A real stream has its value in both parts of a channel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ....cells.resonate import mode_of
from ..cell import Implementation, cell
from ..kernels.affine import COMPLEX
from ..parts import complex_times, complex_times_conj, pairs, parts
from ..spike import emit, slopes, times_slope

MEMBRANE = tl.constexpr(6)  # the place of p after those of `slopes`


def scalars(values: Sequence[float], state: torch.dtype) -> tuple[float, ...]:
    """(mode, surrogate_scale) as p: of spikes, then whether h is the membrane."""
    mode = mode_of(values[0])
    return (*slopes(mode.surrogate, mode.tie, values[1], state), float(mode.membrane))


@triton.jit
def real(z):
    re, _ = parts(z)
    return re


@triton.jit
def step(x, s, p):
    input, decay, gain, _ = x
    re, im = parts(complex_times(decay, s))
    return pairs(re + real(gain) * real(input), im)


@triton.jit
def output(x, s, after, p):
    re = real(after)
    h = tl.where(p[MEMBRANE] != 0, re, emit(re, real(x[3]), p))
    return pairs(h, h)


@triton.jit
def push(x, m, p):
    return complex_times(x[1], m)


@triton.jit
def pull(x, m, p):
    return complex_times_conj(m, x[1])


@triton.jit
def of_output(x, after, g, p):
    """What g, the gradient of h, gives to that of the real part of the state after."""
    return tl.where(p[MEMBRANE] != 0, real(g), times_slope(real(g), real(after), real(x[3]), p))


@triton.jit
def cotangent(x, s, after, g, m, p):
    re, im = parts(m)
    return pairs(re + of_output(x, after, g, p), im)


@triton.jit
def vjp(x, s, after, g, m, p):
    input, _, gain, _ = x
    q = of_output(x, after, g, p)
    re, im = parts(m)
    re = re + q
    lam = pairs(re, im)
    of_input = real(gain) * re
    of_gain = real(input) * re
    of_threshold = tl.where(p[MEMBRANE] != 0, 0.0, -q)
    dx = (
        pairs(of_input, of_input), complex_times_conj(lam, s), pairs(of_gain, of_gain),
        pairs(of_threshold, of_threshold),
    )  # fmt: skip
    return pull(x, lam, p), dx


@triton.jit
def enter(x, s):
    """A NaN threshold makes its channel NaN."""
    return tl.where(x[3] == x[3], s, x[3])


_CELL = cell(
    step, pull, vjp, push=push, output=output, cotangent=cotangent, enter=enter, rules=COMPLEX, adjoint_sees_state=True
)
CELL = Implementation(_CELL, complex=_CELL, scalars=scalars)
