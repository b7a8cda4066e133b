"""Compiles the Triton kernels without a GPU, and reads their binaries: `python -m tests.triton_offline`.

The variants are those that mru_kernels.backends.triton can launch: a kernel, a cell, a dtype, which inputs come as
streams, and whether rows are aligned to 16 bytes. They follow from the specs of the cells. The binaries' disassembly
(cuobjdump and nvdisasm, which Triton brings; for AMD the assembly itself) gives registers, spills, the width of loads
and stores, and barriers.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from mru_kernels import ops

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
REAL = {"c64": "fp32", "c128": "fp64"}  # the dtype of the two parts of a channel
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
COMPLEX = {"c64": torch.complex64, "c128": torch.complex128}
OF_MAPS = ("fold", "carry", "check")  # kernels that read no stream
STREAMS = ("inputs", "grads", "h", "grad_h")  # arguments
MAIN = "bmru"  # the cell that is compiled for every dtype, layout and architecture
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Variant:
    kernel: str
    cell: str = MAIN
    arch: str = "sm_90"
    dtype: str = "fp32"
    streams: tuple[str, ...] = ()  # the inputs that come as streams
    codes: bool = False
    aligned: bool = True
    overwrites: bool = False  # epsilon is 0
    resets: bool = False  # the state is reset before some steps, and boundaries have gradients
    narrow: bool = False  # at most 64 channels, which leave two to a lane

    @property
    def spec(self) -> ops.Cell:
        return ops.CELLS[self.cell]

    @property
    def functions(self):
        from mru_kernels.backends.triton.cell import find

        implementation = find(self.cell)
        return implementation.complex if self.dtype in REAL else implementation.real

    @property
    def element(self) -> str:
        """Dtype of the streams as kernels take them."""
        return REAL.get(self.dtype, self.dtype)

    @property
    def state(self) -> str:
        return "fp64" if self.element == "fp64" else "fp32"

    @property
    def per_channel(self) -> tuple[str, ...]:
        """The inputs that come per channel, but for optional ones."""
        return tuple(i.name for i in self.spec.inputs if not i.optional and i.name not in self.streams)

    @property
    def reads(self):
        from mru_kernels.backends.triton.tuning import Reads

        counts = len(self.streams), len(self.per_channel)
        flags = self.codes, self.resets, self.spec.complex_state, self.spec.composes
        return Reads(DTYPES[self.element], *counts, *flags)

    @property
    def tile(self) -> int:
        from mru_kernels.backends.triton import tuning

        return tuning.tile(self.kernel, self.reads)

    @property
    def of_lane(self) -> int:
        from mru_kernels.backends.triton import tuning

        parts = 1 + (self.dtype in REAL or self.spec.complex_state)
        most = tuning.channels_of_lane(self.kernel, DTYPES[self.element], parts, self.aligned)
        return min(most, 2) if self.narrow else most

    @property
    def row_bits(self) -> int | None:
        """What a lane loads of a stream's row at once; None: not tested."""
        if not self.aligned:
            return 64 if self.dtype == "c64" else None
        if self.spec.complex_state and self.kernel not in OF_MAPS:
            return None  # two neighbours load one element of a stream
        bits = self.of_lane * 8 * BYTES[self.state if self.kernel in OF_MAPS else self.element]
        return bits if bits > 32 else None

    @property
    def stops(self) -> bool:
        """Whether it ends before its segment, which its lanes decide together."""
        return self.kernel == "summarize_adjoint" and self.overwrites

    @property
    def is_main(self) -> bool:
        """Whether every input that may be a stream and is not optional is one, and no other."""
        required = tuple(i.name for i in self.spec.inputs if not i.optional and i.kind != "channel")
        return self.streams == required and self.kernel not in OF_MAPS

    @property
    def name(self) -> str:
        words = [self.kernel, self.dtype, self.cell]
        if self.kernel not in OF_MAPS:
            words += ["codes" if self.codes else "streams", "+".join(self.streams)]
        words += ["epsilon 0"] * self.overwrites + ["resets"] * self.resets
        words += ["unaligned"] * (not self.aligned) + ["narrow"] * self.narrow
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
    """Every variant for sm_90, but only the main ones of fp16, whose code is bf16's, of unaligned rows, of few channels
    and of resets (bf16 and fp32); and for each other architecture the main ones of bf16 and fp32.
    """
    every = [v for cell in ops.CELLS.values() for dtype in _dtypes(cell) for v in _of_cell(cell, dtype)]
    every += _of_maps()
    main = [v for v in every if v.cell == MAIN and v.dtype == "bf16" and v.is_main]
    every += [replace(v, dtype="fp16") for v in main] + [replace(v, aligned=False) for v in main]
    every += [replace(v, dtype=dtype, narrow=True) for dtype in ("bf16", "fp32") for v in main]
    complex_main = [v for v in every if v.dtype == "c64" and v.is_main]
    every += [replace(v, aligned=False) for v in complex_main]
    others = [replace(v, dtype=dtype) for dtype in ("bf16", "fp32") for v in main] + complex_main
    every += [replace(v, arch=arch) for arch in ARCHITECTURES if arch != "sm_90" for v in others]
    every += [replace(v, resets=True) for v in others]
    resetting = [v for v in every if _writes_may_reset(v) and v.kernel not in ("fold", "carry")]
    return every + [replace(v, overwrites=True) for v in resetting]


def _dtypes(cell: ops.Cell) -> list[str]:
    return ["bf16", "fp32", "fp64", *(name for name, dtype in COMPLEX.items() if dtype in cell.dtypes)]


def _writes_may_reset(variant: Variant) -> bool:
    from mru_kernels.backends.triton.kernels.affine import WRITE_OR_HOLD

    return variant.functions.rules is WRITE_OR_HOLD


def _of_cell(cell: ops.Cell, dtype: str) -> Iterator[Variant]:
    """The kernels that read streams or codes, for every choice of streams."""
    sees_state = Variant("", cell.name, dtype=dtype).functions.adjoint_sees_state.value
    choices = [(False,) if i.kind == "channel" else (True,) if i.kind == "stream" and not i.optional else (True, False)
               for i in cell.inputs]  # fmt: skip
    for chosen in product(*choices):
        streams = tuple(i.name for i, is_stream in zip(cell.inputs, chosen, strict=True) if is_stream)
        absent = [i for i, is_stream in zip(cell.inputs, chosen, strict=True) if i.kind == "stream" and not is_stream]
        codes = cell.has_codes(((1 << len(cell.inputs)) - 1) & ~cell.mask(*(i.name for i in absent)))
        form = Variant("", cell.name, dtype=dtype, streams=streams)
        yield replace(form, kernel="forward")
        yield replace(form, kernel="backward")
        if not cell.composes:
            continue
        yield replace(form, kernel="summarize", codes=codes)
        if codes:
            yield replace(form, kernel="backward", codes=True)
            if form.is_main:  # from codes these two read no stream of the cell's
                yield replace(form, kernel="forward", codes=True)
                yield replace(form, kernel="summarize_adjoint", codes=True)
        elif not sees_state:
            yield replace(form, kernel="summarize_adjoint")


def _of_maps() -> list[Variant]:
    """The kernels that compose maps, for each kind of factor and state dtype."""
    found = {}
    for cell in ops.CELLS.values():
        for dtype in _dtypes(cell):
            variant = Variant("", cell.name, dtype=dtype, streams=tuple(i.name for i in cell.inputs[:2]))
            if dtype != "bf16":  # its states are float32
                found.setdefault((variant.functions.rules, dtype), variant)
    return [replace(v, kernel=kernel) for v in found.values() for kernel in OF_MAPS]


def _arguments(variant: Variant, warp: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The types of a kernel's arguments, "constexpr" for what is compiled in; and the values of the latter."""
    import triton.language as tl

    from mru_kernels.backends import CHUNK
    from mru_kernels.backends.triton.kernels import arguments

    spec, state = variant.spec, variant.state
    align = 16 // BYTES[variant.element] if variant.aligned else 1 + (variant.dtype in REAL)
    streams = sum(1 << i for i, of_spec in enumerate(spec.inputs) if of_spec.name in variant.streams)
    channels = sum(1 << i for i, of_spec in enumerate(spec.inputs)
                   if of_spec.name not in variant.streams and of_spec.kind != "stream")  # fmt: skip
    form = (streams, channels, variant.codes, variant.overwrites, variant.resets, variant.resets, CHUNK)
    form += (spec.complex_state,)
    values = {
        "cell": variant.functions,
        "rules": variant.functions.rules,
        "form": arguments.Form(*map(tl.constexpr, form)),
        "block": arguments.Block(*map(tl.constexpr, (align, variant.tile, warp * variant.of_lane))),
        "overwrites": variant.overwrites,
    }
    stream = arguments.Stream(f"*{variant.element}", "i64", "i64")
    inputs = tuple(stream if streams >> i & 1 else arguments.Stream(f"*{state}", "i64", "i64")
                   for i in range(len(spec.inputs)))  # fmt: skip
    types = {
        "inputs": inputs,
        "grads": inputs,
        "h": stream,
        "grad_h": stream,
        "scan": arguments.Scan("*i64", "*i64", "*i64", *["i64"] * (len(arguments.Scan._fields) - 3)),
        "walk": arguments.Walk(*["i64"] * 3),
        "scalars": (arguments.Double("i64", "i64"),) * _count_scalars(variant),
        "maps": arguments.Maps(f"*{state}", f"*{state}"),
        "groups": arguments.Maps(f"*{state}", f"*{state}"),
        "codes": "*i32",
        "resets": arguments.Resets("*u8", f"*{state}", f"*{state}"),
        "saved": arguments.Saved(f"*{state}", "*i32", f"*{state}", f"*{state}"),
        **{name: _constants(value) for name, value in values.items()},
    }
    if not variant.resets:
        absent = {"resets": None, "grad_checkpoints": None}
        types |= dict.fromkeys(absent, "constexpr")
        values |= absent
    return types, values


def _count_scalars(variant: Variant) -> int:
    from mru_kernels.backends.triton.cell import find

    return len(find(variant.cell).scalars([0.5] * len(variant.spec.scalars), torch.float32))


def _constants(value):
    """A tuple of the shape of `value`, with "constexpr" for each member."""
    if not isinstance(value, tuple):
        return "constexpr"
    members = [_constants(v) for v in value]
    return type(value)(*members) if hasattr(value, "_fields") else tuple(members)


def compile_variant(variant: Variant):
    """Triton's result: `.asm` holds the stages."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mru_kernels.backends.triton import kernels, tuning

    kernel = getattr(kernels, variant.kernel)
    amd = variant.arch.startswith("gfx")
    target = GPUTarget("hip", variant.arch, 64) if amd else GPUTarget("cuda", int(variant.arch[3:]), 32)
    types, values = _arguments(variant, target.warp_size)
    signature = {name: types.get(name, f"*{variant.state}") for name in kernel.arg_names}
    aligned = [kind if variant.aligned or name not in STREAMS else () for name, kind in signature.items()]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=dict(_leaves(tuple(values.get(name, ()) for name in kernel.arg_names))),
        attrs={path: [["tt.divisibility", 16]] for path, kind in _leaves(tuple(aligned)) if kind.startswith("*")},
    )
    options = tuning.options(variant.kernel, variant.reads, amd)
    return triton.compile(source, target=target, options=options)


def _leaves(values: tuple, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Any]]:
    """What nested tuples hold, each with its path."""
    for i, value in enumerate(values):
        if isinstance(value, tuple):
            yield from _leaves(value, (*path, i))
        else:
            yield (*path, i), value


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
    """Rows of streams for which the code of a variant has a load: its time loops are unrolled over a tile or word, and
    twice, for whole tiles or words and for the last.
    """
    streams, tile = len(variant.streams), variant.tile
    match variant.kernel:
        case "check":  # what left and what was handed on; with bounds also the map, what entered and its magnitude
            return 2 if variant.overwrites else 6
        case "forward":
            return 2 * tile * streams * (not variant.codes)
        case "summarize":
            return 2 * tile * streams
        case "summarize_adjoint":  # the gradient; and all streams but one, which is added to the state
            return 2 * 16 * (1 if variant.codes else streams)
        case "backward":  # and tiles to recompute the states: two at once and one, or one
            recomputed = 0 if variant.codes else 3 if BYTES[variant.element] == 2 else 1
            return tile * (streams * (2 + recomputed) + 2)
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
