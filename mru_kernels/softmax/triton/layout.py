"""What a kernel is given, and where a program finds its numbers.

    B batch, T time, H heads, G channels of a head, D = H G
    stream     [B, T, H] or [B, T, D], unit stride on the last axis, any strides on B and T
    row        mean [D], then planes [H] each, in the state dtype: borders have Z and z
    sequence, step, segment, chunk       as in backends/triton/kernels

A program is one warp for most heads, and scans a block of heads with all their channels. If a head has one channel,
blocks have one axis, else two: [heads, group].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...backends.triton.kernels.arguments import size
from ...backends.triton.kernels.place import first_segment
from ...backends.triton.kernels.rows import when
from .step import PER_HEAD, STREAM


class Block(NamedTuple):
    """How a program lays out its numbers and its loads. A kernel is compiled for each."""

    align: Any  # rows of heads start at multiples of it, in elements, and a lane may load as many at once
    group_align: Any  # the same of rows of channels
    tile: Any  # steps whose rows are loaded before the first is used
    channels: Any  # heads of a program, a power of two
    group: Any  # a power of two, at least G; 1 if and only if G is 1


class Stream(NamedTuple):
    """A tensor [B, T, H] or [B, T, D] with its strides in units of what rows are aligned to; or [H]."""

    data: Any
    batch: Any
    time: Any


class Scan(NamedTuple):
    """The sizes of a scan, encoded. Flags are 0 or 1."""

    offsets: Any  # [N + 1] int64, of packed sequences
    sequences: Any  # N
    time: Any  # T
    channels: Any  # H; the host gives it in units of `align`
    group: Any  # G; the host gives it in units of `group_align` if it is not 1
    segment_size: Any  # steps of a segment; 0: sequences are scanned whole
    segments: Any  # how many there is room for, those of all sequences together
    chunk: Any  # steps between two borders
    reverse: Any
    packed: Any
    has_initial: Any
    saved: Any  # whether borders are
    room: Any  # rows in which a program of `backward` keeps states
    groups: Any  # of segments, in a sequence
    per_group: Any  # segments in each


class Inputs(NamedTuple):
    """The streams as pointers to their rows at step 0 of a sequence and the stride of a step; and numbers of heads."""

    score: Any
    value: Any
    decay: Any
    bonus: Any


class Tile(NamedTuple):
    """The inputs of some steps."""

    score: Any
    value: Any
    decay: Any


class Channels(NamedTuple):
    """The channels of a program's heads."""

    first: Any  # the first of all
    d: Any  # [channels]: after the first; of those that are masked out, others that exist
    mask: Any  # [channels]


class Context(NamedTuple):
    """A program's view of its call. Pass it on as an argument: Triton makes tensors of constants that are assigned."""

    form: Any
    block: Any
    scan: Any
    at: Any  # its Place, of heads
    channels: Any  # its Channels


@triton.jit
def sizes(scan, block):
    """The scan with its integers decoded."""
    group = size(scan.group) * block.group_align if block.group > 1 else size(scan.group)
    return Scan(
        scan.offsets, size(scan.sequences), size(scan.time), size(scan.channels) * block.align, group,
        size(scan.segment_size), size(scan.segments), size(scan.chunk), size(scan.reverse), size(scan.packed),
        size(scan.has_initial), size(scan.saved), size(scan.room), size(scan.groups), size(scan.per_group),
    )  # fmt: skip


@triton.jit
def uncut(scan):
    """The scan of whole sequences."""
    return Scan(
        scan.offsets, scan.sequences, scan.time, scan.channels, scan.group, scan.segment_size * 0, scan.segments,
        scan.chunk, scan.reverse, scan.packed, scan.has_initial, scan.saved, scan.room, scan.groups, scan.per_group,
    )  # fmt: skip


@triton.jit
def programs_of(scan):
    """How many segments there are, or sequences if they are scanned whole."""
    return tl.where(scan.segment_size != 0, scan.segments, scan.sequences)


@triton.jit
def channels_of(block, scan, at):
    """The channels of a program's heads."""
    if block.group > 1:
        j = tl.arange(0, block.group)
        exists = j < scan.group.to(tl.int32)
        j = tl.max_contiguous(tl.multiple_of(tl.where(exists, j, 0), block.group_align), block.group_align)
        d = at.d[:, None] * scan.group.to(tl.int32) + j[None, :]
        d = tl.max_contiguous(tl.multiple_of(d, (1, block.group_align)), (1, block.group_align))
        mask = at.mask[:, None] & exists[None, :]
    else:
        d = at.d
        mask = at.mask
    return Channels(at.first * scan.group, d, mask)


# ------------------------------------------------------------------------- streams


@triton.jit
def _open(stream, c, first, d, ALIGN: tl.constexpr):
    time = size(stream.time) * ALIGN
    t = tl.where(c.scan.reverse != 0, c.scan.time - 1 - c.at.start, c.at.start)
    row = stream.data + (c.at.batch * (size(stream.batch) * ALIGN) + t * time + first)
    row = tl.multiple_of(row, ALIGN * (stream.data.dtype.element_ty.primitive_bitwidth // 8))  # bytes
    return row + d, tl.where(c.scan.reverse != 0, -time, time)


@triton.jit
def open_heads(stream, c):
    """A stream [B, T, H], opened."""
    return _open(stream, c, c.at.first, c.at.d, c.block.align)


@triton.jit
def open_channels(stream, c):
    """A stream [B, T, D], opened."""
    return _open(stream, c, c.channels.first, c.channels.d, c.block.group_align)


@triton.jit
def open_inputs(c, score, value, decay, bonus, STATE: tl.constexpr):
    decays = (0, 0)
    bonuses = 0.0
    if c.form.decay == STREAM:
        decays = open_heads(decay, c)
    elif c.form.decay == PER_HEAD:
        decays = (tl.load(decay.data + c.at.first + c.at.d).to(STATE), 0)
    if c.form.bonus:
        bonuses = tl.load(bonus + c.at.first + c.at.d).to(STATE)
    return Inputs(open_heads(score, c), open_channels(value, c), decays, bonuses)


@triton.jit
def load_rows(opened, step, STATE: tl.constexpr, N: tl.constexpr):
    """The rows of N steps in the state dtype."""
    row = opened[0] + step * opened[1]
    values = ()
    for _ in tl.static_range(N):
        values = values + (tl.load(row).to(STATE),)
        row += opened[1]
    return values


@triton.jit
def load_tile(c, inputs, step, STATE: tl.constexpr, N: tl.constexpr):
    decays = ()
    if c.form.decay == STREAM:
        decays = load_rows(inputs.decay, step, STATE, N)
    return Tile(load_rows(inputs.score, step, STATE, N), load_rows(inputs.value, step, STATE, N), decays)


@triton.jit
def decay_at(c, inputs, tile, i: tl.constexpr):
    """The decay at the i-th step of a tile; 0 if there is none."""
    if c.form.decay == STREAM:
        decay = tile.decay[i]
    else:
        decay = inputs.decay[0]
    return decay


# ------------------------------------------------------------------------- rows


@triton.jit
def mean_at(c, data, row, PLANES: tl.constexpr):
    """Pointers to the mean of a row that has PLANES planes."""
    return data + row * (c.scan.channels * (c.scan.group + PLANES)) + (c.channels.first + c.channels.d)


@triton.jit
def plane_at(c, data, row, PLANES: tl.constexpr, i: tl.constexpr):
    """Pointers to the i-th of a row's PLANES planes."""
    first = row * (c.scan.channels * (c.scan.group + PLANES)) + c.scan.channels * (c.scan.group + i)
    return data + first + (c.at.first + c.at.d)


@triton.jit
def put(c, data, row, mean, planes):
    """Store a row. An odd number of planes has room for one more, so that rows start where vectors may."""
    PLANES: tl.constexpr = len(planes) + len(planes) % 2
    tl.store(mean_at(c, data, row, PLANES), mean, mask=c.channels.mask)
    for i in tl.static_range(len(planes)):
        tl.store(plane_at(c, data, row, PLANES, i), planes[i], mask=c.at.mask)


@triton.jit
def get_planes(c, data, row, N: tl.constexpr):
    """The N planes of a row."""
    planes = ()
    for i in tl.static_range(N):
        planes = planes + (tl.load(plane_at(c, data, row, N + N % 2, i)),)
    return planes


@triton.jit
def border_row(c, chunk):
    """The row of [B ((T - 1) // chunk), D + 2 H] with the state that enters the chunk number `chunk` > 0."""
    return c.at.batch * ((c.scan.time - 1) // c.scan.chunk) + c.at.start // c.scan.chunk + chunk - 1


@triton.jit
def get_border(c, data, row, known):
    """Mean, Z and z of a row; those of an empty state if not `known`."""
    mean = tl.load(mean_at(c, data, row, 2), mask=when(known, c.channels.mask), other=0.0)
    mask = when(known, c.at.mask)
    Z = tl.load(plane_at(c, data, row, 2, 0), mask=mask, other=float("-inf"))
    z = tl.load(plane_at(c, data, row, 2, 1), mask=mask, other=0.0)
    return mean, Z, z


@triton.jit
def segments_of(scan, at):
    """The number of the first segment of a sequence, and how many segments it has."""
    return first_segment(scan, at.n), (at.length + scan.segment_size - 1) // scan.segment_size
