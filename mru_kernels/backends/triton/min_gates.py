"""The functions that minGRU and minLSTM share (csrc/min_gates.h), compiled by Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exp_of_minus_abs(x):
    """e^-|x|. With it, sigmoid(x) and sigmoid(-x) are 1 and e over 1 + e, in the order that the sign of x gives."""
    return tl.exp(-tl.abs(x))


@triton.jit
def sigmoid_numerator(x, e):
    """The numerator of sigmoid(x)."""
    return tl.where(x >= 0, 1.0, e)


@triton.jit
def sigmoid_numerator_of_minus(x, e):
    """The numerator of sigmoid(-x)."""
    return tl.where(x >= 0, e, 1.0)


@triton.jit
def candidate_value(c, e, over):
    """g(c) = c + 1/2 for c >= 0, else sigmoid(c), for e = e^-|c| and over = 1 / (1 + e)."""
    return tl.where(c >= 0, c + 0.5, e * over)


@triton.jit
def candidate_slope(c, e, over):
    return tl.where(c >= 0, 1.0, e * over * over)
