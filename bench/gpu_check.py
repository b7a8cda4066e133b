"""All that wants a GPU, in one command of nine minutes at most: `python -m bench gpu-check`, or `make gpu-check`.

Stages, each in processes of their own that end at the stage's deadline: build, checks, times, sanitizers. The checks
are tests and comparison, side by side. A Triton kernel takes seconds to compile and nearly every call needs some, so
Triton gets fewer examples, and half of the cases (`bench compare --brief`).
What fails is reported, and the rest goes on. Nothing is installed: the package is built and used in its tree. Results
go to `bench/results/<gpu>-torch<version>` (.json, .md, .png), and to $OUT too where that is set, with the log.

The exit status is 0; 1 where something failed; 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import torch

from . import cli, inputs, timing, work
from .inputs import Call, Case
from .peers import PEERS, job

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
LOGS = ROOT / "build" / "gpu-check"
TESTS = ("tests/test_gpu.py", "tests/test_op.py", "tests/test_bad_input.py")
TOOLS = ("memcheck", "racecheck", "synccheck")

Shape = tuple[int, int, int, str]
#: B, T, D and dtype of what is timed, with epsilon 0 and a threshold stream.
SHAPES: tuple[Shape, ...] = (
    (8, 4096, 2048, "bf16"),
    (32, 2048, 512, "fp32"),
    (1, 1048576, 64, "fp32"),
    (256, 512, 64, "fp32"),
    (256, 256, 2048, "bf16"),
    (512, 256, 512, "fp32"),
)
SELDOM = ", seldom writes"  # after a backend's name: where one step in three hundred writes, not one in two
#: Stage: seconds from the start by which it ends. One that ends early leaves the rest to the next.
DEADLINES = {"build": 100, "checks": 300, "times": 460, "sanitizers": 520}

WORKS = (work.FORWARD, work.BACKWARD, work.BOTH)
_COPIED = 2**30  # bytes, both read and written, by the copy that bandwidth is measured by
_PER_SUBJECT = 0.4  # seconds
_GRACE = 30  # seconds between the last peer's begin and the end of the times
_COMPILING = 60  # more of them, for a peer that is compiled first
_GOODBYE = 5  # seconds to say what it has found, for what takes too long
_LAST_CASE = 20  # seconds between the begin of a comparison's last case and the end of the checks, likewise


# ------------------------------------------------------------------------------------------- processes


@dataclass
class Outcome:
    """How something ended: "passed", "failed", "timed out" or "skipped", and why."""

    name: str
    status: str
    reason: str = ""
    seconds: float = 0.0

    @property
    def bad(self) -> bool:
        return self.status in ("failed", "timed out")

    def __str__(self) -> str:
        return f"{self.status:10}{self.name:28}{self.seconds:6.0f} s  {self.reason}".rstrip()


def run_jobs(jobs: dict[str, Sequence[str]], seconds: float, logs: Path, **environment: str) -> list[Outcome]:
    """Run commands side by side, each in the tree with output to a log of its name, and end those that take longer."""
    logs.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment}
    start, running, outcomes = time.monotonic(), [], []
    for name, command in jobs.items():
        log = logs / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}.log"
        try:
            with open(log, "w") as file:
                process = subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                    preexec_fn=_heed_interrupts,
                )  # fmt: skip
        except OSError as error:
            outcomes.append(Outcome(name, "failed", str(error)))
        else:
            running.append((name, process, log))
    for name, process, log in running:
        try:
            code = process.wait(max(start + seconds - time.monotonic(), 0.1))
            status = "failed" if code else "passed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)  # the session that it began, with its own processes
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GOODBYE)  # pytest tells what has failed
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = "timed out"
        last = " ".join(_last_lines(log, 1)).strip()[:120]
        reason = {"passed": last, "failed": f"exit status {process.returncode}: {last}"}.get(status, last)
        outcomes.append(Outcome(name, status, reason, time.monotonic() - start))
        if status != "passed":
            print(f"\n--- the end of {log.name}", *_last_lines(log, 25), "---\n", sep="\n", flush=True)
    return outcomes


def _heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # what runs in the background may have been told to ignore them


def _last_lines(path: Path, count: int) -> list[str]:
    return path.read_text(errors="replace").splitlines()[-count:]


def missing(*packages: str) -> str:
    """What is not installed of these, in words; empty if all are."""
    names = [name for name in packages if find_spec(name) is None]
    return f"{', '.join(names)} not installed" if names else ""


# ------------------------------------------------------------------------------------------- the stages


@dataclass
class Check:
    """What the stages know of each other."""

    device: str
    shapes: Sequence[Shape]
    logs: Path
    backends: list[str] = field(default_factory=list)
    cuda: str | None = None  # where nvcc is

    @property
    def figures(self) -> Path:
        return self.logs / "figures.jsonl"

    def build(self, seconds: float) -> Iterable[Outcome]:
        """Builds the extension in place, with CUDA where nvcc is."""
        give_metadata()
        environment = {}
        if self.cuda:
            environment = {"CUDA_HOME": self.cuda, "MRU_FORCE_CUDA": "1"}
            if "TORCH_CUDA_ARCH_LIST" not in os.environ:
                environment["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*torch.cuda.get_device_capability(self.device))
        lacks = missing("setuptools", "ninja")
        if lacks:
            yield Outcome("build", "skipped", f"{lacks}: there is no C++ extension")
        else:
            command = [sys.executable, "setup.py", "build_ext", "--inplace"]
            yield from run_jobs({"build": command}, seconds, self.logs, **environment)

    def find_backends(self) -> Iterable[Outcome]:
        """Asks, in a new process, which backends can run."""
        code = (
            "import json, sys, mru_kernels as m; from mru_kernels.backends import TABLE; "
            "kind = sys.argv[1].partition(':')[0]; reasons = m.available_backends(sys.argv[1]); "
            "print('backends', json.dumps({n: r for n, r in reasons.items() if kind in TABLE[n].device_types}))"
        )
        (outcome,) = run_jobs({"backends": [sys.executable, "-c", code, self.device]}, 60, self.logs)
        if outcome.bad:
            yield outcome
            return
        (line,) = (x for x in _last_lines(self.logs / "backends.log", 50) if x.startswith("backends "))
        reasons = json.loads(line.removeprefix("backends "))
        self.backends = [name for name, reason in reasons.items() if reason is None]
        for name, reason in reasons.items():
            if reason is not None:
                expected = name != "cuda" or self.cuda
                yield Outcome(f"backend {name}", "failed" if expected else "skipped", reason)
        if not reasons:
            yield Outcome("backends", "failed", f"none is for {self.device}")

    def checks(self, seconds: float) -> Iterable[Outcome]:
        """`python -m bench compare` and the tests of the op, of each backend, side by side."""
        cores = os.cpu_count() or 1
        jobs: dict[str, Sequence[str]] = {}
        for name in self.backends:
            parts, brief = (max(cores // 2, 1), ["--brief"]) if name == "triton" else (1, [])
            for part in range(1, parts + 1):
                jobs[" ".join(["compare", name, *brief, f"{part}/{parts}"])] = [
                    *(sys.executable, "-m", "bench", "compare", "--device", self.device, "--backend", name, *brief),
                    *("--part", f"{part}/{parts}", "--seconds", str(seconds - _LAST_CASE)),
                    *("--json", str(self.logs / f"compare-{name}-{part}.json")),
                ]
        lacks = missing("pytest", "hypothesis")
        if lacks:
            yield Outcome("tests", "skipped", lacks)
        else:
            for name in self.backends:
                profile, workers = ("few", 3 * cores // 8) if name == "triton" else ("brief", cores // 8)
                side_by_side = ["-n", str(max(workers, 1)), "--dist", "worksteal"] if not missing("xdist") else []
                jobs[f"tests {name} {profile}"] = [
                    *(sys.executable, "-m", "pytest", "-q", "-m", "not slow and not check", "-p", "no:cacheprovider"),
                    *("--hypothesis-profile", profile, "--maxfail", "20", *side_by_side),
                    *("--backend", name, "--device", self.device, *TESTS),
                ]
        # A thread a process: the reference's small steps gain nothing from more.
        yield from run_jobs(jobs, seconds, self.logs, OMP_NUM_THREADS="1")

    def times(self, seconds: float) -> Iterable[Outcome]:
        """`time_all`, with each peer."""
        shapes = [f"{batch},{steps},{channels},{dtype}" for batch, steps, channels, dtype in self.shapes]
        command = self._own("--job", "times", "--seconds", str(seconds - _GRACE), "--shape", *shapes)
        yield from run_jobs({"times": command}, seconds, self.logs)

    def sanitizers(self, seconds: float) -> Iterable[Outcome]:
        """compute-sanitizer's tools on `run_small_set`; every tensor an allocation of its own, so that they see it."""
        path = os.pathsep.join([os.environ.get("PATH", ""), f"{self.cuda}/bin"])
        program = shutil.which("compute-sanitizer", path=path)
        if program is None:
            yield Outcome("sanitizers", "skipped", "compute-sanitizer is not on the PATH")
            return
        own = self._own("--job", "small-set")
        jobs = {tool: [program, "--tool", tool, "--error-exitcode", "9", *own] for tool in TOOLS}
        yield from run_jobs(jobs, seconds, self.logs, PYTORCH_NO_CUDA_MEMORY_CACHING="1")

    def _own(self, *arguments: str) -> list[str]:
        command = [sys.executable, "-m", "bench", "gpu-check", "--device", self.device, "--logs", str(self.logs)]
        return [*command, "--backend", *self.backends, *arguments]


def run_stages(check: Check, deadlines: dict[str, float]) -> list[Outcome]:
    """Run each stage named, to its deadline; without a backend all but the build is skipped."""
    start, outcomes = time.monotonic(), []

    def note(found: Iterable[Outcome]) -> None:
        for outcome in found:
            outcomes.append(outcome)
            print(outcome, flush=True)

    stages: dict[str, Callable[[float], Iterable[Outcome]]] = {
        "build": check.build, "checks": check.checks, "times": check.times, "sanitizers": check.sanitizers,
    }  # fmt: skip
    for name, deadline in deadlines.items():
        if name != "build" and not check.backends:
            note([Outcome(name, "skipped", "there is no backend to run")])
            continue
        try:
            note(stages[name](start + deadline - time.monotonic()))
            if name == "build":
                note(check.find_backends())
        except Exception as error:  # the others go on
            note([Outcome(name, "failed", f"{type(error).__name__}: {error}")])
    return outcomes


def give_metadata() -> None:
    """The package asks for its own version, which an installation records: without one, record it in the tree."""
    try:
        metadata.version("mru_kernels")
    except metadata.PackageNotFoundError:
        version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
        folder = ROOT / "mru_kernels.egg-info"
        folder.mkdir(exist_ok=True)
        (folder / "PKG-INFO").write_text(f"Metadata-Version: 2.1\nName: mru_kernels\nVersion: {version}\n")


# -------------------------------------------------------------------------------------- jobs on the GPU


@dataclass(frozen=True)
class Figure:
    """A time of one subject (a backend, a peer or torch.add) on one shape, epsilon 0, with a threshold stream. Half of
    the steps write unless the subject says otherwise.
    """

    shape: tuple[int, int, int]
    dtype: str
    subject: str
    work: str  # "forward", "backward" or "forward + backward"
    ms: float
    spread: float  # between the quartiles, over the median
    gb_per_s: float  # at the bytes of the floor
    percent_of_copy: float


Works = dict[tuple[str, str], Callable[[], object]]  # by subject and work


class Timing:
    """Times backends and peers on a device.

    Args:
        device: where.
        write: takes "copy", "figure", "call", "left out" or "failed", and what it is, as soon as it is known.
        copied: bytes that a copy reads, and writes, to measure the bandwidth.
    """

    def __init__(self, device: torch.device, write: Callable[[str, object], None], copied: int = _COPIED):
        self.device, self.write = device, write
        self.bandwidth = self._copy(copied)
        self._checked: set[str] = set()  # peers

    def _copy(self, copied: int) -> float:

        source = torch.ones(copied // 4, device=self.device)
        target = torch.empty_like(source)
        seconds, spread = timing.measure({"copy": lambda: target.copy_(source)}, self.device, _PER_SUBJECT)["copy"]
        rate = 2 * copied / seconds / 1e9
        self.write("copy", {"bytes": 2 * copied, "gb_per_s": rate, "spread": spread})
        return rate

    def backends(self, names: Sequence[str], shape: Shape) -> None:
        """Time, beside torch.add, the backends that meet their limits on few such inputs."""
        from . import speed

        call = _call(shape, self.device)
        candidate, threshold = call.tensors.values()
        out = torch.empty_like(candidate)
        works: Works = {(work.ADD, work.FORWARD): lambda: torch.add(candidate, threshold, out=out)}
        seldom = replace(call, tensors={"candidate": candidate * 0.005, "threshold": threshold})
        for name in names:
            if speed.meets_limits(_case(shape), name, self.device):
                works |= _works(name, call, speed.op(call, name))
                works |= _works(name + SELDOM, seldom, speed.op(seldom, name))
            else:
                self.write("failed", f"{name} on {shape}: beyond its limits against the reference, so not timed")
        self._measure(shape, call, works)

    def calls(self, name: str) -> None:
        """Time calls of a backend on tiny inputs."""
        from .speed import overhead

        microseconds = overhead(self.device, name) | _in_graph(name, self.device)
        self.write("call", {"backend": name, "microseconds": microseconds})

    def peer(self, name: str, shape: Shape) -> None:
        """Time a peer, forward, and forward and backward; checked on the first shape that it is timed on."""
        from .speed import check_peer

        call = _call(shape, self.device)
        if name not in self._checked:
            check_peer(name, replace(call, tensors={name: t[:2] for name, t in call.tensors.items()}))
            self._checked.add(name)
        works = _works(name, call, job(PEERS[name], call))
        timed = (work.FORWARD, work.BOTH) if PEERS[name].whole else (work.FORWARD,)
        for key in ((name, what) for what in timed):  # apart: some have no gradient
            self._measure(shape, call, {key: works[key]})

    def _measure(self, shape: Shape, call: Call, works: Works) -> None:

        *sizes, dtype = shape
        moved = work.floor_bytes(call)
        for (subject, name), (seconds, spread) in timing.measure(works, self.device, _PER_SUBJECT).items():
            count = 3 * call.stream.nbytes if subject == work.ADD else moved[name]
            rate = count / seconds / 1e9
            times = (seconds * 1e3, spread, rate, 100 * rate / self.bandwidth)
            self.write("figure", asdict(Figure(tuple(sizes), dtype, subject, name, *times)))


def time_all(
    timing: Timing, shapes: Sequence[Shape], backends: Sequence[str], deadline: float, peers: Sequence[str]
) -> None:
    """Time backends on all shapes, then peers; none is begun when `time.monotonic()` is past the deadline, and one that
    is compiled first not shortly before it.
    """

    def attempt(kind: str, what: str, run: Callable[..., None], *arguments: object) -> None:
        try:
            run(*arguments)
        except Exception as error:  # the others go on
            timing.write(kind, f"{what}: {type(error).__name__}: {error}".splitlines()[0][:300])

    for shape in shapes:
        attempt("failed", f"{shape}", timing.backends, backends, shape)
    for name in backends:
        attempt("failed", f"calls of {name}", timing.calls, name)
    for name in peers:
        for shape in shapes:
            reason = PEERS[name].why_not(_case(shape), timing.device)
            if reason is None and time.monotonic() > deadline - _COMPILING * PEERS[name].slow_at_first:
                reason = "no time was left"
            if reason is None:
                attempt("left out", f"{name} on {shape}", timing.peer, name, shape)  # its limits are none of ours
                torch.compiler.reset()
            else:
                timing.write("left out", f"{name} on {shape}: {reason}")


def _case(shape: Shape) -> Case:
    """Such inputs, epsilon 0 and a threshold stream."""
    batch, steps, channels, dtype = shape
    return inputs.case("bmru", inputs.DTYPES[dtype], batch=batch, time=steps, channels=channels)


def _call(shape: Shape, device: torch.device) -> Call:
    """Candidate, threshold and gradient, drawn where they are to be: standard normal."""
    generator = torch.Generator(device).manual_seed(0)
    draw = (torch.randn(shape[:3], generator=generator, device=device) for _ in range(3))
    candidate, threshold, grad = (t.to(inputs.DTYPES[shape[3]]) for t in draw)
    tensors, settings = {"candidate": candidate, "threshold": threshold}, {"epsilon": 0.0, "surrogate_scale": 1.0}
    return Call("bmru", tensors, settings, grad, torch.zeros_like(grad[:, 0]))


def _works(subject: str, call: Call, f: Callable) -> Works:
    """What is timed of a function of the call's tensors."""
    found = work.passes(call, f)
    return {(subject, what): found[what] for what in WORKS}


def _in_graph(backend: str, device: torch.device, calls: int = 100) -> dict[str, float]:
    """Microseconds of a small call within a CUDA graph; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    import mru_kernels as mk

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
    """Compare each backend with the reference on a few small calls, with time whole and split."""
    from mru_kernels.backends import TABLE

    from . import compare

    options = (
        {"channels": 64},
        {"batch": "packed", "reverse": True, "alpha": True, "threshold": "channel", "epsilon": 0.5},
        {"amplitude": True, "epsilon": 1.0, "initial_state": "real"},
    )
    cases = [
        inputs.case("bmru", inputs.DTYPES[dtype], time=150, **given) for dtype in ("fp32", "bf16") for given in options
    ]
    rows = []
    for name in backends:
        for steps in (0, 64):
            with patch.object(TABLE[name].module, "segment", lambda *sizes, steps=steps: steps):
                rows += compare.run(cases, name, device)
    print(compare.table(rows))
    return bool(rows) and all(row.passed for row in rows)


# ----------------------------------------------------------------------------------------------- report


def read_figures(path: Path) -> dict[str, list]:
    """What `time_all` wrote, by kind; the last line may be cut off."""
    found: dict[str, list] = {kind: [] for kind in ("copy", "figure", "call", "left out", "failed")}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            kind, what = json.loads(line)
        except ValueError:
            continue
        found[kind].append(what)
    return found


def with_ratios(figures: Sequence[dict], backends: Sequence[str]) -> list[dict]:
    """The figures, those of peers with "slower_than": the ratio of their time to each backend's for the same work."""

    def job(f: dict) -> tuple:
        return tuple(f["shape"]), f["dtype"], f["work"]

    def ratios(f: dict) -> dict[str, float]:
        return {g["subject"]: f["ms"] / g["ms"] for g in figures if g["subject"] in backends and job(g) == job(f)}

    return [f if f["subject"] in backends else f | {"slower_than": ratios(f)} for f in figures]


def machine(device: torch.device) -> dict[str, object]:
    """What the figures were measured on, with driver and clocks as nvidia-smi tells them."""
    facts = timing.machine(device)
    for package in ("triton", "accelerated-scan", "flash-linear-attention"):
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = None
    if device.type == "cuda":
        names = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")
        index = torch.cuda.current_device() if device.index is None else device.index
        told = timing.output_of(
            "nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", f"--id={index}"
        )
        facts |= dict(zip(names, map(str.strip, told.split(",")), strict=False)) if told else {}
        properties = torch.cuda.get_device_properties(device)
        facts["multiprocessors"], facts["cuda"] = properties.multi_processor_count, torch.version.cuda
    return facts


def markdown(record: dict) -> str:
    """The record for people."""
    lines = ["# " + str(record["machine"]["device"]), ""]
    lines += [", ".join(f"{k} {v}" for k, v in record["machine"].items() if v is not None), ""]
    for copy in record["copy"]:
        lines += [f"Copy of {copy['bytes'] / 2**30:.3g} GiB, read and written: {copy['gb_per_s']:.4g} GB/s.", ""]
    if record["figures"]:
        lines += [
            "Epsilon 0, a threshold stream; half of the steps write, or seldom one in three hundred. GB/s and share of "
            "that copy at the bytes of the floor.",
            "",
            "| B, T, D | dtype | work | subject | ms | spread | GB/s | of copy | slower than |",
            "|---|---|---|---|---:|---:|---:|---:|---|",
        ]
    for f in sorted(record["figures"], key=lambda f: (f["shape"], f["dtype"], WORKS.index(f["work"]))):
        ratios = ", ".join(f"{name} {ratio:.3g}x" for name, ratio in f.get("slower_than", {}).items())
        numbers = f"{f['ms']:.4g} | {f['spread']:.0%} | {f['gb_per_s']:.4g} | {f['percent_of_copy']:.1f} %"
        shape = ", ".join(map(str, f["shape"]))
        lines.append(f"| {shape} | {f['dtype']} | {f['work']} | {f['subject']} | {numbers} | {ratios} |")
    for call in record["call"]:
        lines += ["", f"Microseconds a call, {call['backend']}:", ""]
        lines += [f"- {name}: {value:.1f}" for name, value in call["microseconds"].items()]
    if record["left out"]:
        lines += ["", "Left out:", "", *(f"- {reason}" for reason in record["left out"])]
    lines += ["", "| stage | status | seconds | |", "|---|---|---:|---|"]
    lines += [f"| {s['name']} | {s['status']} | {s['seconds']:.0f} | {s['reason']} |" for s in record["stages"]]
    return "\n".join(lines) + "\n"


def summary(record: dict) -> str:
    """A row a shape, a column a backend and pass: the percent of the copy's rate, at the bytes of the floor."""
    backends = [call["backend"] for call in record["call"]]
    columns = [(backend, what) for backend in backends for what in (work.FORWARD, work.BACKWARD)]
    lines = ["| B, T, D | dtype | " + " | ".join(f"{backend}, {what}" for backend, what in columns) + " |"]
    lines.append("|---|---|" + "---:|" * len(columns))
    share = {(*f["shape"], f["dtype"], f["subject"], f["work"]): f["percent_of_copy"] for f in record["figures"]}
    for shape in dict.fromkeys((*f["shape"], f["dtype"]) for f in record["figures"]):
        percents = [f"{share[(*shape, *column)]:.0f} %" for column in columns]
        lines.append(f"| {', '.join(map(str, shape[:3]))} | {shape[3]} | " + " | ".join(percents) + " |")
    return "\n".join(lines)


def plot(record: dict, path: Path) -> None:
    """Rates over the bytes moved, under the roof that the copy sets."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    axes.axhline(record["copy"][0]["gb_per_s"], color="black", label="copy")
    markers = dict(zip(WORKS, "ovs", strict=True))
    subjects = list(dict.fromkeys(f["subject"] for f in record["figures"]))
    for index, subject in enumerate(subjects):
        for what, marker in markers.items():
            chosen = [f for f in record["figures"] if (f["subject"], f["work"]) == (subject, what)]
            x, y = ([f[name] for f in chosen] for name in ("gb_per_s", "ms"))
            moved = [rate * ms / 1e3 for rate, ms in zip(x, y, strict=True)]
            if chosen:
                axes.plot(moved, x, marker, color=f"C{index % 10}", alpha=0.8, label=f"{subject}, {what}")
    axes.set(xscale="log", yscale="log", xlabel="GB at the floor", ylabel="GB/s", title=record["machine"]["device"])
    axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def report(check: Check, outcomes: list[Outcome], results: Path) -> list[Path]:
    """Write record, table and plot; the paths."""
    found = read_figures(check.figures)
    outcomes += [Outcome("times", "failed", reason) for reason in found["failed"]]
    facts = machine(torch.device(check.device))
    record = {
        "machine": facts,
        **{kind: found[kind] for kind in ("copy", "call", "left out")},
        "figures": with_ratios(found["figure"], check.backends),
        "stages": [asdict(outcome) for outcome in outcomes],
    }
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{facts['device']}-torch{torch.__version__}")
    results.mkdir(parents=True, exist_ok=True)
    paths = [results / f"{name}.json", results / f"{name}.md"]
    paths[0].write_text(json.dumps(record, indent=1) + "\n")
    paths[1].write_text(markdown(record))
    if missing("matplotlib"):
        print("no plot: matplotlib not installed")
    elif record["copy"]:
        paths.append(results / f"{name}.png")
        plot(record, paths[-1])
    print(f"\n{markdown(record)}\n" + "\n".join(map(str, paths)))
    return paths


def copy_out(paths: Sequence[Path], logs: Path, folder: Path) -> None:
    """Copy results to a folder; the comparison's parts as one file, and all logs as one."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        shutil.copy(path, folder)
    found = [json.loads(path.read_text()) for path in sorted(logs.glob("compare-*.json"))]
    if found:
        rows = [row for part in found for row in part["rows"]]
        (folder / "compare.json").write_text(json.dumps({**found[0], "rows": rows}, indent=1) + "\n")
    parts = (f"=== {log.name}\n{log.read_text(errors='replace')}" for log in sorted(logs.glob("*.log")))
    (folder / "gpu-check.log").write_text("\n".join(parts))


# ---------------------------------------------------------------------------------------------- command


def _shape(text: str) -> Shape:
    sizes, _, dtype = text.rpartition(",")
    if dtype not in inputs.DTYPES:
        raise argparse.ArgumentTypeError(f"expected B,T,D,dtype such as 8,4096,2048,bf16, got {text!r}")
    return *cli.shape(sizes), dtype


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench gpu-check", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", help="a CPU stands in for a GPU where this is tested")
    parser.add_argument("--stage", nargs="+", choices=DEADLINES, default=list(DEADLINES))
    parser.add_argument("--shape", type=_shape, nargs="+", default=list(SHAPES), metavar="B,T,D,dtype")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--logs", type=Path, default=LOGS)
    parser.add_argument("--job", choices=["times", "small-set"], help=argparse.SUPPRESS)
    parser.add_argument("--backend", nargs="*", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(f"gpu-check: no GPU that torch {torch.__version__} can use")
        return 2

    check = Check(arguments.device, arguments.shape, arguments.logs, arguments.backend)
    if arguments.job == "small-set":
        return 0 if run_small_set(check.backends, device) else 1
    if arguments.job == "times":
        deadline = time.monotonic() + arguments.seconds
        check.logs.mkdir(parents=True, exist_ok=True)
        with open(check.figures, "w", buffering=1) as file:
            timing = Timing(device, lambda kind, what: print(json.dumps([kind, what]), file=file))
            time_all(timing, check.shapes, check.backends, deadline, list(PEERS))
        return 0

    shutil.rmtree(check.logs, ignore_errors=True)
    if device.type == "cuda":
        from torch.utils.cpp_extension import CUDA_HOME

        check.cuda = CUDA_HOME if CUDA_HOME and shutil.which("nvcc", path=f"{CUDA_HOME}/bin") else None
    outcomes = run_stages(check, {name: DEADLINES[name] for name in DEADLINES if name in arguments.stage})
    paths = report(check, outcomes, arguments.results)
    if os.environ.get("OUT"):
        copy_out(paths, check.logs, Path(os.environ["OUT"]))
    print(*outcomes, sep="\n")
    failed = [outcome.name for outcome in outcomes if outcome.bad]
    print(f"\nfailed: {', '.join(failed)}" if failed else "\nnothing failed")
    return 1 if failed else 0
