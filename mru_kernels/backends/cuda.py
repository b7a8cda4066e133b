"""The C++ kernels for NVIDIA devices (csrc/cuda), in the same extension as those for the CPU."""

from __future__ import annotations

import torch

from .. import torch_private as private
from . import CHUNK, cpu

CHUNK_SIZES = (16, 64)  # the streams of a chunk lie in shared memory
_WORD = 16  # bytes that a thread moves at once
_ENOUGH = 2**11  # words in one time step of all sequences; time is cut only below this number
_MOST = 2**15  # threads if time is cut: eight warps per multiprocessor of an H100; each warp loads a tile ahead
_FEW = 4 * CHUNK  # shorter sequences are not cut


def load() -> None:
    """Load the extension, which registers `mru::*.cuda` if it was built with CUDA."""
    cpu.load()
    if not private.has_kernel("mru::bmru.cuda", "CUDA"):
        raise ImportError("the extension is built without CUDA (needs nvcc and a CUDA build of torch, see setup.py)")
    if torch.version.cuda is None:
        raise ImportError("torch is built without CUDA")


def segment(sequences: int, steps: int, channels: int, itemsize: int, device: torch.device) -> int:
    """Steps of a segment, from sizes only: results are the same on every device."""
    words = -(-channels * itemsize // _WORD)
    if sequences * words >= _ENOUGH or sequences * words == 0 or steps < _FEW * sequences:
        return 0
    least = max(-(-steps * words // _MOST), CHUNK)
    return (least + CHUNK - 1) // CHUNK * CHUNK
