"""Each segment as one affine map of the adjoint, for cells whose adjoint does not see the state."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .affine import after_selecting, as_head, identity, recent
from .arguments import scalars_of, sizes
from .context import Context
from .place import WORD, hidden, left_of, place, program, word_row
from .resets import bits_of, load_mask, where_reset
from .rows import (
    get_whole,
    grad_of_boundary,
    inputs_at,
    inputs_per_channel,
    load_tile,
    open_inputs,
    open_stream,
    put,
)


class Opened(NamedTuple):
    """The tensors of a program."""

    inputs: Any  # opened
    grad_h: Any  # opened
    codes: Any
    grad_checkpoints: Any


@triton.jit
def adjoint_word(c, map_, writes, late, mask, opened, first, MASKED: tl.constexpr):
    """The map of the steps so far, from the right, and of the 16 from `first` on, some beyond the end if MASKED.

    Its factor leaves resets out.
    """
    TILE: tl.constexpr = c.block.tile
    STATE: tl.constexpr = late.dtype
    factor, m = map_
    left = left_of(c.at, first, WORD)
    if c.form.codes:
        word = get_whole(opened.codes, word_row(c.scan, c.at, first), c.at)
        writes += c.cell.codes.writes(word)
    if c.form.boundaries:
        m += grad_of_boundary(c, opened.grad_checkpoints, first + WORD)
    resets = bits_of(c, mask)
    for j in tl.static_range(WORD - TILE, -1, -TILE):
        step = hidden(first + j, c.at)
        grads = load_tile(opened.grad_h, c.at, step, left - j, STATE, 1, TILE, MASKED)
        if not c.form.codes:
            tile = load_tile(
                opened.inputs, c.at, hidden(first + j, c.at), left - j, STATE, c.form.streams, TILE, MASKED
            )
        # Always true, which ptxas does not know. With codes, the branch keeps it from sinking the loads below. With
        # gates in float64, it keeps it from computing the gates of the next tile early, which spills.
        if MASKED or not (c.form.codes or (c.cell.gated and STATE == tl.float64)) or left > j:
            for i in tl.static_range(TILE - 1, -1, -1):
                if c.form.codes:
                    lam = c.cell.cotangent(inputs_per_channel(opened.inputs, c.form), 0.0, 0.0, grads[0][i], m, c.p)
                    before = c.cell.codes.pull(word, j + i, lam, c.p)
                    product = factor
                else:
                    x = inputs_at(opened.inputs, tile, c.form, i)
                    before = c.cell.pull(x, c.cell.cotangent(x, 0.0, 0.0, grads[0][i], m, c.p), c.p)
                    product = c.cell.pull(x, factor, c.p)
                before = where_reset(c, resets, j + i, 0.0, before)
                if MASKED:
                    m = tl.where(j + i < left, before, m)
                    factor = tl.where(j + i < left, product, factor)
                    late = tl.where(j + i < left, recent(c.cell.rules, before, late), late)
                else:
                    m = before
                    factor = product
                    late = recent(c.cell.rules, before, late)
    return (factor, m), writes, late


@triton.jit
def prepend_word(c, map_, mask, opened, first, MASKED: tl.constexpr):
    """The map of 16 steps from `first` on, then of those to their left, `map_`. Writes overwrite the state."""
    zeros = tl.zeros_like(map_[1])
    of_word, writes, _ = adjoint_word(c, (zeros + 1.0, zeros), zeros.to(tl.int32), zeros, mask, opened, first, MASKED)
    if c.form.codes:
        of_word = (tl.where(writes == 0, 1.0, 0.0).to(zeros.dtype), of_word[1])
    if c.form.resets:
        of_word = (tl.where(bits_of(c, mask) != 0, 0.0, of_word[0]), of_word[1])
    return after_selecting(map_, of_word)


@triton.jit
def until_written(c, map_, opened, whole):
    """The map of a segment, from the left until every channel has written or is reset: nothing passes that.

    Also the union of the words' masks.
    """
    first = c.at.begin
    mask = load_mask(c, first, WORD)
    seen = mask
    holds = 1
    while (holds != 0) & (first < whole):
        map_ = prepend_word(c, map_, mask, opened, first, False)
        holds = tl.max(tl.where(map_[0] != 0, 1, 0), 0)
        first += WORD
        if c.form.resets:
            seen = seen | mask
            mask = load_mask(c, first, WORD)
    if (holds != 0) & (whole < c.at.end):
        map_ = prepend_word(c, map_, mask, opened, whole, True)
        if c.form.resets:
            seen = seen | mask
    return map_, seen


@triton.jit
def from_the_right(c, map_, opened, whole):
    """The map of a segment, its writes, its recent m, and the union of its words' masks."""
    mask = load_mask(c, whole, WORD)
    seen = mask
    late = tl.zeros_like(map_[1])
    writes = late.to(tl.int32)
    if whole < c.at.end:
        map_, writes, late = adjoint_word(c, map_, writes, late, mask, opened, whole, True)
    mask = load_mask(c, whole - WORD, WORD)
    for w in range(0, (c.at.end - c.at.begin) // WORD):
        first = whole - (w + 1) * WORD
        mask_ahead = load_mask(c, first - WORD, WORD)
        map_, writes, late = adjoint_word(c, map_, writes, late, mask, opened, first, False)
        if c.form.resets:
            seen = seen | mask
        mask = mask_ahead
    return map_, writes, late, seen


@triton.jit
def summarize_adjoint_segment(c, inputs, codes, grad_h, grad_checkpoints, maps, lates, p_double):
    """`summarize_adjoint` for the segment of a program; `p_double` is c.p in float64."""
    STATE: tl.constexpr = maps.factor.dtype.element_ty
    at = c.at
    opened_inputs = open_inputs(inputs, c.scan, at, c.form, c.block, STATE)
    opened = Opened(opened_inputs, (open_stream(grad_h, c.scan, at, c.form, c.block),), codes, grad_checkpoints)
    map_ = identity(c.cell.rules, at.d, STATE)
    whole = at.begin + (at.end - at.begin) // WORD * WORD
    if c.form.overwrites:
        map_, seen = until_written(c, map_, opened, whole)
        factor, m = map_
    else:
        map_, writes, late, seen = from_the_right(c, map_, opened, whole)
        factor, m = map_
        if c.form.codes:
            factor = c.cell.codes.factor(writes, at.end - at.begin, p_double).to(STATE)
        put(lates, at.segment, at, late, at.mask)
    if c.form.resets:
        factor = as_head(factor, seen)
    put(maps.factor, at.segment, at, factor, at.mask)
    put(maps.offset, at.segment, at, m, at.mask)


@triton.jit
def summarize_adjoint(
    cell, form, block,
    inputs,  # the cell's inputs, a Stream each
    scan,
    scalars,  # of the cell, a Double each
    codes,  # [B, T // 16 + (N if packed else 1), D] int32, if form.codes
    grad_h,  # Stream [B, T, D]
    grad_checkpoints,  # as the checkpoints, or None
    maps,  # Maps: written
    lates,  # [segments, D]: written, the recent magnitudes of the m that end in the offset
    resets,  # Resets, or None
):  # fmt: skip
    """Each segment as the affine map from what its right end receives to what its left end passes on."""
    STATE: tl.constexpr = maps.factor.dtype.element_ty
    scan = sizes(scan, block)
    segment, b = program(scan, block)
    if segment < scan.segments:
        at = place(scan, block, segment, b)
        p = scalars_of(scalars, form, STATE)
        p_double = scalars_of(scalars, form, tl.float64)
        summarize_adjoint_segment(
            Context(cell, form, block, scan, at, p, resets), inputs, codes, grad_h, grad_checkpoints, maps, lates,
            p_double,
        )  # fmt: skip
