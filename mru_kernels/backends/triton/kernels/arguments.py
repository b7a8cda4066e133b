"""What a kernel is given, on the host and on the device.

Triton compiles a kernel again for an integer that is 1, divisible by 16 or wider than 32 bits. So the host encodes
every size, stride and flag as an odd integer of 64 bits (`encode`), and the kernel decodes it (`size`).
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import triton
import triton.language as tl

_SHIFT = tl.constexpr(1 << 61)


class Form(NamedTuple):
    """What a call gives to its cell. A kernel is compiled for each form."""

    streams: Any  # bit i: input i is a stream
    channels: Any  # bit i: input i comes per channel, given or not
    codes: Any  # whether write codes stand for the streams wherever these would be read again
    overwrites: Any  # whether every write overwrites the state
    resets: Any  # whether the state is reset before some steps
    boundaries: Any  # whether the checkpoints have a gradient
    chunk: Any  # steps between two checkpoints
    doubled: Any = tl.constexpr(False)  # whether a channel has two parts in states and one in streams


class Block(NamedTuple):
    """How a program lays out its channels and its loads. A kernel is compiled for each."""

    align: Any  # elements: rows of streams start at multiples of it, and a lane may load as many at once
    tile: Any  # steps whose rows are loaded before the first is used; or maps, in a walk
    channels: Any  # how many a program scans, a power of two


class Stream(NamedTuple):
    """A tensor `[B, T, D]` with strides in units of `align` elements; or `[D]`, whose strides are not read.

    With form.doubled D is half of that of states, and each element belongs to two neighbours of a block.
    """

    data: Any
    batch: Any
    time: Any


class Scan(NamedTuple):
    """The sizes of a scan, and which part of the sequences it is. Flags are 0 or 1."""

    offsets: Any  # [N + 1] int64, of packed sequences
    flag: Any  # [1] int64, set by `check`
    slots: Any  # [N] int64: the row of each sequence's state, if states are in slots
    sequences: Any  # N
    time: Any  # T
    channels: Any  # D; the host gives it in units of `align`
    segment_size: Any  # steps of a segment; 0: sequences are scanned whole
    segments: Any  # how many there is room for, those of all sequences together
    reverse: Any
    packed: Any
    given: Any  # bit i: input i is given
    has_initial: Any
    has_reset_state: Any
    saved: Any  # rows of checkpoints; 0: none are wanted
    rescan: Any  # whether this launch scans sequences whole after a split, and only if `flag` is set
    slot_count: Any  # rows of the states in slots; -1: the state of sequence n has row n


class Walk(NamedTuple):
    """How one program walks over the segments of a sequence."""

    groups: Any  # of segments, in a sequence
    per_group: Any  # segments in each
    flip: Any  # whether it starts from the right


class Maps(NamedTuple):
    """The affine maps of segments or groups, s -> factor s + offset: both [segments, D] in the state dtype."""

    factor: Any
    offset: Any


class Resets(NamedTuple):
    """Where the state becomes another one before a step."""

    mask: Any  # [B, T] uint8, in the order of time
    state: Any  # [N, D]; zeros if there is none
    grads: Any  # [rows, D]: its gradient, sums over chunks that `backward` writes


class Saved(NamedTuple):
    """What `backward` recomputes states from, and where it keeps them."""

    initial: Any  # [N, D]
    codes: Any  # [B, T // 16 + (N if packed else 1), D] int32
    checkpoints: Any  # [B, (T - 1) // chunk, D]
    states: Any  # [segments * (min(T, chunk) // tile), D]: room for the states before the tiles of a chunk


class Double(NamedTuple):
    """The bits of a float64. Triton would pass a Python float as float32."""

    high: Any
    low: Any


def encode(n: int) -> int:
    """An integer below 2^61 in magnitude as one that is odd and 64 bits wide."""
    return 2 * (n + _SHIFT.value) + 1


def encode_double(x: float) -> Double:
    (bits,) = struct.unpack("<Q", struct.pack("<d", x))
    return Double(encode(bits >> 32), encode(bits & 0xFFFFFFFF))


@triton.jit
def size(n):
    """What `encode` was given."""
    return (n >> 1) - _SHIFT


@triton.jit
def sizes(scan, block):
    """The scan with its integers decoded."""
    return Scan(
        scan.offsets, scan.flag, scan.slots, size(scan.sequences), size(scan.time), size(scan.channels) * block.align,
        size(scan.segment_size), size(scan.segments), size(scan.reverse), size(scan.packed), size(scan.given),
        size(scan.has_initial), size(scan.has_reset_state), size(scan.saved), size(scan.rescan), size(scan.slot_count),
    )  # fmt: skip


@triton.jit
def scalars_of(doubles, form, STATE: tl.constexpr):
    """The scalars of the cell in a dtype. Where writes overwrite the state, the first one, epsilon, is constant: 0."""
    values = ()
    for i in tl.static_range(len(doubles)):
        if i == 0 and form.overwrites:
            values = values + (tl.full((), 0.0, STATE),)
        else:
            bits = (size(doubles[i].high) << 32) | size(doubles[i].low)
            values = values + (bits.to(tl.float64, bitcast=True).to(STATE),)
    return values
