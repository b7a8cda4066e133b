"""minGRU (csrc/cells/min_gru.h): s' = (1 - z) s + z g(c) with z = sigmoid(u), h = s'."""

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401  (Triton's interpreter looks for it)

from ..cell import Implementation, cell
from ..min_gates import (
    candidate_slope,
    candidate_value,
    exp_of_minus_abs,
    sigmoid_numerator,
    sigmoid_numerator_of_minus,
)


@triton.jit
def gates(x):
    """1 - z, z, g(c) and g'(c). The two sigmoids share one division."""
    c, u = x
    of_c, of_u = exp_of_minus_abs(c), exp_of_minus_abs(u)
    over_both = 1.0 / ((1.0 + of_c) * (1.0 + of_u))
    over_u, over_c = over_both * (1.0 + of_c), over_both * (1.0 + of_u)
    decay, write = sigmoid_numerator_of_minus(u, of_u) * over_u, sigmoid_numerator(u, of_u) * over_u
    return decay, write, candidate_value(c, of_c, over_c), candidate_slope(c, of_c, over_c)


@triton.jit
def step(x, s, p):
    decay, write, value, _ = gates(x)
    return decay * s + write * value


@triton.jit
def pull(x, m, p):
    _, u = x
    e = exp_of_minus_abs(u)
    return sigmoid_numerator_of_minus(u, e) / (1.0 + e) * m


@triton.jit
def vjp(x, s, after, g, m, p):
    decay, write, value, slope = gates(x)
    lam = g + m
    written = lam * write
    return decay * lam, (written * slope, written * decay * (value - s))


CELL = Implementation(cell(step, pull, vjp, gated=True))
