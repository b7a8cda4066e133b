"""The step of the bistable cells: a select (csrc/maps/write_or_hold.h).

Where the gate writes, s' = v + epsilon s; elsewhere s' = s. NaN is absorbing. Their scalars are p = (epsilon, bend,
tie, gain), the last three those of `surrogate`; their last input is alpha, and h = alpha s'.

A write code has 2 bits: the low one if the step writes, and the high one if it writes the second of two values; NaN is
the high one alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..surrogate import surrogate

LOW_BITS = tl.constexpr(0x55555555)  # of a word's codes


def scalars(values: Sequence[float], state: torch.dtype) -> tuple[float, ...]:
    """(epsilon, surrogate_scale) as p."""
    epsilon, surrogate_scale = values
    return (epsilon, *surrogate(surrogate_scale, state))


def overwrites(p: tuple[float, ...]) -> bool:
    return p[0] == 0


@triton.jit
def scaled(s, epsilon):
    """epsilon s, but 0 if epsilon is 0: nothing is multiplied by 0."""
    return epsilon * tl.where(epsilon == 0, 0.0, s)


@triton.jit
def write_or_hold(writes, nan, v, s, epsilon):
    """The state after a step."""
    return tl.where(nan, float("nan"), tl.where(writes & (s == s), v + scaled(s, epsilon), s))


@triton.jit
def recomputed(holds, v, s, epsilon):
    """The state after a step without NaN."""
    return tl.where(holds, s, v + scaled(s, epsilon))


# ------------------------------------------------------------------------- alpha


@triton.jit
def output(x, s, after, p):
    return x[len(x) - 1] * after


@triton.jit
def cotangent(x, s, after, g, m, p):
    return tl.fma(x[len(x) - 1], g, m)


@triton.jit
def enter(x, s):
    """A NaN alpha makes its channel NaN."""
    alpha = x[len(x) - 1]
    return tl.where(alpha == alpha, s, alpha)


# ------------------------------------------------------------------------- write codes


@triton.jit
def code_of(writes, nan, second):
    return tl.where(nan, 2, tl.where(writes, tl.where(second, 3, 1), 0))


@triton.jit
def low_bit(word, i: tl.constexpr):
    return (word & (1 << (2 * i))) != 0


@triton.jit
def high_bit(word, i: tl.constexpr):
    return ((word >> (2 * i)) & 2) != 0


@triton.jit
def step_code(word, i: tl.constexpr, first, second, s, epsilon):
    """write_or_hold of the i-th code, which writes the value `first` or `second`."""
    high = high_bit(word, i)
    written = tl.where(high, second, first).to(s.dtype) + scaled(s, epsilon)
    held = tl.where(high, float("nan"), s)
    return tl.where(low_bit(word, i) & (s == s), written, held)


@triton.jit
def recompute_code(word, i: tl.constexpr, first, second, s, epsilon):
    return recomputed(low_bit(word, i) == 0, tl.where(high_bit(word, i), second, first).to(s.dtype), s, epsilon)


@triton.jit
def pull_code(word, i: tl.constexpr, m, p):
    return tl.where(low_bit(word, i), scaled(m, p[0]), m)


@triton.jit
def count_low_bits(bits):
    """How many of 16 pairs of bits are 1, the others being 0."""
    n = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    n = (n + (n >> 4)) & 0x0F0F0F0F
    return (n * 0x01010101) >> 24


@triton.jit
def writes_of_word(word):
    return count_low_bits(word & LOW_BITS)


@triton.jit
def factor_of_writes(writes, steps, p):
    """epsilon^writes, by squaring; 0^0 is 1. `steps` is an upper limit of the block `writes`."""
    base = p[0]
    result = tl.where(writes >= 0, 1.0, base)
    while steps > 0:
        result = tl.where((writes & 1) != 0, result * base, result)
        base *= base
        writes = writes >> 1
        steps = steps >> 1
    return result


@triton.jit
def step_word_at_once(word, first, second, s, epsilon):
    """The state after a word's codes, if epsilon is 0 or 1."""
    writes = word & LOW_BITS
    nan = ((word >> 1) & LOW_BITS & ~word) != 0
    of_second = (word >> 1) & writes
    of_first = writes ^ of_second
    last = tl.where(of_second > of_first, second, first)  # of two disjoint sets of bits, the one with the last
    total = count_low_bits(of_first) * first + count_low_bits(of_second) * second
    value = tl.where(epsilon == 0, last, total).to(s.dtype)
    return write_or_hold(writes != 0, nan, value, s, epsilon)


@triton.jit
def step_word(word, first, second, s, epsilon):
    """The state after a word's codes."""
    if (epsilon == 0) | (epsilon == 1):
        s = step_word_at_once(word, first, second, s, epsilon)
    else:
        for i in tl.static_range(16):
            s = step_code(word, i, first, second, s, epsilon)
    return s
