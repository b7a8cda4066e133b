"""The C++ kernels for NVIDIA devices (csrc/cuda), in the same extension as those for the CPU."""

from __future__ import annotations

import torch

from .. import torch_private as private
from . import cpu

CHUNK_SIZES = (16, 64)  # the streams of a chunk lie in shared memory


def load() -> None:
    """Load the extension, which registers `mru::*.cuda` if it was built with CUDA."""
    cpu.load()
    if not private.has_kernel("mru::bmru.cuda", "CUDA"):
        raise ImportError("the extension is built without CUDA (needs nvcc and a CUDA build of torch, see setup.py)")
    if torch.version.cuda is None:
        raise ImportError("torch is built without CUDA")


def segment(sequences: int, steps: int, channels: int, itemsize: int, device: torch.device) -> int:
    """Steps of a segment, from sizes only; see csrc/segment.h."""
    return torch.ops.mru.segment.cuda(sequences, steps, channels, itemsize)
