"""First-quadrant bistable memory recurrent unit, a Schmitt trigger; see csrc/cells/schmitt.h."""

from __future__ import annotations

import triton
import triton.language as tl

from ..cell import Codes, Implementation, cell
from ..kernels.affine import WRITE_OR_HOLD
from ..surrogate import slope
from ..write_or_hold import (
    code_of,
    cotangent,
    enter,
    factor_of_writes,
    output,
    overwrites,
    pull_code,
    recompute_code,
    recomputed,
    scalars,
    scaled,
    step_code,
    step_word,
    write_or_hold,
    writes_of_word,
)

FIRST, SECOND = tl.constexpr(1.0), tl.constexpr(0.0)  # the values that a code writes


@triton.jit
def writes(x):
    candidate, low, high, _ = x
    return (candidate < low) | (candidate >= high)


@triton.jit
def has_nan(x):
    candidate, low, high, _ = x
    return (candidate != candidate) | (low != low) | (high != high)


@triton.jit
def written(x):
    """U: 1 where the candidate reaches `high`."""
    return tl.where(x[0] >= x[2], 1.0, 0.0).to(x[0].dtype)


@triton.jit
def step(x, s, p):
    return write_or_hold(writes(x), has_nan(x), written(x), s, p[0])


@triton.jit
def recompute(x, s, p):
    candidate, low, high, _ = x
    return recomputed((candidate >= low) & (candidate < high), written(x), s, p[0])


@triton.jit
def pull(x, m, p):
    return tl.where(writes(x), scaled(m, p[0]), m)


@triton.jit
def vjp(x, s, after, g, m, p):
    candidate, low, high, _ = x
    epsilon, bend, tie, gain = p
    lam = cotangent(x, s, after, g, m, p)
    gained = lam * gain
    dhold = gained * ((1.0 - epsilon) * s - written(x))
    passed = tl.where(writes(x), gained, 0.0)
    dupper = tl.where(candidate >= low, passed - dhold, passed) * slope(candidate - high, bend, tie)
    dlower = tl.where(candidate >= high, 0.0, dhold) * slope(candidate - low, bend, tie)
    return pull(x, lam, p), (dupper + dlower, -dlower, -dupper, g * after)


@triton.jit
def encode(x):
    return code_of(writes(x), has_nan(x), x[0] < x[2])


@triton.jit
def schmitt_step_code(word, i: tl.constexpr, s, p):
    return step_code(word, i, FIRST, SECOND, s, p[0])


@triton.jit
def schmitt_recompute_code(word, i: tl.constexpr, s, p):
    return recompute_code(word, i, FIRST, SECOND, s, p[0])


@triton.jit
def schmitt_step_word(word, s, p):
    return step_word(word, FIRST, SECOND, s, p[0])


CODES = Codes(
    encode, schmitt_step_code, schmitt_recompute_code, pull_code, schmitt_step_word, writes_of_word, factor_of_writes
)
CELL = Implementation(
    cell(
        step, pull, vjp, recompute=recompute, output=output, cotangent=cotangent, enter=enter, rules=WRITE_OR_HOLD,
        codes=CODES,
    ),
    scalars=scalars,
    overwrites=overwrites,
)  # fmt: skip
