"""Processes with other environments, which answer questions about a call.

glibc reads its allocator settings when a process starts, and torch chooses its CPU instructions then. So other settings
need another process. `python -m bench.aside` reads questions from its standard input and writes the answers to its
standard output.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from . import allocator
from .inputs import Call
from .records import Figure
from .work import DEFAULT_ALLOCATOR

#: Variables with which torch, and so the CPU kernels, use only the vector instructions that every machine has.
OTHER_INSTRUCTIONS = {"ATEN_CPU_CAPABILITY": "default"}


class Aside:
    """A process that answers questions, until `close`. If a question ends it, the next one starts another.

    Args:
        environment: the whole environment of the process.
    """

    def __init__(self, environment: Mapping[str, str]):
        self._environment = environment
        self._process = self._started()

    def _started(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.aside"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=self._environment, start_new_session=True,  # Ctrl-C is for this process only
        )  # fmt: skip

    def ask(self, question: str, call: Call | None, backend: str) -> Any:
        """The answer to a question of `QUESTIONS` about a call.

        Raises:
            RuntimeError: the process failed. Its error is on the standard error stream.
        """
        if self._process.returncode is not None:
            self._process = self._started()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with TemporaryDirectory() as folder:
            file = Path(folder, "call.pt")
            torch.save(call, file)
            try:
                print(json.dumps([question, str(file), backend]), file=self._process.stdin, flush=True)
                answer = self._process.stdout.readline()
            except BrokenPipeError:
                answer = ""
        if not answer:
            self.close()
            raise RuntimeError(f"{question}: the process with other settings failed")
        return json.loads(answer)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


class Others:
    """Two processes that run the CPU kernels: one with glibc's default allocator settings, one with other instructions.

    It is a context manager, which starts and ends them.

    Args:
        backend: the name of the backend.
    """

    def __init__(self, backend: str):
        self._backend = backend

    def __enter__(self) -> Others:
        self._allocator = Aside(allocator.default())
        self._instructions = Aside(os.environ | OTHER_INSTRUCTIONS)
        try:
            for process in (self._allocator, self._instructions):  # so that no start-up runs while something is timed
                process.ask("ready", None, self._backend)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._allocator.close()
        self._instructions.close()

    def digest(self, call: Call) -> str:
        """`verify.digest` of a call with other instructions."""
        return self._instructions.ask("digest", call, self._backend)

    def times(self, call: Call) -> list[Figure]:
        """`speed.time_op` of a call with glibc's default allocator settings."""
        found = [Figure.from_json(fields) for fields in self._allocator.ask("times", call, self._backend)]
        return [replace(f, subject=f.subject + DEFAULT_ALLOCATOR) for f in found]


def _ready(*_: object) -> bool:
    return True


def _digest(file: str, backend: str) -> str:
    from . import verify

    return verify.digest(_load(file), backend)


def _times(file: str, backend: str) -> list[dict[str, Any]]:
    from . import speed

    return [figure.to_json() for figure in speed.time_op(_load(file), backend)]


def _load(file: str) -> Call:
    return torch.load(file, weights_only=False)  # this user's own file


#: "ready": True, once the process has started. "digest": `verify.digest`. "times": the figures of `speed.time_op`.
QUESTIONS: dict[str, Callable[..., Any]] = {"ready": _ready, "digest": _digest, "times": _times}


def main() -> None:
    from . import speed, verify  # noqa: F401 so that the answer to "ready" comes after the imports

    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # only answers go to the standard output
        for line in sys.stdin:
            question, file, backend = json.loads(line)
            print(json.dumps(QUESTIONS[question](file, backend)), file=answers, flush=True)


if __name__ == "__main__":
    main()
