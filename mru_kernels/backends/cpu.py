"""The C++ kernels for CPU tensors (csrc/cpu)."""

from __future__ import annotations

from pathlib import Path

import torch

CHUNK_SIZES = (16, 4096)


def load() -> None:
    """Load the extension, which defines `mru::*.cpu` and `mru::*.cuda` and has the kernels of the first."""
    found = sorted(Path(__file__).parents[1].glob("_C*.so"))
    if not found:
        raise ImportError("the C++ extension is not built (pip install --no-build-isolation -e .)")
    torch.ops.load_library(str(found[0]))


def segment(sequences: int, steps: int, channels: int, itemsize: int, device: torch.device) -> int:
    """Steps of a segment, from sizes only; see csrc/segment.h."""
    return torch.ops.mru.segment.cpu(sequences, steps, channels, itemsize)


def isa() -> str:
    """The instruction set that the kernels use on this machine: baseline, avx2 or avx512."""
    return torch.ops.mru.cpu_isa()
