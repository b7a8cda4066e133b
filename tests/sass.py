"""What the kernels issue, read without a GPU: `python -m tests.sass bfloat16 "backward<Form<Bmru<float, false>" sm_90`.

Prints the longer straight runs of instructions of the kernels whose name holds the second argument, and how many go to
the units that add and multiply, and to those that compare, select and move bits, which on NVIDIA devices have half the
rate. Reads the objects that `pytest -m check tests/test_cuda_binary.py` builds.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from .test_cuda_binary import Kernel, kernels_of

ARITHMETIC = {"FADD", "FMUL", "FFMA", "IMAD", "HADD2", "HMUL2", "HFMA2", "DADD", "DMUL", "DFMA"}
BITS = {"FSETP", "FSET", "FSEL", "FMNMX", "ISETP", "SEL", "LOP3", "PLOP3", "SHF", "PRMT", "LEA", "IADD3", "VIADD"}
BITS |= {"MOV", "F2FP", "P2R", "R2P", "HSETP2", "HSET2", "HMNMX2", "VIMNMX", "DSETP"}
LEAST = 90  # instructions of a run that is shown


def runs(kernel: Kernel) -> Iterator[Counter[str]]:
    """Opcodes between a label or a branch and the next."""
    run: Counter[str] = Counter()
    for line in kernel.instructions.splitlines():
        instruction = re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?(\w+)", line)
        if instruction:
            run[instruction[1]] += 1
        if line.startswith(".L_x_") or (instruction and instruction[1] in ("BRA", "EXIT")):
            yield run
            run = Counter()


def main(element: str, name: str, architecture: str) -> None:
    for kernel in kernels_of(element):
        if kernel.architecture == architecture and name in kernel.name:
            print(f"{kernel.name}: {kernel.registers} registers")
            for run in runs(kernel):
                if run.total() >= LEAST:
                    share = [sum(count for op, count in run.items() if op in unit) for unit in (ARITHMETIC, BITS)]
                    most = ", ".join(f"{count} {op}" for op, count in run.most_common(8))
                    print(f"  {run.total():5} instructions, {share[0]:4} arithmetic, {share[1]:4} bits: {most}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(f"usage: python -m tests.sass ELEMENT NAME ARCHITECTURE, of {Path('build/objects')}\n\n{__doc__}")
    main(*sys.argv[1:])
