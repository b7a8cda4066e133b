"""The module with the CUDA kernels of the softmax recurrence under host execution, and its ops."""

from __future__ import annotations

import fcntl
import os
from functools import cache
from pathlib import Path
from types import ModuleType

import simt
from mru_kernels.softmax import registration

ELEMENTS = ("float32", "float64", "bfloat16", "float16")
LOADED = ("float32", "bfloat16") if simt.SANITIZE else ELEMENTS  # as simt.LOADED
FOLDER = simt.FOLDER / "softmax"


def build(folder: Path = FOLDER, csrc: Path = simt.ROOT / "csrc", elements: tuple[str, ...] = LOADED) -> Path:
    """As `simt.build`, with the kernels of the softmax recurrence."""
    sources = {"kernels": "softmax/cuda/softmax.cu", "binding": "softmax/cuda/simt.cpp"}
    return simt.build(folder, csrc, elements, name="mru_simt_softmax", **sources)


@cache
def define_ops() -> None:
    registration.define("simt")


@cache
def control() -> ModuleType:
    """The loaded module: as `simt.control`."""
    define_ops()
    named = os.environ.get("MRU_SIMT_MODULE")
    if named:
        return simt.load_module(Path(named))
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return simt.load_module(build())
