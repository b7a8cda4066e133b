"""Resets of the state before a step: one bit a step, the same for all channels. Without form.resets nothing is read."""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import get, when


@triton.jit
def load_mask(c, step, N: tl.constexpr):
    """Whether the state is reset before each of N steps from `step` on, [N]; false beyond the segment."""
    mask = ()
    if c.form.resets:
        i = step + tl.arange(0, N)
        position = c.at.start + i
        t = tl.where(c.scan.reverse != 0, c.scan.time - 1 - position, position)
        within = (i >= c.at.begin) & (i < c.at.end)
        mask = tl.load(c.resets.mask + c.at.batch * c.scan.time + t, mask=within, other=0)
    return mask


@triton.jit
def bits_of(c, mask):
    """The entries of `load_mask` as the bits of an integer."""
    bits = 0
    if c.form.resets:
        BITS: tl.constexpr = tl.int64 if mask.shape[0] > 31 else tl.int32
        bits = tl.sum(tl.where(mask != 0, 1, 0).to(BITS) << tl.arange(0, mask.shape[0]), 0)
    return bits


@triton.jit
def last_of(mask):
    """The place of the last reset; -1 if there is none."""
    return tl.max(tl.where(mask != 0, tl.arange(0, mask.shape[0]), -1), 0)


@triton.jit
def load_state(c):
    """The state after a reset, before the cell's rule of entry."""
    state = ()
    if c.form.resets:
        state = get(c.resets.state, c.at.index, c.at, when(c.scan.has_reset_state != 0, c.at.mask), 0.0)
    return state


@triton.jit
def where_reset(c, bits, i: tl.constexpr, state, s):
    """`state` if bit i is set, else `s`."""
    if c.form.resets:
        s = tl.where(((bits >> i) & 1) != 0, state, s)
    return s
