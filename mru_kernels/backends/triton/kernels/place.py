"""Where a program works: its segment of a sequence, its block of channels, and the rows that belong to them."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

WORD = tl.constexpr(16)  # steps of the write codes in an int32
GRID = tl.constexpr(1 << 30)  # programs on the grid's x axis; more go to y


class Place(NamedTuple):
    """The segment of a sequence and the block of channels that a program scans."""

    segment: Any  # its number; that of the sequence if sequences are scanned whole
    n: Any  # of the sequence, in the order of scanning
    index: Any  # of the sequence, in the order of cu_seqlens: the row of its states [N, D]
    batch: Any  # the row of streams [B, T, D]
    start: Any  # steps of the batch row that come before the sequence
    length: Any  # steps of the sequence
    begin: Any  # the first step of the segment
    end: Any  # the step after its last; the segment is empty if end <= begin
    first: Any  # the first channel
    d: Any  # [block.channels]: channels after the first; 0 if masked out, so that rows can be loaded without a mask
    mask: Any  # [block.channels]: whether there is such a channel
    width: Any  # D


@triton.jit
def program(scan, block):
    """The number of the segment, sequence or group that this program works on, and that of its block of channels."""
    unit = tl.program_id(1).to(tl.int64) * GRID + tl.program_id(0)
    blocks = (scan.channels + block.channels - 1) // block.channels
    return unit // blocks, unit % blocks


@triton.jit
def works(scan, segment):
    """Whether this program has a segment or sequence to scan."""
    programs = tl.where(scan.segment_size != 0, scan.segments, scan.sequences)
    return (segment < programs) & (tl.load(scan.flag, mask=scan.rescan != 0, other=1) != 0)


@triton.jit
def bounds(scan, n):
    """Index, start and length of the n-th sequence scanned. Offsets are clamped, as nothing has checked them."""
    if scan.packed != 0:
        index = tl.where(scan.reverse != 0, scan.sequences - 1 - n, n)
        low = tl.minimum(tl.maximum(tl.load(scan.offsets + index), 0), scan.time)
        high = tl.minimum(tl.maximum(tl.load(scan.offsets + index + 1), low), scan.time)
        start = tl.where(scan.reverse != 0, scan.time - high, low)
        length = high - low
    else:
        index = n
        start = n * 0
        length = scan.time
    return index, start, length


@triton.jit
def first_segment(scan, n):
    """The number of the first segment of a sequence. Those of packed sequences have numbers to spare."""
    if scan.packed != 0:
        _, start, _ = bounds(scan, n)
        segment = start // scan.segment_size + n
    else:
        segment = n * ((scan.time + scan.segment_size - 1) // scan.segment_size)
    return segment


@triton.jit
def sequence_of(scan, segment):
    """The sequence of a segment: the last one whose first segment has no higher number."""
    if scan.packed != 0:
        low = segment * 0
        high = scan.sequences
        while high - low > 1:
            middle = (low + high) // 2
            before = first_segment(scan, middle) <= segment
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle)
        n = low
    else:
        n = segment // tl.maximum(scan.segments // tl.maximum(scan.sequences, 1), 1)
    return n


@triton.jit
def place(scan, block, segment, b):
    """The place of segment `segment`, or of that sequence if sequences are scanned whole, and of block `b`."""
    n = segment
    begin = segment * 0
    if scan.segment_size != 0:
        n = sequence_of(scan, segment)
        begin = tl.maximum(segment - first_segment(scan, n), 0) * scan.segment_size
    index, start, length = bounds(scan, n)
    end = tl.where(scan.segment_size != 0, tl.minimum(begin + scan.segment_size, length), length)
    batch = tl.where(scan.packed != 0, 0, n)
    first = b * block.channels
    d = tl.arange(0, block.channels)
    mask = d < tl.minimum(scan.channels - first, block.channels).to(tl.int32)
    d = tl.max_contiguous(tl.multiple_of(tl.where(mask, d, 0), block.align), block.align)
    return Place(segment, n, index, batch, start, length, begin, end, first, d, mask, scan.channels)


@triton.jit
def left_of(at, step, N: tl.constexpr):
    """How many of N steps from `step` on the segment has."""
    return tl.minimum(at.end - step, N).to(tl.int32)


@triton.jit
def hidden(step, at):
    """A step of a segment, opaque to LLVM, which otherwise keeps the addresses of all steps in registers."""
    return tl.minimum(step, at.end)


# ------------------------------------------------------------------------- rows of what is not a stream


@triton.jit
def word_row(scan, at, step):
    """The row of the codes `[B (T // 16 + (N if packed else 1)), D]` that holds those of 16 steps."""
    first = tl.where(scan.packed != 0, at.start // WORD + at.n, at.n * (scan.time // WORD + 1))
    return first + step // WORD


@triton.jit
def checkpoint_row(scan, at, step, form):
    """The row of `[B ((T - 1) // chunk), D]` with the state that enters `step`, a multiple of the chunk above 0."""
    return at.batch * ((scan.time - 1) // form.chunk) + (at.start + step) // form.chunk - 1


@triton.jit
def sums_row(scan, at, form):
    """The row for the sums over the first chunk of a sequence; see `Call.sums`."""
    chunks = (scan.time + form.chunk - 1) // form.chunk
    return tl.where(scan.packed != 0, at.start // form.chunk + at.n, at.n * chunks)
