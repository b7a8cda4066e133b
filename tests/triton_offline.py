"""Compiles the Triton kernels without a GPU, and reads their binaries: `python -m tests.triton_offline`.

The variants are those of triton_variants.py. The binaries' disassembly (cuobjdump and nvdisasm, which Triton brings;
for AMD the assembly itself) gives registers, spills, the width of loads and stores, and barriers.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from tests.triton_variants import ARCHITECTURES, BYTES, REAL, Variant, variants

STREAMS = ("inputs", "grads", "h", "grad_h")  # arguments of kernels


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
