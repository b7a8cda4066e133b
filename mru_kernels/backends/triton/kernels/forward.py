"""The forward pass over sequences, or over their segments from the states that enter them."""

from __future__ import annotations

import triton
import triton.language as tl

from .arguments import scalars_of, sizes
from .context import Context
from .place import WORD, checkpoint_row, hidden, left_of, place, program, word_row, works
from .resets import bits_of, load_mask, load_state, where_reset
from .rows import (
    get,
    get_whole,
    inputs_at,
    inputs_per_channel,
    load_tile,
    open_inputs,
    open_stream,
    put,
    put_row,
    row_at,
    when,
)


@triton.jit
def state_row(scan, at):
    """The row of the sequence's initial and final state. A slot may be none of `scan.slot_count`."""
    slot = tl.load(scan.slots + at.index, mask=scan.slot_count >= 0, other=0)
    return tl.where(scan.slot_count >= 0, slot, at.index)


@triton.jit
def has_state(scan, at):
    """Whether the sequence has a state; one whose slot is none of those that there are is skipped."""
    row = state_row(scan, at)
    return (scan.slot_count < 0) | ((row >= 0) & (row < scan.slot_count))


@triton.jit
def enter(c, opened, s):
    """The state that enters a segment, if the cell changes the one that enters its sequence."""
    begins = (c.at.begin == 0) & (c.at.length > 0)
    return tl.where(begins, c.cell.enter(inputs_per_channel(opened, c.form), s), s)


@triton.jit
def enter_after_reset(c, opened):
    """The state that enters a step after a reset."""
    state = load_state(c)
    if c.form.resets:
        state = c.cell.enter(inputs_per_channel(opened, c.form), state)
    return state


@triton.jit
def forward_word(c, s, word, resets, reset_state, opened, opened_h, first, MASKED: tl.constexpr):
    """Write h at the 16 steps from `first` on, which have the bits `resets`. If MASKED, some lie beyond the end.

    Returns the state after.
    """
    left = left_of(c.at, first, WORD)
    for j in range(0, WORD, c.block.tile):
        if not c.form.codes:
            step = hidden(first + j, c.at)
            tile = load_tile(opened, c.at, step, left - j, s.dtype, c.form.streams, c.block.tile, MASKED)
        row = row_at(opened_h, hidden(first + j, c.at))
        for i in tl.static_range(c.block.tile):
            before = where_reset(c, resets, i, reset_state, s)
            if c.form.codes:
                x = inputs_per_channel(opened, c.form)
                after = c.cell.codes.step(word, i, before, c.p)
            else:
                x = inputs_at(opened, tile, c.form, i)
                after = c.cell.step(x, before, c.p)
            if MASKED:
                s = tl.where(j + i < left, after, s)
            else:
                s = after
            mask = when(j + i < left, c.at.mask) if MASKED else c.at.mask
            put_row(row, c, c.cell.output(x, before, s, c.p), mask)
            row += opened_h[1]
        if c.form.codes:
            word = word >> (2 * c.block.tile)
        if c.form.resets:
            resets = resets >> c.block.tile
    return s


@triton.jit
def forward_segment(c, inputs, initial, entries, codes, h, final_state, checkpoints):
    """`forward` for the segment or sequence of a program."""
    at = c.at
    scan = c.scan
    opened = open_inputs(inputs, scan, at, c.form, c.block, final_state.dtype.element_ty)
    opened_h = open_stream(h, scan, at, c.form, c.block)
    if scan.segment_size != 0:
        s = get(entries, at.segment, at, at.mask, 0.0)
    else:
        s = get(initial, state_row(scan, at), at, when(scan.has_initial != 0, at.mask), 0.0)
    s = enter(c, opened, s)
    reset_state = enter_after_reset(c, opened)
    mask = load_mask(c, at.begin, WORD)
    word = tl.zeros((c.block.channels,), tl.int32)
    if c.form.codes:
        word = get(codes, word_row(scan, at, at.begin), at, when(at.begin < at.end, at.mask), 0)
    whole = at.end - (at.end - at.begin) % WORD
    for first in range(at.begin, whole, WORD):
        after = first + WORD
        ahead = word
        if c.form.codes:
            ahead = get_whole(codes, word_row(scan, at, tl.minimum(after, at.end - 1)), at)
        mask_ahead = load_mask(c, after, WORD)
        s = forward_word(c, s, word, bits_of(c, mask), reset_state, opened, opened_h, first, False)
        word = ahead
        mask = mask_ahead
        if (scan.saved != 0) & (after % c.form.chunk == 0) & (after < at.length):
            put(checkpoints, checkpoint_row(scan, at, after, c.form), at, s, at.mask)
    if whole < at.end:
        s = forward_word(c, s, word, bits_of(c, mask), reset_state, opened, opened_h, whole, True)
    put(final_state, tl.where(scan.segment_size != 0, at.segment, state_row(scan, at)), at, s, at.mask)


@triton.jit
def forward(
    cell, form, block,
    inputs,  # the cell's inputs, a Stream each
    scan,
    scalars,  # of the cell, a Double each
    initial,  # [N, D], or [slots, D]
    entries,  # [segments, D], if time is split
    codes,  # [B, T // 16 + (N if packed else 1), D] int32, if form.codes
    h,  # Stream [B, T, D]
    final_state,  # [N, D], or `initial` if states are in slots; if time is split [segments, D], what leaves a segment
    checkpoints,  # [B, (T - 1) // chunk, D]
    resets,  # Resets, or None
):  # fmt: skip
    """h, checkpoints and final states, from the streams or from the codes."""
    STATE: tl.constexpr = final_state.dtype.element_ty
    scan = sizes(scan, block)
    segment, b = program(scan, block)
    if works(scan, segment):
        at = place(scan, block, segment, b)
        p = scalars_of(scalars, form, STATE)
        if has_state(scan, at):
            forward_segment(
                Context(cell, form, block, scan, at, p, resets), inputs, initial, entries, codes, h, final_state,
                checkpoints,
            )  # fmt: skip
