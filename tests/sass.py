"""Counts the instructions that kernels issue, without a GPU.

    python -m tests.sass bfloat16 "backward<Form<cells::bmru, BFloat16, 4" sm_90
    python -m tests.sass triton "backward bf16 bmru codes candidate+threshold epsilon 0" sm_90

Prints the longer straight runs of instructions, and how many of each go to the units that add and multiply, and to
those that compare, select and move bits, which run at half the rate on NVIDIA devices. It shows the CUDA kernels whose
name contains the text, from the objects that `pytest -m check tests/test_cuda_binary.py` builds, or compiles the
variant of Triton's kernels with that name (`python -m tests.triton_offline` lists them).
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator

from . import triton_offline, triton_variants
from .test_cuda_binary import kernels_of

ARITHMETIC = {"FADD", "FMUL", "FFMA", "IMAD", "HADD2", "HMUL2", "HFMA2", "DADD", "DMUL", "DFMA"}
BITS = {"FSETP", "FSET", "FSEL", "FMNMX", "ISETP", "SEL", "LOP3", "PLOP3", "SHF", "PRMT", "LEA", "IADD3", "VIADD"}
BITS |= {"MOV", "F2FP", "P2R", "R2P", "HSETP2", "HSET2", "HMNMX2", "VIMNMX", "DSETP"}
LEAST = 80  # instructions of a run that is shown


def runs(listing: str) -> Iterator[Counter[str]]:
    """Opcodes from a label or a branch to the next."""
    run: Counter[str] = Counter()
    for line in listing.splitlines():
        instruction = re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?(\w+)", line)
        if instruction:
            run[instruction[1]] += 1
        if line.startswith(".L_x_") or (instruction and instruction[1] in ("BRA", "EXIT")):
            yield run
            run = Counter()
    yield run


def listings(element: str, name: str, architecture: str) -> Iterator[tuple[str, str]]:
    """Name and instructions of every kernel that matches."""
    if element == "triton":
        for variant in triton_variants.variants():
            if (variant.name, variant.arch) == (name, architecture):
                _, listing = triton_offline.disassemble(triton_offline.compile_variant(variant).asm["cubin"])
                yield variant.name, listing
    else:
        for kernel in kernels_of(element):
            if kernel.architecture == architecture and name in kernel.name:
                yield kernel.name, kernel.instructions


def main(element: str, name: str, architecture: str) -> None:
    for title, listing in listings(element, name, architecture):
        print(title)
        for run in runs(listing):
            if run.total() >= LEAST:
                arithmetic, bits = (sum(n for op, n in run.items() if op in unit) for unit in (ARITHMETIC, BITS))
                most = ", ".join(f"{n} {op}" for op, n in run.most_common(8))
                print(f"  {run.total():5} instructions, {arithmetic:4} arithmetic, {bits:4} bits: {most}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
