"""Faults planted into copies of the CUDA sources, behind switches: the battery must catch each.

A copy has one cell and one element type, because all of them would take too long to compile and to run. It has all
faults that this cell and this type show.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock

from . import FOLDER, battery, build, planting


@dataclass(frozen=True)
class Fault:
    """In `file`, relative to csrc/cuda, `old` becomes `new`: see tests/planted.py. The battery runs on `cell`."""

    name: str
    file: str
    old: str
    new: str
    cell: str = "bmru"

    @property
    def shown(self) -> tuple[str, str]:
        """The element type and the cell that show the fault."""
        return "bfloat16" if self.file == "pairs.cuh" else "float32", self.cell


_BARRIER = "    __syncthreads();\n"
_AFTER_RUNS = "    offsets[own] = of_run.b;\n"
_AFTER_PARTS = (
    "    if (group < parts) walk(factors + first, offsets + first, kCarryLanes, of_part, part_offsets[own]);\n"
)
_AFTER_REDUCE = "  partial[threadIdx.y * kLanes + threadIdx.x] = sum.total();\n"
_AFTER_MAPS = "    reduce<kOverwrites>(part, cell, copies);\n"
_AFTER_ADJOINT_MAPS = "    if constexpr (kSelects) reduce_selecting();\n    else reduce();\n"
_WAIT = "      wait_for_copies<1>();\n"
_WALK = "if (group == 0) left = walk(part_factors, part_offsets, kCarryLanes, parts, left);"
_ADD = "sum.add(load<Traffic::kState, 1>(sums + (row * count + which) * channels + d).at[0]);"
_NEXT = "next < 0 || next >= plan.row_segments"
_LATE = "work.late ? load<Traffic::kState, 1>(work.late + thread).at[0] : 0"
_BOUNDARY_IN_TILE = "part.has(0) && !(span.resets && part.position == span.begin)"
_COTANGENT = "cell_.cotangent(x, states_[t].at[w], states_[t + 1].at[w], S(widen(grad, w)), S(0))"
_PULL = "pull_at(cell_, x, states_[t].at[w], a.at[w])"
_CLEAR = "if (scan_.offsets && scan_.checkpoints) clear(scan_.checkpoints, scan_.batch * scan_.checkpoint_rows);\n"
_SUMMARIZE = "  summarize_segments(Heads::kBegin);\n"
_CARRY = "  carry_over(1);\n"
_EXPAND = "  if constexpr (F::Cell::kCodes) over_segments(expand<F>);\n  else forward_tiles(plan_);\n"
_SAVES = "      if (span.resets && saves(span.begin)) save<Single>(span.begin, d, s);\n"
_ENTERS = "      if (span.enters()) s = enter<Single>(scan, call.cell, span, d, ChannelInputs<Single>(scan, d));\n"
_SEGMENT_SAVES = "    checkpoints.pass(span.begin, s);\n"
_SEGMENT_ENTERS = "    if (span.enters()) s = enter<F>(scan, cell, span, d, channel);\n"
_MOVED = "x[1] * (reset == kSubtractDecayed ? s - fall : s) + x[0]"

#: By file: name, old text, new text and, if it is not bmru, the cell.
_FAULTS = {
    "resets.cuh": (
        (
            "reset of a reversed scan at the wrong time",
            "scan.reverse ? scan.time - 1 - position : position",
            "position",
        ),
        ("resets of the next word overlooked", "~1u << (word % kResetWord)", "~3u << (word % kResetWord)"),
        ("resets of the group before overlooked", "group-- * kResetGroup <= begin", "group-- >= 0"),
    ),
    "spans.cuh": (
        ("offsets not clamped", "return at < 0 ? 0 : (at < scan.time ? at : scan.time);", "return at;"),
        (
            "boundaries of packed sequences at positions of the row",
            "start + plan.chunk_divisor(position - start) * scan.chunk",
            "plan.chunk_divisor(position) * scan.chunk",
        ),
    ),
    "streams.cuh": (
        ("tile ahead not waited for", _WAIT[2:], ""),
        ("wrong checkpoint", "span.first || next < span.begin", "next < span.begin"),
        ("missing tail mask", "(position % U == 0 && position + U <= end)", "position % U == 0"),
        ("wrong reverse offset", "scan.reverse ? scan.time - 1 : 0", "scan.reverse ? scan.time : 0"),
        ("32-bit offset", "return data + (first + position * step);", "return data + int(first + position * step);"),
    ),
    "codes.cuh": (
        ("word ahead is the last one", "begin_ <= next && next < end_", "next < begin_"),
        ("code shifted", "words_.at[w] |= codes << before;", "words_.at[w] |= codes << before / 2;"),
    ),
    "segments.cuh": (
        ("end of a sequence passed over", "holds && span.last", "false"),
        ("adjoint read to the end", "holds |= a.at[w] != 0;", "holds = true;"),
        ("map of the adjoint past a reset", "span.last || span.right || span.resets", "span.last"),
        (
            "state kept at a reset in a segment",
            _SEGMENT_SAVES + _SEGMENT_ENTERS,
            _SEGMENT_SAVES + _SEGMENT_ENTERS.replace("span.enters()", "span.first"),
        ),
        (
            "checkpoint of a segment saved after a reset",
            _SEGMENT_SAVES + _SEGMENT_ENTERS,
            _SEGMENT_ENTERS + _SEGMENT_SAVES,
        ),
        ("map of a head", "call.heads == Heads::kBegin", "call.heads != Heads::kEnd"),
    ),
    "carry.cuh": (
        ("dropped barrier in carry", _AFTER_RUNS + _BARRIER, _AFTER_RUNS),
        ("dropped barrier in reduce", _AFTER_REDUCE + _BARRIER[2:], _AFTER_REDUCE),
        # Threads exchange these values through shared memory, so this stands for a shuffle that is off by one.
        ("exchange off by one", _WALK, _WALK.replace("parts, left", "parts - 1, left")),
        ("dropped barrier after the parts", _AFTER_PARTS + _BARRIER, _AFTER_PARTS),
        ("turns of carry apart", _WALK, _WALK.replace("left = ", "")),
        ("rows of sums added plainly", _ADD, _ADD.replace("sum.add(", "sum.sum += (")),
        ("adjoint carried from the left", "direction > 0 ? begin : row_segments - 1 - begin", "begin"),
        ("check never fires", "store<Traffic::kState>(work.again, Vector<int, 1>{{1}});", ""),
        ("last boundary not checked", _NEXT, _NEXT + " - 1", "linear_recurrence"),
        (
            "last boundary of the adjoint not checked",
            _NEXT,
            _NEXT.replace("next <", "next <="),
            "linear_recurrence",
        ),
        ("sums of both scans", "rows = uncut_rows;", ""),
        ("small by chance scanned again", _LATE, _LATE.replace("work.late ?", "false ?"), "linear_recurrence"),
        ("factor of a map after a reset", "resets ? S(0) : all.a", "all.a"),
        ("sums over resets lose a segment", "segment <= last", "segment < last"),
        ("a segment left out of a map", "i < row_segments", "i < row_segments - 1"),
    ),
    "tiles.cuh": (
        ("missing head mask", "(low <= t && t < high)", "t < high"),
        (
            "maps applied beyond the range",
            "is_nan(finite) && !is_nan(carried) ? scan(carried) : left",
            "left",
            "linear_recurrence",
        ),
    ),
    "forward.cuh": (
        ("dropped barrier in a tile", _AFTER_MAPS + _BARRIER, _AFTER_MAPS),
        ("copies not waited for", _WAIT, ""),
        ("a slot beyond the last", "slot < 0 || slot >= call.scan.slot_count", "slot < 0"),
        ("a skipped step not cleared", "inside && threadIdx.y == 0", "false"),
        ("state not saved", _BOUNDARY_IN_TILE, _BOUNDARY_IN_TILE.replace("has(0)", "has(1)")),
        ("state kept at a reset", _SAVES + _ENTERS, _SAVES + _ENTERS.replace("span.enters()", "span.first")),
        ("checkpoint saved after a reset", _SAVES + _ENTERS, _ENTERS + _SAVES),
        ("NaN in a tile overlooked", "copies = !Of::has_nan(squared);", "copies = true;"),
        ("NaN that enters overlooked", "copies = copies && !is_nan(s.at[w]);", ""),
    ),
    "backward.cuh": (
        ("copies of the adjoint not waited for", _WAIT, ""),
        ("wrong chunk boundary", "begin > span.begin ? begin : span.begin", "span.begin"),
        ("m passes a reset", "      room.carried(c) = 0;\n", ""),
        ("sums over resets added plainly", "reset_grad.add(room.carried(c));", "reset_grad.sum += room.carried(c);"),
        (
            "state after a reset from a checkpoint",
            "span.enters() && position == span.begin",
            "span.first && position == span.begin",
        ),
        ("state between boundaries a step short", "begin < position", "begin < position - 1"),
        (
            "gradient of a boundary lost where a segment ends",
            "joins(scan, call.plan, span, span.end)",
            "span.right && joins(scan, call.plan, span, span.end)",
        ),
        ("terms of a thread added plainly", "if (summed_ == kSummed) add_up(), summed_ = 0;", ""),
        ("rows of sums left out", "segment < plan.segments", "segment < plan.sum_rows"),
    ),
    "backward_tile.cuh": (
        ("dropped barrier in a tile of the adjoint", _AFTER_ADJOINT_MAPS + _BARRIER, _AFTER_ADJOINT_MAPS),
        ("gradient of a boundary lost in a tile", "position > agent_.span.begin", "false"),
        ("walk from the wrong end", "c + (groups - 1) * room_.channels", "c"),
        (
            "slope of the output at the state before",
            "state(t + 1, w)",
            "state(t, w)",
            "leaky_integrator",
        ),
        (
            "map of the adjoint at the state before",
            _COTANGENT,
            _COTANGENT.replace("t + 1", "t"),
            "leaky_integrator",
        ),
        (
            "factor of the adjoint at the state after",
            _PULL,
            _PULL.replace("states_[t]", "states_[t + 1]"),
            "lif",
        ),
    ),
    "pairs.cuh": (
        ("sign of a zero", "fused(x, splat(1).bits, 0)", "x.bits"),
        ("borrow between halves", "(a.bits | kSigns) - b.bits", "a.bits - b.bits"),
    ),
    "scan.cu": (
        ("carry used before it is written", _SUMMARIZE + _CARRY + _EXPAND, _SUMMARIZE + _EXPAND + _CARRY),
        ("adjoint that sees the state from no offset", "from_zero.exit = work_.offset;", "", "leaky_integrator"),
        ("mask read twice", _CLEAR, "mark();" + _CLEAR),
        ("streams read twice", _SUMMARIZE + _CARRY + _EXPAND, 2 * _SUMMARIZE + _CARRY + _EXPAND),
    ),
    "plan.h": (
        ("misaligned pointers", "all = all && reinterpret_cast<uintptr_t>(p) % 16 == 0;", ""),
        ("misaligned rows", "s.batch % width == 0 && s.time % width == 0", "true"),
    ),
    "../maps/affine.h": (
        ("carry across sequences", "(a == S(0) && s == s) || is_head()", "a == S(0) && s == s"),
        ("adjoint past a write", "holds ? b + before.b : b", "b + before.b"),
    ),
    "../cells/bmru.h": (("gain of slopes left out", "lambda * splat<V>(surrogate.gain)", "lambda"),),
    "../spike.h": (("a tie that always fires", "tie ? v >= threshold : v > threshold", "v >= threshold", "lif"),),
    "../cells/lif.h": (
        (
            "multiplied and added at once",
            _MOVED,
            "std::fma(x[1], reset == kSubtractDecayed ? s - fall : s, x[0])",
            "lif",
        ),
        ("reset after the leak", _MOVED, "x[1] * s + x[0] - (reset == kSubtractDecayed ? fall : zero)", "lif"),
        ("reset followed though detached", "detached || reset == kNone", "reset == kNone", "lif"),
    ),
}
FAULTS = tuple(Fault(name, file, *fault) for file, faults in _FAULTS.items() for name, *fault in faults)
#: The element types and cells that show the faults: a copy for each.
SHOWN = sorted({fault.shown for fault in FAULTS})

_building = Lock()


@cache
def _copy(element: str, cell: str) -> Path:
    folder = FOLDER / "mutants" / f"{element}-{cell}"
    others = {path for path in (planting.CSRC / "cells").iterdir() if path.stem != cell}
    faults = [
        (number, (planting.CSRC / "cuda" / fault.file).resolve(), fault.old, fault.new)
        for number, fault in enumerate(FAULTS, 1)
        if fault.shown == (element, cell)
    ]
    planting.plant(folder / "csrc", faults, others)
    return build(folder, folder / "csrc", (element,))


def outcome(element: str, cell: str, fault: Fault | None = None) -> str:
    """The first check of the battery that fails with a fault, or without one if it is None; empty if all pass."""
    with _building:
        module = _copy(element, cell)
    number = FAULTS.index(fault) + 1 if fault else 0
    return planting.outcome(number, module, battery.failure, element)
