"""The sizes of exported C programs on a 32-bit microcontroller: `python -m examples.c_sizes`.

Needs arm-none-eabi-gcc. Prints the table of docs/small-machines.md.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import torch

import mru_kernels as mk

COMPILER = ["arm-none-eabi-gcc", "-std=c99", "-ffreestanding", "-Os", "-mthumb", "-mcpu=cortex-m0plus"]
MODULES = {
    "`BMRU(3, 16)`": lambda: mk.BMRU(3, 16),
    "`BMRU(3, 16, learn_initial_state=False)`": lambda: mk.BMRU(3, 16, learn_initial_state=False),
    "`BMRU(8, 64, 2)`": lambda: mk.BMRU(8, 64, 2),
    "`CMRU(8, 64, 2)`": lambda: mk.CMRU(8, 64, 2),
    "`FirstQuadrantBMRU(8, 64, 2)`": lambda: mk.FirstQuadrantBMRU(8, 64, 2),
    "`MinGRU(8, 64, 2)`": lambda: mk.MinGRU(8, 64, 2),
    "`MRUNetwork(8, 4, width=32, num_blocks=2)`": lambda: mk.MRUNetwork(8, 4, width=32, num_blocks=2),
}


def code_bytes(program: mk.export.CProgram) -> int:
    """The size of the machine code and its constants, without parameters and without libraries."""
    file = program.path.with_suffix(".o")
    subprocess.run([*COMPILER, "-c", program.path, "-o", file], check=True)
    sections = subprocess.run(["arm-none-eabi-size", "-A", file], check=True, capture_output=True, text=True).stdout
    rows = [line.split() for line in sections.splitlines() if line.startswith((".text", ".rodata"))]
    return sum(int(row[1]) for row in rows) - program.flash


def rows(modules: dict, folder: Path) -> list[str]:
    """The table: a row for each module and type of weights."""
    lines = [
        "| module | weights | parameters, bytes | code, bytes | RAM, bytes | multiply-adds | libm calls |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, make in modules.items():
        for weights in ("float32", "int8"):
            p = mk.export.c(make(), folder / "net.c", weights=weights)
            lines.append(
                f"| {name} | {weights} | {p.flash:,} | {code_bytes(p):,} | {p.ram:,} | {p.multiply_adds:,} |"
                f" {p.libm_calls} |"
            )
    return lines


if __name__ == "__main__":
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        print("\n".join(rows(MODULES, Path(folder))))
