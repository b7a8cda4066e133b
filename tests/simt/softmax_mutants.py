"""Faults planted into a copy of the softmax recurrence's CUDA sources, behind switches: `simt.softmax` must catch each.

There is no fault of a barrier. The kernels have only that of `reduce`, which the cells use too: `simt.mutants` drops
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock

from . import planting, softmax
from .softmax_module import FOLDER, build


@dataclass(frozen=True)
class Fault:
    """In `file`, relative to csrc/softmax, the text `old` becomes `new`: see tests/planted.py."""

    name: str
    file: str
    old: str
    new: str


_AT = "scan.reverse ? scan.time - 1 - position : position"
_OFFSET = "call.plan.steps_divisor(offset_of(call.scan, sequence))"
_BLOCKS = "call_.scan.sequences * ceil_div(call_.scan.channels, kCarryChannels)"
_ROWS = "s.batch % width == 0 && s.time % width == 0"
_FORWARD = "    over_segments(cuda::forward<F>, kThreads, 0, call_);\n"

#: By file: name, old text and new text.
_FAULTS = {
    "step.h": (
        ("order of rounding", "(x - hi) - lo", "x - (hi + lo)"),
        ("sign of a gap", "newer ? -e : e", "newer ? e : -e"),
        ("low part of a map", "((second.Z - past.hi) - past.lo) + second.z", "(second.Z - past.hi) - past.lo"),
        ("z dropped at a border", "size < splat<V>(kInfinity<V>) ? z : zero<V>()", "zero<V>()"),
        ("factor of the adjoint without decays", "(start.hi - end.hi) + decay", "start.hi - end.hi"),
    ),
    "cuda/threads.cuh": (
        ("border off by one", "call.plan.chunk_divisor(position) - 1", "call.plan.chunk_divisor(position - 1)"),
        ("sums beyond a part", "if (place.lane + by < plan.lanes) x += other;", "x += other;"),
        ("threads without channels add to sums", "if (!place.inside) x = 0;", ""),
        ("wrong end of a reversed scan", _AT, _AT.replace(" - 1", "")),
        ("numbers that sequences share", f"sequence + {_OFFSET}", _OFFSET),
        ("sequence before that of a segment", "first_segment(call, middle) <= segment",
         "first_segment(call, middle) < segment"),
        ("empty sequence without a segment", "if (count == 0) count = 1;", ""),
        ("numbers left over are scanned", "index < 0 || index >= all.count", "index < 0"),
        ("numbers before the first sequence are scanned", "index < 0 || index >= all.count",
         "index >= all.count"),
        ("final state of a number left over", "index == all.count - 1", "index >= all.count - 1"),
        ("segment at steps of the row", "begin += index * call.plan.steps;", "begin = index * call.plan.steps;"),
        ("segment beyond its sequence", "last ? all.end : begin + call.plan.steps",
         "last ? call.scan.time : begin + call.plan.steps"),
    ),
    "cuda/forward.cuh": (
        ("a step beyond the segment", "if (t < left_) lines_.next(next_[t]);", "lines_.next(next_[t]);"),
        ("decays of a segment", "decays[h] += heads.decay_of(inputs, h);", "decays[h] = heads.decay_of(inputs, h);"),
        ("border before it is passed", "position != range.start", "position != range.begin"),
    ),
    "cuda/carry.cuh": (
        ("maps before a turn lost", "lane == 0 ? entry : entry.then(before)", "lane == 0 ? entry : before"),
        ("shuffle by too few lanes", "lane >= by", "lane > by"),
        ("adjoint carried without the mean", "f * (start.mean - end.mean)", "S(0)"),
        ("border of another segment", "all.start + segment * plan.steps", "all.start + (segment + 1) * plan.steps"),
        ("border at steps of the row", "all.start + segment * plan.steps", "segment * plan.steps"),
    ),
    "cuda/backward.cuh": (
        ("copies not waited for", "    wait_for_copies<0>();\n", ""),
        ("partial sums", "part < call.plan.parts", "part < call.plan.parts - 1"),
        ("gradient of Z once a part", "place_.leads() && w == h", "place_.leads_part() && w == h"),
        ("rows of sums", "place_.segment * plan.parts + place_.part", "place_.segment * plan.parts"),
        ("state of another tile", "room_.saved(first / F::kTile)", "room_.saved(0)"),
        ("adjoint opened at every tile", "tile == tiles - 1", "true"),
    ),
    "cuda/plan.h": (
        ("too few numbers for packed segments", "scan.sequences + scan.time / steps", "scan.time / steps"),
        ("time of no sequence is cut", "scan.segment > 0 && scan.sequences > 0", "scan.segment > 0"),
    ),
    "cuda/softmax.cu": (
        ("only the first packed sequence is carried", _BLOCKS, _BLOCKS.replace("sequences", "batch")),
        ("misaligned words", f"is_aligned && {_ROWS}", _ROWS),
        ("misaligned rows", f"is_aligned && {_ROWS}", "is_aligned"),
        ("streams read twice", _FORWARD, 2 * _FORWARD),
        ("borders that no chunk has", "scan.offsets && scan.checkpoints", "false"),
    ),
}  # fmt: skip
FAULTS = tuple(Fault(name, file, *fault) for file, faults in _FAULTS.items() for name, *fault in faults)

_ELEMENT = "float32"
_building = Lock()


@cache
def _copy() -> Path:
    folder = FOLDER / "mutants"
    faults = [(number, planting.CSRC / "softmax" / f.file, f.old, f.new) for number, f in enumerate(FAULTS, 1)]
    planting.plant(folder / "csrc", faults)
    return build(folder, folder / "csrc", (_ELEMENT,))


def outcome(fault: Fault | None = None) -> str:
    """The first check that fails with a fault, or without one if it is None; empty if all pass."""
    with _building:
        module = _copy()
    number = FAULTS.index(fault) + 1 if fault else 0
    return planting.outcome(number, module, softmax.failure, _ELEMENT)
