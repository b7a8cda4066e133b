"""Everything that needs a GPU, in at most nine minutes: `python -m bench gpu-check`, or `make gpu-check`.

The stages are build, checks (tests and comparison), times, sanitizers. Each runs in other processes, which end at the
stage's deadline. A failure is reported, and the other stages still run. Nothing is installed: the package is built and
used in its tree. Results go to `bench/results/<gpu>-torch<version>` (.json, .md, .png). If $OUT is set, results and log
are copied there.

The comparison has every cell and the softmax recurrence; the sanitizers see one cell and the recurrence. One cell is
timed on all shapes; the recurrence, `lif` and `resonate` on one each. These three have not yet run on a GPU.

The exit status is 0 if all passed, 1 if something failed, 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import cli, inputs
from ..peers import PEERS
from .processes import ROOT
from .report import copy_out, report
from .stages import DEADLINES, SHAPES, Check, Shape, record_version, run_stages

RESULTS = ROOT / "bench" / "results"
LOGS = ROOT / "build" / "gpu-check"


def _shape(text: str) -> Shape:
    sizes, _, dtype = text.rpartition(",")
    if dtype not in inputs.DTYPES:
        raise argparse.ArgumentTypeError(f"expected B,T,D,dtype such as 8,4096,2048,bf16, got {text!r}")
    return *cli.shape(sizes), dtype


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=cli.prog("gpu-check"), description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", help="the device to check; tests give a CPU")
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
        from . import jobs

        return 0 if jobs.run_small_set(check.backends, device) else 1
    if arguments.job == "times":
        _time(check, device, arguments.seconds)
        return 0
    return _run(check, arguments.stage, arguments.results)


def _time(check: Check, device: torch.device, seconds: float) -> None:
    from . import jobs

    deadline = time.monotonic() + seconds
    check.logs.mkdir(parents=True, exist_ok=True)
    with open(check.figures, "w", buffering=1) as file:
        timing = jobs.Timing(device, lambda kind, what: print(json.dumps([kind, what]), file=file))
        jobs.time_all(timing, check.shapes, check.backends, deadline, list(PEERS))


def _run(check: Check, stages: Sequence[str], results: Path) -> int:
    record_version()
    shutil.rmtree(check.logs, ignore_errors=True)
    if torch.device(check.device).type == "cuda":
        from torch.utils.cpp_extension import CUDA_HOME

        check.cuda = CUDA_HOME if CUDA_HOME and shutil.which("nvcc", path=f"{CUDA_HOME}/bin") else None
    outcomes = run_stages(check, {name: DEADLINES[name] for name in DEADLINES if name in stages})
    paths = report(check, outcomes, results)
    if os.environ.get("OUT"):
        copy_out(paths, check.logs, Path(os.environ["OUT"]))
    print(*outcomes, sep="\n")
    failed = [outcome.name for outcome in outcomes if outcome.bad]
    print(f"\nfailed: {', '.join(failed)}" if failed else "\nnothing failed")
    return 1 if failed else 0
