"""The forward pass over sequences, or over their segments from the states that enter them."""

from __future__ import annotations

import triton
import triton.language as tl

from ...backends.triton.kernels.place import place, program
from .layout import (
    Context,
    border_row,
    channels_of,
    decay_at,
    get_border,
    load_tile,
    mean_at,
    open_channels,
    open_inputs,
    plane_at,
    programs_of,
    put,
    segments_of,
    sizes,
    uncut,
)
from .step import INFINITY, PER_HEAD, STREAM, Border, add, close, open_border, step, then, update


@triton.jit
def forward_tile(c, inputs, y, state, first, N: tl.constexpr):
    """Write y at the N steps from `first` on. Returns the state after."""
    tile = load_tile(c, inputs, first, state.mean.dtype, N)
    row = y[0] + first * y[1]
    for i in tl.static_range(N):
        decay = decay_at(c, inputs, tile, i)
        state, _, _, out = step(tile.score[i], tile.value[i], decay, inputs.bonus, state, c.form)
        tl.store(row, out, mask=c.channels.mask)
        row += y[1]
    return state


@triton.jit
def forward_segment(c, score, value, decay, bonus, initial, entries, y, final_state, borders):
    """`forward` for the segment or sequence of a program."""
    at = c.at
    scan = c.scan
    inputs = open_inputs(c, score, value, decay, bonus, final_state.dtype.element_ty)
    opened_y = open_channels(y, c)
    if scan.segment_size != 0:
        mean, Z, z = get_border(c, entries, at.segment, True)
    else:
        mean, Z, z = get_border(c, initial, at.index, scan.has_initial != 0)
    begin = at.begin
    row = border_row(c, begin // scan.chunk)
    while begin < at.end:
        if (scan.saved != 0) & (begin > 0):
            put(c, borders, row, mean, (Z, z))
        end = tl.minimum(begin + scan.chunk, at.end)
        whole = end - (end - begin) % c.block.tile
        state = open_border(Border(mean, Z, z))
        for first in range(begin, whole, c.block.tile):
            state = forward_tile(c, inputs, opened_y, state, first, c.block.tile)
        for first in range(whole, end):
            state = forward_tile(c, inputs, opened_y, state, first, 1)
        mean, Z, z = close(state)
        begin = end
        row += 1
    if scan.segment_size == 0:
        put(c, final_state, at.index, mean, (Z, z))


@triton.jit
def forward(
    form, block,
    score,  # Stream [B, T, H]
    value,  # Stream [B, T, D]
    decay,  # Stream [B, T, H], or [H]
    bonus,  # [H]
    scan,
    initial,  # [N, D + 2 H]
    entries,  # [segments, D + 2 H], if time is cut: what enters each
    y,  # Stream [B, T, D]
    final_state,  # [N, D + 2 H]; if time is cut, `carry` writes it
    borders,  # [B ((T - 1) // chunk), D + 2 H]
):  # fmt: skip
    """y, borders and final states. The state is opened at each border and closed at the next, saved or not."""
    scan = sizes(scan, block)
    segment, b = program(scan, block)
    if segment < programs_of(scan):
        at = place(scan, block, segment, b)
        forward_segment(
            Context(form, block, scan, at, channels_of(block, scan, at)), score, value, decay, bonus, initial,
            entries, y, final_state, borders,
        )  # fmt: skip


# ------------------------------------------------------------------------- time in parallel


@triton.jit
def summarize_tile(c, inputs, state, total, rest, first, N: tl.constexpr):
    """The state after N steps, and the sum of their decays in two floats."""
    tile = load_tile(c, inputs, first, state.mean.dtype, N)
    for i in tl.static_range(N):
        decay = decay_at(c, inputs, tile, i)
        state, _ = update(tile.score[i], tile.value[i], decay, state, c.form)
        if c.form.decay == STREAM:
            total, rest = add(total, rest, decay)
    return state, total, rest


@triton.jit
def empty(c, STATE: tl.constexpr):
    """The mean and the log weight of an empty state, and 0 for each head."""
    zeros = tl.zeros(c.at.mask.shape, STATE)
    return tl.zeros(c.channels.mask.shape, STATE), zeros - INFINITY, zeros


@triton.jit
def summarize_segment(c, score, value, decay, maps):
    """`summarize` for the segment of a program."""
    STATE: tl.constexpr = maps.dtype.element_ty
    at = c.at
    inputs = open_inputs(c, score, value, decay, 0, STATE)
    mean, Z, zeros = empty(c, STATE)
    state = open_border(Border(mean, Z, zeros))
    total = zeros
    rest = zeros
    end = tl.maximum(at.end, at.begin)
    whole = end - (end - at.begin) % c.block.tile
    for first in range(at.begin, whole, c.block.tile):
        state, total, rest = summarize_tile(c, inputs, state, total, rest, first, c.block.tile)
    for first in range(whole, end):
        state, total, rest = summarize_tile(c, inputs, state, total, rest, first, 1)
    if c.form.decay == PER_HEAD:
        total = tl.where(end > at.begin, inputs.decay[0] * (end - at.begin).to(STATE), 0.0)
    mean, Z, z = close(state)
    put(c, maps, at.segment, mean, (total + rest, Z, z))


@triton.jit
def summarize(
    form, block, score, value, decay, scan,
    maps,  # [segments, D + 4 H]: of each the mean, the sum of decays, Z and z
):  # fmt: skip
    """The map of each segment: the state that it makes from an empty one, and the sum of its decays."""
    scan = sizes(scan, block)
    segment, b = program(scan, block)
    if segment < scan.segments:
        at = place(scan, block, segment, b)
        summarize_segment(
            Context(form, block, scan, at, channels_of(block, scan, at)), score, value, decay, maps
        )  # fmt: skip


@triton.jit
def get_map(c, maps, row, exists):
    """The sum of the decays and the state of a map; the identity if there is none."""
    mask = tl.where(exists, c.at.mask, False)
    mean = tl.load(mean_at(c, maps, row, 4), mask=tl.where(exists, c.channels.mask, False), other=0.0)
    decay = tl.load(plane_at(c, maps, row, 4, 0), mask=mask, other=0.0)
    Z = tl.load(plane_at(c, maps, row, 4, 1), mask=mask, other=float("-inf"))
    z = tl.load(plane_at(c, maps, row, 4, 2), mask=mask, other=0.0)
    return decay, Border(mean, Z, z)


@triton.jit
def walk(c, state, total, maps, begin, end, entries, WRITES: tl.constexpr):
    """The state after the segments in rows `begin` to `end` of `maps`, and `total` plus their decays.

    What enters each segment goes to `entries` if WRITES.
    """
    for first in range(begin, end, c.block.tile):
        decays = ()
        seconds = ()
        for i in tl.static_range(c.block.tile):
            decay, second = get_map(c, maps, first + i, first + i < end)
            decays = decays + (decay,)
            seconds = seconds + (second,)
        for i in tl.static_range(c.block.tile):
            if WRITES:
                if first + i < end:
                    put(c, entries, first + i, state.mean, (state.Z, state.z))
            state = then(state, decays[i], seconds[i], c.form)
            total += decays[i]
    return state, total


@triton.jit
def group_of(scan, at, group):
    """The first segment of a group of a sequence's segments, the one after its last, and if it is the last group."""
    first, count = segments_of(scan, at)
    begin = tl.minimum(group * scan.per_group, count)
    end = tl.minimum(begin + scan.per_group, count)
    return first + begin, first + end, group == tl.maximum((count - 1) // scan.per_group, 0)


@triton.jit
def fold_group(c, unit, maps, groups):
    """`fold` for the group of a program."""
    begin, end, _ = group_of(c.scan, c.at, unit % c.scan.groups)
    mean, Z, zeros = empty(c, maps.dtype.element_ty)
    state, total = walk(c, Border(mean, Z, zeros), zeros, maps, begin, end, maps, False)
    put(c, groups, unit, state.mean, (total, state.Z, state.z))


@triton.jit
def fold(
    form, block, scan, maps,
    groups,  # [N groups, D + 4 H]
):  # fmt: skip
    """The map of each group of segments."""
    scan = sizes(scan, block)
    unit, b = program(scan, block)
    if unit < scan.sequences * scan.groups:
        at = place(uncut(scan), block, unit // scan.groups, b)
        fold_group(Context(form, block, scan, at, channels_of(block, scan, at)), unit, maps, groups)


@triton.jit
def carry_group(c, unit, initial, maps, groups, entries, final_state):
    """`carry` for the group of a program."""
    n = c.at.n * c.scan.groups
    begin, end, is_last = group_of(c.scan, c.at, unit - n)
    mean, Z, z = get_border(c, initial, c.at.index, c.scan.has_initial != 0)
    state, total = walk(c, Border(mean, Z, z), tl.zeros_like(Z), groups, n, unit, entries, False)
    state, total = walk(c, state, total, maps, begin, end, entries, True)
    if is_last:
        put(c, final_state, c.at.index, state.mean, (state.Z, state.z))


@triton.jit
def carry(form, block, scan, initial, maps, groups, entries, final_state):
    """What enters each segment, `entries` [segments, D + 2 H], and the final states [N, D + 2 H]."""
    scan = sizes(scan, block)
    unit, b = program(scan, block)
    if unit < scan.sequences * scan.groups:
        at = place(uncut(scan), block, unit // scan.groups, b)
        carry_group(
            Context(form, block, scan, at, channels_of(block, scan, at)), unit, initial, maps, groups, entries,
            final_state,
        )  # fmt: skip
