"""The gradients, chunk by chunk from the right. The states of a chunk are recomputed from the border before it."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...backends.triton.kernels.place import GRID, place, program, sums_row
from ...backends.triton.kernels.rows import row_at
from .forward import group_of
from .layout import (
    Context,
    border_row,
    channels_of,
    decay_at,
    get_border,
    get_planes,
    load_rows,
    load_tile,
    mean_at,
    open_channels,
    open_heads,
    open_inputs,
    programs_of,
    put,
    sizes,
    uncut,
)
from .step import (
    PER_HEAD,
    STREAM,
    Border,
    State,
    enter_adjoint,
    leave_adjoint,
    open_border,
    past_factor,
    reciprocal,
    spread,
    step,
    step_adjoint,
    total,
    update,
)


class Opened(NamedTuple):
    """The streams of a program, opened."""

    inputs: Any
    grad_y: Any
    score: Any
    value: Any
    decay: Any


class Sums(NamedTuple):
    """Over the steps of a chunk."""

    decay: Any  # [channels]: the gradient
    bonus: Any  # [channels]: the gradient
    factor: Any  # [heads]: the product of the factors of the past


@triton.jit
def room_at(c, room, row):
    """Pointers to the mean in a program's row of `room`, and to the other numbers of a state."""
    HEADS: tl.constexpr = c.block.channels
    GROUP: tl.constexpr = c.block.group
    heads = tl.arange(0, HEADS)
    row = room + row * (HEADS * (GROUP + 3))
    others = row + HEADS * GROUP + heads
    if c.form.grouped:
        means = row + (heads[:, None] * GROUP + tl.arange(0, GROUP)[None, :])
    else:
        means = row + heads
    return means, others, others + HEADS, others + 2 * HEADS


@triton.jit
def recompute(c, inputs, room, row, state, first, N: tl.constexpr):
    """The state after N steps. The state before them goes to row `row` of `room`."""
    mean, q, m, low = room_at(c, room, row)
    tl.store(mean, state.mean)
    tl.store(q, state.q)
    tl.store(m, state.m)
    tl.store(low, state.c)
    tile = load_tile(c, inputs, first, state.mean.dtype, N)
    for i in tl.static_range(N):
        decay = decay_at(c, inputs, tile, i)
        state, _ = update(tile.score[i], tile.value[i], decay, state, c.form)
    return state


@triton.jit
def backward_tile(c, opened, room, row, adjoint, sums, first, N: tl.constexpr):
    """The gradients at N steps, from the state before them in row `row` of `room`. Returns the adjoint and the sums."""
    mean, q, m, low = room_at(c, room, row)
    state = State(tl.load(mean), tl.load(q), tl.load(m), tl.load(low))
    tile = load_tile(c, opened.inputs, first, state.mean.dtype, N)
    grads = load_rows(opened.grad_y, first, state.mean.dtype, N)
    states = ()
    steps = ()
    for i in tl.static_range(N):
        states = states + (state,)
        decay = decay_at(c, opened.inputs, tile, i)
        state, share, read, y = step(tile.score[i], tile.value[i], decay, opened.inputs.bonus, state, c.form)
        steps = steps + ((share, read, y),)
    rows = (
        row_at(opened.score, first + (N - 1)), row_at(opened.value, first + (N - 1)),
        row_at(opened.decay, first + (N - 1)),
    )  # fmt: skip
    for i in tl.static_range(N - 1, -1, -1):
        g = grads[i]
        if c.form.grouped:
            g = tl.where(c.channels.mask, g, 0.0)  # sums over a head take none of its masked channels
        share, read, y = steps[i]
        adjoint, grad = step_adjoint(g, tile.value[i], states[i], share, read, y, adjoint, c.form)
        if c.form.gradients:
            tl.store(rows[0], total(grad.score, c.form), mask=c.at.mask)
            tl.store(rows[1], grad.value, mask=c.channels.mask)
            if c.form.decay == STREAM:
                tl.store(rows[2], total(grad.decay, c.form), mask=c.at.mask)
            rows = (rows[0] - opened.score[1], rows[1] - opened.value[1], rows[2] - opened.decay[1])
            sums = Sums(sums.decay + grad.decay, sums.bonus + grad.bonus, sums.factor)
        else:
            sums = Sums(sums.decay, sums.bonus, sums.factor * past_factor(share))
    return adjoint, sums


@triton.jit
def backward_chunk(c, opened, room, border, grad_mean, grad_Z, begin, end):
    """From the gradients of the state at a chunk's end those at its start; the sums; and the change of the mean."""
    TILE: tl.constexpr = c.block.tile
    start = open_border(border)
    tiles = (end - begin) // TILE
    rest = (end - begin) % TILE
    last = begin + tiles * TILE
    state = start
    for i in range(0, tiles):
        state = recompute(c, opened.inputs, room, i, state, begin + i * TILE, TILE)
    for i in range(0, rest):
        state = recompute(c, opened.inputs, room, tiles + i, state, last + i, 1)
    tl.debug_barrier()  # a lane may load what another one has stored
    adjoint = enter_adjoint(grad_mean, grad_Z, state, c.form)
    zeros = tl.zeros_like(grad_Z)
    sums = Sums(zeros, zeros, start.q * reciprocal(state.q, c.form.nvidia))
    for i in range(0, rest):
        j = rest - 1 - i
        adjoint, sums = backward_tile(c, opened, room, tiles + j, adjoint, sums, last + j, 1)
    for i in range(0, tiles):
        j = tiles - 1 - i
        adjoint, sums = backward_tile(c, opened, room, j, adjoint, sums, begin + j * TILE, TILE)
    tl.debug_barrier()  # before the next chunk takes the room
    grad_mean, grad_Z = leave_adjoint(adjoint, start, c.form)
    return grad_mean, grad_Z, sums, start.mean - state.mean


@triton.jit
def get_gradient(c, data, row):
    """The gradients of the mean and of Z in a row, both [channels]: that of Z stands at a head's first channel."""
    mean, Z, _ = get_border(c, data, row, True)
    if c.form.grouped:
        Z = tl.where(c.channels.mask & (tl.arange(0, c.block.group)[None, :] == 0), spread(Z, c.form), 0.0)
    return mean, Z


@triton.jit
def put_sums(c, data, row, sums):
    """Store sums over a chunk in a row [H]."""
    at = data + row * c.scan.channels + (c.at.first + c.at.d)
    tl.store(at, total(sums, c.form), mask=c.at.mask)


@triton.jit
def backward_segment(
    c, score, value, decay, bonus, initial, borders, grad_y, grad_final, grad_score, grad_value, grad_decay,
    grad_bonus, grad_initial, shifts, room,
):  # fmt: skip
    """`backward` for the segment or sequence of a program."""
    STATE: tl.constexpr = room.dtype.element_ty
    at = c.at
    scan = c.scan
    opened = Opened(
        open_inputs(c, score, value, decay, bonus, STATE), open_channels(grad_y, c), open_heads(grad_score, c),
        open_channels(grad_value, c), open_heads(grad_decay, c) if c.form.decay == STREAM else (0, 0),
    )  # fmt: skip
    own = tl.where(scan.segment_size != 0, at.segment, at.index)
    unit = tl.program_id(1).to(tl.int64) * GRID + tl.program_id(0)
    room += unit * (scan.room * (c.block.channels * (c.block.group + 3)))
    if c.form.gradients:
        grad_mean, grad_Z = get_gradient(c, grad_final, own)
    else:
        grad_mean = tl.zeros(c.channels.mask.shape, STATE)
        grad_Z = tl.zeros(c.channels.mask.shape, STATE)
    factor = tl.full(at.mask.shape, 1.0, STATE)
    shift = tl.zeros(c.channels.mask.shape, STATE)
    chunks = tl.maximum(at.end - at.begin + scan.chunk - 1, 0) // scan.chunk
    last = at.begin // scan.chunk + chunks - 1
    saved = border_row(c, last)
    summed = sums_row(scan, at, scan) + last
    for i in range(0, chunks):
        begin = at.begin + (chunks - 1 - i) * scan.chunk
        known = (begin > 0) | (scan.has_initial != 0)
        before = tl.where(begin > 0, saved - i, at.index)
        mean, Z, z = get_border(c, tl.where(begin > 0, borders, initial), before, known)
        grad_mean, grad_Z, sums, change = backward_chunk(
            c, opened, room, Border(mean, Z, z), grad_mean, grad_Z, begin, tl.minimum(begin + scan.chunk, at.end)
        )
        if c.form.gradients:
            if c.form.decay == PER_HEAD:
                put_sums(c, grad_decay.data, summed - i, sums.decay)
            if c.form.bonus:
                put_sums(c, grad_bonus, summed - i, sums.bonus)
        factor *= sums.factor
        shift += change
    of_head = total(grad_Z, c.form)
    if c.form.gradients:
        put(c, grad_initial, own, grad_mean, (of_head, of_head))
    else:
        put(c, grad_initial, own, grad_mean, (of_head, factor))
        put(c, shifts, own, shift, ())


@triton.jit
def backward(
    form, block, score, value, decay, bonus, scan, initial, borders,
    grad_y,  # Stream [B, T, D]
    grad_final,  # [N, D + 2 H], or if time is cut [segments, D + 2 H]: what the right end receives
    grad_score,  # Stream [B, T, H]
    grad_value,  # Stream [B, T, D]
    grad_decay,  # Stream [B, T, H], or [rows, H] with the sums over chunks
    grad_bonus,  # [rows, H], the same
    grad_initial,  # [N, D + 2 H], or if time is cut [segments, D + 2 H]: written, what the left end passes on
    shifts,  # [segments, D]: written without form.gradients
    room,  # for each program, the states before the tiles of a chunk: [scan.room, heads of a block times (group + 3)]
):  # fmt: skip
    """Gradients of the inputs, and what passes to the left of the segment.

    Without form.gradients, the map of each segment: what passes to the left of it if 0 comes from the right, with the
    factor of what comes in the plane of z, and the shift of the mean.
    """
    scan = sizes(scan, block)
    segment, b = program(scan, block)
    if segment < programs_of(scan):
        at = place(scan, block, segment, b)
        backward_segment(
            Context(form, block, scan, at, channels_of(block, scan, at)), score, value, decay, bonus, initial,
            borders, grad_y, grad_final, grad_score, grad_value, grad_decay, grad_bonus, grad_initial, shifts, room,
        )  # fmt: skip


# ------------------------------------------------------------------------- time in parallel


@triton.jit
def walk_adjoint(c, grad_mean, grad_Z, factor, shift, maps, shifts, begin, end, entries, WRITES: tl.constexpr):
    """Gradients of the state before the segments in rows `begin` to `end` from those after them.

    `factor` and `shift` of the segments to the right become those of all. What enters each goes to `entries`.
    """
    TILE: tl.constexpr = c.block.tile
    last = end
    while last > begin:
        means = ()
        planes = ()
        changes = ()
        for i in tl.static_range(TILE):
            row = tl.maximum(last - 1 - i, begin)
            means = means + (tl.load(mean_at(c, maps, row, 2)),)
            planes = planes + (get_planes(c, maps, row, 2),)
            changes = changes + (tl.load(mean_at(c, shifts, row, 0)),)
        for i in tl.static_range(TILE):
            exists = last - 1 - i >= begin
            if WRITES:
                if exists:
                    put(c, entries, last - 1 - i, grad_mean, (grad_Z, grad_Z))
            f = tl.where(exists, planes[i][1], 1.0)
            change = tl.where(exists, changes[i], 0.0)
            of_mean = grad_mean * tl.where(c.channels.mask, change, 0.0)
            grad_Z = f * (grad_Z + total(of_mean, c.form)) + tl.where(exists, planes[i][0], 0.0)
            grad_mean = spread(f, c.form) * grad_mean + tl.where(exists, means[i], 0.0)
            factor = factor * f
            shift = shift + change
        last -= TILE
    return grad_mean, grad_Z, factor, shift


@triton.jit
def fold_adjoint_group(c, unit, maps, shifts, groups, group_shifts):
    """`fold_adjoint` for the group of a program."""
    STATE: tl.constexpr = maps.dtype.element_ty
    begin, end, _ = group_of(c.scan, c.at, unit % c.scan.groups)
    zeros = tl.zeros(c.channels.mask.shape, STATE)
    nothing = tl.zeros(c.at.mask.shape, STATE)
    mean, Z, factor, shift = walk_adjoint(c, zeros, nothing, nothing + 1, zeros, maps, shifts, begin, end, maps, False)
    put(c, groups, unit, mean, (Z, factor))
    put(c, group_shifts, unit, shift, ())


@triton.jit
def fold_adjoint(
    form, block, scan,
    maps,  # [segments, D + 2 H]
    shifts,  # [segments, D]
    groups,  # [N groups, D + 2 H]
    group_shifts,  # [N groups, D]
):  # fmt: skip
    """The maps of the segments of each group as one."""
    scan = sizes(scan, block)
    unit, b = program(scan, block)
    if unit < scan.sequences * scan.groups:
        at = place(uncut(scan), block, unit // scan.groups, b)
        fold_adjoint_group(
            Context(form, block, scan, at, channels_of(block, scan, at)), unit, maps, shifts, groups, group_shifts
        )  # fmt: skip


@triton.jit
def carry_adjoint_group(c, unit, maps, shifts, groups, group_shifts, grad_final, entries, grad_initial):
    """`carry_adjoint` for the group of a program."""
    n = c.at.n * c.scan.groups
    begin, end, _ = group_of(c.scan, c.at, unit - n)
    mean, Z, _ = get_border(c, grad_final, c.at.index, True)
    zeros = tl.zeros_like(mean)
    mean, Z, factor, shift = walk_adjoint(
        c, mean, Z, tl.zeros_like(Z), zeros, groups, group_shifts, unit + 1, n + c.scan.groups, entries, False
    )
    mean, Z, factor, shift = walk_adjoint(c, mean, Z, factor, shift, maps, shifts, begin, end, entries, True)
    if unit == n:
        put(c, grad_initial, c.at.index, mean, (Z, Z))


@triton.jit
def carry_adjoint(
    form, block, scan, maps, shifts, groups, group_shifts, grad_final,
    entries,  # [segments, D + 2 H]
    grad_initial,  # [N, D + 2 H]
):  # fmt: skip
    """The gradients that enter each segment from the right, and those of the initial states."""
    scan = sizes(scan, block)
    unit, b = program(scan, block)
    if unit < scan.sequences * scan.groups:
        at = place(uncut(scan), block, unit // scan.groups, b)
        carry_adjoint_group(
            Context(form, block, scan, at, channels_of(block, scan, at)), unit, maps, shifts, groups, group_shifts,
            grad_final, entries, grad_initial,
        )  # fmt: skip
