"""Copies of the CUDA sources with planted faults, and processes for host execution with one fault switched on."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Container
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from unittest.mock import patch

from tests.planted import KILLED, switched

from . import ROOT

CSRC = (ROOT / "csrc").resolve()


def plant(copy: Path, faults: list[tuple[int, Path, str, str]], without: Container[Path] = ()) -> None:
    """Write a copy of the sources with faults. A file that does not change keeps its time, so ninja skips it.

    Args:
        copy: the folder.
        faults: for each fault its number, its file, the old text and the new text.
        without: files that are left out of the copy.
    """
    sources = {path for path in CSRC.rglob("*") if path.is_file() and path not in without}
    assert {file for _, file, _, _ in faults} <= sources
    for old in [path for path in copy.rglob("*") if path.is_file()]:
        if CSRC / old.relative_to(copy) not in sources:
            old.unlink()
    for source in sources:
        text = source.read_text()
        if own := [(number, old, new) for number, file, old, new in faults if file == source]:
            text = switched(text, own)
        target = copy / source.relative_to(CSRC)
        if not target.exists() or target.read_text() != text:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)


_TIMEOUT = 600.0
_processes = multiprocessing.get_context("forkserver")
# The server imports these once, for all its forks: imports take 5 s of CPU. None of them loads the kernels of a copy.
_processes.set_forkserver_preload(["pytest", "simt.battery", "simt.softmax"])


def start_server() -> None:
    """Start the server that forks the processes of `outcome`. Call it before other threads read the environment."""
    with patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(sys.path)}):  # the server does not get sys.path
        forkserver.ensure_running()


def _run(pipe: Connection, fault: int, module: Path, failure: Callable[[str], str], element: str) -> None:
    os.environ |= {"MRU_FAULT": str(fault), "MRU_SIMT_MODULE": str(module)}
    pipe.send(failure(element))


def outcome(fault: int, module: Path, failure: Callable[[str], str], element: str) -> str:
    """What `failure(element)` returns in a process of its own, with a fault of a module switched on, or how it crashed.

    Args:
        fault: the number of the fault; 0: none.
        module: the module of a copy.
        failure: returns the first check that fails, or an empty text.
        element: the dtype that is checked.

    Raises:
        TimeoutError: it did not end in time.
        EOFError: it ended without a result and without a crash.
    """
    ours, its = _processes.Pipe(duplex=False)
    process = _processes.Process(target=_run, args=(its, fault, module, failure, element))
    process.start()
    its.close()
    try:
        if not ours.poll(_TIMEOUT):
            raise TimeoutError(f"fault {fault} of {module}: no check failed in {_TIMEOUT} s")
        return ours.recv()
    except EOFError:
        process.join()
        if process.exitcode is not None and process.exitcode < 0 and -process.exitcode not in KILLED:
            return f"crash: signal {-process.exitcode}"
        raise
    finally:
        process.kill()
        process.join()
