"""Run a function in a process of its own that need not import torch: it is forked from one that has."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from pathlib import Path

_CONTEXT = get_context("forkserver")
# Their import starts none of torch's threads, which a forked process would lack.
_CONTEXT.set_forkserver_preload(["torch", "pytest", "hypothesis"])


def run(
    function: Callable[..., int], *arguments: object, output: Path, environment: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run `function(*arguments)`, which returns an exit status, in the root of the repository.

    The exit status of a crash is the negative number of its signal.

    Args:
        output: a file for what the process prints.
        environment: variables that are set before the call.
        timeout: seconds after which the process is killed and `subprocess.TimeoutExpired` is raised.
    """
    process = _CONTEXT.Process(target=_call, args=(function, arguments, output, dict(environment)))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise subprocess.TimeoutExpired(str(function), timeout, output.read_text())
    return subprocess.CompletedProcess(str(function), process.exitcode, output.read_text())


def _call(function: Callable[..., int], arguments: tuple, output: Path, environment: dict[str, str]) -> None:
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    os.chdir(Path(__file__).parents[1])
    raise SystemExit(function(*arguments))
