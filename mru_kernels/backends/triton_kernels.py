"""The scan over a cell in Triton: one source for every cell, dtype and split of time.

    B batch, T time, D channels     streams [B, T, D], unit stride on D, any strides on B and T
    sequence                        one run of the recurrence: a batch row, or one span of the packed time axis
    step                            0 is the first step scanned of a sequence, in time the last one when reversed
    segment                         steps that one program scans while others scan the same sequence; 0: no split
    slot                            where a segment keeps its summary: a program each, some left empty when packed
    chunk                           steps between two saved boundary states
    word                            the events of 16 steps, 2 bits each from the low bits up
    tile                            steps whose rows are loaded ahead of their use

A program is one warp that holds BD channels, 16 bytes of a stream a lane, and walks time with the state in registers;
no lane needs the values of another. A complex channel counts as two, its real and its imaginary part, in one lane.
Without a split that is all. With one, a sequence takes summaries of its segments, a walk over these summaries (`fold`,
`carry`), and the segments again from their entry states; where steps fit events these are packed on the way, and the
streams are not read again. `check` then decides whether the call is scanned again as a whole (csrc/cells/cut.h). Where
a write forgets, the adjoint's summary of a segment ends where all channels have written. The summaries issue all loads
of a tile before its first use; in half precision, whose rows take half the registers, `summarize` and `backward` issue
those of the next tile too.

Offsets are 64-bit. Every sum and product is taken in a fixed order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .triton_cells import PAIRS, count_pairs, pairs, parts

WORD = tl.constexpr(16)
GRID = tl.constexpr(1 << 30)  # programs on the grid's x axis; more go to y
_SHIFT = tl.constexpr(1 << 61)
#: What leaves the second-level cache first, last, or in its turn.
STREAMED, KEPT, USUAL = (tl.constexpr(policy) for policy in ("evict_first", "evict_last", ""))


class Stream(NamedTuple):
    """A tensor [B, T, D] and its strides in units of ALIGN elements; or [D], with no strides."""

    data: Any
    batch: Any
    time: Any


class Scan(NamedTuple):
    """The sizes of a scan; channels in units of ALIGN. Flags are 0 or 1."""

    sequences: Any
    time: Any
    channels: Any
    segment: Any
    slots: Any
    reverse: Any
    packed: Any
    has_alpha: Any
    has_initial: Any
    saved: Any  # rows of boundary states; 0: none wanted
    redo: Any  # whether sequences are scanned whole again, if `flag` is not 0; `slots` are those of the cut


class Walk(NamedTuple):
    """How the segments of a sequence are walked: groups, segments in each, from the right or not."""

    groups: Any
    per_group: Any
    flip: Any


class Place(NamedTuple):
    """Where a program works: the n-th sequence scanned, its row among states and its batch row; the position of its
    first step among those of the batch row, and its length; the steps [begin, end) of the segment, none if end <=
    begin; the channels `first` + d, where masked out that of d = 0, so that a row can be loaded without a mask.
    """

    slot: Any
    n: Any
    index: Any
    batch: Any
    start: Any
    length: Any
    begin: Any
    end: Any
    first: Any
    d: Any
    mask: Any
    width: Any  # D


def encode(n: int) -> int:
    """Triton compiles anew for an integer that is 1, a multiple of 16 or 64 bits wide: make each odd and wide."""
    return 2 * (n + _SHIFT.value) + 1


@triton.jit
def size(n):
    return (n >> 1) - _SHIFT


@triton.jit
def sizes(scan, ALIGN: tl.constexpr):
    return Scan(
        size(scan.sequences), size(scan.time), size(scan.channels) * ALIGN, size(scan.segment), size(scan.slots),
        size(scan.reverse), size(scan.packed), size(scan.has_alpha), size(scan.has_initial), size(scan.saved),
        size(scan.redo),
    )  # fmt: skip


# ------------------------------------------------------------------------- where a program works


@triton.jit
def program(scan, BD: tl.constexpr):
    """The program's item and block of channels."""
    unit = tl.program_id(1).to(tl.int64) * GRID + tl.program_id(0)
    blocks = (scan.channels + BD - 1) // BD
    return unit // blocks, unit % blocks


@triton.jit
def works(scan, slot, flag):
    """Whether this program has a segment or sequence to scan."""
    programs = tl.where(scan.segment != 0, scan.slots, scan.sequences)
    return (slot < programs) & (tl.load(flag, mask=scan.redo != 0, other=1) != 0)


@triton.jit
def bounds(scan, offsets, n):
    """Index, position of the first step, and length of the n-th sequence scanned. Offsets are clamped, not trusted."""
    if scan.packed != 0:
        index = tl.where(scan.reverse != 0, scan.sequences - 1 - n, n)
        low = tl.minimum(tl.maximum(tl.load(offsets + index), 0), scan.time)
        high = tl.minimum(tl.maximum(tl.load(offsets + index + 1), low), scan.time)
        start = tl.where(scan.reverse != 0, scan.time - high, low)
        length = high - low
    else:
        index = n
        start = n * 0
        length = scan.time
    return index, start, length


@triton.jit
def first_slot(scan, offsets, n):
    """Slots rise with n and never meet: a sequence takes at most one more than its share of whole segments."""
    if scan.packed != 0:
        _, start, _ = bounds(scan, offsets, n)
        slot = start // scan.segment + n
    else:
        slot = n * ((scan.time + scan.segment - 1) // scan.segment)
    return slot


@triton.jit
def place(scan, offsets, slot, block, ALIGN: tl.constexpr, BD: tl.constexpr):
    n = slot
    begin = slot * 0
    if scan.segment != 0:
        if scan.packed != 0:
            low = slot * 0
            high = scan.sequences
            while high - low > 1:
                middle = (low + high) // 2
                before = first_slot(scan, offsets, middle) <= slot
                low = tl.where(before, middle, low)
                high = tl.where(before, high, middle)
            n = low
        else:
            n = slot // tl.maximum(scan.slots // tl.maximum(scan.sequences, 1), 1)
        begin = tl.maximum(slot - first_slot(scan, offsets, n), 0) * scan.segment
    index, start, length = bounds(scan, offsets, n)
    end = tl.where(scan.segment != 0, tl.minimum(begin + scan.segment, length), length)
    batch = tl.where(scan.packed != 0, 0, n)
    first = block * BD
    d = tl.arange(0, BD)
    mask = d < tl.minimum(scan.channels - first, BD).to(tl.int32)
    d = tl.max_contiguous(tl.multiple_of(tl.where(mask, d, 0), ALIGN), ALIGN)
    return Place(slot, n, index, batch, start, length, begin, end, first, d, mask, scan.channels)


@triton.jit
def when(condition, mask):
    """mask, if a scalar condition holds. (The interpreter mistypes `mask & condition`.)"""
    return tl.where(condition, mask, False)


@triton.jit
def get(data, row, at, mask, other):
    """A row of [rows, D]."""
    return tl.load(data + row * at.width + (at.first + at.d), mask=mask, other=other)


@triton.jit
def get_whole(data, row, at, POLICY: tl.constexpr = USUAL):
    """The same without a mask."""
    return tl.load(data + row * at.width + (at.first + at.d), eviction_policy=POLICY)


@triton.jit
def put(data, row, at, value, mask, POLICY: tl.constexpr = USUAL):
    tl.store(data + row * at.width + (at.first + at.d), value, mask=mask, eviction_policy=POLICY)


@triton.jit
def rows_of(stream, scan, at, ALIGN: tl.constexpr):
    """Pointers to a stream's row at step 0 of a sequence, and the stride from step to step."""
    time = size(stream.time) * ALIGN
    t = tl.where(scan.reverse != 0, scan.time - 1 - at.start, at.start)
    row = stream.data + (at.batch * (size(stream.batch) * ALIGN) + t * time + at.first)
    row = tl.multiple_of(row, ALIGN * (stream.data.dtype.element_ty.primitive_bitwidth // 8))  # bytes
    return row + at.d, tl.where(scan.reverse != 0, -time, time)


@triton.jit
def word_row(scan, at, step):
    """The row of [B, T // 16 + (N if packed else 1), D] that holds the events of 16 steps."""
    first = tl.where(scan.packed != 0, at.start // WORD + at.n, at.n * (scan.time // WORD + 1))
    return first + step // WORD


@triton.jit
def checkpoint_row(scan, at, step, CHUNK: tl.constexpr):
    """The row of [B, (T - 1) // chunk, D] that holds the state which enters `step` > 0, a multiple of the chunk."""
    return at.batch * ((scan.time - 1) // CHUNK) + (at.start + step) // CHUNK - 1


@triton.jit
def sums_rows(scan, start, n, CHUNK: tl.constexpr):
    """The rows of sums over chunks that n sequences take, with all steps before `start`."""
    return tl.where(scan.packed != 0, start // CHUNK + n, n * ((scan.time + CHUNK - 1) // CHUNK))


# ------------------------------------------------------------------------- inputs, and tuples of blocks


@triton.jit
def open_inputs(inputs, scan, at, STATE: tl.constexpr, CHANNELS: tl.constexpr, ALIGN: tl.constexpr):
    """Per input, its rows; or, where it comes per channel (bit i of CHANNELS), its values."""
    opened = ()
    for i in tl.static_range(len(inputs)):
        if CHANNELS >> i & 1:
            opened = opened + ((tl.load(inputs[i].data + at.first + at.d, mask=at.mask, other=0.0).to(STATE), 0),)
        else:
            opened = opened + (rows_of(inputs[i], scan, at, ALIGN),)
    return opened


@triton.jit
def left_of(at, step, N: tl.constexpr):
    """How many of N steps from `step` on the segment has."""
    return tl.minimum(at.end - step, N).to(tl.int32)


@triton.jit
def hidden(step, at):
    """A step of a segment. LLVM does not see that it is one of a progression, of which it would hold all addresses."""
    return tl.minimum(step, at.end)


@triton.jit
def row_at(opened, step):
    """Pointers to the row of a step."""
    return opened[0] + step * opened[1]


@triton.jit
def packed(x):
    """Neighbours in half precision as one integer: a loop would carry each in a register of its own."""
    if x.dtype.primitive_bitwidth == 16:
        low, high = parts(x.to(tl.uint16, bitcast=True).to(tl.uint32))
        x = low | (high << 16)
    return x


@triton.jit
def load_rows(
    opened, at, step, left, CHANNELS: tl.constexpr, PACKED: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
    POLICY: tl.constexpr = STREAMED,
):  # fmt: skip
    """Per input, its values at TILE steps as they lie in memory; if MASKED, those of any steps for what is not left."""
    tile = ()
    for k in tl.static_range(len(opened)):
        values = ()
        if CHANNELS >> k & 1:
            values = repeated(opened[k][0], TILE)
        else:
            row = row_at(opened[k], tl.minimum(step, at.end - 1) if MASKED else step)
            for i in tl.static_range(TILE):
                value = tl.load(row, eviction_policy=POLICY)
                values = values + (packed(value) if PACKED else value,)
                row += tl.where(i + 1 < left, opened[k][1], 0) if MASKED else opened[k][1]
        tile = tile + (values,)
    return tile


@triton.jit
def load_ahead(opened, at, step, CHANNELS: tl.constexpr, ALIGN: tl.constexpr, TILE: tl.constexpr):
    """Rows that a loop carries until it is their turn."""
    return load_rows(opened, at, step, 0, CHANNELS, ALIGN > 1, TILE, False)


@triton.jit
def widened(rows, ELEMENT: tl.constexpr, STATE: tl.constexpr):
    """What load_rows gave, in the state dtype."""
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
    opened, at, step, left, STATE: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
    POLICY: tl.constexpr = STREAMED,
):  # fmt: skip
    """The same in the state dtype."""
    rows = load_rows(opened, at, step, left, CHANNELS, False, TILE, MASKED, POLICY)
    return widened(rows, STATE, STATE)


@triton.jit
def inputs_at(tile, i: tl.constexpr):
    """The inputs of a tile's i-th step."""
    x = ()
    for k in tl.static_range(len(tile)):
        x = x + (tile[k][i],)
    return x


@triton.jit
def repeated(value, N: tl.constexpr):
    out = ()
    for _ in tl.static_range(N):
        out = out + (value,)
    return out


@triton.jit
def load_alpha(alpha, scan, at):
    return tl.load(alpha + at.first + at.d, mask=when(scan.has_alpha != 0, at.mask), other=1.0)


@triton.jit
def enter(initial, scan, at):
    """The state before the first step of a sequence."""
    return get(initial, at.index, at, when(scan.has_initial != 0, at.mask), 0.0)


@triton.jit
def poison(s, scale, at):
    """NaN where alpha is, as all of that channel's output will be."""
    return tl.where(when(at.length > 0, scale != scale), scale, s)


@triton.jit
def factor_of_writes(epsilon, STATE: tl.constexpr, FORGETS: tl.constexpr):
    """epsilon in the state dtype; a constant if it is 0, where a write forgets the state."""
    if FORGETS:
        factor = tl.full((), 0.0, STATE)
    else:
        factor = tl.full((), epsilon, STATE)
    return factor


# ------------------------------------------------------------------------- forward


@triton.jit
def forward_word(
    s, word, opened, opened_h, scan, at, first, scale, eps, STEP: tl.constexpr, STEP_EVENT: tl.constexpr,
    EVENTS: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """h at the steps of a word, of which some lie beyond the end if MASKED; and the state after."""
    left = left_of(at, first, WORD)
    for j in range(0, WORD, TILE):
        if not EVENTS:
            tile = load_tile(opened, at, hidden(first + j, at), left - j, s.dtype, CHANNELS, TILE, MASKED)
        row = row_at(opened_h, hidden(first + j, at))
        for i in tl.static_range(TILE):
            if EVENTS:
                after = STEP_EVENT(word, i, s, eps)
            else:
                after = STEP(inputs_at(tile, i), s, eps)
            if MASKED:
                s = tl.where(j + i < left, after, s)
            else:
                s = after
            mask = when(j + i < left, at.mask) if MASKED else at.mask
            tl.store(row, scale * s, mask=mask, eviction_policy=STREAMED)
            row += opened_h[1]
        if EVENTS:
            word = word >> (2 * TILE)
    return s


@triton.jit
def forward(
    inputs, scan, flag, offsets, alpha, initial, entries, events, h, final_state, checkpoints, epsilon: tl.float64,
    STEP: tl.constexpr, STEP_EVENT: tl.constexpr, EVENTS: tl.constexpr, FORGETS: tl.constexpr, CHANNELS: tl.constexpr,
    CHUNK: tl.constexpr, ALIGN: tl.constexpr, TILE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """h, boundary states and final states, from streams or, if EVENTS, from events.

    Enters with `entries`, [slots, D], where there is a split, and leaves with `final_state`, [slots, D]; else with
    `initial` and `final_state`, [N, D].
    """
    STATE: tl.constexpr = alpha.dtype.element_ty
    scan = sizes(scan, ALIGN)
    slot, block = program(scan, BD)
    if works(scan, slot, flag):
        at = place(scan, offsets, slot, block, ALIGN, BD)
        eps = factor_of_writes(epsilon, STATE, FORGETS)
        scale = load_alpha(alpha, scan, at)
        opened = open_inputs(inputs, scan, at, STATE, CHANNELS, ALIGN)
        opened_h = rows_of(h, scan, at, ALIGN)
        if scan.segment != 0:
            s = get(entries, slot, at, at.mask, 0.0)
        else:
            s = poison(enter(initial, scan, at), scale, at)
        word = tl.zeros((BD,), tl.int32)
        if EVENTS:
            word = get(events, word_row(scan, at, at.begin), at, when(at.begin < at.end, at.mask), 0)
        whole = at.end - (at.end - at.begin) % WORD
        for first in range(at.begin, whole, WORD):
            after = first + WORD
            ahead = word
            if EVENTS:
                ahead = get_whole(events, word_row(scan, at, tl.minimum(after, at.end - 1)), at)
            s = forward_word(
                s, word, opened, opened_h, scan, at, first, scale, eps, STEP, STEP_EVENT, EVENTS, CHANNELS, TILE, False
            )
            word = ahead
            if (scan.saved != 0) & (after % CHUNK == 0) & (after < at.length):
                put(checkpoints, checkpoint_row(scan, at, after, CHUNK), at, s, at.mask)
        if whole < at.end:
            s = forward_word(
                s, word, opened, opened_h, scan, at, whole, scale, eps, STEP, STEP_EVENT, EVENTS, CHANNELS, TILE, True
            )
        put(final_state, tl.where(scan.segment != 0, slot, at.index), at, s, at.mask)


@triton.jit
def power(base, n, at):
    """base^n, of a scalar and a block of numbers of steps; 0^0 is 1."""
    result = tl.where(n >= 0, 1.0, base)
    steps = at.end - at.begin
    while steps > 0:
        result = tl.where((n & 1) != 0, result * base, result)
        base *= base
        n = n >> 1
        steps = steps >> 1
    return result


@triton.jit
def recent(u, late, MAGNITUDE: tl.constexpr):
    """The magnitude of the last few states, updated by `u`. It fades, so that an older state counts for nothing."""
    return tl.maximum(MAGNITUDE(u), 0.25 * late)


@triton.jit
def summarize_word(
    ahead, factor, writes, offset, late, opened, events, scan, at, first, whole, eps, STEP: tl.constexpr, PUSH:
    tl.constexpr, MAGNITUDE: tl.constexpr, ENCODE: tl.constexpr, STEP_EVENT: tl.constexpr, STEP_WORD: tl.constexpr,
    EVENTS: tl.constexpr, CHANNELS: tl.constexpr, ALIGN: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The map of a segment's steps so far and of another word's. If EVENTS, the writes are counted, of which the factor
    is a power; and the offset takes a word at once if a write forgets all or nothing.
    """
    ELEMENT: tl.constexpr = opened[0][0].dtype.element_ty
    left = left_of(at, first, WORD)
    word = tl.zeros_like(writes)
    steps = tl.minimum(whole - first, WORD).to(tl.int32)  # LLVM would unroll the loop if it knew
    for j in range(0, steps, TILE):
        if ELEMENT.primitive_bitwidth == 16 and not MASKED:
            tile = widened(ahead, ELEMENT, offset.dtype)
            ahead = load_ahead(opened, at, tl.minimum(first + j + TILE, whole - TILE), CHANNELS, ALIGN, TILE)
        else:
            tile = load_tile(opened, at, hidden(first + j, at), left - j, offset.dtype, CHANNELS, TILE, MASKED)
        if MASKED or left > j:  # which it is, see fold
            of_tile = tl.zeros_like(writes)
            for i in tl.static_range(TILE):
                x = inputs_at(tile, i)
                if EVENTS:
                    event = ENCODE(x)
                    if MASKED:
                        event = tl.where(j + i < left, event, 0)
                    of_tile = of_tile | (event << (2 * i))
                elif MASKED:
                    offset = tl.where(j + i < left, STEP(x, offset, eps), offset)
                    factor = tl.where(j + i < left, PUSH(x, factor, eps), factor)
                    late = tl.where(j + i < left, recent(offset, late, MAGNITUDE), late)
                else:
                    offset = STEP(x, offset, eps)
                    factor = PUSH(x, factor, eps)
                    late = recent(offset, late, MAGNITUDE)
            word = word | (of_tile << (2 * j))
    if EVENTS:
        put(events, word_row(scan, at, first), at, word, at.mask)
        writes += count_pairs(word & PAIRS)
        if (eps == 0) | (eps == 1):
            offset = STEP_WORD(word, offset, eps)
        else:
            for i in tl.static_range(WORD):
                offset = STEP_EVENT(word, i, offset, eps)
    return ahead, factor, writes, offset, late


@triton.jit
def summarize(
    inputs, scan, offsets, alpha, events, factors, sums, lates, epsilon: tl.float64, STEP: tl.constexpr, PUSH:
    tl.constexpr, ONE: tl.constexpr, MAGNITUDE: tl.constexpr, ENCODE: tl.constexpr, STEP_EVENT: tl.constexpr,
    STEP_WORD: tl.constexpr, EVENTS: tl.constexpr, FORGETS: tl.constexpr, CHANNELS: tl.constexpr, ALIGN:
    tl.constexpr, TILE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Each segment as one affine map, (factor, offset) [slots, D]; its `recent` offsets; and its events, if EVENTS."""
    STATE: tl.constexpr = alpha.dtype.element_ty
    HALF: tl.constexpr = inputs[0].data.dtype.element_ty.primitive_bitwidth == 16
    scan = sizes(scan, ALIGN)
    slot, block = program(scan, BD)
    if slot < scan.slots:
        at = place(scan, offsets, slot, block, ALIGN, BD)
        eps = factor_of_writes(epsilon, STATE, FORGETS)
        opened = open_inputs(inputs, scan, at, STATE, CHANNELS, ALIGN)
        factor = ONE(at.d).to(STATE)
        offset = tl.zeros((BD,), STATE)
        late = tl.full((BD,), 1.0 if EVENTS else 0.0, STATE)  # an event adds at most 1
        writes = tl.zeros((BD,), tl.int32)
        whole = at.end - (at.end - at.begin) % WORD
        if at.begin < whole:
            ahead = load_ahead(opened, at, at.begin, CHANNELS, ALIGN, TILE) if HALF else ()
            for first in range(at.begin, whole, WORD):
                ahead, factor, writes, offset, late = summarize_word(
                    ahead, factor, writes, offset, late, opened, events, scan, at, first, whole, eps, STEP, PUSH,
                    MAGNITUDE, ENCODE, STEP_EVENT, STEP_WORD, EVENTS, CHANNELS, ALIGN, TILE, False,
                )  # fmt: skip
        if whole < at.end:
            _, factor, writes, offset, late = summarize_word(
                (), factor, writes, offset, late, opened, events, scan, at, whole, at.end, eps, STEP, PUSH, MAGNITUDE,
                ENCODE, STEP_EVENT, STEP_WORD, EVENTS, CHANNELS, ALIGN, TILE, True,
            )  # fmt: skip
        if EVENTS:
            factor = power(tl.full((), epsilon, tl.float64), writes, at).to(STATE)
        put(factors, slot, at, factor, at.mask)
        put(sums, slot, at, offset, at.mask)
        if not FORGETS:
            put(lates, slot, at, late, at.mask)


# ------------------------------------------------------------------------- between segments


@triton.jit
def map_row(base, k, count, flip):
    return base + tl.where(flip != 0, count - 1 - k, k)


@triton.jit
def load_maps(factors, sums, at, row, step, left, TILE: tl.constexpr):
    """TILE affine maps, the first in `row` and one a step from the next; for what is not left, the last again."""
    maps = ()
    place = row * at.width + (at.first + at.d)
    for i in tl.static_range(TILE):
        maps = maps + ((tl.load(factors + place), tl.load(sums + place)),)
        place += tl.where(i + 1 < left, step * at.width, 0)
    return maps


@triton.jit
def fold(
    scan, walk, offsets, factors, sums, group_factors, group_sums,
    ONE: tl.constexpr, TIMES: tl.constexpr, ALIGN: tl.constexpr, TILE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Groups of segments as one affine map each, [B * groups, D]. Not for packed sequences."""
    scan = sizes(scan, ALIGN)
    item, block = program(scan, BD)
    groups = size(walk.groups)
    if item < scan.sequences * groups:
        count = scan.slots // scan.sequences
        base = (item // groups) * count
        at = place(scan, offsets, base, block, ALIGN, BD)
        begin = (item % groups) * size(walk.per_group)
        end = tl.minimum(begin + size(walk.per_group), count)
        factor = ONE(at.d).to(factors.dtype.element_ty)
        offset = tl.zeros((BD,), factors.dtype.element_ty)
        flip = size(walk.flip)
        for k in range(begin, end, TILE):
            left = tl.minimum(end - k, TILE).to(tl.int32)
            maps = load_maps(factors, sums, at, map_row(base, k, count, flip), 1 - 2 * flip, left, TILE)
            if left > 0:  # which it is; but ptxas does not put off loads until after a branch
                for i in tl.static_range(TILE):
                    offset = tl.where(i < left, TIMES(maps[i][0], offset) + maps[i][1], offset)
                    factor = tl.where(i < left, TIMES(maps[i][0], factor), factor)
        put(group_factors, item, at, factor, at.mask)
        put(group_sums, item, at, offset, at.mask)


@triton.jit
def carry(
    scan, walk, flag, offsets, alpha, initial, factors, sums, group_factors, group_sums, entries, final_state,
    TIMES: tl.constexpr, ALIGN: tl.constexpr, TILE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The state that enters each segment, and the one that leaves the last.

    A program walks the maps of the groups before its own, then those of its own segments. A packed sequence is one
    group. From the right (flip) it is the adjoint that is carried, and alpha has no part. Lowers the flag of `check`.
    """
    scan = sizes(scan, ALIGN)
    item, block = program(scan, BD)
    groups = size(walk.groups)
    n = item // groups
    if (item == 0) & (block == 0):
        tl.store(flag, 0)
    if n < scan.sequences:
        group = item % groups
        base = first_slot(scan, offsets, n)
        at = place(scan, offsets, base, block, ALIGN, BD)
        index, _, length = bounds(scan, offsets, n)
        flip = size(walk.flip)
        count = (length + scan.segment - 1) // scan.segment
        begin = group * size(walk.per_group)
        end = tl.where(groups == 1, count, tl.minimum(begin + size(walk.per_group), count))
        s = get(initial, index, at, when(scan.has_initial != 0, at.mask), 0.0)
        if flip == 0:
            scale = load_alpha(alpha, scan, at)
            s = tl.where(when(length > 0, scale != scale), scale, s)
        for k in range(0, group, TILE):
            left = tl.minimum(group - k, TILE).to(tl.int32)
            maps = load_maps(group_factors, group_sums, at, n * groups + k, 1, left, TILE)
            if left > 0:  # see fold
                for i in tl.static_range(TILE):
                    s = tl.where(i < left, TIMES(maps[i][0], s) + maps[i][1], s)
        for k in range(begin, end, TILE):
            left = tl.minimum(end - k, TILE).to(tl.int32)
            row = map_row(base, k, count, flip)
            maps = load_maps(factors, sums, at, row, 1 - 2 * flip, left, TILE)
            for i in tl.static_range(TILE):
                put(entries, row, at, s, when(i < left, at.mask))
                row += 1 - 2 * flip
                s = tl.where(i < left, TIMES(maps[i][0], s) + maps[i][1], s)
        if end == count:
            put(final_state, index, at, s, at.mask)


@triton.jit
def consistent(factor, offset, late, entry, leaves, handed, MAGNITUDE: tl.constexpr, FORGETS: tl.constexpr):
    """Whether what `leaves` a segment, scanned from `entry`, is what composing maps `handed` to the next segment.

    The bound lets rounding pass. Rounding is large against factor entry and offset where both are small by chance;
    `late`, of `recent`, measures it then. A factor that may have underflowed has few right bits, so its bound is tight.
    Where a write forgets, factors are 0 or 1: values are wrong only where not finite.
    """
    ROUNDING: tl.constexpr = 2.0**-40 if entry.dtype == tl.float64 else 2.0**-16
    error = MAGNITUDE(leaves - handed)
    if FORGETS:
        near = error < float("inf")
    else:
        size_of_factor = MAGNITUDE(factor)
        terms = size_of_factor * MAGNITUDE(entry) + MAGNITUDE(offset)
        bound = tl.where(size_of_factor < 2.0**-62, ROUNDING, 2.0**-8) * terms + ROUNDING * late
        near = (error <= bound) & (bound < float("inf"))
    of_leaves = MAGNITUDE(leaves)
    of_handed = MAGNITUDE(handed)
    return (leaves == handed) | near | ((of_leaves != of_leaves) & (of_handed != of_handed))


@triton.jit
def check(
    scan, walk, flag, offsets, factors, sums, lates, entries, exits, final_state,
    MAGNITUDE: tl.constexpr, FORGETS: tl.constexpr, ALIGN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Set the flag to 1 if a segment's exit state differs from the next segment's entry state. `exits` are [slots, D].

    Composing goes wrong where numbers leave the range of the dtype: a factor that overflows or underflows, an offset
    that overflows alone.
    """
    scan = sizes(scan, ALIGN)
    slot, block = program(scan, BD)
    if slot < scan.slots:
        at = place(scan, offsets, slot, block, ALIGN, BD)
        if at.begin < at.end:
            flip = size(walk.flip)
            is_last = tl.where(flip != 0, at.begin == 0, at.end == at.length)
            row = tl.where(is_last, at.index, slot + 1 - 2 * flip)
            handed = get(tl.where(is_last, final_state, entries), row, at, at.mask, 0.0)
            factor = get(factors, slot, at, at.mask, 0.0)
            offset = get(sums, slot, at, at.mask, 0.0)
            late = offset if FORGETS else get(lates, slot, at, at.mask, 0.0)
            entry = get(entries, slot, at, at.mask, 0.0)
            leaves = get(exits, slot, at, at.mask, 0.0)
            right = consistent(factor, offset, late, entry, leaves, handed, MAGNITUDE, FORGETS)
            wrong = tl.max(tl.where(right, 0, tl.where(at.mask, 1, 0)), 0)
            if wrong != 0:
                tl.store(flag, 1)


# ------------------------------------------------------------------------- backward


@triton.jit
def adjoint_word(
    factor, writes, m, late, opened, opened_grad, events, scan, at, first, scale, eps, PULL: tl.constexpr,
    MAGNITUDE: tl.constexpr, PULL_EVENT: tl.constexpr, EVENTS: tl.constexpr, CHANNELS: tl.constexpr, TILE:
    tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The map of a segment's steps so far, from the right, and of another word's; see summarize_word."""
    left = left_of(at, first, WORD)
    if EVENTS:
        word = get_whole(events, word_row(scan, at, first), at)
        writes += count_pairs(word & PAIRS)
    for j in tl.static_range(WORD - TILE, -1, -TILE):
        grads = load_tile(opened_grad, at, hidden(first + j, at), left - j, m.dtype, 0, TILE, MASKED)
        if not EVENTS:
            tile = load_tile(opened, at, hidden(first + j, at), left - j, m.dtype, CHANNELS, TILE, MASKED)
        if MASKED or not EVENTS or left > j:  # which it is, see fold
            for i in tl.static_range(TILE - 1, -1, -1):
                lam = tl.fma(scale, grads[0][i], m)  # as in `backward`: rounded alike
                if EVENTS:
                    before = PULL_EVENT(word, j + i, lam, eps)
                    product = factor
                else:
                    x = inputs_at(tile, i)
                    before = PULL(x, lam, eps)
                    product = PULL(x, factor, eps)
                if MASKED:
                    m = tl.where(j + i < left, before, m)
                    factor = tl.where(j + i < left, product, factor)
                    late = tl.where(j + i < left, recent(before, late, MAGNITUDE), late)
                else:
                    m = before
                    factor = product
                    late = recent(before, late, MAGNITUDE)
    return factor, writes, m, late


@triton.jit
def append_word(
    factor, m, opened, opened_grad, events, scan, at, first, scale, eps, PULL: tl.constexpr, MAGNITUDE:
    tl.constexpr, PULL_EVENT: tl.constexpr, EVENTS: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """The map of a segment's steps so far, from the left, with another word to their right. A write forgets."""
    zeros = tl.zeros_like(m)
    of_word, writes, passed, _ = adjoint_word(
        zeros + 1.0, zeros.to(tl.int32), zeros, zeros, opened, opened_grad, events, scan, at, first, scale, eps, PULL,
        MAGNITUDE, PULL_EVENT, EVENTS, CHANNELS, TILE, MASKED,
    )  # fmt: skip
    if EVENTS:
        of_word = tl.where(writes == 0, 1.0, 0.0).to(m.dtype)
    return tl.where(factor == 0, factor, of_word), tl.where(factor == 0, m, m + passed)


@triton.jit
def summarize_adjoint(
    inputs, scan, offsets, alpha, events, grad_h, factors, sums, lates, epsilon: tl.float64, PULL: tl.constexpr,
    ONE: tl.constexpr, MAGNITUDE: tl.constexpr, PULL_EVENT: tl.constexpr, EVENTS: tl.constexpr, FORGETS:
    tl.constexpr, CHANNELS: tl.constexpr, ALIGN: tl.constexpr, TILE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Each segment as the affine map from what its right end receives to what its left end passes on."""
    STATE: tl.constexpr = alpha.dtype.element_ty
    scan = sizes(scan, ALIGN)
    slot, block = program(scan, BD)
    if slot < scan.slots:
        at = place(scan, offsets, slot, block, ALIGN, BD)
        eps = factor_of_writes(epsilon, STATE, FORGETS)
        scale = load_alpha(alpha, scan, at)
        opened = open_inputs(inputs, scan, at, STATE, CHANNELS, ALIGN)
        opened_grad = (rows_of(grad_h, scan, at, ALIGN),)
        factor = ONE(at.d).to(STATE)
        m = tl.zeros((BD,), STATE)
        late = tl.zeros((BD,), STATE)
        writes = tl.zeros((BD,), tl.int32)
        words = (at.end - at.begin) // WORD
        whole = at.begin + words * WORD
        if FORGETS:
            # From the left, until every channel has written: what comes after has no part in what leaves.
            first = at.begin
            holds = 1
            while (holds != 0) & (first < whole):
                factor, m = append_word(
                    factor, m, opened, opened_grad, events, scan, at, first, scale, eps, PULL, MAGNITUDE, PULL_EVENT,
                    EVENTS, CHANNELS, TILE, False,
                )  # fmt: skip
                holds = tl.max(tl.where(factor != 0, 1, 0), 0)
                first += WORD
            if (holds != 0) & (whole < at.end):
                factor, m = append_word(
                    factor, m, opened, opened_grad, events, scan, at, whole, scale, eps, PULL, MAGNITUDE, PULL_EVENT,
                    EVENTS, CHANNELS, TILE, True,
                )  # fmt: skip
        else:
            if whole < at.end:
                factor, writes, m, late = adjoint_word(
                    factor, writes, m, late, opened, opened_grad, events, scan, at, whole, scale, eps, PULL, MAGNITUDE,
                    PULL_EVENT, EVENTS, CHANNELS, TILE, True,
                )  # fmt: skip
            for w in range(0, words):
                factor, writes, m, late = adjoint_word(
                    factor, writes, m, late, opened, opened_grad, events, scan, at, whole - (w + 1) * WORD, scale, eps,
                    PULL, MAGNITUDE, PULL_EVENT, EVENTS, CHANNELS, TILE, False,
                )  # fmt: skip
            if EVENTS:
                factor = power(tl.full((), epsilon, tl.float64), writes, at).to(STATE)
        put(factors, slot, at, factor, at.mask)
        put(sums, slot, at, m, at.mask)
        if not FORGETS:
            put(lates, slot, at, late, at.mask)


@triton.jit
def replay(
    s, row, opened, events, states, scan, at, step, eps, REPLAY: tl.constexpr, REPLAY_EVENT: tl.constexpr,
    EVENTS: tl.constexpr, CHANNELS: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The state after some tiles of one word; those before each go to the rows of `states` from `row` on."""
    if EVENTS:
        word = get_whole(events, word_row(scan, at, step), at) >> (2 * (step % WORD)).to(tl.int32)
    for j in tl.static_range(TILES):
        put(states, row + j, at, s, at.mask, KEPT)
        if not EVENTS:
            tile = load_tile(opened, at, hidden(step + j * TILE, at), TILE, s.dtype, CHANNELS, TILE, False, USUAL)
        for i in tl.static_range(TILE):
            if EVENTS:
                s = REPLAY_EVENT(word, j * TILE + i, s, eps)
            else:
                s = REPLAY(inputs_at(tile, i), s, eps)
    return s


@triton.jit
def backward_tile(
    s, both, m, sum_alpha, sums, opened, opened_dx, at, first, scale, eps, k_scale, REPLAY: tl.constexpr,
    PULL: tl.constexpr, VJP: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The gradients at TILE steps, of which some lie beyond the end if MASKED; and what they add to the sums."""
    ELEMENT: tl.constexpr = opened[0][0].dtype.element_ty
    inputs_tile = widened(both[0], ELEMENT, s.dtype)
    grad_tile = widened(both[1], ELEMENT, s.dtype)
    left = left_of(at, first, TILE)
    within = (s,)
    for i in tl.static_range(TILE):
        within = within + (REPLAY(inputs_at(inputs_tile, i), within[i], eps),)
    rows = ()
    for k in tl.static_range(len(opened)):
        rows = rows + (row_at(opened_dx[k], first) + (TILE - 1) * opened_dx[k][1],)
    for i in tl.static_range(TILE - 1, -1, -1):
        x = inputs_at(inputs_tile, i)
        g = grad_tile[0][i]
        lam = tl.fma(scale, g, m)
        dx = VJP(x, within[i], lam, eps, k_scale)
        before = PULL(x, lam, eps)
        product = g * within[i + 1]
        if MASKED:
            before = tl.where(i < left, before, m)
            product = tl.where(i < left, product, 0.0)
        m = before
        sum_alpha += product
        totals = ()
        rows_before = ()
        for k in tl.static_range(len(opened)):
            if CHANNELS >> k & 1:
                totals = totals + (sums[k] + (tl.where(i < left, dx[k], 0.0) if MASKED else dx[k]),)
            else:
                totals = totals + (sums[k],)
                mask = when(i < left, at.mask) if MASKED else at.mask
                tl.store(rows[k], dx[k], mask=mask, eviction_policy=STREAMED)
            rows_before = rows_before + (rows[k] - opened_dx[k][1],)
        sums = totals
        rows = rows_before
    return m, sum_alpha, sums


@triton.jit
def load_both(
    opened, opened_grad, at, step, left, CHANNELS: tl.constexpr, ALIGN: tl.constexpr, TILE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """A tile of the inputs and of the gradient, as a loop may carry it until its turn."""
    PACKED: tl.constexpr = ALIGN > 1
    inputs = load_rows(opened, at, step, left, CHANNELS, PACKED, TILE, MASKED)
    return inputs, load_rows(opened_grad, at, step, left, 0, PACKED, TILE, MASKED)


@triton.jit
def backward(
    inputs, scan, flag, offsets, alpha, initial, events, checkpoints, grad_h, grad_final, grads, grad_initial, partial,
    states, epsilon: tl.float64, bend: tl.float64, tie: tl.float64, gain: tl.float64,
    REPLAY: tl.constexpr, PULL: tl.constexpr, VJP: tl.constexpr, REPLAY_EVENT: tl.constexpr, EVENTS: tl.constexpr,
    FORGETS: tl.constexpr, CHANNELS: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr, TILE: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """Gradients of the inputs, what passes to the left of the segment, and sums over its chunks.

    grad_final: what the right end receives, [slots, D] where there is a split, else [N, D].
    grad_initial: what the left end passes on, alike.
    partial:    [1 + inputs per channel, `sums_rows`, D], of alpha, then of each of these inputs. Many equal terms,
                added one by one, would lose more than rounding.

    states:     room for those before the tiles of a chunk, [slots * (min(T, CHUNK) // TILE), D].

    Chunk by chunk from the right. From the state saved at the chunk's start follow those before its tiles, and from
    each of these the states within the tile.
    """
    STATE: tl.constexpr = alpha.dtype.element_ty
    HALF: tl.constexpr = inputs[0].data.dtype.element_ty.primitive_bitwidth == 16
    TILES: tl.constexpr = 2 if HALF else 1  # as many bytes of each stream are on the way whatever its dtype
    scan = sizes(scan, ALIGN)
    slot, block = program(scan, BD)
    if works(scan, slot, flag):
        at = place(scan, offsets, slot, block, ALIGN, BD)
        eps = factor_of_writes(epsilon, STATE, FORGETS)
        k_scale = (tl.full((), bend, STATE), tl.full((), tie, STATE), tl.full((), gain, STATE))
        scale = load_alpha(alpha, scan, at)
        opened = open_inputs(inputs, scan, at, STATE, CHANNELS, ALIGN)
        opened_grad = (rows_of(grad_h, scan, at, ALIGN),)
        opened_dx = ()
        for k in tl.static_range(len(inputs)):
            if CHANNELS >> k & 1:
                opened_dx = opened_dx + ((0, 0),)
            else:
                opened_dx = opened_dx + (rows_of(grads[k], scan, at, ALIGN),)
        m = get(grad_final, tl.where(scan.segment != 0, slot, at.index), at, at.mask, 0.0)
        room = slot * (tl.minimum(scan.time, CHUNK) // TILE)
        chunks = (at.end - at.begin + CHUNK - 1) // CHUNK
        chunk = at.begin + (chunks - 1) * CHUNK
        saved = checkpoint_row(scan, at, chunk, CHUNK)
        summed = sums_rows(scan, at.start, at.n, CHUNK) + chunk // CHUNK
        left = chunks.to(tl.int32)
        if left > 0:
            ahead = ()
            if HALF:
                first = tl.maximum(at.end - (at.end - at.begin) % TILE - TILE, at.begin)
                ahead = load_both(opened, opened_grad, at, first, left_of(at, first, TILE), CHANNELS, ALIGN, TILE, True)
            while left > 0:
                sum_alpha = tl.zeros((BD,), STATE)
                sums = repeated(sum_alpha, len(inputs))
                end = tl.minimum(chunk + CHUNK, at.end)
                data = tl.where(chunk > 0, checkpoints, initial)
                known = when((chunk > 0) | (scan.has_initial != 0), at.mask)
                s = get(data, tl.where(chunk > 0, saved, at.index), at, known, 0.0)
                tiles = ((end - chunk) // TILE).to(tl.int32)
                for tile in range(0, tiles - TILES + 1, TILES):
                    s = replay(
                        s, room + tile, opened, events, states, scan, at, chunk + tile * TILE, eps, REPLAY,
                        REPLAY_EVENT, EVENTS, CHANNELS, TILES, TILE,
                    )  # fmt: skip
                if tiles % TILES != 0:
                    s = replay(
                        s, room + (tiles - 1), opened, events, states, scan, at, chunk + (tiles - 1) * TILE, eps,
                        REPLAY, REPLAY_EVENT, EVENTS, CHANNELS, 1, TILE,
                    )  # fmt: skip
                last = chunk + tiles * TILE
                if last < end:
                    some = left_of(at, last, TILE)
                    both = load_both(opened, opened_grad, at, last, some, CHANNELS, ALIGN, TILE, True)
                    m, sum_alpha, sums = backward_tile(
                        s, both, m, sum_alpha, sums, opened, opened_dx, at, last, scale, eps, k_scale, REPLAY, PULL,
                        VJP, CHANNELS, TILE, True,
                    )  # fmt: skip
                if not HALF or tiles > 0:
                    if HALF:
                        before = get_whole(states, room + (tiles - 1), at, KEPT)
                    first = last
                    while first > chunk:
                        first = tl.maximum(first - TILE, chunk)  # hidden
                        if HALF:
                            s = before
                            both = ahead
                            row = room + (tl.maximum(first - TILE, chunk) - chunk) // TILE
                            before = get_whole(states, row, at, KEPT)
                            following = tl.maximum(first - TILE, at.begin)
                            ahead = load_both(opened, opened_grad, at, following, 0, CHANNELS, ALIGN, TILE, False)
                        else:
                            s = get_whole(states, room + (first - chunk) // TILE, at, KEPT)
                            both = load_both(opened, opened_grad, at, first, 0, CHANNELS, ALIGN, TILE, False)
                        if not HALF or chunk >= 0:  # which it is, see fold
                            m, sum_alpha, sums = backward_tile(
                                s, both, m, sum_alpha, sums, opened, opened_dx, at, first, scale, eps, k_scale, REPLAY,
                                PULL, VJP, CHANNELS, TILE, False,
                            )  # fmt: skip
                rows = sums_rows(scan, scan.time, scan.sequences, CHUNK)
                if scan.has_alpha != 0:
                    put(partial, summed, at, sum_alpha, at.mask)
                for k in tl.static_range(len(inputs)):
                    if CHANNELS >> k & 1:
                        put(partial, k * rows + summed, at, sums[k], at.mask)
                chunk -= CHUNK
                saved -= 1
                summed -= 1
                left -= 1
        # Without a split `chunk` is negative here; as LLVM cannot tell, it does not keep the row's address from the
        # start on.
        put(grad_initial, tl.where((scan.segment == 0) & (chunk < 0), at.index, slot), at, m, at.mask)
