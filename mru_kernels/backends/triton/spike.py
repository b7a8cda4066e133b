"""Spikes: the step function H(v - threshold) of a state, with one of five surrogate derivatives (csrc/spike.h)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...cells.spikes import SURROGATES, normal
from ..surrogate import surrogate
from .surrogate import reciprocal

# Places of p.
KIND, TIE, STEEP, ROUND, GAIN, SQUARES = (tl.constexpr(i) for i in range(6))
ATAN, SIGMOID, TRIANGLE, STRAIGHT = (
    tl.constexpr(list(SURROGATES).index(name)) for name in ("atan", "sigmoid", "triangle", "straight_through")
)


def slopes(name: str, tie: bool, k: float, state: torch.dtype) -> tuple[float, ...]:
    """The first six scalars of a cell that spikes: which surrogate, whether a tie fires, and constants of the slope."""
    bend, rounded, gain = surrogate(k, state) if name == "atan" else (normal(k, state), 1.0, 1.0)
    return list(SURROGATES).index(name), tie, bend, rounded, gain, name in ("fast_sigmoid", "sigmoid")


@triton.jit
def fires(v, threshold, p):
    """It compares and does not subtract: infinity against infinity is a tie. NaN does not fire."""
    return tl.where(p[TIE] != 0, v >= threshold, v > threshold)


@triton.jit
def emit(v, threshold, p):
    """1 or 0, and NaN where v is NaN."""
    return tl.where(v == v, tl.where(fires(v, threshold, p), 1.0, 0.0).to(v.dtype), v)


@triton.jit
def times_slope(g, v, threshold, p):
    """G times the slope at v - threshold, which is 0 where v is infinite, but 1 everywhere for "straight_through".

    One reciprocal serves all: a kernel is compiled for any surrogate.
    """
    far = tl.abs(v - threshold) * p[STEEP]
    e = tl.exp(-far)
    near = reciprocal(tl.where(p[KIND] == ATAN, far * far, tl.where(p[KIND] == SIGMOID, e, far)) + p[ROUND])
    scale = tl.where(p[KIND] == SIGMOID, p[STEEP] * e, p[GAIN])
    curve = g * scale * near * tl.where(p[SQUARES] != 0, near, 1.0)
    line = tl.where(far > 1, 0.0, p[STEEP] * (1.0 - far) * g)
    return tl.where(p[KIND] == STRAIGHT, g, tl.where(p[KIND] == TRIANGLE, line, curve))
