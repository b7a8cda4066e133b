"""Leaky integrator (csrc/cells/leaky_integrator.h), the example to copy: s' = a s + x, h = tanh(s')."""

from __future__ import annotations

import triton
import triton.language as tl

from ..cell import Implementation, cell


@triton.jit
def tanh(s):
    """A quotient of polynomials where 1 - exp(-2 |s|) would cancel."""
    q = s * s
    over = ((q + 378.0) * q + 17325.0) * q + 135135.0
    under = ((28.0 * q + 3150.0) * q + 62370.0) * q + 135135.0
    rest = tl.exp(-2.0 * tl.abs(s))
    large = (1.0 - rest) / (1.0 + rest)
    return tl.where(tl.abs(s) < 0.5, s * (over / under), tl.where(s < 0, -large, large))


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
def cotangent(x, s, after, g, m):
    h = tanh(after)
    return tl.fma(1.0 - h * h, g, m)


@triton.jit
def vjp(x, s, after, g, m, p):
    lam = cotangent(x, s, after, g, m)
    return pull(x, lam, p), (lam, lam * s)


CELL = Implementation(cell(step, pull, vjp, output=output, cotangent=cotangent, adjoint_sees_state=True))
