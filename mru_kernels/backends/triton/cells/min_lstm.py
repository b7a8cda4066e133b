"""minLSTM (csrc/cells/min_lstm.h): s' = (f s + i g(c)) / (f + i), i = sigmoid(u), f = sigmoid(v), h = s'."""

from __future__ import annotations

import triton
import triton.language as tl

from ..cell import Implementation, cell
from ..min_gates import (
    candidate_slope,
    candidate_value,
    exp_of_minus_abs,
    sigmoid_numerator,
    sigmoid_numerator_of_minus,
)


@triton.jit
def shares(u, v, of_u, of_v):
    """f / (f + i) and i / (f + i) as A and B over A + B, for e^-|u| and e^-|v|: A, B and A + B."""
    # minimum() of a NaN may be 0: of_u and of_v make both shares NaN.
    difference = tl.minimum(v, 0.0) - tl.minimum(u, 0.0)
    e = exp_of_minus_abs(difference)
    keep = sigmoid_numerator(difference, e) * (1.0 + of_u)
    write = sigmoid_numerator_of_minus(difference, e) * (1.0 + of_v)
    return keep, write, keep + write


@triton.jit
def step(x, s, p):
    c, u, v = x
    keep, write, sum = shares(u, v, exp_of_minus_abs(u), exp_of_minus_abs(v))
    of_c = exp_of_minus_abs(c)
    over_both = 1.0 / ((1.0 + of_c) * sum)
    over_c, over_sum = over_both * sum, over_both * (1.0 + of_c)
    return keep * over_sum * s + write * over_sum * candidate_value(c, of_c, over_c)


@triton.jit
def pull(x, m, p):
    _, u, v = x
    keep, _, sum = shares(u, v, exp_of_minus_abs(u), exp_of_minus_abs(v))
    return keep / sum * m


@triton.jit
def vjp(x, s, after, g, m, p):
    c, u, v = x
    of_c, of_u, of_v = exp_of_minus_abs(c), exp_of_minus_abs(u), exp_of_minus_abs(v)
    keep, write, sum = shares(u, v, of_u, of_v)
    # One division for 1 / sum, sigmoid(c), sigmoid(-u) and sigmoid(-v): the factors under it are between 1 and 4.
    under_c, under_u, under_v = 1.0 + of_c, 1.0 + of_u, 1.0 + of_v
    first, second = under_c * sum, under_u * under_v
    over_all = 1.0 / (first * second)
    over_first, over_second = over_all * second, over_all * first
    over_c, over_sum = over_first * sum, over_first * under_c

    decay, write = keep * over_sum, write * over_sum
    lam = g + m
    of_odds = decay * write * lam * (candidate_value(c, of_c, over_c) - s)  # dL/d log(i / f)
    of_update = of_odds * (sigmoid_numerator_of_minus(u, of_u) * (over_second * under_v))
    of_forget = -of_odds * (sigmoid_numerator_of_minus(v, of_v) * (over_second * under_u))
    return decay * lam, (lam * write * candidate_slope(c, of_c, over_c), of_update, of_forget)


CELL = Implementation(cell(step, pull, vjp, gated=True))
