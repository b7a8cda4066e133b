"""Triton's kernels of the softmax recurrence, compiled for devices that are not there, and what their binaries hold."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests import sass
from tests.triton_offline import _constants, _leaves, disassemble
from tests.triton_variants import DTYPES

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
STREAMS = ("score", "value", "y", "grad_y", "grad_score", "grad_value")


@dataclass(frozen=True)
class Variant:
    """A kernel, and what it is compiled for. `group` is the number of channels of a head."""

    kernel: str
    arch: str = "sm_90"
    dtype: str = "bf16"
    decay: str = "NONE"
    bonus: bool = False
    group: int = 1
    aligned: bool = True
    gradients: bool = True

    @property
    def name(self) -> str:
        words = [self.kernel, self.arch, self.dtype, f"decay {self.decay}", f"group {self.group}"]
        words += ["bonus"] * self.bonus + ["unaligned"] * (not self.aligned) + ["maps"] * (not self.gradients)
        return " ".join(words)


@dataclass(frozen=True)
class Report:
    """What a binary holds."""

    variant: Variant
    registers: int
    spilled: int  # bytes of local memory, and loads and stores of it
    shared: int
    barriers: int
    instructions: int  # in all; 0 for AMD
    longest: dict[str, int]  # of each kind in the longest run, a tile's


def variants() -> list[Variant]:
    """Each kernel, the passes with all options, and the passes of RWKV-4 and Aaren for each architecture."""
    wkv, stream, heads = {"decay": "PER_HEAD", "bonus": True}, {"decay": "STREAM", "bonus": True}, {"group": 64}
    found = [Variant("summarize", decay="STREAM"), Variant("backward", gradients=False, **stream)]
    found += [Variant(name) for name in ("fold", "carry", "fold_adjoint", "carry_adjoint")]
    for kernel in ("forward", "backward"):
        found += [Variant(kernel, dtype=dtype, **stream) for dtype in ("fp32", "fp64")]
        found += [Variant(kernel, aligned=False, **wkv)]
        found += [Variant(kernel, arch=arch, **form) for arch in ARCHITECTURES for form in (wkv, heads)]
    return found


def compile_variant(variant: Variant):
    """Triton's result: `.asm` holds the stages."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mru_kernels.softmax.triton import launch, layout, step

    kernel = launch.KERNELS[variant.kernel]
    amd = variant.arch.startswith("gfx")
    target = GPUTarget("hip", variant.arch, 64) if amd else GPUTarget("cuda", int(variant.arch[3:]), 32)
    state = "fp64" if variant.dtype == "fp64" else "fp32"
    lanes, launch.LANES = launch.LANES, target.warp_size
    block, warps = launch.block_of(variant.kernel, variant.group, variant.aligned, DTYPES[state])
    launch.LANES = lanes
    flags = (variant.bonus, variant.group > 1, variant.gradients, not amd)
    form = step.Form(getattr(step, variant.decay), *map(tl.constexpr, flags))
    stream = layout.Stream(f"*{variant.dtype}", "i64", "i64")
    per_head = layout.Stream(f"*{state}", "i64", "i64")
    values = {"form": form, "block": block}
    types = dict.fromkeys(STREAMS, stream)
    types |= dict.fromkeys(("decay", "grad_decay"), stream if variant.decay == "STREAM" else per_head)
    types["scan"] = layout.Scan("*i64", *["i64"] * (len(layout.Scan._fields) - 1))
    types |= {name: _constants(value) for name, value in values.items()}
    signature = {name: types.get(name, f"*{state}") for name in kernel.arg_names}
    aligned = [kind if variant.aligned or name not in STREAMS else () for name, kind in signature.items()]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=dict(_leaves(tuple(values.get(name, ()) for name in kernel.arg_names))),
        attrs={path: [["tt.divisibility", 16]] for path, kind in _leaves(tuple(aligned)) if kind.startswith("*")},
    )
    options = launch.options(variant.kernel, warps, amd)
    return triton.compile(source, target=target, options=options)


def examine(variant: Variant) -> Report:
    """Compile a variant and read its binary."""
    asm = compile_variant(variant).asm
    if "amdgcn" in asm:
        value = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", asm["amdgcn"])[1])  # noqa: E731
        spilled = value("vgpr_spill_count") + value("private_segment_fixed_size")
        barriers = len(re.findall(r"\bs_barrier", asm["amdgcn"]))
        return Report(variant, value("vgpr_count"), spilled, value("group_segment_fixed_size"), barriers, 0, {})
    usage, listing = disassemble(asm["cubin"])
    used = {name: int(n) for name, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    count = lambda pattern: len(re.findall(pattern, listing))  # noqa: E731
    spilled = used["STACK"] + used["LOCAL"] + count(r"\b(?:LDL|STL)\b")
    runs = list(sass.runs(listing))
    longest = max(runs, key=lambda run: run.total())
    barriers = count(r"\b(?:BAR|BARRIER)\b")
    return Report(
        variant, used["REG"], spilled, used["SHARED"], barriers, sum(run.total() for run in runs), dict(longest)
    )
