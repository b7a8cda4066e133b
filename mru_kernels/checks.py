"""Checks of user input: each raises an error that names the argument, what was expected and what came.

Only metadata is looked at (and the values of `epsilon` and `cu_seqlens` where these are on the CPU), so a check never
waits for a device and traces under torch.compile. MRU_CHECK=1 in the environment has `cu_seqlens` on a device checked
too, at the price of waiting for it; without it the kernels clamp the offsets.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import os
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import ParamSpec

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from .backends import Backend

P = ParamSpec("P")

STREAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALF_DTYPES = (torch.bfloat16, torch.float16)
COMPLEX_DTYPES = (torch.complex64, torch.complex128)
MOST_ELEMENTS = 2**63 // 8  # so that 64 bits can address the bytes, whatever the dtype
_CHECK = os.environ.get("MRU_CHECK") == "1"
_FAKE = torch._C._TorchDispatchModeKey.FAKE


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and sums for streams of `dtype`."""
    return dtype if dtype in (torch.float64, *COMPLEX_DTYPES) else torch.float32


def has_value(t: Tensor) -> bool:
    """Whether `t.item()` has a value: False for meta and fake tensors and for tensors that vmap maps over."""
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        if torch._C._functorch.is_batchedtensor(t):
            return False
        t = torch._C._functorch.get_unwrapped(t)
    return not (t.is_meta or isinstance(t, FakeTensor))


def _names(dtypes) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The autocast dtype of `device`; None if autocast is off or unavailable there."""
    if not torch._C._is_any_autocast_enabled() or not torch.amp.is_autocast_available(device.type):
        return None
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


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
    compiling = torch.compiler.is_compiling()
    plain = not (compiling or torch._C._is_tracing()) and torch._C._len_torch_dispatch_stack() == 0
    if plain and isinstance(value, float):
        known = _epsilons.get(value)
        if known is not None:
            return known
    if isinstance(value, Tensor) and (compiling or not has_value(value)):
        _epsilon_tensor(value)
        return _double(value)
    number = epsilon_value(value)
    if compiling:  # a sum is not specialised on the number, as `torch.full` is
        return torch.zeros((), dtype=torch.float64, device="cpu") + number
    if isinstance(value, Tensor) and (plain or not _in_fake_mode()):
        return _double(value)
    if not plain:  # becomes a constant of the trace, or a fake tensor under a fake mode
        return torch.full((), number, dtype=torch.float64, device="cpu")
    made = _constant(number)
    if len(_epsilons) < 1024:
        _epsilons[number] = made
    return made


def own_epsilon(value: float | Tensor) -> Tensor:
    """`epsilon` as a new tensor, which a module keeps: a real one whatever mode or transform it is made under."""
    if torch.compiler.is_compiling():
        return epsilon(value).clone()
    return _constant(epsilon_value(value))


def epsilon_value(value: float | Tensor) -> float:
    """`epsilon` as a number, checked; in compiled code the kernel checks its range."""
    compiling = torch.compiler.is_compiling()
    if isinstance(value, Tensor):
        _epsilon_tensor(value)
        if compiling:
            return value.item()
        if isinstance(value, FakeTensor):
            raise ValueError("epsilon: expected a number, got a fake tensor, which has none")
        if _in_fake_mode():
            with _disable_current_modes():
                value = value.item()
        else:
            value = value.item()
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"epsilon: expected a float or a 0-dim tensor, got {type(value).__name__}")
    if not (compiling or 0.0 <= value <= 1.0):
        raise ValueError(f"epsilon: expected a value in [0, 1], got {value}")
    return float(value)


def _double(t: Tensor) -> Tensor:
    return t if t.dtype is torch.float64 else t.to(torch.float64)  # `to` is slow even as a no-op


def _epsilon_tensor(value: Tensor) -> None:
    if value.dim() != 0 or value.device.type != "cpu" or not value.is_floating_point():
        came = f"a {value.dtype} tensor of shape {list(value.shape)} on {value.device}"
        raise ValueError(f"epsilon: expected a float or a 0-dim floating CPU tensor, got {came}")
    if value.requires_grad:
        raise ValueError("epsilon: expected a schedule, not a trained parameter; got a tensor that requires grad")


def _in_fake_mode() -> bool:
    """Whether a FakeTensorMode is active; ops then refuse real tensors."""
    return torch._C._len_torch_dispatch_stack() > 0 and torch._C._get_dispatch_mode(_FAKE) is not None


def _constant(value: float) -> Tensor:
    """A tensor that outlives what it is made under: no mode makes it fake or inference, no transform wraps it."""
    with (
        torch._C.DisableTorchFunction(),
        _disable_current_modes(),
        torch._C._DisableFuncTorch(),
        torch.inference_mode(False),
    ):
        return torch.full((), value, dtype=torch.float64, device="cpu")


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


def constructor(init: Callable[P, None]) -> Callable[P, None]:
    """Decorate `__init__`: a TypeError for wrong arguments names the called class and the nearest argument."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def checked(*args: P.args, **options: P.kwargs) -> None:
        try:
            signature.bind(*args, **options)
        except TypeError as error:
            cls = type(args[0])
            raise TypeError(f"{cls.__name__}: {_misfit(cls, len(args) - 1, options) or error}") from None
        init(*args, **options)

    return checked


def _misfit(cls: type, positional: int, options: Mapping[str, object]) -> str | None:
    """The message for too many positional or unknown keyword arguments; None if neither applies."""
    parameters: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if base.__module__.split(".")[0] == __package__ and "__init__" in vars(base):
            parameters |= inspect.signature(vars(base)["__init__"]).parameters
    places = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD and name != "self"]
    keywords = [name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
    if positional > len(places):
        expected = f"expected at most {len(places)} positional arguments ({', '.join(places)}), got {positional}"
        return f"{expected}; give by name: {', '.join(keywords)}"
    for name in options:
        if name not in parameters:
            near = difflib.get_close_matches(name, places + keywords, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(places + keywords)}"
            return f"unknown argument {name!r}; {hint}"
    return None
