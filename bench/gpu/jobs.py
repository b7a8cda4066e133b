"""Jobs that `gpu-check` runs in other processes: times of backends and peers, and few calls for the sanitizers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from unittest.mock import patch

import torch

import mru_kernels as mk

from .. import compare, inputs, peer_checks, softmax_cases, speed, timing, work
from ..inputs import Call, Case
from ..peers import PEERS, job
from ..records import Figure
from .stages import Shape

CELL = "bmru"  # the cell that is timed on all shapes
SELDOM = ", seldom writes"  # suffix of a backend's name: one step in three hundred writes, instead of one in two
#: The other ops that are timed, each on the shape of this number, or the last one if there are fewer.
OTHERS = {"lif": 1, "resonate": 1, softmax_cases.WKV: 0, softmax_cases.AAREN: 0}

_COPIED = 2**30  # bytes that the copy reads, and as many that it writes, to measure the bandwidth
_PER_SUBJECT = 0.4  # seconds
_CHECKED = (4, 256, 128)  # B, T, D of the largest case that is compared before anything is timed
_COMPILING = 60  # seconds that a peer may take to compile
_HEAD = 64  # channels of a head in the form of Aaren

#: Calls of the softmax recurrence for the sanitizers: form, dtype, whether packed, whether reversed, steps.
SMALL_SOFTMAX = (
    (softmax_cases.WKV, "fp32", True, True, 150), (softmax_cases.WKV, "bf16", False, False, 300),
    (softmax_cases.AAREN, "bf16", True, False, 1500), (softmax_cases.AAREN, "fp32", False, True, 300),
)  # fmt: skip

Works = dict[tuple[str, str], Callable[[], object]]  # by subject and work


class Timing:
    """Times backends and peers on a device.

    Args:
        device: the device.
        write: called with each result when it is known: its kind ("copy", "figure", "other", "call", "left out" or
            "failed") and its value. An "other" is a figure of one of `OTHERS`.
        copied: bytes that a copy reads, and as many that it writes, to measure the bandwidth.
    """

    def __init__(self, device: torch.device, write: Callable[[str, object], None], copied: int = _COPIED):
        self.device, self.write = device, write
        self.bandwidth = self._copy(copied)
        self._checked: set[str] = set()  # names of peers

    def _copy(self, copied: int) -> float:
        source = torch.ones(copied // 4, device=self.device)
        target = torch.empty_like(source)
        seconds, spread = timing.measure({"copy": lambda: target.copy_(source)}, self.device, _PER_SUBJECT)["copy"]
        rate = 2 * copied / seconds / 1e9
        self.write("copy", {"bytes": 2 * copied, "gb_per_s": rate, "spread": spread})
        return rate

    def backends(self, names: Sequence[str], shape: Shape) -> None:
        """Time torch.add, and the backends that meet their limits on a smaller case."""
        call = _call(shape, self.device)
        candidate, threshold = call.tensors.values()
        out = torch.empty_like(candidate)
        works: Works = {(work.ADD, work.FORWARD): lambda: torch.add(candidate, threshold, out=out)}
        seldom = replace(call, tensors={"candidate": candidate * 0.005, "threshold": threshold})
        for name in names:
            if _meets_limits(CELL, name, shape, self.device):
                works |= _works(name, call, peer_checks.op(call, name))
                works |= _works(name + SELDOM, seldom, peer_checks.op(seldom, name))
            else:
                self.write("failed", f"{name} on {shape}: beyond its limits against the reference, so not timed")
        self._measure(shape, call, works)

    def other(self, op: str, name: str, shape: Shape) -> None:
        """Time an op of `OTHERS` on a backend that meets its limits on a smaller case."""
        if not _meets_limits(op, name, shape, self.device):
            self.write("failed", f"{op} of {name} on {shape}: beyond its limits against the reference, so not timed")
            return
        call = _softmax_call(op, shape, self.device) if op in softmax_cases.FORMS else _neurons(op, shape, self.device)
        self._measure(shape, call, _works(f"{name}, {op}", call, peer_checks.op(call, name)), "other")

    def calls(self, name: str) -> None:
        """Time calls of a backend on tiny inputs."""
        microseconds = speed.overhead(self.device, name) | _in_graph(name, self.device)
        self.write("call", {"backend": name, "microseconds": microseconds})

    def peer(self, name: str, shape: Shape) -> None:
        """Time a peer: forward, and forward + backward. It is checked on the first shape that it gets."""
        call = _call(shape, self.device)
        if name not in self._checked:
            peer_checks.check_peer(name, replace(call, tensors={name: t[:2] for name, t in call.tensors.items()}))
            self._checked.add(name)
        works = _works(name, call, job(PEERS[name], call))
        timed = (work.FORWARD, work.BOTH) if PEERS[name].whole else (work.FORWARD,)
        for key in ((name, what) for what in timed):  # one at a time: a gradient may fail
            self._measure(shape, call, {key: works[key]})

    def _measure(self, shape: Shape, call: Call, works: Works, kind: str = "figure") -> None:
        *sizes, dtype = shape
        moved = work.floor_bytes(call)
        for (subject, name), (seconds, spread) in timing.measure(works, self.device, _PER_SUBJECT).items():
            count = 3 * call.stream.nbytes if subject == work.ADD else moved[name]
            rate = count / seconds / 1e9
            figure = Figure(
                tuple(sizes), dtype, subject, name, seconds * 1e3, spread, gb_per_s=rate,
                percent_of_copy=100 * rate / self.bandwidth,
            )  # fmt: skip
            self.write(kind, figure.to_json())


def time_all(
    timing: Timing, shapes: Sequence[Shape], backends: Sequence[str], deadline: float, peers: Sequence[str]
) -> None:
    """Time backends on all shapes, then the other ops, then peers.

    None of the last two starts after the deadline, a value of `time.monotonic()`. No peer that compiles starts shortly
    before it.
    """

    def attempt(kind: str, what: str, run: Callable[..., None], *arguments: object) -> None:
        try:
            run(*arguments)
        except Exception as error:  # the others are still timed
            timing.write(kind, f"{what}: {type(error).__name__}: {error}".splitlines()[0][:300])

    for shape in shapes:
        attempt("failed", f"{shape}", timing.backends, backends, shape)
    for name in backends:
        attempt("failed", f"calls of {name}", timing.calls, name)
    for op, place in OTHERS.items():
        for name in backends:
            shape = shapes[min(place, len(shapes) - 1)]
            if time.monotonic() > deadline:
                timing.write("left out", f"{op} of {name} on {shape}: no time was left")
            else:
                attempt("failed", f"{op} of {name} on {shape}", timing.other, op, name, shape)
    for name in peers:
        for shape in shapes:
            reason = PEERS[name].why_not(_case(shape), timing.device)
            if reason is None and time.monotonic() > deadline - _COMPILING * PEERS[name].slow_at_first:
                reason = "no time was left"
            if reason is None:
                attempt("left out", f"{name} on {shape}", timing.peer, name, shape)  # a peer's failure is not ours
                torch.compiler.reset()
            else:
                timing.write("left out", f"{name} on {shape}: {reason}")


def _case(shape: Shape, cell: str = CELL) -> Case:
    """A case of this shape; of `CELL` with epsilon 0 and a threshold stream."""
    batch, steps, channels, dtype = shape
    return inputs.case(cell, inputs.DTYPES[dtype], batch=batch, time=steps, channels=channels)


def _meets_limits(op: str, backend: str, shape: Shape, device: torch.device) -> bool:
    """Whether the op meets its limits against the reference, on a smaller case, which compiles few kernels."""
    if op in softmax_cases.FORMS:
        case = next(case for case in softmax_cases.covering_cases(inputs.DTYPES[shape[3]]) if case.form == op)
    else:
        sizes = zip(("batch", "time", "channels"), shape[:3], _CHECKED, strict=True)
        case = _case(shape, op)
        case = replace(case, options={**case.options, **{name: min(size, most) for name, size, most in sizes}})
    return all(row.passed for row in compare.run([case], backend, device))


def _call(shape: Shape, device: torch.device) -> Call:
    """A call on a candidate, threshold and gradient that are standard normal and drawn on the device."""
    candidate, threshold, grad = _streams(3, shape, device)
    tensors, settings = {"candidate": candidate, "threshold": threshold}, {"epsilon": 0.0, "surrogate_scale": 1.0}
    return Call(CELL, tensors, settings, grad, torch.zeros_like(grad[:, 0]))


def _streams(count: int, shape: Shape, device: torch.device) -> list[torch.Tensor]:
    """Standard normal streams, drawn on the device."""
    generator = torch.Generator(device).manual_seed(0)
    draw = (torch.randn(shape[:3], generator=generator, device=device) for _ in range(count))
    return [t.to(inputs.DTYPES[shape[3]]) for t in draw]


def _neurons(cell: str, shape: Shape, device: torch.device) -> Call:
    """A call of a cell with one stream, drawn on the device. Its vectors are those of a case of one step."""
    _, _, channels, dtype = shape
    small = _case((1, 1, channels, dtype), cell).build().to(device)
    stream, grad = _streams(2, shape, device)
    name, *_ = small.tensors
    grad_final = torch.zeros_like(grad[:, 0], dtype=small.grad_final.dtype)
    return replace(small, tensors=small.tensors | {name: stream}, grad_h=grad, grad_final=grad_final)


def _softmax_call(form: str, shape: Shape, device: torch.device) -> Call:
    """A call of the softmax recurrence: of RWKV-4, or with heads of `_HEAD` channels, or one head, and no decay."""
    score, value, grad = _streams(3, shape, device)
    channels = shape[2]
    if form == softmax_cases.WKV:
        vectors = softmax_cases.vectors(channels, device)
        tensors = {"value": value, "score": score} | {name: t.float() for name, t in vectors.items()}
    else:
        heads = channels // _HEAD if channels % _HEAD == 0 else 1
        tensors = {"value": value, "score": score[..., :heads].contiguous()}
    return Call(softmax_cases.OP, tensors, {}, grad, grad.new_zeros(0))


def _works(subject: str, call: Call, f: Callable) -> Works:
    """The timed passes of a function of the call's tensors."""
    found = work.passes(call, f)
    return {(subject, what): found[what] for what in work.MAIN}


def _in_graph(backend: str, device: torch.device, calls: int = 100) -> dict[str, float]:
    """Microseconds of a small call in a CUDA graph; empty on a CPU."""
    if device.type != "cuda":
        return {}
    c, b = torch.randn(1, 1, 512, device=device), torch.randn(1, 1, 512, device=device)
    mk.bmru(c, b, backend=backend)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            mk.bmru(c, b, backend=backend)
    seconds, _ = timing.measure({"graph": graph.replay}, device, _PER_SUBJECT)["graph"]
    return {"bmru (1, 1, 512) in a CUDA graph": seconds / calls * 1e6}


def run_small_set(backends: Sequence[str], device: torch.device) -> bool:
    """Compare each backend with the reference on a few small calls, with time whole and split.

    They are of one cell and of both forms of the softmax recurrence. They are few because a sanitizer slows each one.
    """
    from mru_kernels.backends import TABLE

    options = (
        {"channels": 64},
        {"batch": "packed", "reverse": True, "alpha": True, "threshold": "channel", "epsilon": 0.5},
        {"amplitude": True, "epsilon": 1.0, "initial_state": "real"},
    )
    cases = [
        inputs.case(CELL, inputs.DTYPES[dtype], time=150, **given) for dtype in ("fp32", "bf16") for given in options
    ]
    softmax = [softmax_cases.Case(form, inputs.DTYPES[dtype], *variant) for form, dtype, *variant in SMALL_SOFTMAX]
    rows = []
    for name in backends:
        rows += compare.run(softmax, name, device)
        for steps in (0, 64):
            with patch.object(TABLE[name].module, "segment", lambda *sizes, steps=steps: steps):
                rows += compare.run(cases, name, device)
    print(compare.table(rows))
    return bool(rows) and all(row.passed for row in rows)
