"""The cells in Triton: what csrc/cells states in C++, for blocks of channels.

A cell is a handful of functions that the kernels are given as constexpr arguments. `x` is the tuple of its inputs at
one step and `s` the state before it, blocks in the state dtype:

    step(x, s, epsilon)                the state after
    push(x, m, epsilon)                a m, where a is the factor of the affine form s' = a s + w
    pull(x, m, epsilon)                conj(a) m
    vjp(x, s, lam, epsilon, scale)     the gradients of x, with lam = dL/ds', and scale of surrogate()
    one(d), times(a, b)                the factor 1 for channels d, and a product of factors, or of one and a state
    magnitude(a)                       |a|; of a complex channel the sum over its parts, in both
    replay(x, s, epsilon)              the state after, where no input was NaN

Where events of 2 bits suffice for a step (hold, one of two writes, NaN), and a word holds those of 16:

    encode(x)                          the event
    step_event(word, i, s, epsilon), replay_event(word, i, s, epsilon), pull_event(word, i, m, epsilon)
                                       the same from the i-th event of a word
    step_word(word, s, epsilon)        the state after all of a word's steps, where epsilon is 0 or 1

A complex channel is two neighbours of a block, the real and the imaginary part, which one lane holds.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl


class Cell(NamedTuple):
    """The functions of a cell; those of events are None where a step does not fit one."""

    step: Any
    push: Any
    pull: Any
    vjp: Any
    one: Any
    times: Any
    magnitude: Any
    replay: Any
    encode: Any = None
    step_event: Any = None
    replay_event: Any = None
    pull_event: Any = None
    step_word: Any = None


PAIRS = tl.constexpr(0x55555555)  # the low bits of a word's events

# ------------------------------------------------------------------------- the step that the bistable cells share


@triton.jit
def one(d):
    return tl.where(d >= 0, 1.0, 0.0)


@triton.jit
def magnitude(a):
    return tl.abs(a)


@triton.jit
def times_or_zero(a, b):
    """a b, a factor times another or a state; NaN is absorbing, and nothing else is multiplied by 0."""
    return tl.where((a == 0) & (b == b), 0.0, a * b)


@triton.jit
def scaled(s, epsilon):
    """epsilon s; where epsilon is 0 so is the product, of anything."""
    return epsilon * tl.where(epsilon == 0, 0.0, s)


@triton.jit
def write_or_hold(writes, nan, v, s, epsilon):
    """Where the gate writes, v + epsilon s; elsewhere s. NaN is absorbing."""
    return tl.where(nan, float("nan"), tl.where(writes & (s == s), v + scaled(s, epsilon), s))


@triton.jit
def replayed(holds, v, s, epsilon):
    """The same for gradients, which are left open where there is a NaN."""
    return tl.where(holds, s, v + scaled(s, epsilon))


@triton.jit
def low_bit(word, i: tl.constexpr):
    return (word & (1 << (2 * i))) != 0


@triton.jit
def high_bit(word, i: tl.constexpr):
    return ((word >> (2 * i)) & 2) != 0


@triton.jit
def encoded(writes, nan, second):
    """An event's bits: the low one if it writes, and the high one if the second value; NaN is the high one alone."""
    return tl.where(nan, 2, tl.where(writes, tl.where(second, 3, 1), 0))


@triton.jit
def written_by_event(word, i: tl.constexpr, first, second, s, epsilon):
    """write_or_hold from an event."""
    high = high_bit(word, i)
    written = tl.where(high, second, first).to(s.dtype) + scaled(s, epsilon)
    held = tl.where(high, float("nan"), s)
    return tl.where(low_bit(word, i) & (s == s), written, held)


@triton.jit
def count_pairs(pairs):
    """How many of 16 pairs of bits are 1, the others being 0."""
    n = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    n = (n + (n >> 4)) & 0x0F0F0F0F
    return (n * 0x01010101) >> 24


@triton.jit
def written_by_word(word, first, second, s, epsilon):
    """The state after 16 steps that hold, write one of two values, or are NaN, where epsilon is 0 or 1."""
    writes = word & PAIRS
    nan = ((word >> 1) & PAIRS & ~word) != 0
    of_second = (word >> 1) & writes
    of_first = writes ^ of_second
    last = tl.where(of_second > of_first, second, first)  # of two disjoint sets of bits, the one with the last
    total = count_pairs(of_first) * first + count_pairs(of_second) * second
    value = tl.where(epsilon == 0, last, total).to(s.dtype)
    return write_or_hold(writes != 0, nan, value, s, epsilon)


@triton.jit
def pull_event(word, i: tl.constexpr, m, epsilon):
    return tl.where(low_bit(word, i), scaled(m, epsilon), m)


def surrogate(k: float, state: torch.dtype) -> tuple[float, float, float]:
    """(bend, tie, gain) of the surrogate scale k, any finite k > 0, for the dtype of states.

    The surrogate derivative of the unit step, k / (1 + (pi k x)^2), is gain / (tie + (bend x)^2), where tie = gain / k
    and bend = pi sqrt(k gain). `gain` is a power of two: 1 where k and 1 / k are well within the range of the dtype.
    Elsewhere it keeps tie, 1 / tie and bend normal numbers, as devices flush subnormal ones. In float32, k beyond
    [2^-240, 2^180] counts as the nearest in it: its products with gradients are 0 or infinite as those of k are.
    """
    finfo = torch.finfo(state)
    most = math.frexp(finfo.max)[1] - 8  # the exponent of k from which on gain is not 1
    k = min(max(k, 2.0 ** (-2 * most)), 2.0 ** min(3 * most // 2, 1023))
    exponent = math.frexp(k)[1] - 1
    gain = 2.0 ** math.copysign(max(abs(exponent) - most, 0), exponent)
    return max(math.pi * math.sqrt(k) * math.sqrt(gain), finfo.tiny), gain / k, gain


@triton.jit
def slope(x, scale):
    """The surrogate derivative of the unit step without its factor `gain`; that of the sign is twice that.

    The caller multiplies the gradient by `gain` first: a slope alone may leave the range where the product does not.
    """
    y = x * scale[0]
    y = y * y + scale[1]
    if x.dtype == tl.float64:
        result = 1.0 / y
    else:
        root = tl.rsqrt(y)  # one instruction, where a division takes several
        result = root * root
    return result


# ------------------------------------------------------------------------- BMRU (csrc/cells/bmru.h)


@triton.jit
def bmru_writes(x):
    """The gate compares, it does not subtract: a tie writes."""
    return tl.abs(x[0]) >= tl.abs(x[1])


@triton.jit
def bmru_nan(x):
    nan = (x[0] != x[0]) | (x[1] != x[1])
    if len(x) == 3:
        nan = nan | (x[2] != x[2])
    return nan


@triton.jit
def bmru_value(x):
    """m sgn(c)."""
    sgn = tl.where(x[0] < 0, -1.0, 1.0).to(x[0].dtype)
    if len(x) == 3:
        sgn = x[2] * sgn
    return sgn


@triton.jit
def bmru_step(x, s, epsilon):
    return write_or_hold(bmru_writes(x), bmru_nan(x), bmru_value(x), s, epsilon)


@triton.jit
def bmru_replay(x, s, epsilon):
    return replayed(tl.abs(x[0]) < tl.abs(x[1]), bmru_value(x), s, epsilon)


@triton.jit
def bmru_pull(x, m, epsilon):
    return tl.where(bmru_writes(x), scaled(m, epsilon), m)


@triton.jit
def bmru_vjp(x, s, lam, epsilon, scale):
    sgn = tl.where(x[0] >= 0, 1.0, -1.0).to(s.dtype)  # not as in replay: the compiler would keep predicates until here
    written = tl.where(bmru_writes(x), lam, 0.0)
    value = sgn
    dc = slope(x[0], scale) * (written * (scale[2] + scale[2]))
    if len(x) == 3:
        value = sgn * x[2]
        dc = dc * x[2]
    dgate = lam * scale[2] * (value + (epsilon - 1.0) * s) * slope(tl.abs(x[0]) - tl.abs(x[1]), scale)
    dc += tl.where(x[0] == 0, 0.0, dgate) * sgn
    db = tl.where(x[1] == 0, 0.0, tl.where(x[1] < 0, dgate, -dgate))
    if len(x) == 3:
        grads = (dc, db, written * sgn)
    else:
        grads = (dc, db)
    return grads


@triton.jit
def bmru_encode(x):
    return encoded(bmru_writes(x), bmru_nan(x), x[0] < 0)


@triton.jit
def bmru_step_event(word, i: tl.constexpr, s, epsilon):
    return written_by_event(word, i, 1.0, -1.0, s, epsilon)


@triton.jit
def bmru_replay_event(word, i: tl.constexpr, s, epsilon):
    return replayed(low_bit(word, i) == 0, tl.where(high_bit(word, i), -1.0, 1.0).to(s.dtype), s, epsilon)


@triton.jit
def bmru_step_word(word, s, epsilon):
    return written_by_word(word, 1.0, -1.0, s, epsilon)


# ------------------------------------------------------------------------- Schmitt trigger (csrc/cells/schmitt.h)


@triton.jit
def schmitt_writes(x):
    return (x[0] < x[1]) | (x[0] >= x[2])


@triton.jit
def schmitt_nan(x):
    return (x[0] != x[0]) | (x[1] != x[1]) | (x[2] != x[2])


@triton.jit
def schmitt_upper(x):
    return tl.where(x[0] >= x[2], 1.0, 0.0).to(x[0].dtype)


@triton.jit
def schmitt_step(x, s, epsilon):
    return write_or_hold(schmitt_writes(x), schmitt_nan(x), schmitt_upper(x), s, epsilon)


@triton.jit
def schmitt_replay(x, s, epsilon):
    return replayed((x[0] >= x[1]) & (x[0] < x[2]), schmitt_upper(x), s, epsilon)


@triton.jit
def schmitt_pull(x, m, epsilon):
    return tl.where(schmitt_writes(x), scaled(m, epsilon), m)


@triton.jit
def schmitt_vjp(x, s, lam, epsilon, scale):
    gained = lam * scale[2]
    dhold = gained * ((1.0 - epsilon) * s - schmitt_upper(x))
    written = tl.where(schmitt_writes(x), gained, 0.0)
    dupper = tl.where(x[0] >= x[1], written - dhold, written) * slope(x[0] - x[2], scale)
    dlower = tl.where(x[0] >= x[2], 0.0, dhold) * slope(x[0] - x[1], scale)
    return (dupper + dlower, -dlower, -dupper)


@triton.jit
def schmitt_encode(x):
    return encoded(schmitt_writes(x), schmitt_nan(x), x[0] < x[2])


@triton.jit
def schmitt_step_event(word, i: tl.constexpr, s, epsilon):
    return written_by_event(word, i, 1.0, 0.0, s, epsilon)


@triton.jit
def schmitt_replay_event(word, i: tl.constexpr, s, epsilon):
    return replayed(low_bit(word, i) == 0, tl.where(high_bit(word, i), 0.0, 1.0).to(s.dtype), s, epsilon)


@triton.jit
def schmitt_step_word(word, s, epsilon):
    return written_by_word(word, 1.0, 0.0, s, epsilon)


# ------------------------------------------------------------------------- linear recurrence (csrc/cells/linear.h)


@triton.jit
def times(a, b):
    return a * b


@triton.jit
def linear_step(x, s, epsilon):
    return x[1] * s + x[0]


@triton.jit
def linear_push(x, m, epsilon):
    return x[1] * m


@triton.jit
def linear_vjp(x, s, lam, epsilon, scale):
    return (lam, lam * s)


# ------------------------------------------------------------------------- the same, complex


@triton.jit
def parts(z):
    return tl.split(tl.reshape(z, (z.shape[0] // 2, 2)))


@triton.jit
def pairs(re, im):
    return tl.reshape(tl.join(re, im), (2 * re.shape[0],))


@triton.jit
def complex_one(d):
    return tl.where(d % 2 == 0, 1.0, 0.0)


@triton.jit
def complex_magnitude(a):
    a_re, a_im = parts(a)
    total = tl.abs(a_re) + tl.abs(a_im)
    return pairs(total, total)


@triton.jit
def complex_times(a, b):
    a_re, a_im = parts(a)
    b_re, b_im = parts(b)
    return pairs(a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re)


@triton.jit
def complex_times_conj(a, b):
    """a conj(b), rounded alike in every kernel. With conj(b) as a block of its own, Triton 3.6's ptxas spills in
    summarize_adjoint.
    """
    a_re, a_im = parts(a)
    b_re, b_im = parts(b)
    return pairs(tl.fma(a_re, b_re, a_im * b_im), tl.fma(a_im, b_re, -(a_re * b_im)))


@triton.jit
def complex_step(x, s, epsilon):
    return complex_times(x[1], s) + x[0]


@triton.jit
def complex_push(x, m, epsilon):
    return complex_times(x[1], m)


@triton.jit
def complex_pull(x, m, epsilon):
    return complex_times_conj(m, x[1])


@triton.jit
def complex_vjp(x, s, lam, epsilon, scale):
    return (lam, complex_times_conj(lam, s))


#: For real streams.
CELLS = {
    "bmru": Cell(
        bmru_step, bmru_pull, bmru_pull, bmru_vjp, one, times_or_zero, magnitude, bmru_replay, bmru_encode,
        bmru_step_event, bmru_replay_event, pull_event, bmru_step_word,
    ),
    "schmitt": Cell(
        schmitt_step, schmitt_pull, schmitt_pull, schmitt_vjp, one, times_or_zero, magnitude, schmitt_replay,
        schmitt_encode, schmitt_step_event, schmitt_replay_event, pull_event, schmitt_step_word,
    ),
    "linear_recurrence": Cell(linear_step, linear_push, linear_push, linear_vjp, one, times, magnitude, linear_step),
}  # fmt: skip
#: For complex streams.
COMPLEX_CELLS = {
    "linear_recurrence": Cell(
        complex_step,
        complex_push,
        complex_pull,
        complex_vjp,
        complex_one,
        complex_times,
        complex_magnitude,
        complex_step,
    ),
}
