"""Faults planted into one copy of the CPU sources, each with the tests of this suite that must catch it.

Each fault is behind a switch (planted.py). The copy is compiled without optimization, for the baseline. For each wider
instruction set, one cell is compiled again, and the rest stays as it is. The Python files are those of this package.
"""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch.utils import cpp_extension

from tests import planted

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "cpu-faults"
CSRC = FOLDER / "csrc"

COMPILER = [
    *(os.environ.get("CXX", "g++"), "-std=c++20", "-O0", "-w", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-DTORCH_TARGET_VERSION=0x020b000000000000", "-DMRU_ONE_ISA", "-DMRU_ISA=kBaseline", f"-I{FOLDER}", f"-I{CSRC}"),
    "-Dalways_inline=unused",  # inlining takes a third of the compiler's time
    *(f"-isystem{path}" for path in cpp_extension.include_paths()),
]
#: The compiler's flags for each instruction set, from the narrowest to the widest.
ISAS = {
    "baseline": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
}
#: The cell whose tests show the faults of a wider instruction set.
WIDER = "bmru"
CELLS = runpy.run_path(str(ROOT / "csrc/cells.py"))
#: For each object its source, relative to csrc/cpu, and the cell that it contains.
OBJECTS: dict[str, tuple[str, str | None]] = {
    **{path.stem: (path.name, None) for path in (ROOT / "csrc/cpu").glob("*.cpp")},
    "library": ("../torch/library.cpp", None),
    "softmax_driver": ("../softmax/cpu/register.cpp", None),
    "softmax": ("../softmax/cpu/kernels.cpp", None),
    **{cell: ("kernels/kernels.cpp", cell) for cell in CELLS["names"](ROOT / "csrc")},
}


def _files(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/test_{name}.py" for name in names)


COMMON = _files("precision", "isa", "cuts", "resets")
LIF, RESONATE, WANTED = _files("lif"), _files("resonate"), _files("wanted")
GATES = _files("op", "min_gates")
SOFTMAX = _files("softmax", "softmax_precision")
INTERLEAVED, LARGE = _files("interleaved"), _files("large")


@dataclass(frozen=True)
class Fault:
    """A planted fault: in `file`, relative to csrc, the text `old` becomes `new`, as `planted.switched` describes them.

    Attributes:
        tests: the tests that must fail, as an expression of pytest's -k.
        files: the files of the tests.
        isa: the instruction set, a key of `ISAS`.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
    files: tuple[str, ...] = COMMON
    isa: str = "baseline"


_NARROW_NAN = "return x != x ? (u >> 16) | 0x40u : rounded;"
_NARROW_AVX512 = "_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT)"
_NARROW_AVX2 = "_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT)"
_STORE_FEW = "copy_few<N, kSize>(static_cast<char*>(p), reinterpret_cast<const char*>(&v), lanes.count);"
_OFFSETS = """\
BackwardPass(offsets_only, k, segments)
      .run([&](int64_t i, int64_t d) { return cut_maps.maps.b.at(i, d); },
           [&](int64_t i, int64_t d) { return cut_maps.late.at(i, d); });"""
_RESET = "if (part.resets) std::memcpy(state, resets.at(part, d0), (d1 - d0) * state_bytes(scan));"
_HEAD = "if (part.resets) k.head(d1 - d0, resets.at(part, d0), map);"
_BOUNDARY = "scan.grad_checkpoints && !F::Cell::kAdjointSeesState && is_boundary(scan, segment, end)"
_BORDER = "segment.batch * scan.checkpoint_rows + segment.start / scan.chunk + step / scan.chunk - 1"
_MOVED = "x[1] * (reset == kSubtractDecayed ? s - fall : s) + x[0]"
_STREAM = "_mm_stream_si128(static_cast<__m128i*>(p), (__m128i)v)"
_STREAM_AVX2 = "_mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v)"
_STREAM_AVX512 = "_mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v)"
_WHOLE_LINES = "(uintptr_t(at) | uintptr_t(step * kSize) | uintptr_t(n * kSize)) % kLine == 0"
FAULTS = (
    Fault("a NaN rounded", "cpu/kernels/vector.h", _NARROW_NAN, "return rounded;", "ieee"),
    Fault("a tie rounded up", "cpu/kernels/vector.h", "0x7fffu + ((u >> 16) & 1u)", "U{} + 0x8000u", "ieee"),
    Fault("a half subnormal tie rounded up", "cpu/kernels/vector.h", "bit_cast<F>(magnitude) + 0.5f",
           "bit_cast<F>(magnitude + 1u) + 0.5f", "ieee"),
    Fault("a half tie rounded up", "cpu/kernels/vector.h", "0xfffu + ((magnitude >> 13) & 1u)", "U{} + 0x1000u",
           "ieee"),
    Fault("65519 made infinite", "cpu/kernels/vector.h", "0x477ff000u", "0x477fe000u", "ieee"),
    Fault("a half subnormal scaled", "cpu/kernels/vector.h", "bit_cast<F>(magnitude + (113u << 23)) - 0x1p-14f",
           "bit_cast<F>(magnitude) * 0x1p112f", "ieee"),
    Fault("halves truncated by AVX-512", "cpu/kernels/vector.h", _NARROW_AVX512,
           "_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_ZERO)", "ieee", isa="avx512"),
    Fault("halves truncated by AVX2", "cpu/kernels/vector.h", _NARROW_AVX2,
           "_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_ZERO)", "ieee", isa="avx2"),
    Fault("a channel too many read", "cpu/kernels/vector.h", "bytes > 8 ? load_few_bytes(from + 8, bytes - 8) : 0",
           "bytes > 8 ? load_as<uint64_t>(from + 8) : 0", "behind"),
    Fault("a channel too few stored", "cpu/kernels/vector.h", _STORE_FEW,
           _STORE_FEW.replace("lanes.count", "lanes.count & ~1"), "channels and schmitt"),
    Fault("last channels of a sum not cleared", "cpu/kernels/backward.h", "carried_sum[k] = {};", "",
           "sums and schmitt"),
    Fault("terms added plainly", "cpu/kernels/backward.h", "(right - summed_from) % kSummed == 0", "false",
           "sums and schmitt"),
    Fault("the gradient of another array left out", "torch/ops.h", "(wanted >> bound.place[i] & 1) == 0",
           "(wanted >> i & 1) == 0", "changes_nothing_else", WANTED),
    Fault("a gradient that is not wanted not set to zero", "cpu/backward.cpp", "std::memset(grad, 0, row_bytes(scan));",
           "std::memset(grad, 1, row_bytes(scan));", "changes_nothing_else", WANTED),
    Fault("what a sum lost left out", "sum.h", "lost == lost ? sum + lost : sum", "sum", "sums and schmitt"),
    Fault("gain of slopes left out", "cells/schmitt.h", "lambda * splat<V>(surrogate.gain)", "lambda",
           "slopes and schmitt"),
    Fault("a look back given up", "cpu/forward.cpp", "part.begin > begin", "part.begin > begin && steps <= 1 << 13",
           "held_over_long"),
    Fault("a look ahead given up", "cpu/backward.cpp", "part.end < end", "part.end < end && steps <= 1 << 13",
           "held_over_long"),
    Fault("adjoint that sees the state from no offset", "cpu/backward.cpp", _OFFSETS, "", "depend_on_the_state"),
    Fault("a reset that keeps the state", "cpu/forward.cpp", _RESET, "", "scanned_apart"),
    Fault("m that passes a reset", "cpu/backward.cpp", "if (part.resets) take(i, d0, d1, m(i, d0));", "",
           "scanned_apart"),
    Fault("a reset looked through", "cpu/forward.cpp", "if (reset < segment.begin) return;", "return;",
           "reset_is_held"),
    Fault("a reset looked through by m", "cpu/backward.cpp", "if (end == segment.end) return;", "return;",
           "reset_is_held"),
    Fault("the map of a segment with a reset", "cpu/forward.cpp", _HEAD, "", "is_a_constant"),
    Fault("resets of a reversed scan", "cpu/plan.h", "(scan.reverse ? scan.time - 1 - first : first)", "first",
           "scanned_apart"),
    Fault("a reset recomputed from the checkpoint", "cpu/kernels/backward.h",
           "segment.resets && begin == segment.begin", "false", "second_derivatives_with_resets"),
    Fault("a boundary after its reset", "cpu/kernels/backward.h",
           "scan.grad_checkpoints && is_boundary(scan, segment, end)",
           "scan.grad_checkpoints && !segment.resets && is_boundary(scan, segment, end)", "every_few_steps"),
    Fault("the gradient of a boundary lost where time is cut", "cpu/kernels/summary.h", _BOUNDARY, "false",
           "boundaries_where_time_is_cut"),
    Fault("codes of a word begun before a reset lost", "cpu/kernels/rows.h",
           "count == 0 || shift_of(segment.begin) == 0", "true", "before_a_reset_is_remembered"),
    Fault("zeros by non-temporal stores", "cpu/kernels/vector.h", _STREAM, _STREAM.replace(")v)", ")V{})"),
           "large_call and bmru", LARGE),
    Fault("zeros by non-temporal stores of AVX2", "cpu/kernels/vector.h", _STREAM_AVX2,
           _STREAM_AVX2.replace(")v)", ")V{})"), "large_call and bmru", LARGE, "avx2"),
    Fault("zeros by non-temporal stores of AVX-512", "cpu/kernels/vector.h", _STREAM_AVX512,
           _STREAM_AVX512.replace(")v)", ")V{})"), "large_call and bmru", LARGE, "avx512"),
    Fault("any rows taken for whole lines", "cpu/kernels/vector.h", _WHOLE_LINES, "true", "large_call and bmru", LARGE),
    Fault("half a square transposed", "cpu/interleaved.cpp", "turn *= 2", "turn *= 4", "bits_of_many and bmru",
           INTERLEAVED),
    Fault("a reversed square from its other end", "cpu/interleaved.cpp", "by > 0 ? t : t + N - 1", "by > 0 ? t : t",
           "bits_of_many and bmru", INTERLEAVED),
    Fault("every segment of a run from the first checkpoint", "cpu/interleaved.cpp", "checkpoint(segment, step)",
           "checkpoint(*segments_, step)", "bits_of_many and bmru", INTERLEAVED),
    Fault("every segment of a run in the first sequence", "cpu/interleaved.cpp",
           "row(const_cast<void*>(scan_.initial), scan_, segment.sequence)",
           "row(const_cast<void*>(scan_.initial), scan_, segments_->sequence)", "bits_of_many and bmru", INTERLEAVED),
    Fault("a run without its last sum", "cpu/interleaved.cpp", "/*rows=*/count_", "count_ - 1",
           "bits_of_many and schmitt", INTERLEAVED),
    Fault("the codes of a segment's first chunk for all", "cpu/interleaved.cpp",
           "(segment.begin + begin) / kCodesPerWord", "segment.begin / kCodesPerWord", "bits_of_many and bmru",
           INTERLEAVED),
    Fault("a log weight in one float", "softmax/step.h", "r.newer ? zero<V>() : past.lo", "zero<V>()",
           "precision_of_float32", SOFTMAX),
    Fault("a bonus added to a large score", "softmax/step.h", "ratio(distance(score, m, c) + bonus)",
           "ratio(distance(score + bonus, m, c))", "precision_of_float32", SOFTMAX),
    Fault("mu without the end of a chunk", "softmax/step.h", "(d_Z - d_mean * mean) * r", "d_Z * r",
           "definition_and_gradients", SOFTMAX),
    Fault("a bonus read with the decayed state", "softmax/cpu/rows.h", "weigh_read(score, read_factor, m, c)",
           "weigh_read(score, read_factor - in.decay_at(lanes, j, step), m, c)", "definition_and_gradients", SOFTMAX),
    Fault("a read with the weight of the update", "softmax/step.h", "b * factor", "b", "definition_and_gradients",
           SOFTMAX),
    Fault("one ratio for any decay", "softmax/cpu/kernels.cpp", "-kModerate<S> <= x && x <= kModerate<S>", "true",
           "large_scores_and_decays", SOFTMAX),
    Fault("one ratio by the first head's decay", "softmax/cpu/kernels.cpp", "h < scan.heads", "h < 1",
           "large_scores_and_decays", SOFTMAX),
    Fault("a vast decay hidden by its bonus", "softmax/cpu/kernels.cpp", "moderate(decay) && moderate(decay + bonus)",
           "moderate(decay + bonus)", "vast_decay", SOFTMAX),
    Fault("infinite decays taken for finite", "softmax/step.h", "is_infinite(sum) ? zero<V>() : rest", "rest",
           "minus_infinity_ends_the_past", SOFTMAX),
    Fault("the wrong one of two weights", "softmax/step.h", "r.newer ? score : past.hi", "r.newer ? past.hi : score",
           "definition_and_gradients", SOFTMAX),
    Fault("borders of packed sequences in one row", "softmax/cpu/rows.h", _BORDER,
           _BORDER.replace("segment.start / scan.chunk + ", ""), "directions_and_packed_sequences", SOFTMAX),
    Fault("half of the sums over a head", "softmax/cpu/backward.h", "width > 0", "width > 1",
           "definition_and_gradients", SOFTMAX),
    Fault("the mean that moves in a segment left out", "softmax/cpu/carry.h", "f[i] * (d_Z + sum_of_parts(parts))",
           "f[i] * d_Z", "time_cut", SOFTMAX),
    Fault("a map that decays after its end", "softmax/step.h", "plus(first.Z, first.z, second.decay)",
           "plus(first.Z, first.z, first.decay)", "time_cut", SOFTMAX),
    Fault("no gradient of the initial z", "softmax/cpu/register.cpp", "std::memcpy(of_Z + heads, of_Z, heads);", "",
           "definition_and_gradients", SOFTMAX),
    Fault("a complex decay pulled without its conjugate", "cells/resonate.h", "conj(x[1]) * m", "x[1] * m",
           "are_those_of_the_loop", RESONATE),
    Fault("an imaginary part stored", "cpu/kernels/vector.h", "store(lanes, p, v.re);", "store(lanes, p, v.im);",
           "are_those_of_the_loop", RESONATE),
    Fault("the gradient of a threshold with the other sign", "cells/resonate.h", "membrane ? zero : -q",
           "membrane ? zero : q", "are_those_of_the_loop", RESONATE),
    Fault("a NaN threshold that does not reach the state", "cells/resonate.h",
           "x[3].re == x[3].re ? s.re : x[3].re", "s.re", "nan_stays", RESONATE),
    Fault("a tie that always fires", "spike.h", "tie ? v >= threshold : v > threshold", "v >= threshold",
           "a_tie_spikes", LIF),
    Fault("a reset joined with the input", "cells/lif.h", "return moved - fall;", "return x[1] * s + (x[0] - fall);",
           "same_bits_everywhere", LIF),
    Fault("a reset after the leak", "cells/lif.h", _MOVED,
           "x[1] * s + x[0] - (reset == kSubtractDecayed ? fall : zero)", "same_bits_everywhere", LIF),
    Fault("a reset followed though detached", "cells/lif.h", "detached || reset == kNone", "reset == kNone",
           "all_combinations_equal", LIF),
    Fault("the slope of a sigmoid without one factor", "min_gates.h", "e * over * over", "e * over",
           "equals_the_reference and min_gru", GATES),
    Fault("the gradient of a gate without the state", "cells/min_gru.h", "(gates.value - s)", "gates.value",
           "equals_the_reference and min_gru", GATES),
    Fault("gates above zero that count in the shares", "cells/min_lstm.h",
           "(v < zero ? v : zero) - (u < zero ? u : zero)", "v - u", "equals_the_reference and min_lstm", GATES),
    Fault("the low part of ln(2) left out", "cpu/kernels/elementary.h",
           "(limited - n * splat(kHigh)) - n * splat(kLow)", "limited - n * splat(kHigh)",
           "where_the_backend_cuts_time and min_gru", GATES),
    Fault("tanh without its sign", "cpu/kernels/elementary.h",
           "with_sign(e_minus_1 / (splat(2) + e_minus_1), x)", "e_minus_1 / (splat(2) + e_minus_1)",
           "where_the_backend_cuts_time and leaky", GATES),
)  # fmt: skip


def _plant() -> None:
    """Write the copy of the sources with every fault. A fault's number is its place in `FAULTS`, from 1 on."""
    shutil.copytree(ROOT / "csrc", CSRC)
    for file in {m.file for m in FAULTS}:
        faults = [(number, m.old, m.new) for number, m in enumerate(FAULTS, 1) if m.file == file]
        (CSRC / file).write_text(planted.switched((CSRC / file).read_text(), faults))
    CELLS["write_header"](ROOT / "csrc", FOLDER)
    CELLS["write_schemas"](ROOT / "csrc", FOLDER)


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


def _compile(name: str, isa: str) -> Path:
    source, cell = OBJECTS[name]
    own = (f"-DMRU_CELL={cell}",) if cell else ()
    target = FOLDER / f"{name}-{isa}.o"
    _run(*COMPILER, *ISAS[isa], *own, "-c", CSRC / "cpu" / source, "-o", target)
    return target


def _package(isa: str, objects: Iterable[Path]) -> None:
    """Make a package that is this one, except that its extension consists of these objects."""
    package = FOLDER / isa / "mru_kernels"
    package.mkdir(parents=True)
    for part in (ROOT / "mru_kernels").iterdir():
        if part.suffix != ".so":
            (package / part.name).symlink_to(part)
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    torch = ("-ltorch", "-ltorch_cpu", "-lc10")
    _run(COMPILER[0], "-shared", *objects, "-Wl,-Bsymbolic", "-lstdc++", *libraries, *torch, "-o", package / "_C.so")


def build(isas: Collection[str]) -> None:
    """Build a package with the faults for each of these instruction sets."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    _plant()
    jobs = dict.fromkeys([*((name, "baseline") for name in OBJECTS), *((WIDER, isa) for isa in isas)])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = dict(zip(jobs, pool.map(lambda job: _compile(*job), jobs), strict=True))
    for isa in isas:
        _package(isa, [objects[name, isa if name == WIDER else "baseline"] for name in OBJECTS])


def outcome(fault: Fault) -> subprocess.CompletedProcess[str]:
    """Run the tests of a fault with the fault switched on."""
    return _run_tests(fault.isa, fault.tests, fault.files, FAULTS.index(fault) + 1)


def outcome_without_fault(isa: str) -> subprocess.CompletedProcess[str]:
    """Run the tests of all faults of an instruction set with no fault switched on."""
    faults = [m for m in FAULTS if m.isa == isa]
    tests = " or ".join(sorted({f"({m.tests})" for m in faults}))
    return _run_tests(isa, tests, sorted({file for m in faults for file in m.files}), fault=0)


def _run_tests(isa: str, tests: str, files: Iterable[str], fault: int) -> subprocess.CompletedProcess[str]:
    """Run tests in a process of their own: a fault may crash it."""
    options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not check", "-o", f"pythonpath={FOLDER / isa} ."]
    command = [sys.executable, "-m", "pytest", *options, "-k", tests, *files]
    environment = os.environ | {"MRU_FAULT": str(fault)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
