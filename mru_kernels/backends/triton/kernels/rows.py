"""Loads and stores of rows: those of states `[rows, D]`, and tiles of the rows of streams `[B, T, D]`.

An opened tensor is a pair: of a stream, pointers to its row at step 0 of the sequence and the stride from step to step;
of an input per channel, its values, and 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..parts import pairs, parts
from .arguments import size
from .place import checkpoint_row

#: Which lines the second-level cache evicts first, last, or in their turn.
STREAMED, KEPT, USUAL = (tl.constexpr(policy) for policy in ("evict_first", "evict_last", ""))


@triton.jit
def when(condition, mask):
    """`mask` if a scalar condition is true. (The interpreter mistypes `mask & condition`.)"""
    return tl.where(condition, mask, False)


@triton.jit
def get(data, row, at, mask, other):
    """A row of `[rows, D]`."""
    return tl.load(data + row * at.width + (at.first + at.d), mask=mask, other=other)


@triton.jit
def get_whole(data, row, at, POLICY: tl.constexpr = USUAL):
    """A row of `[rows, D]` without a mask."""
    return tl.load(data + row * at.width + (at.first + at.d), eviction_policy=POLICY)


@triton.jit
def put(data, row, at, value, mask, POLICY: tl.constexpr = USUAL):
    tl.store(data + row * at.width + (at.first + at.d), value, mask=mask, eviction_policy=POLICY)


@triton.jit
def grad_of_boundary(c, grads, step):
    """The gradient of the state that is saved before `step`; 0 if none is."""
    is_saved = (step % c.form.chunk == 0) & (step < c.at.length)
    return get(grads, checkpoint_row(c.scan, c.at, step, c.form), c.at, when(is_saved, c.at.mask), 0.0)


@triton.jit
def open_stream(stream, scan, at, form, block):
    """A stream, opened."""
    first = at.first // 2 if form.doubled else at.first
    time = size(stream.time) * block.align
    t = tl.where(scan.reverse != 0, scan.time - 1 - at.start, at.start)
    row = stream.data + (at.batch * (size(stream.batch) * block.align) + t * time + first)
    row = tl.multiple_of(row, block.align * (stream.data.dtype.element_ty.primitive_bitwidth // 8))  # bytes
    return row + (at.d // 2 if form.doubled else at.d), tl.where(scan.reverse != 0, -time, time)


@triton.jit
def put_row(row, c, value, mask):
    """Store the row of a stream; with form.doubled the first of two neighbours."""
    if c.form.doubled:
        mask = when(c.at.d % 2 == 0, mask)
    tl.store(row, value, mask=mask, eviction_policy=STREAMED)


@triton.jit
def open_inputs(inputs, scan, at, form, block, STATE: tl.constexpr):
    """The inputs, opened. One that is not given is 1, a constant if it would be a stream."""
    opened = ()
    for i in tl.static_range(len(inputs)):
        if form.streams >> i & 1:
            opened = opened + (open_stream(inputs[i], scan, at, form, block),)
        elif form.channels >> i & 1:
            given = when((scan.given >> i & 1) != 0, at.d >= 0)
            value = tl.load(inputs[i].data + at.first + at.d, mask=given, other=1.0)
            opened = opened + ((value.to(STATE), 0),)
        else:
            opened = opened + ((1.0, 0),)
    return opened


@triton.jit
def open_grads(grads, scan, at, form, block):
    """The gradients of the inputs that are streams, opened."""
    opened = ()
    for i in tl.static_range(len(grads)):
        if form.streams >> i & 1:
            opened = opened + (open_stream(grads[i], scan, at, form, block),)
        else:
            opened = opened + ((0, 0),)
    return opened


@triton.jit
def row_at(opened, step):
    """Pointers to the row of a step."""
    return opened[0] + step * opened[1]


@triton.jit
def joined(x):
    """Neighbours in half precision as one integer: a loop would carry each in a register of its own."""
    if x.dtype.primitive_bitwidth == 16:
        low, high = parts(x.to(tl.uint16, bitcast=True).to(tl.uint32))
        x = low | (high << 16)
    return x


@triton.jit
def load_rows(
    opened, at, step, left, STREAMS: tl.constexpr, JOINED: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
    POLICY: tl.constexpr = STREAMED,
):  # fmt: skip
    """Of each stream (bit i of STREAMS) the rows of TILE steps, as they lie in memory; of other inputs ().

    If MASKED, only `left` steps exist; for the others it loads the last row again.
    """
    tile = ()
    for k in tl.static_range(len(opened)):
        values = ()
        if STREAMS >> k & 1:
            row = row_at(opened[k], tl.minimum(step, at.end - 1) if MASKED else step)
            for i in tl.static_range(TILE):
                value = tl.load(row, eviction_policy=POLICY)
                values = values + (joined(value) if JOINED else value,)
                row += tl.where(i + 1 < left, opened[k][1], 0) if MASKED else opened[k][1]
        tile = tile + (values,)
    return tile


@triton.jit
def widened(rows, ELEMENT: tl.constexpr, STATE: tl.constexpr):
    """The rows of `load_rows` in the state dtype."""
    tile = ()
    for k in tl.static_range(len(rows)):
        values = ()
        for i in tl.static_range(len(rows[k])):
            x = rows[k][i]
            if x.dtype == tl.uint32:
                low = (x & 0xFFFF).to(tl.uint16).to(ELEMENT, bitcast=True)
                x = pairs(low, (x >> 16).to(tl.uint16).to(ELEMENT, bitcast=True))
            values = values + (x.to(STATE),)
        tile = tile + (values,)
    return tile


@triton.jit
def load_tile(
    opened, at, step, left, STATE: tl.constexpr, STREAMS: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
    POLICY: tl.constexpr = STREAMED,
):  # fmt: skip
    """`load_rows`, in the state dtype."""
    rows = load_rows(opened, at, step, left, STREAMS, False, TILE, MASKED, POLICY)
    return widened(rows, STATE, STATE)


@triton.jit
def inputs_at(opened, tile, form, i: tl.constexpr):
    """All inputs at the i-th step of a tile."""
    x = ()
    for k in tl.static_range(len(opened)):
        if form.streams >> k & 1:
            x = x + (tile[k][i],)
        else:
            x = x + (opened[k][0],)
    return x


@triton.jit
def inputs_per_channel(opened, form):
    """The inputs where no step is meant: those per channel, and 1 for each stream, which must not be read."""
    x = ()
    for k in tl.static_range(len(opened)):
        if form.streams >> k & 1:
            x = x + (1.0,)
        else:
            x = x + (opened[k][0],)
    return x


@triton.jit
def repeated(value, N: tl.constexpr):
    out = ()
    for _ in tl.static_range(N):
        out = out + (value,)
    return out
