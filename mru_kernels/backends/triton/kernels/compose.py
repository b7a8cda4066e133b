"""Between segments: their maps are composed, and afterwards compared with what scanning the segments gave."""

from __future__ import annotations

import triton
import triton.language as tl

from .affine import apply, consistent, identity, then
from .arguments import size, sizes
from .place import bounds, first_segment, place, program
from .rows import get, put, when


@triton.jit
def map_row(base, k, count, flip):
    """The row of the k-th of `count` segments walked over, from the right if `flip`."""
    return base + tl.where(flip != 0, count - 1 - k, k)


@triton.jit
def load_maps(maps, at, row, step, left, TILE: tl.constexpr):
    """TILE affine maps, the first in `row` and one a step from the next. Only `left` exist: it repeats the last."""
    loaded = ()
    place = row * at.width + (at.first + at.d)
    for i in tl.static_range(TILE):
        loaded = loaded + ((tl.load(maps.factor + place), tl.load(maps.offset + place)),)
        place += tl.where(i + 1 < left, step * at.width, 0)
    return loaded


@triton.jit
def count_segments(scan, n):
    """How many segments the n-th sequence has."""
    _, _, length = bounds(scan, n)
    return (length + scan.segment_size - 1) // scan.segment_size


@triton.jit
def fold(
    rules, block, scan, walk,
    maps,  # Maps of segments
    groups,  # Maps of groups, [N * groups, D]: written
):  # fmt: skip
    """Each group of segments as one affine map. A packed sequence is one group."""
    STATE: tl.constexpr = maps.factor.dtype.element_ty
    scan = sizes(scan, block)
    item, b = program(scan, block)
    of_sequence = size(walk.groups)
    if item < scan.sequences * of_sequence:
        n = item // of_sequence
        count = count_segments(scan, n) if scan.packed != 0 else scan.segments // scan.sequences
        base = first_segment(scan, n) if scan.packed != 0 else n * count
        at = place(scan, block, base, b)
        begin = (item % of_sequence) * size(walk.per_group)
        end = tl.minimum(begin + size(walk.per_group), count)
        factor, offset = identity(rules, at.d, STATE)
        flip = size(walk.flip)
        for k in range(begin, end, block.tile):
            left = tl.minimum(end - k, block.tile).to(tl.int32)
            loaded = load_maps(maps, at, map_row(base, k, count, flip), 1 - 2 * flip, left, block.tile)
            if left > 0:  # always true: ptxas does not sink the loads below a branch
                for i in tl.static_range(block.tile):
                    new_factor, new_offset = then(rules, (factor, offset), loaded[i])
                    offset = tl.where(i < left, new_offset, offset)
                    factor = tl.where(i < left, new_factor, factor)
        index, _, _ = bounds(scan, n)
        row = tl.where(scan.packed != 0, index, item)
        put(groups.factor, row, at, factor, at.mask)
        put(groups.offset, row, at, offset, at.mask)


@triton.jit
def carry(
    rules, block, scan, walk,
    initial,  # [N, D]: the state before each sequence, or from the right the gradient of its final state
    maps,  # Maps of segments
    groups,  # Maps of groups, [N * groups, D]
    entries,  # [segments, D]: written, what enters each segment
    final_state,  # [N, D]: written, what leaves the last segment walked over
):  # fmt: skip
    """What enters each segment, from the left or, if walk.flip, from the right. Clears the flag of `check`.

    A program walks over the maps of the groups before its own, then over those of its own segments. A packed sequence
    is one group.
    """
    scan = sizes(scan, block)
    item, b = program(scan, block)
    of_sequence = size(walk.groups)
    n = item // of_sequence
    if (item == 0) & (b == 0):
        tl.store(scan.flag, 0)
    if n < scan.sequences:
        group = item % of_sequence
        base = first_segment(scan, n)
        at = place(scan, block, base, b)
        index, _, length = bounds(scan, n)
        flip = size(walk.flip)
        count = (length + scan.segment_size - 1) // scan.segment_size
        begin = group * size(walk.per_group)
        end = tl.where(of_sequence == 1, count, tl.minimum(begin + size(walk.per_group), count))
        s = get(initial, index, at, when(scan.has_initial != 0, at.mask), 0.0)
        for k in range(0, group, block.tile):
            left = tl.minimum(group - k, block.tile).to(tl.int32)
            loaded = load_maps(groups, at, n * of_sequence + k, 1, left, block.tile)
            if left > 0:  # always true, see fold
                for i in tl.static_range(block.tile):
                    s = tl.where(i < left, apply(rules, loaded[i], s), s)
        for k in range(begin, end, block.tile):
            left = tl.minimum(end - k, block.tile).to(tl.int32)
            row = map_row(base, k, count, flip)
            loaded = load_maps(maps, at, row, 1 - 2 * flip, left, block.tile)
            for i in tl.static_range(block.tile):
                put(entries, row, at, s, when(i < left, at.mask))
                row += 1 - 2 * flip
                s = tl.where(i < left, apply(rules, loaded[i], s), s)
        if end == count:
            put(final_state, index, at, s, at.mask)


@triton.jit
def check(
    rules,
    overwrites: tl.constexpr,  # whether factors are 0 or 1
    block, scan, walk,
    maps,  # Maps of segments
    lates,  # [segments, D]: recent magnitudes, see `consistent`; not read if `overwrites`
    entries,  # [segments, D]: what enters each segment
    exits,  # [segments, D]: what leaves it, scanned from there
    final_state,  # [N, D]: what leaves the last segment, by composing
):  # fmt: skip
    """Set the flag to 1 if what leaves a segment differs from what enters the next.

    Composing goes wrong where numbers leave the range of the dtype: a factor that overflows or underflows, an offset
    that overflows alone.
    """
    scan = sizes(scan, block)
    segment, b = program(scan, block)
    if segment < scan.segments:
        at = place(scan, block, segment, b)
        if at.begin < at.end:
            flip = size(walk.flip)
            is_last = tl.where(flip != 0, at.begin == 0, at.end == at.length)
            row = tl.where(is_last, at.index, segment + 1 - 2 * flip)
            handed = get(tl.where(is_last, final_state, entries), row, at, at.mask, 0.0)
            factor = get(maps.factor, segment, at, at.mask, 0.0)
            offset = get(maps.offset, segment, at, at.mask, 0.0)
            late = offset if overwrites else get(lates, segment, at, at.mask, 0.0)
            entry = get(entries, segment, at, at.mask, 0.0)
            leaves = get(exits, segment, at, at.mask, 0.0)
            right = consistent(rules, (factor, offset), late, entry, leaves, handed, overwrites)
            wrong = tl.max(tl.where(right, 0, tl.where(at.mask, 1, 0)), 0)
            if wrong != 0:
                tl.store(scan.flag, 1)
