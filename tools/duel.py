"""Time two builds of this project side by side: `python tools/duel.py BEFORE AFTER`.

BEFORE and AFTER are folders of the project in which the extension is built; it must also be built in the script's own.
A process of each makes the same calls, and the two take turns, so that the machine's noise meets both. A turn's figure
is the median time of a call. The table has the median of BEFORE's figures over the turns, and the median and the range
of the ratio AFTER to BEFORE of a turn.

Times depend on where the memory of a process lies, which does not change while it runs: run a comparison several times.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PASSES = ("forward", "backward")
SHAPES = [(4, 4096, 512), (64, 128, 1024), (16, 1024, 96), (1, 1048576, 16)]
LEAST_CALLS = 4  # of a turn, also if they take longer than --seconds
#: Channels of a head of the ops that are not a cell's: RWKV-4's recurrence, and softmax attention without decays.
OF_A_HEAD = {"wkv": 1, "softmax_recurrence": 64}


def drawn(cell: str, dtype: str, shape: list[int]) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """The tensors and the other arguments of an op, and a gradient of its first result."""
    import torch

    from bench import inputs

    batch, steps, channels = shape
    if cell not in OF_A_HEAD:
        call = inputs.case(cell, inputs.DTYPES[dtype], batch=batch, time=steps, channels=channels).build()
        return call.tensors, call.settings, call.grad_h
    heads = channels // OF_A_HEAD[cell]
    generator = torch.Generator().manual_seed(0)
    score, value, grad = (
        torch.randn(batch, steps, width, generator=generator).to(inputs.DTYPES[dtype])
        for width in (heads, channels, channels)
    )
    if cell == "softmax_recurrence":
        return {"score": score, "value": value}, {}, grad
    decay, bonus = -torch.linspace(-5.0, 1.0, heads).exp(), 0.3 * torch.randn(heads, generator=generator)
    return {"key": score, "value": value, "decay": decay, "bonus": bonus}, {}, grad


def subject(cell: str, dtype: str, shape: list[int], pass_: str, streams: bool) -> Callable[[], object]:
    """A call of this process's build. With `streams`, the backward pass is asked for the gradients of streams only."""
    import torch

    import mru_kernels

    tensors, settings, grad = drawn(cell, dtype, shape)
    op = getattr(mru_kernels, cell)
    if pass_ == "forward":
        return lambda: op(**tensors, **settings)
    leaves = {name: t.requires_grad_(t.dim() == 3 or not streams) for name, t in tensors.items()}
    h, _ = op(**leaves, **settings)
    wanted = [t for t in leaves.values() if t.requires_grad]
    return lambda: torch.autograd.grad(h, wanted, grad, retain_graph=True)


def serve() -> None:
    """Take the turns that standard input asks for, a line each, and print the milliseconds of each."""
    made: dict[str, Callable[[], object]] = {}
    for line in sys.stdin:
        seconds, name = json.loads(line)
        run = made.get(str(name))
        if run is None:
            made = {str(name): (run := subject(*name))}
        run()
        times, end = [], time.perf_counter() + seconds
        while len(times) < LEAST_CALLS or time.perf_counter() < end:
            start = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - start))
        print(statistics.median(times), flush=True)


class Side:
    """The process of a build."""

    def __init__(self, tree: Path):
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tree,
            env=os.environ | {"PYTHONPATH": str(tree)},
        )  # fmt: skip

    def turn(self, seconds: float, name: tuple[Any, ...]) -> float:
        """The milliseconds of a call."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([seconds, name]), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.process.args}: the process has ended, see above")
        return float(answer)


def main() -> None:
    if sys.argv[1:] == ["--serve"]:
        return serve()
    sys.path.insert(0, str(ROOT))
    from bench import allocator, cli, inputs, records

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path, metavar="BEFORE")
    parser.add_argument("after", type=Path, metavar="AFTER")
    cells = [*inputs.CELLS, *OF_A_HEAD]
    parser.add_argument("--cell", nargs="+", default=["bmru", "linear_recurrence", "lif"], choices=cells)
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=list(inputs.DTYPES))
    parser.add_argument("--shape", type=cli.shape, nargs="+", default=SHAPES, metavar="B,T,D")
    parser.add_argument("--pass", nargs="+", default=PASSES, choices=PASSES, dest="passes")
    parser.add_argument("--streams", action="store_true", help="backward: gradients of the streams only")
    parser.add_argument("--turns", type=cli.positive, default=5, help="turns of each build (default: 5)")
    parser.add_argument("--seconds", type=float, default=0.08, help="seconds of a turn (default: 0.08)")
    given = parser.parse_args()
    sides = [Side(tree.resolve()) for tree in (given.before, given.after)]
    rows = [("B, T, D", "dtype", "pass", "before, ms", "after / before", "range")]
    for shape, dtype, cell, pass_ in product(given.shape, given.dtype, given.cell, given.passes):
        times = []
        for turn in range(given.turns):
            order = sides if turn % 2 == 0 else sides[::-1]
            found = {side: side.turn(given.seconds, (cell, dtype, shape, pass_, given.streams)) for side in order}
            times.append([found[side] for side in sides])
        ratios = [after / before for before, after in times]
        least, most = min(ratios), max(ratios)
        before = statistics.median(before for before, _ in times)
        row = (
            ", ".join(map(str, shape)),
            dtype,
            f"{cell}, {pass_}",
            f"{before:.2f}",
            f"{statistics.median(ratios):.2f}",
        )
        rows.append((*row, f"{least:.2f} to {most:.2f}"))
    print(records.aligned(rows))
    print(f"\n{given.turns} turns of {given.seconds:g} s; allocator: {allocator.describe()}")
    return None


if __name__ == "__main__":
    main()
