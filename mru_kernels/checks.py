"""Checks of user input: each raises an error that names the argument, what was expected and what came.

Only metadata is looked at (and the values of `epsilon` and `cu_seqlens` where these are on the CPU), so a check never
waits for a device and traces under torch.compile. MRU_CHECK=1 in the environment has `cu_seqlens` on a device checked
too, at the price of waiting for it; without it the kernels clamp the offsets.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from .backends import Backend

STREAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COMPLEX_DTYPES = (torch.complex64, torch.complex128)
MOST_ELEMENTS = 2**63 // 8  # so that 64 bits can address the bytes, whatever the dtype
_CHECK = os.environ.get("MRU_CHECK") == "1"


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and sums for streams of `dtype`."""
    return dtype if dtype in (torch.float64, *COMPLEX_DTYPES) else torch.float32


def _names(dtypes) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def tensor(name: str, value, rank: int, shape: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {type(value).__name__}")
    if value.dim() != rank:
        raise ValueError(f"{name}: expected {rank} dimensions {shape}, got shape {list(value.shape)}")


def streams(named: Mapping[str, Tensor], dtypes: tuple[torch.dtype, ...]) -> None:
    """Streams `[B, T, D]` of one dtype, which is one of `dtypes`, one shape and device."""
    first_name = None
    for name, value in named.items():
        tensor(name, value, 3, "[batch, time, channels]")
        if first_name is None:
            first_name, dtype, shape, device = name, value.dtype, value.shape, value.device
            if dtype not in dtypes:
                raise TypeError(f"{name}: expected a dtype of {_names(dtypes)}, got {dtype}")
            batch, time, channels = shape
            if batch * time * channels > MOST_ELEMENTS:
                raise ValueError(f"{name}: expected a size that 64 bits can address, got shape {list(shape)}")
        elif value.dtype is not dtype:
            raise TypeError(f"{name}: expected {first_name}'s dtype {dtype}, got {value.dtype}")
        elif value.shape != shape:
            raise ValueError(f"{name}: expected {first_name}'s shape {list(shape)}, got {list(value.shape)}")
        elif value.device != device:
            raise ValueError(f"{name}: expected {first_name}'s device {device}, got {value.device}")


def like(name: str, value: Tensor, first: Tensor, shape: tuple[int, ...], letters: str) -> None:
    """A per-channel parameter or a state beside the stream `first`: its shape, dtype and device."""
    allowed = dict.fromkeys((first.dtype, state_dtype(first.dtype)))
    if not first.is_complex():
        allowed[torch.float32] = None
    tensor(name, value, len(shape), letters)
    if value.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)} {letters}, got {list(value.shape)}")
    if value.dtype not in allowed:
        raise TypeError(f"{name}: expected a dtype of {_names(allowed)}, got {value.dtype}")
    if value.device != first.device:
        raise ValueError(f"{name}: expected the streams' device {first.device}, got {value.device}")


def arguments(
    named: Mapping[str, Tensor], channel: Mapping[str, Tensor], alpha: Tensor | None, initial_state: Tensor | None,
    offset: Tensor | None, packed: int, dtypes: tuple[torch.dtype, ...] = STREAM_DTYPES,
) -> None:  # fmt: skip
    """The tensors of a call: streams and inputs per channel by name; the one stream holds `packed` > 0 side by side."""
    streams(named, dtypes)
    (name, first), *_ = named.items()
    sequences, _, channels = first.shape
    if packed:
        if channels % packed:
            raise ValueError(f"{name}: expected a last dimension that {packed} divides, got shape {list(first.shape)}")
        channels //= packed
    for name, value in channel.items():
        like(name, value, first, (channels,), "[channels]")
    if offset is not None:
        cu_seqlens(offset, first)
        sequences = offset.shape[0] - 1
    if initial_state is not None:
        like("initial_state", initial_state, first, (sequences, channels), "[sequences, channels]")
    if alpha is not None:
        like("alpha", alpha, first, (channels,), "[channels]")


_epsilons: dict[float, Tensor] = {}


def epsilon(value: float | Tensor) -> Tensor:
    """`epsilon` as a 0-dim float64 CPU tensor, its value checked where it is known before the kernel runs."""
    if isinstance(value, Tensor):
        if value.dim() != 0 or value.device.type != "cpu" or not value.is_floating_point():
            came = f"a {value.dtype} tensor of shape {list(value.shape)} on {value.device}"
            raise ValueError(f"epsilon: expected a float or a 0-dim floating CPU tensor, got {came}")
        if value.requires_grad:
            raise ValueError("epsilon: expected a schedule, not a trained parameter; got a tensor that requires grad")
        value = value.to(torch.float64)
        if not torch.compiler.is_compiling() and not _in_range(value.item()):
            raise ValueError(f"epsilon: expected a value in [0, 1], got {value.item()}")
        return value
    compiling = torch.compiler.is_compiling()
    if isinstance(value, float) and not compiling:
        known = _epsilons.get(value)
        if known is not None:
            return known
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"epsilon: expected a float or a 0-dim tensor, got {type(value).__name__}")
    if not _in_range(value):
        raise ValueError(f"epsilon: expected a value in [0, 1], got {value}")
    if compiling:
        return torch.full((), float(value), dtype=torch.float64, device="cpu")
    with torch.inference_mode(False):  # an inference tensor could not be saved for a backward pass
        made = torch.full((), float(value), dtype=torch.float64, device="cpu")
    if type(made) is Tensor and len(_epsilons) < 1024:
        _epsilons[float(value)] = made
    return made


def _in_range(value: float) -> bool:
    return 0.0 <= value <= 1.0


def surrogate_scale(value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"surrogate_scale: expected a float, got {type(value).__name__}")
    if not 0.0 < value < float("inf"):
        raise ValueError(f"surrogate_scale: expected a positive finite number, got {value}")
    return float(value)


def flag(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    return value


def cu_seqlens(value: Tensor, first: Tensor) -> None:
    """Offsets `[N + 1]` of packed sequences in streams `[1, total, D]`."""
    tensor("cu_seqlens", value, 1, "[sequences + 1]")
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: expected dtype int32 or int64, got {value.dtype}")
    if value.numel() < 1:
        raise ValueError("cu_seqlens: expected at least one offset, got none")
    if first.shape[0] != 1:
        raise ValueError(f"cu_seqlens: expected streams of batch 1, got batch {first.shape[0]}")
    if value.device != first.device:
        raise ValueError(f"cu_seqlens: expected the streams' device {first.device}, got {value.device}")


def offsets(value: Tensor, total: int) -> None:
    """The values of `cu_seqlens`, where these are at hand."""
    if (value.device.type == "cpu" or _CHECK) and not torch.compiler.is_compiling():
        numbers = value.tolist()
        rises = all(a <= b for a, b in pairwise(numbers))
        if numbers[0] != 0 or numbers[-1] != total or not rises:
            raise ValueError(
                f"cu_seqlens: expected offsets that rise from 0 to the total length {total}, got {numbers}"
            )


def chunk_size(value: int | None) -> int | None:
    """Steps between two boundary states, or None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"chunk_size: expected an int or None, got {type(value).__name__}")
    if value <= 0 or value % 16:
        raise ValueError(f"chunk_size: expected a positive multiple of 16 or None, got {value}")
    return value


def taken(chunk: int, backend: Backend) -> None:
    """The kernels of the backend take chunks of so many steps."""
    least, most = backend.module.CHUNK_SIZES
    if not least <= chunk <= most:
        raise RuntimeError(
            f"backend: {backend.name!r} cannot run this call: it takes a chunk_size from {least} to {most}, got {chunk}"
        )
