"""Steps as one map of the state, s -> factor s + offset, or of the adjoint. Maps compose, so segments scan in parallel.

A map is a pair (factor, offset) of blocks. `rules` is one of REAL, WRITE_OR_HOLD and COMPLEX: what a cell's factors
are, with every rule for NaN, 0 and infinity that composing needs.

A factor NaN marks a head: steps with a reset, which drop any state, NaN included. Where an input makes a factor NaN,
the offset is NaN as well, so nothing is lost.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..parts import complex_times, pairs, parts


class Rules(NamedTuple):
    """What a factor is.

    one(d)          the factor 1, for channels d
    times(a, b)     a factor times a factor or a state
    magnitude(a)    |a|; of a complex channel |re| + |im|, in both parts
    """

    one: Any
    times: Any
    magnitude: Any


@triton.jit
def _one(d):
    return tl.where(d >= 0, 1.0, 0.0)


@triton.jit
def _times(a, b):
    return a * b


@triton.jit
def _times_or_zero(a, b):
    """a b, but 0 if a is 0, which leaves nothing of any number, infinity included. NaN stays NaN."""
    return tl.where((a == 0) & (b == b), 0.0, a * b)


@triton.jit
def _magnitude(a):
    return tl.abs(a)


@triton.jit
def _complex_one(d):
    return tl.where(d % 2 == 0, 1.0, 0.0)


@triton.jit
def _complex_magnitude(a):
    re, im = parts(a)
    total = tl.abs(re) + tl.abs(im)
    return pairs(total, total)


REAL = Rules(_one, _times, _magnitude)
#: A factor of 0 comes from a write that overwrites the state.
WRITE_OR_HOLD = Rules(_one, _times_or_zero, _magnitude)
#: A channel is two neighbours of a block, its real and its imaginary part, in one lane.
COMPLEX = Rules(_complex_one, complex_times, _complex_magnitude)


@triton.jit
def identity(rules, d, STATE: tl.constexpr):
    return rules.one(d).to(STATE), tl.zeros(d.shape, STATE)


@triton.jit
def apply(rules, map_, s):
    """The state after steps, from the state before."""
    return tl.where(map_[0] == map_[0], rules.times(map_[0], s) + map_[1], map_[1])


@triton.jit
def as_head(factor, resets):
    """The factor of steps, which is that of a head if `resets` [16], the union of the masks of their words, has one."""
    return tl.where(tl.max(resets.to(tl.int32), 0) != 0, float("nan"), factor)


@triton.jit
def then(rules, first, second):
    """The map of the steps of `first`, then those of `second`."""
    return rules.times(second[0], first[0]), apply(rules, second, first[1])


@triton.jit
def after_selecting(second, first):
    """`then`, if factors are 0 or 1: a factor 0 ends the search for what passes, so no later number may spoil it."""
    ended = second[0] == 0
    return tl.where(ended, second[0], first[0]), tl.where(ended, second[1], second[1] + first[1])


@triton.jit
def recent(rules, u, late):
    """The magnitude of the last few states: `late`, updated by `u`. It fades, so older states count for nothing."""
    return tl.maximum(rules.magnitude(u), 0.25 * late)


@triton.jit
def consistent(rules, map_, late, entry, leaves, handed, WRITES_RESET: tl.constexpr):
    """Whether the state that leaves a segment, scanned from `entry`, is the one handed to the next segment.

    map_      of the segment; with `handed`, what composing gave
    late      `recent` of the states that end in its offset

    The bound lets rounding pass. Rounding exceeds |factor entry| + |offset| if cancellation leaves both small; `late`
    measures it then. A factor that may have underflowed has few right bits, so its bound is tight. Where writes
    overwrite the state, factors are 0 or 1: values are wrong only where not finite.
    """
    ROUNDING: tl.constexpr = 2.0**-40 if entry.dtype == tl.float64 else 2.0**-16
    error = rules.magnitude(leaves - handed)
    if WRITES_RESET:
        near = error < float("inf")
    else:
        factor = rules.magnitude(map_[0])
        entered = tl.where(factor == factor, factor * rules.magnitude(entry), 0.0)  # a head drops it
        terms = entered + rules.magnitude(map_[1])
        bound = tl.where(factor < 2.0**-62, ROUNDING, 2.0**-8) * terms + ROUNDING * late
        near = (error <= bound) & (bound < float("inf"))
    of_leaves = rules.magnitude(leaves)
    of_handed = rules.magnitude(handed)
    return (leaves == handed) | near | ((of_leaves != of_leaves) & (of_handed != of_handed))
