"""Memory and time of a training step in blocks of time, against the cost formulas: `python -m bench blocks`.

The network is an `MRUNetwork` of 4 blocks of 256 with BMRUs, a batch of one sequence and AdamW. A training step runs
in one thread of a process of its own, after one on a single step. The peak is the resident memory that the system
reports to the parent process, less that of a process that trains on single steps only. The time is that of the CPU,
so other work on the machine hardly changes it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import mru_kernels as mk

from . import allocator, cli, drawing, records

_MIB = 2**20
_FEATURES = 16
_LIMIT = 8 * 2**30


@dataclass(frozen=True)
class Policy:
    """How time is cut: steps of a block, steps of the blocks inside it, and whether saved tensors go to the host."""

    steps: int | None = None
    inner: int | None = None
    offload: bool = False

    def __str__(self) -> str:
        if self.steps is None:
            return "whole"
        inside = "" if self.inner is None else f" in blocks of {self.inner}"
        return f"blocks of {self.steps}{inside}" + ", offloaded" * self.offload

    def run(self, network: mk.MRUNetwork) -> torch.nn.Module:
        if self.steps is None:
            return network
        return mk.blocked(network, self.steps, inner=self.inner, offload=self.offload)

    def bytes(self, steps: int, state: int, step: int) -> int:
        """The formula of docs/blocks-of-time.md: bytes near and on the host, which is the same memory here."""
        if self.steps is None:
            return steps * step
        inside = 0 if self.inner is None else self.steps // self.inner
        return (-(-steps // self.steps) + inside) * state + (self.inner or self.steps) * step


POLICIES = ("whole", "single", "offloaded", "double")


def policies(steps: int, inner: int) -> dict[str, Policy]:
    return {
        "whole": Policy(),
        "single": Policy(steps),
        "offloaded": Policy(steps, offload=True),
        "double": Policy(8 * steps, inner),
    }


def network() -> mk.MRUNetwork:
    torch.manual_seed(0)
    return mk.MRUNetwork(_FEATURES, 16, width=256, num_blocks=4, pool="mean")


def sizes(steps: int = 256) -> tuple[int, int]:
    """Bytes of a state, and bytes that the backward pass of one step needs."""
    module, storages = network(), {}
    known = {p.untyped_storage()._cdata for p in module.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output, state = module(torch.randn(1, steps, _FEATURES))
    saved = sum(size for key, size in storages.items() if key not in known)
    del output
    return sum(t.nbytes for t in state), saved // steps


def train(policy: Policy, steps: int) -> float:
    """Seconds of the CPU for one training step in this process, after one on a single step."""
    module = network()
    run, optimizer = policy.run(module), torch.optim.AdamW(module.parameters())
    for length in (1, steps):
        x = torch.randn(1, length, _FEATURES)
        began = time.process_time()
        run(x)[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    return time.process_time() - began


def measure(policy: Policy, steps: int) -> tuple[int, float]:
    """Peak of the resident memory in bytes and seconds of the CPU of a training step in a process of its own.

    The process is a fork, so this process must not have computed in several threads before.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, str(train(policy, steps)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        seconds = pipe.read()
    _, status, usage = os.wait4(child, 0)
    if not seconds:
        raise RuntimeError(f"{policy}, {steps} steps: the process failed with status {status}")
    return 1024 * usage.ru_maxrss, float(seconds)


def longest(points: Sequence[tuple[int, int]], fixed: int) -> int:
    """The steps, to two digits, at which the line through the last two points (steps, bytes) reaches the limit."""
    (t0, m0), (t1, m1) = points[-2:]
    steps = int(t1 + (_LIMIT - fixed - m1) * (t1 - t0) / (m1 - m0))
    unit = 10 ** (len(str(steps)) - 2)
    return steps // unit * unit


def plot(file: Path, found: dict[str, list[tuple[int, int, float]]], predicted: dict[str, list[int]]) -> None:
    """Draw measured and, dotted, predicted bytes against the steps. `found` has rows (steps, bytes, seconds)."""
    with drawing.canvas(file) as (axes,):
        ends = []
        for (name, rows), colour in zip(found.items(), drawing.COLOURS, strict=False):
            steps, peaks = [row[0] for row in rows], [row[1] / _MIB for row in rows]
            axes.plot(steps, peaks, marker="o", color=colour)
            axes.plot(steps, [n / _MIB for n in predicted[name]], linestyle=":", color=colour)
            ends.append((name, steps[-1], peaks[-1], colour))
        axes.set(
            xscale="log", yscale="log", xlabel="steps", title="peak memory of a training step, MiB (dotted: formula)"
        )
        drawing.name_ends(axes, ends)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=cli.prog("blocks"), description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", nargs="+", type=cli.positive, default=[1024, 4096, 16384], metavar="T")
    parser.add_argument("--steps", type=cli.positive, default=512, help="of a block")
    parser.add_argument("--inner", type=cli.positive, default=128, help="of a block inside a block of 8 times --steps")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument("--plot", type=Path, default=Path("build/blocks.png"), metavar="FILE")
    arguments = parser.parse_args(argv)
    if len(arguments.lengths) < 2:
        parser.error("--lengths: expected at least two, which give the growth of the memory with T")
    if arguments.inner >= 8 * arguments.steps:
        parser.error(f"--inner: expected fewer than 8 times --steps, got {arguments.inner}")
    if not allocator.RETURNED.items() <= os.environ.items():  # glibc reads them when a process starts
        command = [sys.executable, "-m", f"{__package__}.blocks", *(sys.argv[1:] if argv is None else argv)]
        os.execve(sys.executable, command, os.environ | allocator.RETURNED)
    torch.set_num_threads(1)
    head = ["policy", "T", "formula, MiB", "peak, MiB", "process, MiB", "CPU seconds", "longest in 8 GiB"]
    chosen = policies(arguments.steps, arguments.inner)
    chosen = {str(chosen[name]): chosen[name] for name in arguments.policies}
    lengths = sorted(arguments.lengths)
    measured = {name: [measure(policy, steps) for steps in (1, *lengths)] for name, policy in chosen.items()}
    state, step = sizes()  # computes, so it comes after the forks
    lines, found, predicted = [], {}, {}
    for name, ((least, _), *results) in measured.items():
        found[name] = [(t, peak - least, seconds) for t, (peak, seconds) in zip(lengths, results, strict=True)]
        predicted[name] = [chosen[name].bytes(t, state, step) for t in lengths]
        most = longest([row[:2] for row in found[name]], least)
        for (t, peak, seconds), formula in zip(found[name], predicted[name], strict=True):
            row = [f"{n / _MIB:.1f}" for n in (formula, peak, peak + least)]
            lines.append([name, f"{t:,}", *row, f"{seconds:.1f}", f"{most:,}" if t == lengths[-1] else ""])
    print(records.facts_of(records.machine(torch.device("cpu"))))
    print(f"a state: {state:,} bytes; a step of the backward pass: {step:,} bytes\n")
    print(records.table(head, lines, 0))
    plot(arguments.plot, found, predicted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
