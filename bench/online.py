"""Gradients of streams: errors against the whole sequence, and what a step costs: `python -m bench online`.

Chunks with traces and truncated back-propagation through time are compared with back-propagation through the whole
sequence. Memory is the peak of resident memory beyond that before the first step, in a process of its own. Times are
the least CPU times of one thread, taken in turns in another process.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import mru_kernels as mk

from . import allocator, cli, memory, records

_MIB = 2**20
_STEPS = 256  # of the sequence whose gradients are compared
_CHANNELS = 16

#: Two layers with a long memory.
UNITS: dict[str, Callable[[], mk.nn.MRUBase]] = {
    "MinGRU": lambda: mk.MinGRU(_CHANNELS, _CHANNELS, 2, max_time_scale=100.0, dtype=torch.float64),
    "BMRU": lambda: mk.BMRU(_CHANNELS, _CHANNELS, 2, dtype=torch.float64),
    "CMRU": lambda: mk.CMRU(_CHANNELS, _CHANNELS, 2, dtype=torch.float64),
    "LRU": lambda: mk.LRU(_CHANNELS, _CHANNELS, 2, r_min=0.98, r_max=0.999, max_phase=0.1, dtype=torch.float64),
}

#: Steps of the sequence, steps of a chunk or None, and `gradient`. A stream of 16 chunks costs as much a step as any.
COSTS = [
    *((steps, None, None) for steps in (1024, 4096, 16384)),
    *((16 * chunk, chunk, gradient) for chunk in (1, 16, 64, 256) for gradient in (None, "traces")),
]


# ------------------------------------------------------------------------------------------ errors


def _gradients(
    unit: mk.nn.MRUBase, x: Tensor, weights: Tensor, chunk: int | None, gradient: str | None
) -> list[Tensor]:
    """The gradients of the recurrent parameters of each layer, as one vector a layer."""
    unit.zero_grad()
    if chunk is None:
        (unit(x)[0] * weights).sum().backward()
    else:
        feed = mk.stream(unit, gradient)
        for part, weight in zip(x.split(chunk, 1), weights.split(chunk, 1), strict=True):
            (feed(part) * weight).sum().backward()
    named = {n: p.grad for n, p in unit.named_parameters() if not n.startswith(("alpha", "weight_ho", "skip"))}
    return [torch.cat([g.flatten() for n, g in named.items() if n.endswith(f"_l{layer}")]) for layer in range(2)]


def errors(seeds: int = 3) -> list[list[str]]:
    """Rows: unit, chunk, then relative error and cosine of each layer with traces, and truncated."""
    rows = []
    for name, make in UNITS.items():
        for chunk in (8, 32):
            cells = []
            for gradient in ("traces", None):
                found = []
                for seed in range(seeds):
                    torch.manual_seed(seed)
                    unit, x = make(), torch.randn(4, _STEPS, _CHANNELS, dtype=torch.float64)
                    weights = torch.randn(4, _STEPS, _CHANNELS, dtype=torch.float64)
                    whole = _gradients(unit, x, weights, None, None)
                    for layer, grad in enumerate(_gradients(unit, x, weights, chunk, gradient)):
                        error = ((grad - whole[layer]).norm() / whole[layer].norm()).item()
                        found.append((layer, error, torch.cosine_similarity(grad, whole[layer], 0).item()))
                for layer in range(2):
                    mean = [sum(f[i] for f in found if f[0] == layer) / seeds for i in (1, 2)]
                    cells.append(f"{mean[0]:.0e}" if mean[0] < 1e-9 else f"{mean[0]:.2f} / {mean[1]:.3f}")
            rows.append([name, str(chunk), *cells])
    return rows


# ------------------------------------------------------------------------------------------ costs


def step(width: int, batch: int, steps: int, chunk: int | None, gradient: str | None) -> Callable[[], None]:
    """A function that reads a sequence and computes the gradients of its loss, with a loss at every step."""
    torch.manual_seed(0)
    unit = mk.BMRU(width, width)
    x = torch.randn(batch, chunk or steps, width)  # a stream makes its chunks as they come

    def whole() -> None:
        unit.zero_grad()
        unit(x)[0].square().mean().backward()

    def streamed() -> None:
        unit.zero_grad()
        feed = mk.stream(unit, gradient)
        for _ in range(steps // x.shape[1]):
            feed(x).square().mean().backward()

    return whole if chunk is None else streamed


def _peak(width: int, batch: int, row: int) -> float:
    """Peak memory in MiB, in a process of its own."""
    command = [sys.executable, "-m", f"{__package__}.online", "--shape", f"{batch},{width}", "--here", str(row)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | allocator.RETURNED, check=True)
    return json.loads(done.stdout)


def _observed(width: int, batch: int, row: int) -> float:
    steps, chunk, gradient = COSTS[row]
    step(8, 1, 64, 16, gradient)()  # what stays for good: code, threads, their scratch
    observed = memory._Observed(torch.device("cpu"))
    observed.reset()
    before = observed.now()
    step(width, batch, steps, chunk, gradient)()
    return (observed.peak() - before) / _MIB


def costs(width: int, batch: int) -> list[list[str]]:
    """Rows: how, peak memory, and time a step, also over that of the whole of 4096 steps and of truncation."""
    subjects = {i: step(width, batch, *cost) for i, cost in enumerate(COSTS)}
    least = dict.fromkeys(subjects, math.inf)
    for _ in range(5):
        for i, subject in subjects.items():
            start = time.process_time()
            subject()
            least[i] = min(least[i], time.process_time() - start)
    per_step = {i: least[i] / COSTS[i][0] for i in subjects}
    rows = []
    for i, (steps, chunk, gradient) in enumerate(COSTS):
        name = f"whole, T = {steps:,}" if chunk is None else f"chunks of {chunk}, {gradient or 'truncated'}"
        cells = [f"{_peak(width, batch, i):.1f}", f"{1e6 * per_step[i]:.2f}", f"{per_step[i] / per_step[1]:.2f}"]
        rows.append([name, *cells, f"{per_step[i] / per_step[i - 1]:.2f}" if gradient else ""])
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=cli.prog("online"), description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="1,256", metavar="B,D", help="batch and width of the costs")
    parser.add_argument("--seeds", type=cli.positive, default=3, help="of the errors")
    parser.add_argument("--here", type=int, help="print the memory of this row, measured in this process, as JSON")
    arguments = parser.parse_args(argv)
    batch, width = map(int, arguments.shape.split(","))
    if not Path("/proc/self/clear_refs").exists():
        parser.error("memory is read from /proc, which only Linux has")
    if arguments.here is not None:
        print(json.dumps(_observed(width, batch, arguments.here)))
        return 0
    torch.set_num_threads(1)
    print(records.facts_of(records.machine(torch.device("cpu"))))
    head = ["unit", "chunk", "layer 0, traces", "layer 1, traces", "layer 0, truncated", "layer 1, truncated"]
    print("\nrelative error / cosine of the gradient against that of the whole sequence\n")
    print(records.table(head, errors(arguments.seeds), 1))
    head = ["", "peak memory, MiB", "us a step", "over the whole, T = 4,096", "over truncated"]
    print(f"\nBMRU, float32, B = {batch}, {width} features and channels\n")
    print(records.table(head, costs(width, batch), 1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
