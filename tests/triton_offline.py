"""Compiles the Triton kernels where there is no GPU, and reads what came out: `python -m tests.triton_offline`.

The variants are those that mru_kernels.backends.triton can launch: a kernel, a dtype, a set of inputs, and whether
rows are aligned to 16 bytes. The binaries' disassembly (cuobjdump and nvdisasm, which Triton brings, and llvm-objdump's
notes for AMD in the assembly itself) gives registers, spills, the width of loads and stores, and barriers.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
REAL = {"c64": "fp32", "c128": "fp64"}  # two of these to a channel
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
OF_MAPS = ("fold", "carry", "check")  # kernels that read no stream
STREAMS = ("inputs", "grads", "h", "grad_h")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Variant:
    kernel: str
    cell: str = "bmru"
    arch: str = "sm_90"
    dtype: str = "fp32"
    inputs: int = 2
    per_channel: int = 0  # how many inputs, from the second on, are [D]
    events: bool = False
    aligned: bool = True
    forgets: bool = False  # epsilon is 0
    narrow: bool = False  # at most 64 channels, which leave two to a lane

    @property
    def element(self) -> str:
        """Dtype of the streams as kernels take them."""
        return REAL.get(self.dtype, self.dtype)

    @property
    def state(self) -> str:
        return "fp64" if self.element == "fp64" else "fp32"

    @property
    def tile(self) -> int:
        from mru_kernels.backends import triton as backend

        return backend.tile(self.kernel, self.inputs, self.events, self.per_channel, DTYPES[self.element])

    @property
    def of_lane(self) -> int:
        from mru_kernels.backends import triton as backend

        parts = 1 + (self.dtype in REAL)
        most = backend.channels_of_lane(self.kernel, DTYPES[self.element], parts, self.aligned)
        return min(most, 2) if self.narrow else most

    @property
    def row_bits(self) -> int | None:
        """What a lane loads of a stream's row at once; None: not asked for."""
        if not self.aligned:
            return 64 if self.dtype == "c64" else None
        bits = self.of_lane * 8 * BYTES[self.state if self.kernel in OF_MAPS else self.element]
        return bits if bits > 32 else None

    @property
    def stops(self) -> bool:
        """Whether it ends before its segment, which its lanes decide together."""
        return self.kernel == "summarize_adjoint" and self.forgets

    @property
    def is_main(self) -> bool:
        return not self.per_channel and self.kernel not in OF_MAPS

    @property
    def name(self) -> str:
        words = [self.kernel, self.dtype, self.cell]
        if self.kernel not in OF_MAPS:
            words += ["events" if self.events else "streams", f"{self.inputs} inputs"]
            words += [f"{self.per_channel} per channel"] * (self.per_channel > 0)
        words += ["epsilon 0"] * self.forgets + ["unaligned"] * (not self.aligned) + ["narrow"] * self.narrow
        return " ".join(words)


@dataclass(frozen=True)
class Report:
    """What a binary holds. Wide are global loads and stores of 128 bits, or of as much as a lane holds of a row."""

    variant: Variant
    registers: int
    spilled: int  # bytes of local memory, and loads and stores of it
    shared: int
    loads: int
    wide_loads: int
    stores: int
    wide_stores: int
    shuffles: int
    barriers: int


def variants() -> list[Variant]:
    """Every variant for sm_90, but only the main ones of fp16, whose code is bf16's, of unaligned rows and of few
    channels (bf16 and fp32); and for each other architecture the main ones of bf16 and fp32.
    """
    main = [v for v in _of_dtype("bf16") if v.inputs == 2 and v.is_main]
    every = [v for dtype in ("bf16", "fp32", "fp64") for v in _of_dtype(dtype)]
    every += [v for dtype in ("bf16", "fp32", "fp64") for v in _of_schmitt(dtype)]
    every += [replace(v, dtype="fp16") for v in main] + [replace(v, aligned=False) for v in main]
    every += [replace(v, dtype=dtype, narrow=True) for dtype in ("bf16", "fp32") for v in main]
    every += [v for dtype in ("bf16", "fp32", "fp64", "c64", "c128") for v in _of_linear(dtype)]
    complex_main = [v for v in _of_linear("c64") if v.is_main]
    every += [replace(v, aligned=False) for v in complex_main]
    others = [replace(v, dtype=dtype) for dtype in ("bf16", "fp32") for v in main] + complex_main
    every += [replace(v, arch=arch) for arch in ARCHITECTURES if arch != "sm_90" for v in others]
    forgetting = [v for v in every if v.cell != "linear_recurrence" and v.kernel not in ("fold", "carry")]
    return every + [replace(v, forgets=True) for v in forgetting]


def _of_dtype(dtype: str) -> Iterator[Variant]:
    for inputs in (2, 3):
        for per_channel in (0, 1):
            form = Variant("", dtype=dtype, inputs=inputs, per_channel=per_channel)
            yield replace(form, kernel="forward")
            yield replace(form, kernel="backward")
            yield replace(form, kernel="summarize", events=inputs == 2)
            if inputs == 3:
                yield replace(form, kernel="summarize_adjoint")
            else:
                yield replace(form, kernel="backward", events=True)
    # From events these two read no gate stream.
    yield Variant("forward", dtype=dtype, events=True)
    yield Variant("summarize_adjoint", dtype=dtype, events=True)
    yield Variant("fold", dtype=dtype)
    yield Variant("carry", dtype=dtype)
    yield Variant("check", dtype=dtype)


def _of_schmitt(dtype: str) -> Iterator[Variant]:
    """Beyond those that depend on a cell through its events alone."""
    form = Variant("", cell="schmitt", dtype=dtype, inputs=3, per_channel=2)
    yield replace(form, kernel="forward")
    yield replace(form, kernel="backward")
    yield replace(form, kernel="forward", events=True)
    yield replace(form, kernel="summarize", events=True)
    yield replace(form, kernel="summarize_adjoint", events=True)
    yield replace(form, kernel="backward", events=True)


def _of_linear(dtype: str) -> Iterator[Variant]:
    form = Variant("", cell="linear_recurrence", dtype=dtype)
    for kernel in ("forward", "backward", "summarize", "summarize_adjoint"):
        yield replace(form, kernel=kernel)
    yield replace(form, kernel="forward", per_channel=1)
    yield replace(form, kernel="backward", per_channel=1)
    if dtype in REAL:  # real maps take less than those of the bistable cells
        yield replace(form, kernel="fold")
        yield replace(form, kernel="carry")
        yield replace(form, kernel="check")


def compile_variant(variant: Variant):
    """Triton's result: `.asm` holds the stages."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mru_kernels.backends import CHUNK, triton_kernels
    from mru_kernels.backends import triton as backend
    from mru_kernels.backends.triton_cells import CELLS, COMPLEX_CELLS

    kernel = getattr(triton_kernels, variant.kernel)
    amd = variant.arch.startswith("gfx")
    target = GPUTarget("hip", variant.arch, 64) if amd else GPUTarget("cuda", int(variant.arch[3:]), 32)
    element, state, paired = variant.element, variant.state, variant.dtype in REAL
    known = {
        "EVENTS": variant.events,
        "FORGETS": variant.forgets,
        "CHANNELS": ((1 << variant.per_channel) - 1) << 1,
        "CHUNK": CHUNK,
        "ALIGN": 16 // BYTES[element] if variant.aligned else 1 + paired,
        "TILE": variant.tile,
        "BD": target.warp_size * variant.of_lane,
    }
    functions = (COMPLEX_CELLS if paired else CELLS)[variant.cell]
    known |= {name.upper(): function for name, function in functions._asdict().items()}
    streams = [triton_kernels.Stream(f"*{element}", "i64", "i64")] * variant.inputs
    for i in range(variant.per_channel):
        streams[1 + i] = triton_kernels.Stream(f"*{state}", "i64", "i64")
    types = {
        "inputs": tuple(streams),
        "grads": tuple(streams),
        "h": streams[0],
        "grad_h": streams[0],
        "scan": triton_kernels.Scan(*["i64"] * len(triton_kernels.Scan._fields)),
        "walk": triton_kernels.Walk(*["i64"] * len(triton_kernels.Walk._fields)),
        "epsilon": "fp64",
        **dict.fromkeys(("bend", "tie", "gain"), "fp64"),
        "events": "*i32",
        "offsets": "*i64",
        "flag": "*i64",
        **dict.fromkeys(known, "constexpr"),
    }
    signature = {name: types.get(name, f"*{state}") for name in kernel.arg_names}
    aligned = [kind if variant.aligned or name not in STREAMS else () for name, kind in signature.items()]
    places = {name: i for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(places[name],): value for name, value in known.items() if name in places},
        attrs={path: [["tt.divisibility", 16]] for path in _pointers(tuple(aligned))},
    )
    options = backend.options(variant.kernel, variant.events, variant.per_channel, DTYPES[element], amd)
    return triton.compile(source, target=target, options=options)


def _pointers(types: tuple, path: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    for i, kind in enumerate(types):
        if isinstance(kind, tuple):
            yield from _pointers(kind, (*path, i))
        elif kind.startswith("*"):
            yield (*path, i)


def examine(variant: Variant) -> Report:
    """Compile a variant and read its binary."""
    asm = compile_variant(variant).asm
    return _amd(variant, asm["amdgcn"]) if "amdgcn" in asm else _nvidia(variant, asm["cubin"])


def disassemble(cubin: bytes) -> tuple[str, str]:
    """What a kernel uses, and its instructions."""
    import triton.backends.nvidia

    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return (
            _output([tools / "cuobjdump", "-res-usage", file.name]),
            _output([tools / "nvdisasm", "-c", file.name]),
        )


def _nvidia(variant: Variant, cubin: bytes) -> Report:
    usage, listing = disassemble(cubin)
    used = {name: int(n) for name, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    count = lambda pattern: len(re.findall(pattern, listing))  # noqa: E731
    return Report(
        variant,
        registers=used["REG"],
        spilled=used["STACK"] + used["LOCAL"] + count(r"\b(?:LDL|STL)\b"),
        shared=used["SHARED"],
        loads=count(r"\bLDG\b"),
        wide_loads=count(rf"\bLDG\.\S*(?:128|{variant.row_bits})"),
        stores=count(r"\bSTG\b"),
        wide_stores=count(rf"\bSTG\.\S*(?:128|{variant.row_bits})"),
        shuffles=count(r"\bSHFL\b"),
        barriers=count(r"\b(?:BAR|BARRIER|DEPBAR\.ALL)\b"),
    )


def _output(command: list) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _amd(variant: Variant, assembly: str) -> Report:
    value = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])  # noqa: E731
    count = lambda pattern: len(re.findall(pattern, assembly))  # noqa: E731
    return Report(
        variant,
        registers=value("vgpr_count"),
        spilled=value("vgpr_spill_count") + value("private_segment_fixed_size") + count(r"\bscratch_(?:load|store)"),
        shared=value("group_segment_fixed_size"),
        loads=count(r"\b(?:global|flat|buffer)_load_"),
        wide_loads=count(rf"\b(?:global|flat|buffer)_load_dwordx(?:4|{variant.row_bits // 32})"),
        stores=count(r"\b(?:global|flat|buffer)_store_"),
        wide_stores=count(rf"\b(?:global|flat|buffer)_store_dwordx(?:4|{variant.row_bits // 32})"),
        shuffles=count(r"\bds_b?permute|\bds_swizzle|_dpp\b|\bv_permlane"),
        barriers=count(r"\bs_barrier"),
    )


def rows_read(variant: Variant) -> int:
    """Rows of streams for which the code of a variant holds a load: its time loops are unrolled by so much, and there
    twice, for whole tiles or words and for the last.
    """
    streams = variant.inputs - variant.per_channel
    tile = variant.tile
    match variant.kernel:
        case "check":  # a map, what entered, what left, and what was handed on; and the last offsets
            return 5 + (not variant.forgets)
        case "forward":
            return 2 * tile * streams * (not variant.events)
        case "summarize":
            return 2 * tile * streams
        case "summarize_adjoint" if variant.events:
            return 2 * 16
        case "summarize_adjoint":  # a written value has no part in it
            return 2 * 16 * (streams + 1 - (variant.inputs == 3 or variant.cell == "linear_recurrence"))
        case "backward":  # and tiles to replay the states: two at once and one, or one
            replayed = 0 if variant.events else 3 if BYTES[variant.element] == 2 else 1
            return tile * (streams * (2 + replayed) + 2)
    return 2 * tile


def reports(processes: int = 2) -> list[Report]:
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        return list(pool.map(examine, variants()))


def table(rows: list[Report]) -> str:
    head = ("variant", "arch", "registers", "spilled", "shared", "loads", "wide", "stores", "wide")
    head += ("shuffles", "barriers")
    lines = [head]
    for r in rows:
        counts = (r.registers, r.spilled, r.shared, r.loads, r.wide_loads, r.stores, r.wide_stores)
        counts += (r.shuffles, r.barriers)
        lines.append((r.variant.name, r.variant.arch, *map(str, counts)))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def summary(rows: list[Report]) -> str:
    """Markdown: of each kernel, over its variants, the most registers for each architecture."""
    lines = ["| Triton kernel | variants | " + " | ".join(ARCHITECTURES) + " | spilled | barriers |"]
    lines.append("|---|---:|" + "---:|" * (len(ARCHITECTURES) + 2))
    for kernel in dict.fromkeys(r.variant.kernel for r in rows):
        of_kernel = [r for r in rows if r.variant.kernel == kernel]
        most = [[r.registers for r in of_kernel if r.variant.arch == arch] for arch in ARCHITECTURES]
        cells = [len(of_kernel), *(max(registers, default="") for registers in most)]
        cells += [max(r.spilled for r in of_kernel), max(r.barriers for r in of_kernel)]
        lines.append(f"| {kernel} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET"):
        raise SystemExit("TRITON_INTERPRET is set: kernels are not compiled then")
    examined = reports()
    print(f"{table(examined)}\n\n{summary(examined)}")
    raise SystemExit(any(r.spilled for r in examined))
