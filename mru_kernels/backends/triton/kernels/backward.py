"""The gradients, chunk by chunk from the right. The states of a chunk are recomputed from the checkpoint before it."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .affine import recent
from .arguments import scalars_of, sizes
from .context import Context
from .place import WORD, checkpoint_row, hidden, left_of, place, program, sums_row, word_row, works
from .resets import bits_of, load_mask, load_state, where_reset
from .rows import (
    KEPT,
    USUAL,
    get,
    get_whole,
    grad_of_boundary,
    inputs_at,
    load_rows,
    load_tile,
    open_grads,
    open_inputs,
    open_stream,
    put,
    put_row,
    repeated,
    row_at,
    when,
    widened,
)


class Opened(NamedTuple):
    """The tensors of a program, opened."""

    inputs: Any
    grad_h: Any
    grads: Any


class Chunk(NamedTuple):
    """A chunk of a program's steps."""

    begin: Any  # its first step
    row: Any  # of its checkpoint
    resets: Any  # the bits of its steps
    reset_state: Any


@triton.jit
def resets_from(c, chunk, step):
    """The bits of a chunk's steps from `step` on."""
    bits = chunk.resets
    if c.form.resets:
        bits = bits >> (step - chunk.begin)
    return bits


@triton.jit
def recompute(c, s, row, opened, saved, chunk, step, TILES: tl.constexpr):
    """The state after TILES tiles of one word. The state before each goes to `states`, from row `row` on."""
    TILE: tl.constexpr = c.block.tile
    if c.form.codes:
        word = get_whole(saved.codes, word_row(c.scan, c.at, step), c.at) >> (2 * (step % WORD)).to(tl.int32)
    for j in tl.static_range(TILES):
        put(saved.states, row + j, c.at, s, c.at.mask, KEPT)
        if not c.form.codes:
            first = hidden(step + j * TILE, c.at)
            tile = load_tile(opened.inputs, c.at, first, TILE, s.dtype, c.form.streams, TILE, False, USUAL)
        resets = resets_from(c, chunk, step + j * TILE)
        for i in tl.static_range(TILE):
            s = where_reset(c, resets, i, chunk.reset_state, s)
            if c.form.codes:
                s = c.cell.codes.recompute(word, i, s, c.p)
            else:
                s = c.cell.recompute(inputs_at(opened.inputs, tile, c.form, i), s, c.p)
        if c.form.codes:
            word = word >> (2 * TILE)
    return s


@triton.jit
def recompute_chunk(c, s, room, opened, saved, chunk, tiles, TILES: tl.constexpr):
    """Recompute the whole tiles of a chunk, TILES at a time, from the state before it."""
    TILE: tl.constexpr = c.block.tile
    for tile in range(0, tiles - TILES + 1, TILES):
        s = recompute(c, s, room + tile, opened, saved, chunk, chunk.begin + tile * TILE, TILES)
    if tiles % TILES != 0:
        s = recompute(c, s, room + (tiles - 1), opened, saved, chunk, chunk.begin + (tiles - 1) * TILE, 1)
    return s


@triton.jit
def load_both(c, opened, step, left, MASKED: tl.constexpr):
    """A tile of the inputs and of the gradient of h, which a loop may carry until their turn comes."""
    JOINED: tl.constexpr = c.block.align > 1
    inputs = load_rows(opened.inputs, c.at, step, left, c.form.streams, JOINED, c.block.tile, MASKED)
    return inputs, load_rows(opened.grad_h, c.at, step, left, 1, JOINED, c.block.tile, MASKED)


@triton.jit
def states_within(c, s, opened, tile, resets, reset_state):
    """The states before each step of a tile and its reset, and after the last."""
    within = (s,)
    for i in tl.static_range(c.block.tile):
        s = where_reset(c, resets, i, reset_state, within[i])
        within = within + (c.cell.recompute(inputs_at(opened.inputs, tile, c.form, i), s, c.p),)
    return within


@triton.jit
def put_gradients(c, dx, rows, sums, opened, i, left, MASKED: tl.constexpr):
    """Store the gradients of streams at one step, and add those of inputs per channel to the sums."""
    totals = ()
    rows_before = ()
    for k in tl.static_range(len(opened.inputs)):
        if c.form.streams >> k & 1:
            mask = when(i < left, c.at.mask) if MASKED else c.at.mask
            put_row(rows[k], c, dx[k], mask)
            totals = totals + (sums[k],)
        elif c.form.channels >> k & 1:
            totals = totals + (sums[k] + (tl.where(i < left, dx[k], 0.0) if MASKED else dx[k]),)
        else:
            totals = totals + (sums[k],)
        rows_before = rows_before + (rows[k] - opened.grads[k][1],)
    return rows_before, totals + (sums[len(opened.inputs)],)


@triton.jit
def end_at_reset(c, resets, i: tl.constexpr, m, sums):
    """m, which ends at a reset: there it is a gradient of the reset state, the last of the sums."""
    if c.form.resets:
        totals = ()
        for k in tl.static_range(len(sums) - 1):
            totals = totals + (sums[k],)
        sums = totals + (sums[len(sums) - 1] + where_reset(c, resets, i, m, tl.zeros_like(m)),)
        m = where_reset(c, resets, i, 0.0, m)
    return m, sums


@triton.jit
def backward_tile(c, s, both, m, late, sums, opened, chunk, first, MASKED: tl.constexpr):
    """The gradients at the steps of a tile, some beyond the end if MASKED. Returns m, late and the sums."""
    TILE: tl.constexpr = c.block.tile
    ELEMENT: tl.constexpr = opened.inputs[0][0].dtype.element_ty
    inputs_tile = widened(both[0], ELEMENT, s.dtype)
    grad_tile = widened(both[1], ELEMENT, s.dtype)
    left = left_of(c.at, first, TILE)
    resets = resets_from(c, chunk, first)
    within = states_within(c, s, opened, inputs_tile, resets, chunk.reset_state)
    rows = ()
    for k in tl.static_range(len(opened.inputs)):
        rows = rows + (row_at(opened.grads[k], first) + (TILE - 1) * opened.grads[k][1],)
    for i in tl.static_range(TILE - 1, -1, -1):
        x = inputs_at(opened.inputs, inputs_tile, c.form, i)
        s = where_reset(c, resets, i, chunk.reset_state, within[i])  # again: registers are few
        before, dx = c.cell.vjp(x, s, within[i + 1], grad_tile[0][i], m, c.p)
        m = tl.where(i < left, before, m) if MASKED else before
        m, sums = end_at_reset(c, resets, i, m, sums)
        if c.cell.adjoint_sees_state:
            late = recent(c.cell.rules, m, late)
        rows, sums = put_gradients(c, dx, rows, sums, opened, i, left, MASKED)
    return m, late, sums


@triton.jit
def backward_chunk(c, m, late, ahead, opened, saved, room, chunk, HALF: tl.constexpr):
    """The gradients at the steps of a chunk. Returns m, late, the sums, and `ahead`.

    In half precision it loads the tile to the left before it computes one, across the border between chunks too.
    """
    TILE: tl.constexpr = c.block.tile
    at = c.at
    sums = repeated(tl.zeros_like(m), len(opened.inputs) + 1)
    begin = chunk.begin
    end = tl.minimum(begin + c.form.chunk, at.end)
    data = tl.where(begin > 0, saved.checkpoints, saved.initial)
    known = when((begin > 0) | (c.scan.has_initial != 0), at.mask)
    s = get(data, tl.where(begin > 0, chunk.row, at.index), at, known, 0.0)
    tiles = ((end - begin) // TILE).to(tl.int32)
    s = recompute_chunk(c, s, room, opened, saved, chunk, tiles, 2 if HALF else 1)  # as many bytes on the way
    last = begin + tiles * TILE
    if last < end:
        both = load_both(c, opened, last, left_of(at, last, TILE), True)
        m, late, sums = backward_tile(c, s, both, m, late, sums, opened, chunk, last, True)
    if not HALF or tiles > 0:
        if HALF:
            before = get_whole(saved.states, room + (tiles - 1), at, KEPT)
        first = last
        while first > begin:
            first = tl.maximum(first - TILE, begin)  # opaque to LLVM, as `hidden` is
            if HALF:
                s = before
                both = ahead
                before = get_whole(saved.states, room + (tl.maximum(first - TILE, begin) - begin) // TILE, at, KEPT)
                ahead = load_both(c, opened, tl.maximum(first - TILE, at.begin), 0, False)
            else:
                s = get_whole(saved.states, room + (first - begin) // TILE, at, KEPT)
                both = load_both(c, opened, first, 0, False)
            if not HALF or begin >= 0:  # always true: ptxas does not sink the loads below a branch
                m, late, sums = backward_tile(c, s, both, m, late, sums, opened, chunk, first, False)
    return m, late, sums, ahead


@triton.jit
def put_sums(c, grads, row, sums):
    """Store the sums over a chunk of the gradients of the inputs per channel and of the reset state."""
    for k in tl.static_range(len(grads)):
        if c.form.channels >> k & 1:
            if (c.scan.given >> k & 1) != 0:
                put(grads[k].data, row, c.at, sums[k], c.at.mask)
    if c.form.resets:
        if c.scan.has_reset_state != 0:
            put(c.resets.grads, row, c.at, sums[len(grads)], c.at.mask)


@triton.jit
def backward_segment(c, opened, saved, grad_final, grad_checkpoints, grads, grad_initial, lates):
    """`backward` for the segment or sequence of a program."""
    HALF: tl.constexpr = opened.inputs[0][0].dtype.element_ty.primitive_bitwidth == 16
    TILE: tl.constexpr = c.block.tile
    at = c.at
    m = get(grad_final, tl.where(c.scan.segment_size != 0, at.segment, at.index), at, at.mask, 0.0)
    late = tl.zeros_like(m)
    room = at.segment * (tl.minimum(c.scan.time, c.form.chunk) // TILE)
    chunks = (at.end - at.begin + c.form.chunk - 1) // c.form.chunk
    chunk = at.begin + (chunks - 1) * c.form.chunk
    row = checkpoint_row(c.scan, at, chunk, c.form)
    summed = sums_row(c.scan, at, c.form) + chunk // c.form.chunk
    left = chunks.to(tl.int32)
    reset_state = load_state(c)
    mask = load_mask(c, chunk, c.form.chunk)
    if left > 0:
        ahead = ()
        if HALF:
            first = tl.maximum(at.end - (at.end - at.begin) % TILE - TILE, at.begin)
            ahead = load_both(c, opened, first, left_of(at, first, TILE), True)
        while left > 0:
            mask_ahead = load_mask(c, chunk - c.form.chunk, c.form.chunk)
            if c.form.boundaries:
                m += grad_of_boundary(c, grad_checkpoints, chunk + c.form.chunk)
            of_chunk = Chunk(chunk, row, bits_of(c, mask), reset_state)
            m, late, sums, ahead = backward_chunk(c, m, late, ahead, opened, saved, room, of_chunk, HALF)
            mask = mask_ahead
            put_sums(c, grads, summed, sums)
            chunk -= c.form.chunk
            row -= 1
            summed -= 1
            left -= 1
    # Without a split `chunk` is negative here. LLVM cannot tell, so it does not keep the row's address from the start.
    put(grad_initial, tl.where((c.scan.segment_size == 0) & (chunk < 0), at.index, at.segment), at, m, at.mask)
    if c.cell.adjoint_sees_state:
        if c.scan.segment_size != 0:
            put(lates, at.segment, at, late, at.mask)


@triton.jit
def backward(
    cell, form, block,
    inputs,  # the cell's inputs, a Stream each
    scan,
    scalars,  # of the cell, a Double each
    saved,
    grad_h,  # Stream [B, T, D]
    grad_final,  # [N, D], or if time is split [segments, D]: what the right end receives
    grad_checkpoints,  # as the checkpoints, or None
    grads,  # of each input: a Stream [B, T, D], or [rows, D] with the sums over chunks of an input per channel
    grad_initial,  # [N, D], or if time is split [segments, D]: written, what the left end passes on
    lates,  # [segments, D]: written if the adjoint sees the state and time is split, the recent magnitudes of m
    resets,  # Resets, or None
):  # fmt: skip
    """Gradients of the inputs, and what passes to the left of the segment.

    Sums over chunks are added up afterwards: many equal terms, added one by one, would lose more than rounding.
    """
    STATE: tl.constexpr = grad_final.dtype.element_ty
    scan = sizes(scan, block)
    segment, b = program(scan, block)
    if works(scan, segment):
        at = place(scan, block, segment, b)
        opened_inputs = open_inputs(inputs, scan, at, form, block, STATE)
        opened_grad_h = open_stream(grad_h, scan, at, form, block)
        opened = Opened(opened_inputs, (opened_grad_h,), open_grads(grads, scan, at, form, block))
        p = scalars_of(scalars, form, STATE)
        backward_segment(
            Context(cell, form, block, scan, at, p, resets), opened, saved, grad_final, grad_checkpoints, grads,
            grad_initial, lates,
        )  # fmt: skip
