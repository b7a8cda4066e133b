"""Triton kernels for CUDA and ROCm devices, and for CPU tensors under Triton's interpreter.

    tuning.py       how time is cut, and how kernels are compiled
    ops.py          the ops
    launch.py       from the arguments of an op to those of a kernel
    kernels         the kernels, generic over the cell
    cell.py, cells  the protocol of a cell, and a file for each

A kernel is compiled for each cell, dtype, set of streams, layout (aligned to 16 bytes or not) and block of channels,
and once more for an epsilon of 0; never for sizes.
"""

from __future__ import annotations

import torch

from .tuning import CHUNK_SIZES, adjoint_segment, ceil_div, segment

__all__ = ["CHUNK_SIZES", "adjoint_segment", "backward_segment", "forward_segment", "load", "segment"]


def load() -> None:
    """Register `mru::*.triton`. Raises ImportError if Triton is not installed."""
    from . import ops

    ops.register()


def forward_segment(given: int, sizes: tuple[int, int, int], itemsize: int, device: torch.device) -> int:
    """Steps of a segment of the forward pass, a multiple of the chunk; `given` and `sizes` are those of the op."""
    steps = segment(*sizes, itemsize, device) if given < 0 else given
    return ceil_div(steps, CHUNK_SIZES[1]) * CHUNK_SIZES[1]


def backward_segment(given: int, sizes: tuple[int, int, int], itemsize: int, device: torch.device) -> int:
    """Steps of a segment of the backward pass: those given, unless they are what the forward pass takes by itself."""
    steps = forward_segment(given, sizes, itemsize, device)
    if steps == 0 or steps != segment(*sizes, itemsize, device):
        return steps
    return adjoint_segment(*sizes, itemsize, device)
