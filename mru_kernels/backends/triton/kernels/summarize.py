"""Each segment as one affine map of the state, for the forward pass."""

from __future__ import annotations

import triton
import triton.language as tl

from .affine import as_head, identity, recent
from .arguments import scalars_of, sizes
from .context import Context
from .forward import enter, enter_after_reset
from .place import WORD, hidden, left_of, place, program, word_row
from .resets import bits_of, last_of, load_mask, where_reset
from .rows import inputs_at, load_rows, load_tile, open_inputs, put, widened


@triton.jit
def load_ahead(c, opened, step):
    """Rows of a tile, which a loop carries until their turn comes."""
    return load_rows(opened, c.at, step, 0, c.form.streams, c.block.align > 1, c.block.tile, False)


@triton.jit
def encode_tile(c, opened, tile, j, left, MASKED: tl.constexpr):
    """The codes of the steps of a tile, the j-th of a word and the next. If MASKED, `left` steps of the word exist."""
    codes = tl.zeros((c.block.channels,), tl.int32)
    for i in tl.static_range(c.block.tile):
        code = c.cell.codes.encode(inputs_at(opened, tile, c.form, i))
        if MASKED:
            code = tl.where(j + i < left, code, 0)
        codes = codes | (code << (2 * i))
    return codes


@triton.jit
def add_tile(c, map_, late, resets, reset_state, opened, tile, j, left, MASKED: tl.constexpr):
    """The map of the steps so far and of those of a tile, see `encode_tile`; and the recent magnitude.

    Of steps with a reset the factor is not that of a head: `summarize_segment` makes it one.
    """
    factor, offset = map_
    for i in tl.static_range(c.block.tile):
        x = inputs_at(opened, tile, c.form, i)
        offset = where_reset(c, resets, i, reset_state, offset)
        after = c.cell.step(x, offset, c.p)
        product = c.cell.push(x, factor, c.p)
        if MASKED:
            offset = tl.where(j + i < left, after, offset)
            factor = tl.where(j + i < left, product, factor)
            late = tl.where(j + i < left, recent(c.cell.rules, offset, late), late)
        else:
            offset = after
            factor = product
            late = recent(c.cell.rules, offset, late)
    return (factor, offset), late


@triton.jit
def add_codes(c, map_, word, mask, reset_state):
    """The map of the steps so far and of the 16 of a word. Only the codes after the last reset count."""
    offset = map_[1]
    if c.form.resets:
        last = last_of(mask)
        offset = tl.where(last >= 0, reset_state, offset)
        before = 2 * tl.maximum(last, 0)
        word = (word >> before) << before
    return map_[0], c.cell.codes.step_word(word, offset, c.p)


@triton.jit
def add_word(c, ahead, map_, writes, late, mask, reset_state, opened, codes, first, whole, MASKED: tl.constexpr):
    """The map of the steps so far and of the 16 from `first` on. If MASKED, some lie beyond the end.

    Codes are stored, and their writes counted: the factor is a function of that number.
    """
    ELEMENT: tl.constexpr = opened[0][0].dtype.element_ty
    STATE: tl.constexpr = late.dtype
    TILE: tl.constexpr = c.block.tile
    left = left_of(c.at, first, WORD)
    word = tl.zeros_like(writes)
    resets = bits_of(c, mask)
    steps = tl.minimum(whole - first, WORD).to(tl.int32)  # LLVM would unroll the loop if it knew
    for j in range(0, steps, TILE):
        if ELEMENT.primitive_bitwidth == 16 and not MASKED:
            tile = widened(ahead, ELEMENT, STATE)
            ahead = load_ahead(c, opened, tl.minimum(first + j + TILE, whole - TILE))
        else:
            tile = load_tile(opened, c.at, hidden(first + j, c.at), left - j, STATE, c.form.streams, TILE, MASKED)
        if MASKED or left > j:  # always true: ptxas does not sink the loads below a branch
            if c.form.codes:
                word = word | (encode_tile(c, opened, tile, j, left, MASKED) << (2 * j))
            else:
                map_, late = add_tile(c, map_, late, resets, reset_state, opened, tile, j, left, MASKED)
        if c.form.resets:
            resets = resets >> TILE
    if c.form.codes:
        put(codes, word_row(c.scan, c.at, first), c.at, word, c.at.mask)
        writes += c.cell.codes.writes(word)
        map_ = add_codes(c, map_, word, mask, reset_state)
    return ahead, map_, writes, late


@triton.jit
def summarize_segment(c, inputs, codes, maps, lates, p_double):
    """`summarize` for the segment of a program; `p_double` is c.p in float64."""
    STATE: tl.constexpr = maps.factor.dtype.element_ty
    HALF: tl.constexpr = inputs[0].data.dtype.element_ty.primitive_bitwidth == 16
    at = c.at
    opened = open_inputs(inputs, c.scan, at, c.form, c.block, STATE)
    factor, offset = identity(c.cell.rules, at.d, STATE)
    map_ = (factor, enter(c, opened, offset))
    late = tl.full((c.block.channels,), 1.0 if c.form.codes else 0.0, STATE)  # a coded step adds at most 1
    writes = tl.zeros((c.block.channels,), tl.int32)
    reset_state = enter_after_reset(c, opened)
    mask = load_mask(c, at.begin, WORD)
    seen = mask
    whole = at.end - (at.end - at.begin) % WORD
    if at.begin < whole:
        ahead = load_ahead(c, opened, at.begin) if HALF else ()
        for first in range(at.begin, whole, WORD):
            mask_ahead = load_mask(c, first + WORD, WORD)
            ahead, map_, writes, late = add_word(
                c, ahead, map_, writes, late, mask, reset_state, opened, codes, first, whole, False
            )
            if c.form.resets:
                seen = seen | mask
            mask = mask_ahead
    if whole < at.end:
        _, map_, writes, late = add_word(
            c, (), map_, writes, late, mask, reset_state, opened, codes, whole, at.end, True
        )
        if c.form.resets:
            seen = seen | mask
    factor, offset = map_
    if c.form.codes:
        factor = c.cell.codes.factor(writes, at.end - at.begin, p_double).to(STATE)
    if c.form.resets:
        factor = as_head(factor, seen)
    put(maps.factor, at.segment, at, factor, at.mask)
    put(maps.offset, at.segment, at, offset, at.mask)
    if not c.form.overwrites:
        put(lates, at.segment, at, late, at.mask)


@triton.jit
def summarize(
    cell, form, block,
    inputs,  # the cell's inputs, a Stream each
    scan,
    scalars,  # of the cell, a Double each
    codes,  # [B, T // 16 + (N if packed else 1), D] int32: written if form.codes
    maps,  # Maps: written
    lates,  # [segments, D]: written, the recent magnitudes of the states that end in the offset
    resets,  # Resets, or None
):  # fmt: skip
    """Each segment as one affine map, and its codes."""
    STATE: tl.constexpr = maps.factor.dtype.element_ty
    scan = sizes(scan, block)
    segment, b = program(scan, block)
    if segment < scan.segments:
        at = place(scan, block, segment, b)
        p = scalars_of(scalars, form, STATE)
        p_double = scalars_of(scalars, form, tl.float64)
        summarize_segment(
            Context(cell, form, block, scan, at, p, resets), inputs, codes, maps, lates, p_double,
        )  # fmt: skip
