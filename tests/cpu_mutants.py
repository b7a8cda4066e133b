"""Faults planted into copies of the CPU sources, one at a time, each with the tests of this suite that must catch it.

A copy is compiled for one instruction set and without optimization; only the object with the fault is compiled anew.
The Python files are those of this package.
"""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torch.utils import cpp_extension

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "cpu-mutants"

COMPILER = [
    *(os.environ.get("CXX", "g++"), "-std=c++20", "-O0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-DTORCH_TARGET_VERSION=0x020b000000000000", "-DMRU_ONE_ISA", "-DMRU_ISA=kBaseline", f"-I{FOLDER}"),
    *(f"-isystem{path}" for path in cpp_extension.include_paths()),
]
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
CELLS = runpy.run_path(str(ROOT / "csrc/cells.py"))
#: Objects by their source below csrc/cpu and the cell that they contain.
OBJECTS: dict[str, tuple[str, str | None]] = {
    **{path.stem: (path.name, None) for path in (ROOT / "csrc/cpu").glob("*.cpp")},
    "library": ("../torch/library.cpp", None),
    "softmax_driver": ("../softmax/cpu/register.cpp", None),
    "softmax": ("../softmax/cpu/kernels.cpp", None),
    **{cell: ("kernels/kernels.cpp", cell) for cell in CELLS["names"](ROOT / "csrc")},
}


@dataclass(frozen=True)
class Mutant:
    """A fault: in `file` below csrc, the text `old`, which occurs once, becomes `new`.

    Attributes:
        anew: the object that is compiled with the fault.
        tests: the tests that must fail, as an expression of pytest's -k.
        isa: the compiler's flags for the instruction set.
    """

    name: str
    file: str
    old: str
    new: str
    anew: str
    tests: str
    isa: tuple[str, ...] = ()


def _files(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/test_{name}.py" for name in names)


#: The files of the tests that run on a mutant, by the object that is compiled anew; `COMMON` for the others.
TESTS = {"lif": _files("lif"), "resonate": _files("resonate")}
TESTS |= dict.fromkeys(("min_gru", "min_lstm"), _files("op", "min_gates"))
TESTS |= dict.fromkeys(("softmax", "softmax_driver"), _files("softmax", "softmax_precision"))
COMMON = _files("precision", "isa", "cuts", "resets")

_MOVED = "x[1] * (reset == kSubtractDecayed ? s - fall : s) + x[0]"
_NARROW_NAN = "return x != x ? (u >> 16) | 0x40u : rounded;"
MUTANTS = (
    Mutant("a NaN rounded", "cpu/kernels/vector.h", _NARROW_NAN, "return rounded;", "bmru", "ieee"),
    Mutant("a tie rounded up", "cpu/kernels/vector.h", "0x7fffu + ((u >> 16) & 1u)", "0x8000u", "bmru", "ieee"),
    Mutant("a half subnormal tie rounded up", "cpu/kernels/vector.h", "bit_cast<F>(magnitude) + 0.5f",
           "bit_cast<F>(magnitude + 1u) + 0.5f", "bmru", "ieee"),
    Mutant("a half tie rounded up", "cpu/kernels/vector.h", "0xfffu + ((magnitude >> 13) & 1u)", "0x1000u", "bmru",
           "ieee"),
    Mutant("65519 made infinite", "cpu/kernels/vector.h", "0x477ff000u", "0x477fe000u", "bmru", "ieee"),
    Mutant("a half subnormal scaled", "cpu/kernels/vector.h", "bit_cast<F>(magnitude + (113u << 23)) - 0x1p-14f",
           "bit_cast<F>(magnitude) * 0x1p112f", "bmru", "ieee"),
    Mutant("halves truncated by AVX-512", "cpu/kernels/vector.h", "(__m512)v, _MM_FROUND_TO_NEAREST_INT",
           "(__m512)v, _MM_FROUND_TO_ZERO", "bmru", "ieee", AVX512),
    Mutant("halves truncated by AVX2", "cpu/kernels/vector.h", "(__m256)v, _MM_FROUND_TO_NEAREST_INT",
           "(__m256)v, _MM_FROUND_TO_ZERO", "bmru", "ieee", AVX2),
    Mutant("a channel too many read", "cpu/kernels/vector.h", "? load_few_bytes(from + 8, bytes - 8) : 0",
           "? load_as<uint64_t>(from + 8) : 0", "bmru", "behind"),
    Mutant("a channel too few stored", "cpu/kernels/vector.h", "reinterpret_cast<const char*>(&v), lanes.count)",
           "reinterpret_cast<const char*>(&v), lanes.count & ~1)", "schmitt", "channels and schmitt"),
    Mutant("last channels of a sum not cleared", "cpu/kernels/backward.h", "      carried_sum[k] = {};\n", "",
           "schmitt", "sums and schmitt"),
    Mutant("terms added plainly", "cpu/kernels/backward.h", "if ((right - summed_from) % kSummed == 0 || right",
           "if (right", "schmitt", "sums and schmitt"),
    Mutant("what a sum lost left out", "sum.h", "lost == lost ? sum + lost : sum", "sum", "schmitt",
           "sums and schmitt"),
    Mutant("gain of slopes left out", "cells/schmitt.h", "gained = lambda * splat<V>(surrogate.gain);",
           "gained = lambda;", "schmitt", "slopes and schmitt"),
    Mutant("a look back given up", "cpu/forward.cpp", "part.begin > begin; steps *= 2",
           "part.begin > begin && steps <= 1 << 13; steps *= 2", "forward", "held_over_long"),
    Mutant("a look ahead given up", "cpu/backward.cpp", "part.end < end; steps *= 2",
           "part.end < end && steps <= 1 << 13; steps *= 2", "backward", "held_over_long"),
    Mutant("adjoint that sees the state from no offset", "cpu/backward.cpp", "  if (k.adjoint_sees_state)\n",
           "  if (false)\n", "backward", "depend_on_the_state"),
    Mutant("a reset that keeps the state", "cpu/forward.cpp", "if (part.resets) std::memcpy(state,",
           "if (false) std::memcpy(state,", "forward", "scanned_apart"),
    Mutant("m that passes a reset", "cpu/backward.cpp", "if (part.resets) take(i, d0, d1, m(i, d0));", "", "backward",
           "scanned_apart"),
    Mutant("a reset looked through", "cpu/forward.cpp", "  if (reset < segment.begin) return;\n", "  return;\n",
           "forward", "reset_is_held"),
    Mutant("a reset looked through by m", "cpu/backward.cpp", "  if (end == segment.end) return;\n", "  return;\n",
           "backward", "reset_is_held"),
    Mutant("the map of a segment with a reset", "cpu/forward.cpp", "    if (part.resets) k.head(",
           "    if (false) k.head(", "forward", "is_a_constant"),
    Mutant("resets of a reversed scan", "cpu/plan.h", "(scan.reverse ? scan.time - 1 - first : first)", "first",
           "forward", "scanned_apart"),
    Mutant("a reset recomputed from the checkpoint", "cpu/kernels/backward.h", "const bool resets = segment.resets &&",
           "const bool resets = false && segment.resets &&", "linear_recurrence", "second_derivatives_with_resets"),
    Mutant("a boundary after its reset", "cpu/kernels/backward.h", "if (scan.grad_checkpoints && is_boundary(",
           "if (scan.grad_checkpoints && !segment.resets && is_boundary(", "bmru", "every_few_steps"),
    Mutant("the gradient of a boundary lost where time is cut", "cpu/kernels/summary.h", "if (scan.grad_checkpoints &&",
           "if (false && scan.grad_checkpoints &&", "bmru", "boundaries_where_time_is_cut"),
    Mutant("codes of a word begun before a reset lost", "cpu/kernels/rows.h",
           "if (count == 0 || shift_of(segment.begin) == 0) return", "if (true) return", "bmru",
           "before_a_reset_is_remembered"),
    Mutant("a log weight in one float", "softmax/step.h", "r.newer ? zero<V>() : past.lo", "zero<V>()", "softmax",
           "precision_of_float32"),
    Mutant("a bonus added to a large score", "softmax/step.h",
           "ratio(distance(score, m, c) + bonus)", "ratio(distance(score + bonus, m, c))", "softmax",
           "precision_of_float32"),
    Mutant("mu without the end of a chunk", "softmax/step.h", "(d_Z - d_mean * mean) * r", "d_Z * r", "softmax",
           "definition_and_gradients"),
    Mutant("a bonus read with the decayed state", "softmax/cpu/rows.h", "weigh_read(score, read_factor, m, c)",
           "weigh_read(score, read_factor - in.decay_at(lanes, j, step), m, c)", "softmax", "definition_and_gradients"),
    Mutant("a read with the weight of the update", "softmax/step.h", "read_b = b * factor", "read_b = b", "softmax",
           "definition_and_gradients"),
    Mutant("one ratio for any decay", "softmax/cpu/rows.h", "<= kModerate<S>", "<= 1e9", "softmax",
           "large_scores_and_decays"),
    Mutant("one ratio by block of heads", "softmax/cpu/rows.h", "h = -h0; h < scan.heads - h0;", "h = 0; h < heads;",
           "softmax", "number_of_threads"),
    Mutant("the wrong one of two weights", "softmax/step.h", "newer ? score : past.hi", "newer ? past.hi : score",
           "softmax", "definition_and_gradients"),
    Mutant("borders of packed sequences in one row", "softmax/cpu/rows.h",
           "scan.checkpoint_rows + segment.start / scan.chunk + step / scan.chunk - 1",
           "scan.checkpoint_rows + step / scan.chunk - 1", "softmax", "directions_and_packed_sequences"),
    Mutant("half of the sums over a head", "softmax/cpu/backward.h", "int64_t width = kMostLanes / 2; width > 0",
           "int64_t width = kMostLanes / 2; width > 1", "softmax", "definition_and_gradients"),
    Mutant("the mean that moves in a segment left out", "softmax/cpu/carry.h",
           "f[i] * (d_Z + sum_of_parts(parts))", "f[i] * d_Z", "softmax", "time_cut"),
    Mutant("a map that decays after its end", "softmax/step.h", "plus(first.Z, first.z, second.decay)",
           "plus(first.Z, first.z, first.decay)", "softmax", "time_cut"),
    Mutant("no gradient of the initial z", "softmax/cpu/register.cpp", "std::memcpy(of_Z + heads, of_Z, heads);", "",
           "softmax_driver", "definition_and_gradients"),
    Mutant("a complex decay pulled without its conjugate", "cells/resonate.h", "return conj(x[1]) * m;",
           "return x[1] * m;", "resonate", "are_those_of_the_loop"),
    Mutant("an imaginary part stored", "cpu/kernels/vector.h", "store(lanes, p, v.re);", "store(lanes, p, v.im);",
           "resonate", "are_those_of_the_loop"),
    Mutant("the gradient of a threshold with the other sign", "cells/resonate.h", "zero : -q", "zero : q", "resonate",
           "are_those_of_the_loop"),
    Mutant("a NaN threshold that does not reach the state", "cells/resonate.h",
           "x[3].re == x[3].re ? s.re : x[3].re", "s.re", "resonate", "nan_stays"),
    Mutant("a tie that always fires", "spike.h", "tie ? v >= threshold : v > threshold", "v >= threshold", "lif",
           "a_tie_spikes"),
    Mutant("a reset joined with the input", "cells/lif.h", "return moved - fall;", "return x[1] * s + (x[0] - fall);",
           "lif", "same_bits_everywhere"),
    Mutant("a reset after the leak", "cells/lif.h", _MOVED,
           "x[1] * s + x[0] - (reset == kSubtractDecayed ? fall : zero)", "lif", "same_bits_everywhere"),
    Mutant("a reset followed though detached", "cells/lif.h", "if (detached || reset == kNone)", "if (reset == kNone)",
           "lif", "all_combinations_equal"),
    Mutant("the slope of a sigmoid without one factor", "min_gates.h", "splat<V>(1) : e * over * over",
           "splat<V>(1) : e * over", "min_gru", "equals_the_reference and min_gru"),
    Mutant("the gradient of a gate without the state", "cells/min_gru.h", "(gates.value - s)", "gates.value", "min_gru",
           "equals_the_reference and min_gru"),
    Mutant("gates above zero that count in the shares", "cells/min_lstm.h",
           "(v < zero ? v : zero) - (u < zero ? u : zero)", "v - u", "min_lstm", "equals_the_reference and min_lstm"),
)  # fmt: skip


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


def _compile(csrc: Path, name: str, target: Path, isa: tuple[str, ...] = ()) -> None:
    source, cell = OBJECTS[name]
    own = (f"-DMRU_CELL={cell}",) if cell else ()
    _run(*COMPILER, *isa, *own, f"-I{csrc}", "-c", csrc / "cpu" / source, "-o", target)


@cache
def unchanged() -> dict[str, Path]:
    """The objects of the sources as they are, for the narrowest instruction set."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    CELLS["write_header"](ROOT / "csrc", FOLDER)
    CELLS["write_schemas"](ROOT / "csrc", FOLDER)
    objects = {name: FOLDER / f"{name}.o" for name in OBJECTS}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda name: _compile(ROOT / "csrc", name, objects[name]), objects))
    return objects


def package_with(objects: dict[str, Path], folder: Path) -> None:
    """A package in `folder` that is this one, with an extension of these objects."""
    package = folder / "mru_kernels"
    package.mkdir(parents=True)
    for part in (ROOT / "mru_kernels").iterdir():
        if part.suffix != ".so":
            (package / part.name).symlink_to(part)
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    torch = ("-ltorch", "-ltorch_cpu", "-lc10")
    _run(COMPILER[0], "-shared", *objects.values(), "-Wl,-Bsymbolic", "-lstdc++", *libraries, *torch, "-o",
         package / "_C.so")  # fmt: skip


def run_tests(folder: Path, tests: str, files: Collection[str]) -> subprocess.CompletedProcess[str]:
    """The tests on the package in `folder`, in a process of their own: a fault may crash it."""
    options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not check", "-o", f"pythonpath={folder} ."]
    command = [sys.executable, "-m", "pytest", *options, "-k", tests, *files]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)


def outcome(mutant: Mutant | None) -> subprocess.CompletedProcess[str]:
    """Build the mutant, or the sources as they are, and run its tests, or all that any mutant has."""
    folder = FOLDER / (mutant.name.replace(" ", "-") if mutant else "none")
    shutil.rmtree(folder, ignore_errors=True)
    objects = dict(unchanged())
    if mutant is None:
        package_with(objects, folder)
        files = {*COMMON, *(name for names in TESTS.values() for name in names)}
        return run_tests(folder, " or ".join(sorted({f"({m.tests})" for m in MUTANTS})), sorted(files))
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    text = (csrc / mutant.file).read_text()
    assert text.count(mutant.old) == 1, f"{mutant.name}: expected the text to change once in {mutant.file}"
    (csrc / mutant.file).write_text(text.replace(mutant.old, mutant.new))
    objects[mutant.anew] = folder / "anew.o"
    _compile(csrc, mutant.anew, objects[mutant.anew], mutant.isa)
    package_with(objects, folder)
    return run_tests(folder, mutant.tests, TESTS.get(mutant.anew, COMMON))
