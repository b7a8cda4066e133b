"""The C++ kernels for CPU tensors (csrc/cpu)."""

from __future__ import annotations

from pathlib import Path

import torch

from . import CHUNK

CHUNK_SIZES = (16, 4096)
_BLOCK = 64  # channels that keep one thread busy
_ENOUGH = 16  # units of work (sequences x blocks); time is cut only below this number
_SEGMENTS = 64  # of a sequence, at most
_LEAST = 512  # steps of a segment, at least


def load() -> None:
    """Load the extension, which registers `mru::*.cpu`."""
    found = sorted(Path(__file__).parents[1].glob("_C*.so"))
    if not found:
        raise ImportError("the C++ extension is not built (pip install --no-build-isolation -e .)")
    torch.ops.load_library(str(found[0]))


def segment(sequences: int, steps: int, channels: int, itemsize: int, device: torch.device) -> int:
    """Steps of a segment, from sizes only: results must not depend on the number of threads."""
    blocks = (channels + _BLOCK - 1) // _BLOCK
    units = sequences * blocks
    if units >= _ENOUGH or units == 0 or steps < 2 * _LEAST * sequences:
        return 0
    least = max(steps * blocks // _SEGMENTS, _LEAST)
    return (least + CHUNK - 1) // CHUNK * CHUNK


def isa() -> str:
    """The instruction set that the kernels use on this machine: baseline, avx2 or avx512."""
    return torch.ops.mru.cpu_isa()
