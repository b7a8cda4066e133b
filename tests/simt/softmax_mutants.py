"""Faults planted into copies of the softmax recurrence's CUDA sources, one at a time: `simt.softmax` must catch each.

The kernels meet at no barrier but that of `reduce`, which they share with the cells; `simt.mutants` drops it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock

from . import ROOT
from .softmax_module import FOLDER, build


@dataclass(frozen=True)
class Mutant:
    """A fault: in `file`, relative to csrc/softmax, the text `old`, which occurs once, becomes `new`."""

    name: str
    file: str
    old: str
    new: str

    def plant(self, csrc: Path) -> None:
        """Write a copy of the sources with the fault. Files that stay the same keep their time."""
        for source in [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]:
            text = source.read_text()
            if source == ROOT / "csrc" / "softmax" / self.file:
                assert text.count(self.old) == 1, f"{self.name}: expected the text once in {self.file}"
                text = text.replace(self.old, self.new)
            target = csrc / source.relative_to(ROOT / "csrc")
            if not target.exists() or target.read_text() != text:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(text)


#: By file: name, old text and new text.
_FAULTS = {
    "step.h": (
        ("order of rounding", "(x - hi) - lo;", "x - (hi + lo);"),
        ("sign of a gap", "a() const { return newer ? e : splat<V>(1)", "a() const { return newer ? splat<V>(1) : e"),
        ("low part of a map", "past.lo) + second.z;", "past.lo);"),
        ("z dropped at a border", "size < splat<V>(kInfinity<V>) ? z : zero<V>()", "zero<V>()"),
        ("factor of the adjoint without decays", "(start.hi - end.hi) + decay)", "(start.hi - end.hi) + zero<V>())"),
    ),
    "cuda/threads.cuh": (
        ("border off by one", "call.plan.chunk_divisor(position) - 1;", "call.plan.chunk_divisor(position - 1);"),
        ("sums beyond a part", "if (place.lane + by < plan.lanes) x += other;", "x += other;"),
        ("threads without channels add to sums", "if (!place.inside) x = 0;", ""),
        ("wrong end of a reversed scan", "scan.time - 1 - position : position)", "scan.time - position : position)"),
        ("numbers that sequences share", "return sequence + call.plan.", "return call.plan."),
        ("sequence before that of a segment", "(call, middle) <= segment", "(call, middle) < segment"),
        ("empty sequence without a segment", "if (count == 0) count = 1;", ""),
        ("numbers left over are scanned", "if (index < 0 || index >= all.count)", "if (index < 0)"),
        ("numbers before the first sequence are scanned", "if (index < 0 || index >= all.count)",
         "if (index >= all.count)"),
        ("final state of a number left over", "last = index == all.count - 1;", "last = index >= all.count - 1;"),
        ("segment at steps of the row", "begin += index * call.plan.steps;", "begin = index * call.plan.steps;"),
        ("segment beyond its sequence", "last ? all.end :", "last ? call.scan.time :"),
    ),
    "cuda/forward.cuh": (
        ("a step beyond the segment", "if (t < left_) lines_.next(next_[t]);", "lines_.next(next_[t]);"),
        ("decays of a segment", "decays[h] += heads.decay_of", "decays[h] = heads.decay_of"),
        ("border before it is passed", "position != range.start)", "position != range.begin)"),
    ),
    "cuda/carry.cuh": (
        ("maps before a turn lost", "lane == 0 ? entry : entry.then(before)", "lane == 0 ? entry : before"),
        ("shuffle by too few lanes", "if (lane >= by) all =", "if (lane > by) all ="),
        ("adjoint carried without the mean", "f * (start.mean - end.mean)", "S(0)"),
        ("border of another segment", "all.start + segment * plan.steps", "all.start + (segment + 1) * plan.steps"),
        ("border at steps of the row", "all.start + segment * plan.steps", "segment * plan.steps"),
    ),
    "cuda/backward.cuh": (
        ("copies not waited for", "    wait_for_copies<0>();\n", ""),
        ("partial sums", "part < call.plan.parts; ++part", "part < call.plan.parts - 1; ++part"),
        ("gradient of Z once a part", "if (place_.leads() && w == h)", "if (place_.leads_part() && w == h)"),
        ("rows of sums", "place_.segment * plan.parts + place_.part;", "place_.segment * plan.parts;"),
        ("state of another tile", "before[0] = room_.saved(first / F::kTile);", "before[0] = room_.saved(0);"),
        ("adjoint opened at every tile", "tile == tiles - 1, gradient", "true, gradient"),
    ),
    "cuda/plan.h": (
        ("too few numbers for packed segments", "scan.sequences + scan.time / steps", "scan.time / steps"),
        ("time of no sequence is cut", "if (scan.segment > 0 && scan.sequences > 0)", "if (scan.segment > 0)"),
    ),
    "cuda/softmax.cu": (
        ("only the first packed sequence is carried", "scan.sequences * ceil_div(", "scan.batch * ceil_div("),
        ("misaligned words", "return is_aligned && s.batch", "return s.batch"),
        ("misaligned rows", "s.batch % width == 0 && s.time % width == 0;", "true;"),
        ("streams read twice", "    over_segments(cuda::forward<F>, kThreads, 0, call_);\n",
         2 * "    over_segments(cuda::forward<F>, kThreads, 0, call_);\n"),
        ("borders that no chunk has", "if (scan.offsets && scan.checkpoints)", "if (false)"),
    ),
}  # fmt: skip
MUTANTS = tuple(Mutant(name, file, *fault) for file, faults in _FAULTS.items() for name, *fault in faults)

_ELEMENT = "float32"
_FLAGS = "-O0 -w"  # a copy is compiled for each fault; the sources themselves are compiled with warnings
_building = Lock()


def _run(path: Path) -> subprocess.CompletedProcess[str]:
    """The checks on the module at `path`, in a process of its own: a fault may crash it."""
    environment = {**os.environ, "MRU_SIMT_MODULE": str(path), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-m", "simt.softmax", _ELEMENT]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=600)


@cache
def _unchanged() -> Path:
    folder = FOLDER / "mutants" / "none"
    Mutant("none", "step.h", "#pragma once\n", "#pragma once\n").plant(folder / "csrc")
    return build(folder, folder / "csrc", (_ELEMENT,), optimization=_FLAGS)


def unchanged() -> Path:
    """The module of the sources as they are."""
    with _building:
        return _unchanged()


def outcome(mutant: Mutant) -> subprocess.CompletedProcess[str]:
    """Build the mutant and run the checks on it."""
    folder = FOLDER / "mutants" / mutant.name.replace(" ", "-")
    mutant.plant(folder / "csrc")
    return _run(build(folder, folder / "csrc", (_ELEMENT,), unchanged().parent / "module.o", _FLAGS))


def outcome_unchanged() -> subprocess.CompletedProcess[str]:
    """Run the checks on the sources as they are."""
    return _run(unchanged())
