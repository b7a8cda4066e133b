"""The stages of `gpu-check`: build, checks, times, sanitizers."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .. import records
from .processes import ROOT, Outcome, last_lines, missing, run_jobs

Shape = tuple[int, int, int, str]
#: B, T, D and dtype of the timed calls, with epsilon 0 and a threshold stream.
SHAPES: tuple[Shape, ...] = (
    (8, 4096, 2048, "bf16"),
    (32, 2048, 512, "fp32"),
    (1, 1048576, 64, "fp32"),
    (256, 512, 64, "fp32"),
    (256, 256, 2048, "bf16"),
    (512, 256, 512, "fp32"),
)
TESTS = tuple(f"tests/test_{name}.py" for name in ("gpu", "op", "op_layout", "resets", "slots", "bad_input", "bad_ops"))
TOOLS = ("memcheck", "racecheck", "synccheck")

#: The deadline of each stage in seconds from the start. Time that a stage leaves goes to the next.
DEADLINES = {"build": 100, "checks": 300, "times": 460, "sanitizers": 520}

_LAST_PEER = 30  # seconds between the start of the last peer and the end of the times
_LAST_CASE = 20  # seconds between the start of a comparison's last case and the end of the checks


@dataclass
class Check:
    """State shared by the stages.

    Attributes:
        device: where the backends run.
        shapes: the shapes to time.
        logs: the folder for logs and figures.
        backends: names of the backends that can run on the device; `find_backends` sets them.
        cuda: the folder of CUDA; None without nvcc.
    """

    device: str
    shapes: Sequence[Shape]
    logs: Path
    backends: list[str] = field(default_factory=list)
    cuda: str | None = None

    @property
    def figures(self) -> Path:
        return self.logs / "figures.jsonl"

    def build(self, seconds: float) -> Iterable[Outcome]:
        """Build the extension in place, with CUDA if there is nvcc."""
        environment = {}
        if self.cuda:
            environment = {"CUDA_HOME": self.cuda, "MRU_FORCE_CUDA": "1"}
            if "TORCH_CUDA_ARCH_LIST" not in os.environ:
                environment["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*torch.cuda.get_device_capability(self.device))
        absent = missing("setuptools", "ninja")
        if absent:
            yield Outcome("build", "skipped", f"{absent}: there is no C++ extension")
        else:
            command = [sys.executable, "setup.py", "build_ext", "--inplace"]
            yield from run_jobs({"build": command}, seconds, self.logs, **environment)

    def find_backends(self) -> Iterable[Outcome]:
        """Ask, in a new process, which backends can run."""
        code = (
            "import json, sys, mru_kernels as m; from mru_kernels.backends import TABLE; "
            "kind = sys.argv[1].partition(':')[0]; reasons = m.available_backends(sys.argv[1]); "
            "print('backends', json.dumps({n: r for n, r in reasons.items() if kind in TABLE[n].device_types}))"
        )
        (outcome,) = run_jobs({"backends": [sys.executable, "-c", code, self.device]}, 60, self.logs)
        if outcome.bad:
            yield outcome
            return
        (line,) = (x for x in last_lines(self.logs / "backends.log", 50) if x.startswith("backends "))
        reasons = json.loads(line.removeprefix("backends "))
        self.backends = [name for name, reason in reasons.items() if reason is None]
        for name, reason in reasons.items():
            if reason is not None:
                expected = name != "cuda" or self.cuda
                yield Outcome(f"backend {name}", "failed" if expected else "skipped", reason)
        if not reasons:
            yield Outcome("backends", "failed", f"no backend is for {self.device}")

    def checks(self, seconds: float) -> Iterable[Outcome]:
        """Run `python -m bench compare` and the tests of the op for every backend, all at the same time.

        In nearly every call Triton compiles kernels for some seconds. So Triton gets fewer examples, and half
        of the cases (`bench compare --brief`).
        """
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
        absent = missing("pytest", "hypothesis")
        if absent:
            yield Outcome("tests", "skipped", absent)
        else:
            for name in self.backends:
                profile, workers = ("few", 3 * cores // 8) if name == "triton" else ("brief", cores // 8)
                side_by_side = ["-n", str(max(workers, 1)), "--dist", "worksteal"] if not missing("xdist") else []
                jobs[f"tests {name} {profile}"] = [
                    *(sys.executable, "-m", "pytest", "-q", "-m", "not slow and not check", "-p", "no:cacheprovider"),
                    *("--hypothesis-profile", profile, "--maxfail", "20", *side_by_side),
                    *("--backend", name, "--device", self.device, *TESTS),
                ]
        # One thread per process: the reference's small steps gain nothing from more.
        yield from run_jobs(jobs, seconds, self.logs, OMP_NUM_THREADS="1")

    def times(self, seconds: float) -> Iterable[Outcome]:
        """Run `jobs.time_all` with every peer."""
        shapes = [f"{batch},{steps},{channels},{dtype}" for batch, steps, channels, dtype in self.shapes]
        command = self._own("--job", "times", "--seconds", str(seconds - _LAST_PEER), "--shape", *shapes)
        yield from run_jobs({"times": command}, seconds, self.logs)

    def sanitizers(self, seconds: float) -> Iterable[Outcome]:
        """Run compute-sanitizer's tools on `jobs.run_small_set`. Without torch's cache they see every allocation."""
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
    """Run each named stage until its deadline. Without a backend only the build runs."""
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
        except Exception as error:  # the other stages still run
            note([Outcome(name, "failed", f"{type(error).__name__}: {error}")])
    return outcomes


def record_version() -> None:
    """Record the version in the tree if the package is not installed, because the package reads it on import.

    Nothing in this process may import the package before this call.
    """
    if records.version_of("mru_kernels") is None:
        version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
        folder = ROOT / "mru_kernels.egg-info"
        folder.mkdir(exist_ok=True)
        (folder / "PKG-INFO").write_text(f"Metadata-Version: 2.1\nName: mru_kernels\nVersion: {version}\n")
