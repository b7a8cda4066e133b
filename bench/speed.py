"""Times of the ops beside a pass over the same bytes and beside peers: `python -m bench speed`.

All that is compared is interleaved in one process. A figure is a median; its spread is the range between the quartiles
over the median. The floor of a pass is the time that a streaming pass over as many bytes takes, scaled from
`torch.add(c, b, out=h)` measured in the same run; a pass is to move each of its streams once, in or out.
On the CPU memory that is freed stays with the process (`python -m bench` pins the allocator's thresholds), so that an
op's output costs no page faults and a given output and an allocated one are alike. On a GPU a time is the device's own,
between two events, with the caches emptied before it and the call issued ahead of it; what a call costs is measured
apart.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import mru_kernels as mk
from mru_kernels.backends import resolve

from . import compare, inputs
from .peers import PEERS
from .progress import tqdm

SHAPES = ((4, 4096, 512), (1, 1048576, 16), (32, 1024, 64), (64, 128, 1024))
SMALL = (1, 1, 64)  # where the cost of a call shows
_SECONDS = 1.5
_CHECKED_STEPS = 256  # of the inputs are compared with the reference before anything is timed


@dataclass(frozen=True)
class Figure:
    """A time of one subject on one shape."""

    shape: tuple[int, int, int]
    dtype: str
    subject: str
    ms: float
    spread: float
    gb_per_s: float | None  # at the bytes of the floor
    floor_ratio: float | None  # time over that of a streaming pass over the same bytes
    speedup: float | None = None  # of the op over this subject, for peers


class Stopwatch:
    """Seconds that a call takes on a device."""

    _AHEAD = 2_000_000  # cycles, about a millisecond, in which a call is issued before the device is free to begin

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        if self.on_gpu:
            # Read rather than written: lines that are to be written back would take part of the next call's bandwidth.
            size = max(4 * torch.cuda.get_device_properties(device).L2_cache_size, 2**28)
            self.other = torch.ones(size // 4, device=device)
            self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, subject: Callable[[], object]) -> float:
        if not self.on_gpu:
            start = time.perf_counter()
            subject()
            return time.perf_counter() - start
        self.other.sum()
        torch.cuda._sleep(self._AHEAD)
        self.start.record()
        subject()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1e3


def measure(
    subjects: dict[str, Callable[[], object]], device: torch.device, seconds: float = _SECONDS
) -> dict[str, tuple[float, float]]:
    """Median seconds and relative spread of each subject; all take turns, slow ones fewer.

    `seconds` is spent on one subject, at most, beyond its third run.
    """
    stopwatch = Stopwatch(device)
    times: dict[str, list[float]] = {name: [] for name in subjects}
    if stopwatch.on_gpu:  # kernels are compiled by their first call, which is no time of theirs
        for subject in subjects.values():
            subject()
    for turn in range(60):
        for name, subject in subjects.items():
            if turn > 3 and sum(times[name]) > seconds:
                continue
            if turn > 0 and times[name] and times[name][0] > 3 * seconds:
                continue
            elapsed = stopwatch(subject)
            if turn > 0 or elapsed > seconds:  # the first run of a quick subject is warm-up
                times[name].append(elapsed)
    return {name: _median_and_spread(values) for name, values in times.items()}


def _median_and_spread(values: list[float]) -> tuple[float, float]:
    ordered = sorted(values)
    n = len(ordered)
    median = ordered[n // 2]
    return median, (ordered[(3 * n) // 4] - ordered[n // 4]) / median


def per_call(subject: Callable[[], object], calls: int = 2000) -> float:
    """Seconds of one call among many, the best of five rounds."""
    rounds = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls // 5):
            subject()
        rounds.append((time.perf_counter() - start) / (calls // 5))
    return min(rounds)


def time_shape(
    shape: tuple[int, int, int], dtype: torch.dtype, backend: str | None, device: torch.device, epsilon: float,
    peers: Sequence[str],
) -> list[Figure]:  # fmt: skip
    """Time bmru and its peers on one shape."""
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3)]
    candidate, threshold, grad = draw
    per_channel = torch.ones(shape[2], device=device, dtype=dtype)
    out = torch.empty_like(candidate)
    leaves = [t.clone().requires_grad_() for t in (candidate, threshold)]

    def op(c: Tensor, b: Tensor) -> Tensor:
        return mk.bmru(c, b, epsilon=epsilon, backend=backend)[0]

    def both(f: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(f(*leaves), leaves, grad)

    def module_pass() -> None:
        module_input.grad = None
        module(module_input)[0].backward(grad)

    stream = candidate.numel() * candidate.element_size()
    subjects: dict[str, tuple[Callable[[], object], int | None]] = {
        "torch.add(out=)": (lambda: torch.add(candidate, threshold, out=out), 3),
        "bmru forward": (lambda: op(candidate, threshold), 3),
        "bmru forward, threshold [D]": (lambda: op(candidate, per_channel), 2),
        "bmru forward + backward": (both(op), 8),
    }
    if shape[2] >= 64:
        module = mk.BMRU(shape[2], shape[2], epsilon=epsilon, device=device, dtype=dtype)
        module_input = torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
        subjects["BMRU forward"] = (lambda: module(module_input.detach()), None)
        subjects["BMRU forward + backward"] = (module_pass, None)
    for name in peers:
        peer = PEERS[name]
        if peer.why_not(shape, epsilon, device) is None:
            check_peer(name, candidate, threshold, epsilon, backend)
            subjects[f"{name}: forward"] = (lambda run=peer.run: run(candidate, threshold, epsilon), None)
            if peer.whole:
                subjects[f"{name}: forward + backward"] = (both(lambda c, b, run=peer.run: run(c, b, epsilon)), None)
    seconds = measure({name: subject for name, (subject, _) in subjects.items()}, device)
    add, _ = seconds["torch.add(out=)"]
    figures = []
    for name, (median, spread) in seconds.items():
        streams = subjects[name][1]
        peer, _, work = name.partition(": ")
        mine = f"bmru {work}" if peer in PEERS else None
        figures.append(
            Figure(
                shape=shape,
                dtype=str(dtype).removeprefix("torch."),
                subject=name,
                ms=median * 1e3,
                spread=spread,
                gb_per_s=streams * stream / median / 1e9 if streams else None,
                floor_ratio=median / (add * streams / 3) if streams else None,
                speedup=median / seconds[mine][0] if mine in seconds else None,
            )
        )
    return figures


def check_peer(name: str, candidate: Tensor, threshold: Tensor, epsilon: float, backend: str | None = None) -> None:
    """Raise unless a peer computes, in float32, what bmru does on the first steps of these streams."""
    c, b = (t[:, :_CHECKED_STEPS].float().contiguous() for t in (candidate, threshold))
    expected, _ = mk.bmru(c, b, epsilon=epsilon, backend=backend)
    if not torch.allclose(PEERS[name].run(c, b, epsilon), expected, rtol=1e-5, atol=1e-5):
        raise RuntimeError(f"peer {name!r} does not compute what bmru computes")


def passes(shape, dtype, backend: str, device: torch.device, epsilon: float) -> bool:
    """Whether the op meets its limits on the first steps of such inputs."""
    generator = torch.Generator().manual_seed(1)
    batch, steps, channels = shape
    few = (min(batch, 4), min(steps, _CHECKED_STEPS), min(channels, 128))
    tensors = {name: torch.randn(few, generator=generator).to(dtype) for name in ("candidate", "threshold")}
    return all(row.passed for row in compare.run([inputs.call("bmru", tensors, {"epsilon": epsilon})], backend, device))


def overhead(device: torch.device, backend: str | None) -> dict[str, float]:
    """Microseconds of one call on a tiny input."""
    c, b = torch.randn(SMALL, device=device), torch.randn(SMALL, device=device)
    leaf = c.clone().requires_grad_()
    state, gate = torch.zeros(1, 512, device=device), torch.ones(1, 512, device=device)

    def step() -> object:
        return mk.bmru_step(state, gate, state)

    return {
        "torch.add": per_call(lambda: torch.add(c, b)) * 1e6,
        f"bmru {SMALL}, no gradient": per_call(lambda: mk.bmru(c, b, backend=backend)) * 1e6,
        f"bmru {SMALL}, forward with gradient": per_call(lambda: mk.bmru(leaf, b, backend=backend)) * 1e6,
        "bmru_step (1, 512)": per_call(step) * 1e6,
    }


def machine(device: torch.device) -> dict[str, object]:
    """What the figures were measured on."""
    commit = output_of("git", "rev-parse", "--short", "HEAD")
    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    facts: dict[str, object] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or None,
    }
    if device.type == "cpu":
        from mru_kernels.backends import cpu as backend

        facts["isa"] = backend.isa()
    return facts


def output_of(*command: str) -> str:
    """What a command prints; empty where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def table(figures: Sequence[Figure]) -> str:
    """Markdown."""
    lines = [
        "| B, T, D | dtype | subject | ms | spread | GB/s | time / floor | bmru is faster by |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for f in figures:
        shape = ", ".join(map(str, f.shape))
        numbers = (
            f"{f.ms:.3g}",
            f"{f.spread:.0%}",
            "" if f.gb_per_s is None else f"{f.gb_per_s:.1f}",
            "" if f.floor_ratio is None else f"{f.floor_ratio:.2f}",
            "" if f.speedup is None else f"{f.speedup:.3g}x",
        )
        lines.append(f"| {shape} | {f.dtype} | {f.subject} | " + " | ".join(numbers) + " |")
    return "\n".join(lines)


def shape_of(text: str) -> tuple[int, int, int]:
    """The sizes in "B,T,D"."""
    batch, steps, channels = map(int, text.split(","))
    return batch, steps, channels


def sweep(shape: tuple[int, int, int], letter: str) -> list[tuple[int, int, int]]:
    """Shapes in which the size B, T or D is 1, 4, 16 and so on, up to that of `shape`."""
    i = "BTD".index(letter)
    sizes = [size for k in range(shape[i].bit_length()) if (size := 4**k) < shape[i]]
    return [(*shape[:i], size, *shape[i + 1 :]) for size in (*sizes, shape[i])]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench speed", description=__doc__.split("\n")[0])
    parser.add_argument("--shape", type=shape_of, nargs="+", default=list(SHAPES), metavar="B,T,D")
    parser.add_argument("--sweep", choices="BTD", help="let this size of the one --shape grow to it in powers of 4")
    parser.add_argument("--dtype", nargs="+", choices=inputs.DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--backend", help="default: what backend=None chooses")
    parser.add_argument("--epsilon", type=float, default=0.0)
    parser.add_argument("--peer", nargs="*", choices=PEERS, default=[], help="default: none; they are slow")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    if arguments.sweep:
        if len(arguments.shape) != 1:
            parser.error(f"--sweep: expected one --shape, got {len(arguments.shape)}")
        arguments.shape = sweep(arguments.shape[0], arguments.sweep)
    name = resolve(arguments.backend, arguments.device).name
    figures, failed = [], []
    jobs = [(shape, dtype) for shape in arguments.shape for dtype in arguments.dtype]
    for shape, dtype in tqdm(jobs, "shapes", leave=False):
        job = (shape, inputs.DTYPES[dtype], name, arguments.device, arguments.epsilon)
        if passes(*job):
            figures += time_shape(*job, arguments.peer)
        else:
            failed.append(f"FAIL {shape} {dtype}: does not meet its limits against the reference, so it is not timed")
    calls = overhead(arguments.device, name)
    facts = machine(arguments.device) | {"backend": name, "epsilon": arguments.epsilon}
    print(", ".join(f"{k} {v}" for k, v in facts.items()), end="\n\n")
    print(table(figures), end="\n\n")
    print("\n".join(f"{k}: {v:.1f} us a call" for k, v in calls.items()))
    print("\n".join(failed), end="\n" * bool(failed))
    if arguments.json:
        record = {"machine": facts, "figures": [asdict(f) for f in figures], "microseconds": calls, "failed": failed}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if failed else 0
