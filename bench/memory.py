"""Memory of a training step for each `chunk_size`, predicted and measured: `python -m bench memory`.

Between the passes an op keeps its inputs and one state per chunk of time. Where time is scanned in segments it may also
keep write codes, 2 bits a step. A larger `chunk_size` keeps fewer states, and the backward pass recomputes more steps
at a time. None keeps only the inputs, at the cost of another forward pass. Memory is measured in another process: on
the CPU its resident memory, on a GPU the memory from torch's allocator. Times are measured in this process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import mru_kernels as mk
from mru_kernels import ops
from mru_kernels.backends import CHUNK, TABLE

from . import allocator, cli, inputs, records, timing

_MIB = 2**20


@dataclass(frozen=True)
class Memory:
    """Bytes beyond the inputs that are kept between the passes, and bytes at the peak: predicted and measured."""

    kept: int
    peak: int
    kept_measured: int
    peak_measured: int


def expected(call: inputs.Call, chunk_size: int | None, backend: str) -> tuple[int, int]:
    """Predicted bytes: kept between the passes beyond inputs and h, and at the peak beyond inputs and grad_h."""
    cell = ops.CELLS[call.cell]
    streams = [t for t in call.tensors.values() if t.dim() == 3]
    batch, time, channels = call.stream.shape
    segment = TABLE[backend].module.segment(batch, batch * time, channels, call.stream.itemsize, call.stream.device)
    chunk = ops.chunk_of(TABLE[backend], cell, chunk_size or CHUNK, call.stream, packed=0)
    named = {i.name: call.tensors[i.name].to("meta") for i in cell.inputs if i.name in call.tensors}
    inputs_of_op, given = list(named.values()), cell.mask(*named)
    saved = ops.allocate(cell, inputs_of_op, given, 0, None, chunk, segment, save=True)[2:]
    states = sum(t.nbytes for t in saved)
    h, grads = call.stream.nbytes, sum(t.nbytes for t in streams)
    if chunk_size is None:  # the second forward pass allocates an h too, and frees it before gradients are allocated
        return 0, h + max(h + states, states + grads)
    return states, h + states + grads


class _Observed:
    """Bytes in use now, and the most since `reset`."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"

    def _resident(self, field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])

    def now(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.on_gpu else self._resident("VmRSS")

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.on_gpu else self._resident("VmHWM")

    def reset(self) -> None:
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")


def training_step(call: inputs.Call, chunk_size: int | None, backend: str):
    """A function that runs a forward pass, `between()` and a backward pass. It returns the result of `between()`."""
    leaves = {name: t.detach().requires_grad_() for name, t in call.tensors.items()}

    def step(between=lambda: None):
        results = getattr(mk, call.cell)(**leaves, **call.settings, chunk_size=chunk_size, backend=backend)
        seen = between()
        grads = torch.autograd.grad(results, list(leaves.values()), (call.grad_h, call.grad_final))
        del grads
        return seen

    return step


def observe(call: inputs.Call, chunk_size: int | None, backend: str) -> Memory:
    """Measure one training step in this process."""
    observed = _Observed(call.stream.device)
    few = inputs.case(call.cell, call.stream.dtype, batch=1, time=300, channels=512).build().to(call.stream.device)
    training_step(few, chunk_size, backend)()  # allocates what the process keeps: code, threads, their scratch memory
    step = training_step(call, chunk_size, backend)
    observed.reset()
    before = observed.now()
    kept = step(observed.now) - before - call.stream.nbytes
    return Memory(*expected(call, chunk_size, backend), kept, observed.peak() - before)


def in_own_process(argv: Sequence[str]) -> list[Memory]:
    """The results of `main(argv)` for its chunk sizes, from a process that returns freed memory to the system."""
    environment = os.environ | allocator.RETURNED
    command = [sys.executable, "-m", f"{__package__}.memory", *argv, "--here"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return [Memory(**fields) for fields in json.loads(done.stdout)]


def table(rows: Sequence[tuple[int | None, Memory, float]]) -> str:
    """A Markdown table with a row per chunk size."""
    head = ["chunk_size", "kept, MiB: predicted", "measured", "peak, MiB: predicted", "measured"]
    head += ["forward + backward, ms"]
    lines = []
    for chunk_size, memory, seconds in rows:
        bytes_ = (memory.kept, memory.kept_measured, memory.peak, memory.peak_measured)
        lines.append([str(chunk_size), *(f"{n / _MIB:.1f}" for n in bytes_), f"{1e3 * seconds:.3g}"])
    return records.table(head, lines, 0)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog=cli.prog("memory"), description=__doc__.split("\n")[0])
    parser.add_argument("--cell", choices=inputs.CELLS, default="bmru")
    parser.add_argument("--shape", type=cli.shape, default=(4, 4096, 2048), metavar="B,T,D")
    parser.add_argument("--dtype", choices=cli.DTYPES, default="fp32")
    parser.add_argument("--device", default="cpu", type=cli.device)
    parser.add_argument("--backend", help="default: what backend=None chooses")
    parser.add_argument("--chunk-size", nargs="+", type=cli.chunk_size, metavar="N", help='multiples of 16, or "None"')
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--here", action="store_true", help="measure in this process and print JSON")
    arguments = parser.parse_args(argv)
    cli.check_dtypes(parser, arguments.cell, [arguments.dtype])
    row = cli.resolve(parser, arguments.backend, arguments.device)
    backend, (least, most) = row.name, row.module.CHUNK_SIZES
    sizes = arguments.chunk_size or [n for n in (16, 64, 256, 1024) if least <= n <= most] + [None]
    for size in sizes:
        if size is not None and not least <= size <= most:
            parser.error(f"--chunk-size: expected {least} to {most} for backend {backend}, got {size}")
    named = dict(zip(("batch", "time", "channels"), arguments.shape, strict=True))
    call = inputs.case(arguments.cell, cli.DTYPES[arguments.dtype], **named).build().to(arguments.device)
    if arguments.device.type == "cpu" and not Path("/proc/self/clear_refs").exists():
        parser.error("--device: memory of the CPU is read from /proc, which only Linux has")
    if arguments.here:
        print(json.dumps([asdict(observe(call, size, backend)) for size in sizes]))
        return 0

    memories = in_own_process(argv)
    steps = {str(size): training_step(call, size, backend) for size in sizes}
    seconds = timing.measure(steps, arguments.device)
    rows = [(size, memory, seconds[str(size)][0]) for size, memory in zip(sizes, memories, strict=True)]
    facts = records.machine(arguments.device) | {"backend": backend}
    print(records.facts_of(facts))
    shape, stream = records.name_of(arguments.shape), call.stream.nbytes / _MIB
    print(f"{arguments.cell}, {arguments.dtype}, B, T, D = {shape}: {stream:.0f} MiB per stream\n\n{table(rows)}")
    if arguments.json:
        found = [{"chunk_size": size, "seconds": s} | asdict(memory) for size, memory, s in rows]
        records.write_json(arguments.json, {"machine": facts, "shape": arguments.shape, "memory": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
