"""Checks of user input: each raises an error that names the argument, what was expected and what came.

Checks read metadata, and the values of `cu_seqlens` on the CPU, so they never wait for a device and trace under
torch.compile. With MRU_CHECK=1 in the environment they also read `cu_seqlens` on a device, and wait for it; without it
the kernels clamp the offsets.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, ParamSpec

import torch
from torch import Tensor

from . import torch_private as private
from .backends import Backend
from .scalars import has_value

P = ParamSpec("P")

STREAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALF_DTYPES = (torch.bfloat16, torch.float16)
COMPLEX_DTYPES = (torch.complex64, torch.complex128)
MOST_SIZE = 2**31 - 1  # of an argument that is a size, so that the product of two fits 64 bits
MOST_ELEMENTS = 2**63 // 8  # so that 64 bits can address the bytes, whatever the dtype
_CHECK = os.environ.get("MRU_CHECK") == "1"


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and sums for streams of `dtype`."""
    return dtype if dtype in (torch.float64, *COMPLEX_DTYPES) else torch.float32


def complex_dtype(real: torch.dtype) -> torch.dtype:
    """The complex dtype whose parts have dtype `real`; torch.compile does not trace `dtype.to_complex`."""
    return torch.complex128 if real == torch.float64 else torch.complex64


def _names(dtypes) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The autocast dtype of `device`; None if autocast is off or unavailable there."""
    if not private.any_autocast() or not torch.amp.is_autocast_available(device.type):
        return None
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which autocast is off on `device`. Torch's own raises for devices without autocast."""
    is_on = autocast_dtype(device) is not None
    return torch.autocast(device.type, enabled=False) if is_on else nullcontext()


def dense(name: str, value: Tensor, instead: str) -> None:
    """Raise for a nested or sparse tensor; `instead` is what takes sequences of different lengths."""
    if value.is_nested:
        raise TypeError(
            f"{name}: expected a dense tensor, got a nested one; use {instead} for sequences of different lengths"
        )
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got one of layout {value.layout}; call to_dense() first")


def tensor(name: str, value, rank: int, shape: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {type(value).__name__}")
    dense(name, value, "cu_seqlens")
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


def like(
    name: str, value: Tensor, first: Tensor, shape: tuple[int, ...], letters: str, of_complex: bool = False
) -> None:
    """Raise unless a per-channel input or a state fits the stream `first`: shape, dtype and device.

    With `of_complex` it is complex though the stream is real.
    """
    state = state_dtype(first.dtype)
    allowed = dict.fromkeys((complex_dtype(state),) if of_complex else (first.dtype, state))
    if not (first.is_complex() or of_complex):
        allowed[torch.float32] = None
    tensor(name, value, len(shape), letters)
    if value.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)} {letters}, got {list(value.shape)}")
    if value.dtype not in allowed:
        raise TypeError(f"{name}: expected a dtype of {_names(allowed)}, got {value.dtype}")
    if value.device != first.device:
        raise ValueError(f"{name}: expected the streams' device {first.device}, got {value.device}")


def arguments(
    named: Mapping[str, Tensor], channel: Mapping[str, Tensor], states: Mapping[str, Tensor | None],
    offset: Tensor | None, reset: Tensor | None, gates: int = 0, dtypes: tuple[torch.dtype, ...] = STREAM_DTYPES,
    of_complex: Collection[str] = (),
) -> None:  # fmt: skip
    """Raise unless the tensors of a call fit together.

    Args:
        named: the streams, by name.
        channel: the inputs per channel, by name.
        states: by name: "initial_state", "reset_state" or both; None for one that is absent.
        offset, reset: `cu_seqlens` and `resets`.
        gates: how many streams lie side by side in the first one; 0: it is one stream.
        dtypes: of the streams.
        of_complex: names of inputs per channel and states that are complex though the streams are real.
    """
    streams(named, dtypes)
    (name, first), *_ = named.items()
    sequences, _, channels = first.shape
    if gates:
        if channels % gates:
            raise ValueError(f"{name}: expected a last dimension that {gates} divides, got shape {list(first.shape)}")
        channels //= gates
    for name, value in channel.items():
        like(name, value, first, (channels,), "[channels]", name in of_complex)
    if offset is not None:
        cu_seqlens(offset, first)
        sequences = offset.shape[0] - 1
    for name, state in states.items():
        if state is not None:
            like(name, state, first, (sequences, channels), "[sequences, channels]", name in of_complex)
    if reset is not None:
        resets(reset, first)
    elif states.get("reset_state") is not None:
        raise ValueError("reset_state: expected resets with it, got None")


def slots(state: Tensor, state_indices: Tensor, first: Tensor, dtype: torch.dtype) -> None:
    """Raise unless these are states `[slots, D]` in `dtype` and indices `[B]` for a stream `first [B, D]`.

    Reads no values.
    """
    channels = first.shape[1]
    tensor("state", state, 2, "[slots, channels]")
    if state.shape[1] != channels:
        raise ValueError(f"state: expected shape [slots, {channels}], got {list(state.shape)}")
    if state.dtype != dtype:
        raise TypeError(f"state: expected the state dtype {dtype}, got {state.dtype}")
    if not state.is_contiguous():
        raise ValueError(f"state: expected a contiguous tensor, got strides {list(state.stride())}")
    if state.device != first.device:
        raise ValueError(f"state: expected the streams' device {first.device}, got {state.device}")
    slot_indices(state_indices, first)


def slot_indices(value: Tensor, first: Tensor) -> None:
    """Raise unless `value` is indices `[B]` for an input `first [B, ...]`. Reads no values."""
    tensor("state_indices", value, 1, "[batch]")
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"state_indices: expected dtype int32 or int64, got {value.dtype}")
    if value.shape[0] != first.shape[0]:
        raise ValueError(f"state_indices: expected shape [{first.shape[0]}], got {list(value.shape)}")
    if value.device != first.device:
        raise ValueError(f"state_indices: expected the input's device {first.device}, got {value.device}")


def slot_values(state_indices: Tensor, count: int) -> None:
    """Raise ValueError unless every index is -1 or a slot below `count`, and no slot occurs twice. Reads the values."""
    used: set[int] = set()
    for i, slot in enumerate(state_indices.tolist()):
        if not -1 <= slot < count:
            raise ValueError(f"state_indices: expected -1 or a slot below {count}, got {slot} at index {i}")
        if slot in used:
            raise ValueError(f"state_indices: expected every slot once, got {slot} again at index {i}")
        if slot >= 0:
            used.add(slot)


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


def resets(value: Tensor, first: Tensor) -> None:
    """The mask `[B, T]` of the steps before which the state is reset."""
    tensor("resets", value, 2, "[batch, time]")
    if value.dtype is not torch.bool:
        raise TypeError(f"resets: expected dtype bool, got {value.dtype}")
    if value.shape != first.shape[:2]:
        raise ValueError(f"resets: expected shape {list(first.shape[:2])} [batch, time], got {list(value.shape)}")
    if value.device != first.device:
        raise ValueError(f"resets: expected the streams' device {first.device}, got {value.device}")


def offsets(value: Tensor, total: int) -> None:
    """Raise ValueError unless `cu_seqlens [N + 1]` rises from 0 to `total`. Skipped where that waits for a device."""
    if (value.device.type == "cpu" or _CHECK) and not torch.compiler.is_compiling() and has_value(value):
        numbers = value.tolist()
        wrong = None
        if numbers[0] != 0:
            wrong = f"{numbers[0]} at index 0"
        elif any(a > b for a, b in pairwise(numbers)):
            i = next(i for i, (a, b) in enumerate(pairwise(numbers)) if a > b)
            wrong = f"{numbers[i]} and {numbers[i + 1]} at indices {i} and {i + 1}"
        elif numbers[-1] != total:
            wrong = f"{numbers[-1]} at index {len(numbers) - 1}, the last"
        if wrong:
            raise ValueError(f"cu_seqlens: expected offsets that rise from 0 to the total length {total}, got {wrong}")


def chunk_size(value: int | None) -> int | None:
    """Raise unless `value` is the steps between two checkpoints, or None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"chunk_size: expected an int or None, got {type(value).__name__}")
    if value <= 0 or value % 16:
        raise ValueError(f"chunk_size: expected a positive multiple of 16 or None, got {value}")
    return value


def check_chunk(chunk: int, backend: Backend, sizes: tuple[int, int] | None = None) -> None:
    """Raise unless the backend supports this chunk size: from the least to the greatest of `sizes`, or of cells."""
    least, most = sizes or backend.module.CHUNK_SIZES
    if not least <= chunk <= most:
        raise RuntimeError(
            f"backend: {backend.name!r} cannot run this call: it takes a chunk_size from {least} to {most}, got {chunk}"
        )
