"""Faults planted into copies of the CUDA sources, one at a time: the battery must catch each.

A copy has the one cell that the fault names, because all cells would take too long to compile and to run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock

from . import FOLDER, ROOT, build


@dataclass(frozen=True)
class Mutant:
    """A fault: in `file`, relative to csrc/cuda, the text `old`, which occurs once, becomes `new`.

    The battery runs on `cell`.
    """

    name: str
    file: str
    old: str
    new: str
    cell: str = "bmru"

    @property
    def element(self) -> str:
        """The type of streams that shows it."""
        return "bfloat16" if self.file == "pairs.cuh" else "float32"

    def plant(self, csrc: Path, cell: str) -> None:
        """Write a copy of the sources with the fault and one cell. Files that stay the same keep their time."""
        for source in [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]:
            if source.parent.name == "cells" and source.stem != cell:
                continue
            text = source.read_text()
            place = source.relative_to(ROOT / "csrc")
            if source == (ROOT / "csrc" / "cuda" / self.file).resolve():
                assert text.count(self.old) == 1, f"{self.name}: expected the text to change once in {place}"
                text = text.replace(self.old, self.new)
            target = csrc / place
            if not target.exists() or target.read_text() != text:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(text)


_BARRIER = "    __syncthreads();\n"
_AFTER_RUNS = "    offsets[own] = of_run.b;\n"
_AFTER_PARTS = "kCarryLanes, of_part, part_offsets[own]);\n"
_AFTER_REDUCE = "  partial[threadIdx.y * kLanes + threadIdx.x] = sum.total();\n"
_AFTER_MAPS = "    reduce<kOverwrites>(part, cell, copies);\n"
_AFTER_ADJOINT_MAPS = "    else reduce();\n"
_WAIT = "      wait_for_copies<1>();\n"
_EXPAND = "  if constexpr (F::Cell::kCodes) over_segments(expand<F>);\n"
_CARRY = "  carry_over(1);\n"
_SUMMARIZE = "  summarize_segments(Heads::kBegin);\n"
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
        ("resets of the next word overlooked", "& ~1u << (word % kResetWord)", "& ~3u << (word % kResetWord)"),
        ("resets of the group before overlooked", "if (group-- * kResetGroup <= begin)", "if (group-- >= 0)"),
    ),
    "spans.cuh": (
        ("offsets not clamped", "return at < 0 ? 0 : (at < scan.time ? at : scan.time);", "return at;"),
        (
            "boundaries of packed sequences at positions of the row",
            "start + plan.chunk_divisor(position - start) *",
            "plan.chunk_divisor(position) *",
        ),
    ),
    "streams.cuh": (
        ("tile ahead not waited for", "    wait_for_copies<1>();\n    Tile", "    Tile"),
        ("wrong checkpoint", "if (span.first || next < span.begin) next +=", "if (next < span.begin) next +="),
        ("missing tail mask", "if (position % U == 0 && position + U <= end) each", "if (position % U == 0) each"),
        ("wrong reverse offset", "(scan.reverse ? scan.time - 1 : 0) *", "(scan.reverse ? scan.time : 0) *"),
        ("32-bit offset", "return data + (first + position * step);", "return data + int(first + position * step);"),
    ),
    "codes.cuh": (
        ("word ahead is the last one", "if (begin_ <= next && next < end_) ahead_ =", "if (next < begin_) ahead_ ="),
        ("code shifted", "words_.at[w] |= codes << before;", "words_.at[w] |= codes << before / 2;"),
    ),
    "segments.cuh": (
        ("end of a sequence passed over", "if (holds && span.last)", "if (false)"),
        ("adjoint read to the end", "holds |= a.at[w] != 0;", "holds = true;"),
        ("map of the adjoint past a reset", "span.last || span.right || span.resets;", "span.last;"),
        ("state kept at a reset in a segment", "if (span.enters()) s = enter<F>", "if (span.first) s = enter<F>"),
        (
            "checkpoint of a segment saved after a reset",
            _SEGMENT_SAVES + _SEGMENT_ENTERS,
            _SEGMENT_ENTERS + _SEGMENT_SAVES,
        ),
        ("map of a head", "call.heads == Heads::kBegin ? span.first", "call.heads != Heads::kEnd ? span.first"),
    ),
    "carry.cuh": (
        ("dropped barrier in carry", _AFTER_RUNS + _BARRIER, _AFTER_RUNS),
        ("dropped barrier in reduce", _AFTER_REDUCE + _BARRIER[2:], _AFTER_REDUCE),
        # A shuffle off by one, as it is here: threads hand values to each other through shared memory.
        ("exchange off by one", "kCarryLanes, parts, left);", "kCarryLanes, parts - 1, left);"),
        ("dropped barrier after the parts", _AFTER_PARTS + _BARRIER, _AFTER_PARTS),
        ("turns of carry apart", "left = walk(part_factors", "walk(part_factors"),
        (
            "rows of sums added plainly",
            "sum.add(load<Traffic::kState, 1>(sums",
            "sum.sum += (load<Traffic::kState, 1>(sums",
        ),
        ("adjoint carried from the left", "(direction > 0 ? begin : row_segments - 1 - begin)", "begin"),
        ("check never fires", "store<Traffic::kState>(work.again, Vector<int, 1>{{1}});", ";"),
        (
            "last boundary not checked",
            "next < 0 || next >= plan.row_segments)",
            "next < 0 || next >= plan.row_segments - 1)",
            "linear_recurrence",
        ),
        (
            "last boundary of the adjoint not checked",
            "next < 0 || next >= plan.row_segments)",
            "next <= 0 || next >= plan.row_segments)",
            "linear_recurrence",
        ),
        ("sums of both scans", "!= 0) rows = uncut_rows;", "!= 0) rows += 0;"),
        ("small by chance scanned again", "late = work.late ? load", "late = false ? load", "linear_recurrence"),
        ("factor of a map after a reset", "resets ? S(0) : all.a", "all.a"),
        ("sums over resets lose a segment", "segment <= last; ++segment", "segment < last; ++segment"),
        ("a segment left out of a map", "i < row_segments; ++i", "i < row_segments - 1; ++i"),
    ),
    "tiles.cuh": (
        ("missing head mask", "(low <= t && t < high)", "t < high"),
        (
            "maps applied beyond the range",
            "is_nan(finite) && !is_nan(carried) ? scan(carried) : left;",
            "left;",
            "linear_recurrence",
        ),
    ),
    "forward.cuh": (
        ("dropped barrier in a tile", _AFTER_MAPS + _BARRIER, _AFTER_MAPS),
        ("copies not waited for", _WAIT, ""),
        ("a slot beyond the last", "slot < 0 || slot >= call.scan.slot_count", "slot < 0"),
        ("a skipped step not cleared", "if (inside && threadIdx.y == 0)\n      store", "if (false)\n      store"),
        ("state not saved", "if (part.has(0) && !(span.resets", "if (part.has(1) && !(span.resets"),
        ("state kept at a reset", _ENTERS, _ENTERS.replace("span.enters()", "span.first")),
        ("checkpoint saved after a reset", _SAVES + _ENTERS, _ENTERS + _SAVES),
        ("NaN in a tile overlooked", "copies = !Of::has_nan(squared);", "copies = true;"),
        ("NaN that enters overlooked", "copies = copies && !is_nan(s.at[w]);", ";"),
    ),
    "backward.cuh": (
        ("copies of the adjoint not waited for", _WAIT, ""),
        ("wrong chunk boundary", "begin > span.begin ? begin : span.begin, d", "span.begin, d"),
        ("m passes a reset", "      room.carried(c) = 0;\n", ""),
        ("sums over resets added plainly", "reset_grad.add(room.carried(c));", "reset_grad.sum += room.carried(c);"),
        ("state after a reset from a checkpoint", "enters = span.enters() &&", "enters = span.first &&"),
        ("state between boundaries a step short", "begin < position; ++begin", "begin < position - 1; ++begin"),
        (
            "gradient of a boundary lost where a segment ends",
            "if (joins(scan, call.plan, span, span.end))",
            "if (span.right && joins(scan, call.plan, span, span.end))",
        ),
        ("terms of a thread added plainly", "if (summed_ == kSummed) add_up(), summed_ = 0;", ";"),
        (
            "rows of sums left out",
            "segment < plan.segments; segment += plan.sum_rows",
            "segment < plan.sum_rows; segment += plan.sum_rows",
        ),
    ),
    "backward_tile.cuh": (
        ("dropped barrier in a tile of the adjoint", _AFTER_ADJOINT_MAPS + _BARRIER, _AFTER_ADJOINT_MAPS),
        ("gradient of a boundary lost in a tile", "position > agent_.span.begin &&", "false &&"),
        ("walk from the wrong end", "last = c + (groups - 1) * room_.channels;", "last = c;"),
        (
            "slope of the output at the state before",
            "after = state(t + 1, w)",
            "after = state(t, w)",
            "leaky_integrator",
        ),
        (
            "map of the adjoint at the state before",
            "cotangent(x, states_[t].at[w], states_[t + 1].at[w]",
            "cotangent(x, states_[t].at[w], states_[t].at[w]",
            "leaky_integrator",
        ),
        (
            "factor of the adjoint at the state after",
            "pull_at(cell_, x, states_[t].at[w], a.at[w])",
            "pull_at(cell_, x, states_[t + 1].at[w], a.at[w])",
            "lif",
        ),
    ),
    "pairs.cuh": (
        ("sign of a zero", "plus_zero = fused(x, splat(1).bits, 0);", "plus_zero = x.bits;"),
        ("borrow between halves", "(a.bits | kSigns) - b.bits", "a.bits - b.bits"),
    ),
    "scan.cu": (
        (
            "carry used before it is written",
            _CARRY + _EXPAND,
            _EXPAND.rstrip(";\n") + ", carry_over(1);\n",
        ),
        ("adjoint that sees the state from no offset", "from_zero.exit = work_.offset;", "", "leaky_integrator"),
        ("mask read twice", "  mark();\n  if (scan_.offsets", "  mark(), mark();\n  if (scan_.offsets"),
        ("streams read twice", _SUMMARIZE + _CARRY, 2 * _SUMMARIZE + _CARRY),
    ),
    "plan.h": (
        ("misaligned pointers", "all = all && reinterpret_cast<uintptr_t>(p) % 16 == 0;", ""),
        ("misaligned rows", "s.batch % width == 0 && s.time % width == 0", "true"),
    ),
    "../maps/affine.h": (
        ("carry across sequences", "(a == S(0) && s == s) || is_head();", "a == S(0) && s == s;"),
        ("adjoint past a write", "holds ? b + before.b : b", "b + before.b"),
    ),
    "../cells/bmru.h": (
        ("gain of slopes left out", "gained = lambda * splat<V>(surrogate.gain);", "gained = lambda;"),
    ),
    "../spike.h": (("a tie that always fires", "tie ? v >= threshold : v > threshold", "v >= threshold", "lif"),),
    "../cells/lif.h": (
        (
            "multiplied and added at once",
            _MOVED,
            "std::fma(x[1], reset == kSubtractDecayed ? s - fall : s, x[0])",
            "lif",
        ),
        ("reset after the leak", _MOVED, "x[1] * s + x[0] - (reset == kSubtractDecayed ? fall : zero)", "lif"),
        ("reset followed though detached", "if (detached || reset == kNone)", "if (reset == kNone)", "lif"),
    ),
}
MUTANTS = tuple(Mutant(name, file, *fault) for file, faults in _FAULTS.items() for name, *fault in faults)
#: The element types and cells that show the faults: the battery passes on them where there is none.
SHOWN = sorted({(m.element, m.cell) for m in MUTANTS})

_building = Lock()
_FLAGS = "-O0 -w"  # a copy is compiled for each fault; the sources themselves are compiled with warnings


def run_battery(path: Path, element: str) -> subprocess.CompletedProcess[str]:
    """The battery on the module at `path`, in a process of its own: a fault may crash it."""
    environment = {**os.environ, "MRU_SIMT_MODULE": str(path), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-m", "simt.battery", element]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=600)


@cache
def _unchanged(element: str, cell: str) -> Path:
    folder = FOLDER / "mutants" / f"none-{element}-{cell}"
    Mutant("none", "tiles.cuh", "#pragma once\n", "#pragma once\n").plant(folder / "csrc", cell)
    return build(folder, folder / "csrc", (element,), optimization=_FLAGS)


def unchanged(element: str, cell: str) -> Path:
    """The module of the sources as they are, for one element type and cell."""
    with _building:
        return _unchanged(element, cell)


def outcome_unchanged(element: str, cell: str) -> subprocess.CompletedProcess[str]:
    """Run the battery on the sources as they are."""
    return run_battery(unchanged(element, cell), element)


def outcome(mutant: Mutant) -> subprocess.CompletedProcess[str]:
    """Build the mutant and run the battery on it."""
    folder = FOLDER / "mutants" / mutant.name.replace(" ", "-")
    mutant.plant(folder / "csrc", mutant.cell)
    module = unchanged(mutant.element, mutant.cell).parent / "module.o"
    return run_battery(build(folder, folder / "csrc", (mutant.element,), module, _FLAGS), mutant.element)
