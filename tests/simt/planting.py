"""Copies of the CUDA sources with planted faults, and processes of their host execution with one fault switched on."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Container
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from unittest.mock import patch

from tests.planted import switched

from . import ROOT

CSRC = ROOT / "csrc"
#: Of the kernels of a copy: what builds and checks it in least time. The sources themselves are compiled with warnings.
FLAGS = "-O1 -w -Dalways_inline=unused"


def plant(copy: Path, faults: list[tuple[int, Path, str, str]], without: Container[Path] = ()) -> None:
    """Write a copy of the sources. Files that stay the same keep their time.

    Args:
        copy: the folder.
        faults: of each its number, its file, the old text and the new one.
        without: files that the copy does not get.
    """
    sources = {path for path in CSRC.rglob("*") if path.is_file()}
    assert {file for _, file, _, _ in faults} <= sources
    for source in sources:
        if source in without:
            continue
        text = source.read_text()
        if own := [(number, old, new) for number, file, old, new in faults if file == source]:
            text = switched(text, own)
        target = copy / source.relative_to(CSRC)
        if not target.exists() or target.read_text() != text:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)


_TIMEOUT = 600.0
_processes = multiprocessing.get_context("forkserver")
# Imported before the fork, which takes 5 s of CPU. None of them loads the kernels of a copy.
_processes.set_forkserver_preload(["pytest", "simt.battery", "simt.softmax"])


def start_server() -> None:
    """Start the process from which those of `outcome` are forked. Call it before other threads read the environment."""
    with patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(sys.path)}):  # Python does not hand it sys.path
        forkserver.ensure_running()


def _run(pipe: Connection, fault: int, module: Path, failure: Callable[[str], str], element: str) -> None:
    os.environ |= {"MRU_FAULT": str(fault), "MRU_SIMT_MODULE": str(module)}
    pipe.send(failure(element))


def outcome(fault: int, module: Path, failure: Callable[[str], str], element: str) -> str:
    """What `failure(element)` returns with a fault of a module switched on (0: none), or how it crashed.

    It runs in a process of its own.
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
        if process.exitcode is not None and process.exitcode < 0:
            return f"crash: signal {-process.exitcode}"
        raise
    finally:
        process.kill()
        process.join()
