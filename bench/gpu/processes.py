"""Commands that run at the same time, each with its own log and all with one deadline."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_INTERRUPTED = 5  # seconds that a command may take to end after an interrupt


@dataclass
class Outcome:
    """The end of a stage or command: "passed", "failed", "timed out" or "skipped", and the reason."""

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
    """Run commands at the same time in the tree, and end those that miss the deadline.

    Args:
        jobs: commands by name.
        seconds: the time until the deadline of all commands.
        logs: the folder for the output. Each log has the name of its command.
        environment: variables to add to those of this process.
    """
    logs.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment}
    start, running, outcomes = time.monotonic(), [], []
    for name, command in jobs.items():
        log = logs / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}.log"
        try:
            running.append((name, _start(command, environment, log), log))
        except OSError as error:
            outcomes.append(Outcome(name, "failed", str(error)))
    for name, process, log in running:
        status = _wait(process, start + seconds - time.monotonic())
        last = " ".join(last_lines(log, 1)).strip()[:120]
        reason = f"exit status {process.returncode}: {last}" if status == "failed" else last
        outcomes.append(Outcome(name, status, reason, time.monotonic() - start))
        if status != "passed":
            print(f"\n--- the end of {log.name}", *last_lines(log, 25), "---\n", sep="\n", flush=True)
    return outcomes


def _start(command: Sequence[str], environment: dict[str, str], log: Path) -> subprocess.Popen:
    with open(log, "w") as file:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=_take_interrupts,
        )  # fmt: skip


def _take_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell starts background commands with interrupts ignored


def _wait(process: subprocess.Popen, seconds: float) -> str:
    """Wait at most `seconds` for a process, and return its status. End a late process with all that it started."""
    try:
        return "failed" if process.wait(max(seconds, 0.1)) else "passed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_INTERRUPTED)  # pytest prints what has failed
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "timed out"


def last_lines(path: Path, count: int) -> list[str]:
    return path.read_text(errors="replace").splitlines()[-count:]


def missing(*packages: str) -> str:
    """A message with the packages that are not installed; empty if all are."""
    names = [name for name in packages if find_spec(name) is None]
    return f"{', '.join(names)} not installed" if names else ""
