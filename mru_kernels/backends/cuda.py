"""The C++ kernels for NVIDIA devices (csrc/cuda), in the same extension as those for the CPU."""

from __future__ import annotations

import torch

from . import CHUNK, cpu

CHUNK_SIZES = (16, 64)  # the streams of a chunk lie in shared memory
_ENOUGH = 2**13  # channels at once, over all sequences, from which on time is not split
_WANTED = 2**17  # about as many where it is: eight warps of fp32 a multiprocessor of an H100
_LEAST = 2 * CHUNK  # steps of a segment, at least


def load() -> None:
    """Load the extension, which registers `mru::*.cuda` if it was built with CUDA."""
    cpu.load()
    if not torch._C._dispatch_has_kernel_for_dispatch_key("mru::bmru.cuda", "CUDA"):
        raise ImportError("the extension is built without CUDA (needs nvcc and a CUDA build of torch, see setup.py)")
    if torch.version.cuda is None:
        raise ImportError("torch is built without CUDA")


def segment(sequences: int, steps: int, channels: int, device: torch.device) -> int:
    """Steps of a segment, from sizes only: results are the same on every device."""
    at_once = sequences * channels
    if at_once >= _ENOUGH or at_once == 0 or steps < 2 * _LEAST * sequences:
        return 0
    least = max(steps * channels // _WANTED, _LEAST)
    return (least + CHUNK - 1) // CHUNK * CHUNK
