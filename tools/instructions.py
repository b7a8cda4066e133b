"""Count the instructions of the CPU kernels: `python tools/instructions.py TREE`.

TREE is a folder of this project in which the extension is built. valgrind's callgrind runs one thread, and counts what
the extension executes in a pass over a stream, per element of it. Times depend on the machine and on what else it does;
counts do not. valgrind knows AVX2 and not AVX-512, so these are counts of the AVX2 kernels.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from duel import OF_A_HEAD, PASSES, subject

ROOT = Path(__file__).parents[1]
SHAPES = [(1, 2048, 512), (4, 1024, 64), (1, 65536, 16)]
#: A function of the C library that nothing else calls. Before it, callgrind writes what it has counted and starts anew.
MARK = "srand48"


def serve(cases: list[tuple[Any, ...]]) -> None:
    """Run each pass once between two marks."""
    import torch

    torch.set_num_threads(1)
    mark = getattr(ctypes.CDLL(None), MARK)
    for case in cases:
        for run in (subject(*case, name, streams=False) for name in PASSES):
            run()
            mark(0)
            run()
            mark(0)


def executed(profile: Path) -> int:
    """The instructions that the extension executed, from a file of callgrind."""
    total, is_ours, is_call = 0, False, False
    for line in profile.read_text().splitlines():
        if line.startswith("ob="):
            library = Path(line[3:])
            is_ours = library.parent.name == "mru_kernels" and library.name.startswith("_C.")
        elif line.startswith("calls="):
            is_call = True  # the next line is what the callee executed
        elif re.match(r"\d", line):
            total += int(line.split()[-1]) if is_ours and not is_call else 0
            is_call = False
    return total


def count(tree: Path, cases: list[tuple[Any, ...]]) -> list[int]:
    """The instructions of every pass of every case, in order."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "valgrind",
            "--tool=callgrind",
            f"--dump-before={MARK}*",
            "--compress-strings=no",
            "--compress-pos=no",
        ]
        command += [f"--callgrind-out-file={folder}/profile", sys.executable, __file__, "--serve", json.dumps(cases)]
        environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONMALLOC": "malloc"}
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)}:\n{done.stderr[-4000:]}")
        marks = 2 * len(PASSES) * len(cases)
        return [executed(Path(folder, f"profile.{part}")) for part in range(2, marks + 1, 2)]


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        return serve(json.loads(sys.argv[2]))
    sys.path.insert(0, str(ROOT))
    from bench import cli, inputs, records

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tree", type=Path, metavar="TREE")
    parser.add_argument(
        "--cell", nargs="+", default=["bmru", "linear_recurrence", "schmitt"], choices=[*inputs.CELLS, *OF_A_HEAD]
    )
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=list(inputs.DTYPES))
    parser.add_argument("--shape", type=cli.shape, nargs="+", default=SHAPES, metavar="B,T,D")
    given = parser.parse_args()
    cases = list(product(given.cell, given.dtype, given.shape))
    counts = iter(count(given.tree.resolve(), cases))
    rows = [("cell", "dtype", "B, T, D", *(f"{name}, an element" for name in PASSES))]
    for cell, dtype, shape in cases:
        batch, steps, channels = shape
        per_element = [f"{next(counts) / (batch * steps * channels):.2f}" for _ in PASSES]
        rows.append((cell, dtype, ", ".join(map(str, shape)), *per_element))
    print(records.aligned(rows))
    return None


if __name__ == "__main__":
    main()
