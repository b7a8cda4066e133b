"""Checks of the arguments of `mesa`: each raises an error that names the argument, what was expected and what came."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .scalars import has_value

SOLVERS = ("cg", "direct")
BACKENDS = ("torch", "fla")
MOST_DIRECT = 256  # key size of solver="direct", which makes a K x K matrix for every step


def check_numbers(steps: int, tolerance: float, solver: str, chunk_size: int) -> None:
    for name, value in (("steps", steps), ("chunk_size", chunk_size)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name}: expected a positive int, got {value}")
        if value > checks.MOST_SIZE:
            raise ValueError(f"{name}: expected at most {checks.MOST_SIZE}, got {value}")
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)):
        raise TypeError(f"tolerance: expected a float, got {type(tolerance).__name__}")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance: expected a number in [0, 1), got {tolerance}")
    if solver not in SOLVERS:
        raise ValueError(f"solver: expected one of {', '.join(map(repr, SOLVERS))}, got {solver!r}")


def check_backend(backend: str | None) -> None:
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend: expected None or a name, got {type(backend).__name__}")
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: expected None or one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")


def check_tensors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    regularizer: Tensor,
    solver: str,
    offset: Tensor | None = None,
    *,
    step: bool = False,
) -> int:
    """Raise unless the tensors of a call fit together, or those of a step, without time; the number of sequences."""
    rows = "batch, heads" if step else "batch, time, heads"
    rank = rows.count(",") + 2
    checks.tensor("q", q, rank, f"[{rows}, key size]")
    if q.dtype not in checks.STREAM_DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in checks.STREAM_DTYPES)
        raise TypeError(f"q: expected a dtype of {names}, got {q.dtype}")
    *leading, heads, key = q.shape
    if solver == "direct" and key > MOST_DIRECT:
        raise ValueError(f'q: expected a key size of at most {MOST_DIRECT} with solver="direct", got {key}')
    checks.tensor("v", v, rank, f"[{rows}, value size]")
    shapes = {
        "k": (k, (*leading, heads, key)),
        "v": (v, (*leading, heads, v.shape[-1])),
        "decay": (decay, (*leading, heads)),
        "beta": (beta, (*leading, heads)),
    }
    for name, (value, shape) in shapes.items():
        checks.tensor(name, value, len(shape), f"[{rows}, size]" if len(shape) == rank else f"[{rows}]")
        if value.shape != shape:
            raise ValueError(f"{name}: expected q's sizes {list(shape)}, got {list(value.shape)}")
        if value.dtype != q.dtype and not (name in ("decay", "beta") and value.dtype == checks.state_dtype(q.dtype)):
            raise TypeError(f"{name}: expected q's dtype {q.dtype}, got {value.dtype}")
        if value.device != q.device:
            raise ValueError(f"{name}: expected q's device {q.device}, got {value.device}")
    checks.like("regularizer", regularizer, q, (heads, key), "[heads, key size]")
    if q.device.type == "cpu" and not torch.compiler.is_compiling() and has_value(regularizer):
        least = regularizer.detach().amin().item() if regularizer.numel() else 1.0
        if not least > 0:  # also for NaN
            raise ValueError(f"regularizer: expected positive numbers, got {least:g}")
    if offset is None:
        return q.shape[0]
    checks.cu_seqlens(offset, q)
    return offset.shape[0] - 1


def check_state(name: str, state: tuple[Tensor, Tensor], q: Tensor, v: Tensor, sequences: int) -> None:
    if not isinstance(state, (tuple, list)):
        raise TypeError(f"{name}: expected a pair of tensors, got {type(state).__name__}")
    if len(state) != 2:
        raise ValueError(f"{name}: expected a pair of tensors, got {len(state)}")
    heads, key, value = q.shape[-2], q.shape[-1], v.shape[-1]
    for part, size in zip(state, (key, value), strict=True):
        checks.like(name, part, q, (sequences, heads, key, size), "[sequences, heads, key size, size]")
