"""Bistable memory recurrent unit, BMRU (epsilon 0) and CMRU (epsilon 1); see csrc/cells/bmru.h."""

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

FIRST, SECOND = tl.constexpr(1.0), tl.constexpr(-1.0)  # the values that a code writes


@triton.jit
def writes(x):
    """The gate compares and does not subtract, so a tie writes."""
    return tl.abs(x[0]) >= tl.abs(x[1])


@triton.jit
def has_nan(x):
    candidate, threshold, amplitude, _ = x
    return (candidate != candidate) | (threshold != threshold) | (amplitude != amplitude)


@triton.jit
def written(x):
    candidate, _, amplitude, _ = x
    return amplitude * tl.where(candidate < 0, -1.0, 1.0).to(candidate.dtype)


@triton.jit
def step(x, s, p):
    return write_or_hold(writes(x), has_nan(x), written(x), s, p[0])


@triton.jit
def recompute(x, s, p):
    return recomputed(tl.abs(x[0]) < tl.abs(x[1]), written(x), s, p[0])


@triton.jit
def pull(x, m, p):
    return tl.where(writes(x), scaled(m, p[0]), m)


@triton.jit
def vjp(x, s, after, g, m, p):
    candidate, threshold, amplitude, _ = x
    epsilon, bend, tie, gain = p
    lam = cotangent(x, s, after, g, m, p)
    sign = tl.where(candidate >= 0, 1.0, -1.0).to(s.dtype)  # not as in `written`, whose predicates would stay alive
    passed = tl.where(writes(x), lam, 0.0)
    dcandidate = slope(candidate, bend, tie) * (passed * (gain + gain)) * amplitude
    dgate = lam * gain * (sign * amplitude + (epsilon - 1.0) * s)
    dgate = dgate * slope(tl.abs(candidate) - tl.abs(threshold), bend, tie)
    dcandidate += tl.where(candidate == 0, 0.0, dgate) * sign
    dthreshold = tl.where(threshold == 0, 0.0, tl.where(threshold < 0, dgate, -dgate))
    return pull(x, lam, p), (dcandidate, dthreshold, passed * sign, g * after)


@triton.jit
def encode(x):
    return code_of(writes(x), has_nan(x), x[0] < 0)


@triton.jit
def bmru_step_code(word, i: tl.constexpr, s, p):
    return step_code(word, i, FIRST, SECOND, s, p[0])


@triton.jit
def bmru_recompute_code(word, i: tl.constexpr, s, p):
    return recompute_code(word, i, FIRST, SECOND, s, p[0])


@triton.jit
def bmru_step_word(word, s, p):
    return step_word(word, FIRST, SECOND, s, p[0])


CODES = Codes(encode, bmru_step_code, bmru_recompute_code, pull_code, bmru_step_word, writes_of_word, factor_of_writes)
CELL = Implementation(
    cell(
        step, pull, vjp, recompute=recompute, output=output, cotangent=cotangent, enter=enter, rules=WRITE_OR_HOLD,
        codes=CODES,
    ),
    scalars=scalars,
    overwrites=overwrites,
)  # fmt: skip
