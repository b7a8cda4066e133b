"""Each segment as one affine map of the adjoint, for cells whose adjoint does not see the state."""

from __future__ import annotations

import triton
import triton.language as tl

from .affine import after_selecting, identity, recent
from .arguments import scalars_of, sizes
from .context import Context
from .place import WORD, hidden, left_of, place, program, word_row
from .rows import get_whole, inputs_at, inputs_per_channel, load_tile, open_inputs, open_stream, put


@triton.jit
def adjoint_word(c, map_, writes, late, opened, opened_grad, codes, first, MASKED: tl.constexpr):
    """The map of the steps so far, from the right, and of the 16 from `first` on, some beyond the end if MASKED."""
    TILE: tl.constexpr = c.block.tile
    STATE: tl.constexpr = late.dtype
    factor, m = map_
    left = left_of(c.at, first, WORD)
    if c.form.codes:
        word = get_whole(codes, word_row(c.scan, c.at, first), c.at)
        writes += c.cell.codes.writes(word)
    for j in tl.static_range(WORD - TILE, -1, -TILE):
        step = hidden(first + j, c.at)
        grads = load_tile(opened_grad, c.at, step, left - j, STATE, 1, TILE, MASKED)
        if not c.form.codes:
            tile = load_tile(opened, c.at, hidden(first + j, c.at), left - j, STATE, c.form.streams, TILE, MASKED)
        if MASKED or not c.form.codes or left > j:  # always true: ptxas does not sink the loads below a branch
            for i in tl.static_range(TILE - 1, -1, -1):
                if c.form.codes:
                    lam = c.cell.cotangent(inputs_per_channel(opened, c.form), 0.0, 0.0, grads[0][i], m)
                    before = c.cell.codes.pull(word, j + i, lam, c.p)
                    product = factor
                else:
                    x = inputs_at(opened, tile, c.form, i)
                    before = c.cell.pull(x, c.cell.cotangent(x, 0.0, 0.0, grads[0][i], m), c.p)
                    product = c.cell.pull(x, factor, c.p)
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
def prepend_word(c, map_, opened, opened_grad, codes, first, MASKED: tl.constexpr):
    """The map of 16 steps from `first` on, then of those to their left, `map_`. Writes reset the state."""
    zeros = tl.zeros_like(map_[1])
    of_word, writes, _ = adjoint_word(
        c, (zeros + 1.0, zeros), zeros.to(tl.int32), zeros, opened, opened_grad, codes, first, MASKED
    )
    if c.form.codes:
        of_word = (tl.where(writes == 0, 1.0, 0.0).to(zeros.dtype), of_word[1])
    return after_selecting(map_, of_word)


@triton.jit
def until_written(c, map_, opened, opened_grad, codes, whole):
    """The map of a segment, from the left until every channel has written: nothing passes these writes."""
    first = c.at.begin
    holds = 1
    while (holds != 0) & (first < whole):
        map_ = prepend_word(c, map_, opened, opened_grad, codes, first, False)
        holds = tl.max(tl.where(map_[0] != 0, 1, 0), 0)
        first += WORD
    if (holds != 0) & (whole < c.at.end):
        map_ = prepend_word(c, map_, opened, opened_grad, codes, whole, True)
    return map_


@triton.jit
def from_the_right(c, map_, opened, opened_grad, codes, whole):
    """The map of a segment, its writes and its recent m."""
    late = tl.zeros_like(map_[1])
    writes = late.to(tl.int32)
    if whole < c.at.end:
        map_, writes, late = adjoint_word(c, map_, writes, late, opened, opened_grad, codes, whole, True)
    for w in range(0, (c.at.end - c.at.begin) // WORD):
        first = whole - (w + 1) * WORD
        map_, writes, late = adjoint_word(c, map_, writes, late, opened, opened_grad, codes, first, False)
    return map_, writes, late


@triton.jit
def summarize_adjoint_segment(c, inputs, codes, grad_h, maps, lates, p_double):
    """`summarize_adjoint` for the segment of a program; `p_double` is c.p in float64."""
    STATE: tl.constexpr = maps.factor.dtype.element_ty
    at = c.at
    opened = open_inputs(inputs, c.scan, at, c.form, c.block, STATE)
    opened_grad = (open_stream(grad_h, c.scan, at, c.block),)
    map_ = identity(c.cell.rules, at.d, STATE)
    whole = at.begin + (at.end - at.begin) // WORD * WORD
    if c.form.writes_reset:
        factor, m = until_written(c, map_, opened, opened_grad, codes, whole)
    else:
        map_, writes, late = from_the_right(c, map_, opened, opened_grad, codes, whole)
        factor, m = map_
        if c.form.codes:
            factor = c.cell.codes.factor(writes, at.end - at.begin, p_double).to(STATE)
        put(lates, at.segment, at, late, at.mask)
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
    maps,  # Maps: written
    lates,  # [segments, D]: written, the recent magnitudes of the m that end in the offset
):  # fmt: skip
    """Each segment as the affine map from what its right end receives to what its left end passes on."""
    STATE: tl.constexpr = maps.factor.dtype.element_ty
    scan = sizes(scan, block)
    segment, b = program(scan, block)
    if segment < scan.segments:
        at = place(scan, block, segment, b)
        p = scalars_of(scalars, form, STATE)
        p_double = scalars_of(scalars, form, tl.float64)
        summarize_adjoint_segment(Context(cell, form, block, scan, at, p), inputs, codes, grad_h, maps, lates, p_double)
