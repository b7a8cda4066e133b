"""The time of each op or kernel in a call: `python -m bench profile`.

It profiles some forward and backward passes of one cell on one shape with `torch.profiler`. It prints the time of each
op or kernel, the time of a whole pass, and the ratio of that to the floor. The floor is the time of a streaming pass
over the same bytes (see `bench speed`). On a GPU it also prints the command that profiles the kernels with `ncu`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

import mru_kernels as mk

from . import cli, inputs, records, timing
from .work import BOTH, floor_bytes, passes

_PASSES = 10


def floor(call: inputs.Call, device: torch.device) -> float:
    """Seconds per byte of a streaming pass."""
    one, other, out = (torch.empty_like(call.stream) for _ in range(3))
    subjects = {"add": lambda: torch.add(one, other, out=out)}
    seconds, _ = timing.measure(subjects, device, seconds=0.5)["add"]
    return seconds / (3 * out.numel() * out.element_size())


def table(profile: torch.profiler.profile, on_gpu: bool) -> str:
    """A Markdown table of the events with the longest time of their own: on the GPU if `on_gpu`, else on the CPU."""
    own = (lambda e: e.self_device_time_total) if on_gpu else (lambda e: e.self_cpu_time_total)
    events = sorted((e for e in profile.key_averages() if own(e) > 0), key=own, reverse=True)
    total = sum(map(own, events))
    lines = [
        [e.key[:80], f"{e.count / _PASSES:.3g}", f"{own(e) / _PASSES:.1f}", f"{own(e) / total:.1%}"]
        for e in events[:15]
    ]
    return records.table(["event", "calls per pass", "microseconds per pass", "share"], lines, 1)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=cli.prog("profile"), description=__doc__.split("\n")[0])
    parser.add_argument("--cell", choices=inputs.CELLS, default="bmru")
    parser.add_argument("--shape", type=cli.shape, default=(4, 4096, 512), metavar="B,T,D")
    parser.add_argument("--dtype", choices=cli.DTYPES, default="fp32")
    parser.add_argument("--device", default="cpu", type=cli.device)
    parser.add_argument("--backend", help="default: what backend=None chooses")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write a trace for chrome://tracing or Perfetto")
    parser.add_argument("--once", action="store_true", help="run one pass in the range that ncu profiles")
    arguments = parser.parse_args(argv)
    device, shape = arguments.device, dict(zip(("batch", "time", "channels"), arguments.shape, strict=True))
    cli.check_dtypes(parser, arguments.cell, [arguments.dtype])
    backend = cli.resolve(parser, arguments.backend, device).name
    call = inputs.case(arguments.cell, cli.DTYPES[arguments.dtype], **shape).build().to(device)
    run = passes(call, lambda **tensors: getattr(mk, call.cell)(**tensors, **call.settings, backend=backend)[0])[BOTH]
    moved = floor_bytes(call)[BOTH]
    for _ in range(3):
        run()
    on_gpu = device.type == "cuda"
    if arguments.once:
        if not on_gpu:
            parser.error(f"--once: expected a GPU, got --device {device}")
        torch.cuda.synchronize(device)
        with torch.cuda.profiler.profile():
            run()
            torch.cuda.synchronize(device)
        return 0

    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        for _ in range(_PASSES):
            run()
        if on_gpu:
            torch.cuda.synchronize(device)
    seconds, _ = timing.measure({"pass": run}, device, seconds=1.0)["pass"]
    ratio = seconds / (floor(call, device) * moved)
    print(f"{arguments.cell}, {backend}, {arguments.dtype}, B, T, D = {records.name_of(arguments.shape)}\n")
    print(table(profile, on_gpu))
    print(f"\nForward + backward: {1e3 * seconds:.3g} ms, {moved / 2**20:.0f} MiB, {ratio:.2f} times the floor.")
    if arguments.trace:
        profile.export_chrome_trace(str(arguments.trace))
    if on_gpu:
        options = f"--cell {arguments.cell} --shape {','.join(map(str, arguments.shape))} --dtype {arguments.dtype}"
        again = f"{cli.prog('profile')} --once --device {device} --backend {backend} {options}"
        print(f"\nncu --profile-from-start off --set full {again}")
    return 0
