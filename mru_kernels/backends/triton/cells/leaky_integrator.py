"""Leaky integrator (csrc/cells/leaky_integrator.h), the example to copy: s' = a s + x, h = tanh(s')."""

from __future__ import annotations

import triton
import triton.language as tl

from ..cell import Implementation, cell
from ..functions import tanh


@triton.jit
def step(x, s, p):
    input, decay = x
    return decay * s + input


@triton.jit
def output(x, s, after, p):
    return tanh(after)


@triton.jit
def pull(x, m, p):
    _, decay = x
    return decay * m


@triton.jit
def cotangent(x, s, after, g, m, p):
    h = tanh(after)
    return tl.fma(1.0 - h * h, g, m)


@triton.jit
def vjp(x, s, after, g, m, p):
    lam = cotangent(x, s, after, g, m, p)
    return pull(x, lam, p), (lam, lam * s)


CELL = Implementation(cell(step, pull, vjp, output=output, cotangent=cotangent, adjoint_sees_state=True))
