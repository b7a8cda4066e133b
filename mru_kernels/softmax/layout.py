"""The tensors of a call of the softmax recurrence: their sizes, their checks, and the allocation of results."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends, checks
from ..checks import state_dtype
from ..ops import dense_like

#: The least and the greatest chunk of backends that take others for this op than for cells.
_CHUNK_SIZES = {"triton": (16, 256)}
#: Times `Backend.wide_row`: the state of `wkv` with 1024 channels in float32, which halves its backward pass.
_VERY_WIDE = 3


def chunk_sizes(backend: str) -> tuple[int, int]:
    """The least and the greatest `chunk_size` that the kernels of a backend take."""
    return _CHUNK_SIZES.get(backend) or backends.TABLE[backend].module.CHUNK_SIZES


def check_cut(backend: str, chunk: int, segment: int) -> None:
    """Raise ValueError unless the ops of a backend take these numbers of steps."""
    least, most = chunk_sizes(backend)
    if not least <= chunk <= most or chunk % 16:
        raise ValueError(f"chunk: expected a multiple of 16 from {least} to {most}, got {chunk}")
    if not -1 <= segment <= checks.MOST_ELEMENTS:
        raise ValueError(f"segment: expected -1 for the backend's own choice or 0 to 2^60 steps, got {segment}")


def chunk_of(row: backends.Backend, chunk: int, score: Tensor, value: Tensor | None, heads: int) -> int:
    """The steps between two borders: `chunk`, or fewer if it is the default and no size is symbolic.

    Unlike a cell's, these results depend on it by rounding. So it does not depend on whether gradients are wanted.
    """
    heads, channels = sizes(score, value, heads)
    if chunk != backends.CHUNK or any(type(size) is not int for size in (heads, channels)):  # a SymInt
        return chunk
    bytes_of_state = (channels + 2 * heads) * state_dtype(score.dtype).itemsize
    fewer = row.chunk(bytes_of_state)
    return fewer // 2 if bytes_of_state >= _VERY_WIDE * row.wide_row else fewer


def split_gates(gates: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """The scores `[..., H]` and the values `[..., D]` that lie side by side in `gates [..., H + D]`, as views."""
    score, value = gates.split([heads, gates.shape[-1] - heads], -1)
    return score, value


def sizes(score: Tensor, value: Tensor | None, heads: int) -> tuple[int, int]:
    """The heads H and the channels D."""
    return (heads, score.shape[-1] - heads) if value is None else (score.shape[-1], value.shape[-1])


def check(score, value, heads: int, decay, bonus, initial_state, cu_seqlens, first: str = "score") -> None:
    """Raise an error that names the argument which is not as it must be.

    Args:
        first: the caller's name of `score`.
    """
    shape = "[batch, time, heads]" if value is not None else "[batch, time, heads + channels]"
    checks.tensor(first, score, 3, shape)
    if score.dtype not in checks.STREAM_DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in checks.STREAM_DTYPES)
        raise TypeError(f"{first}: expected a dtype of {names}, got {score.dtype}")
    if value is None:
        if not 0 <= heads <= score.shape[-1]:
            raise ValueError(f"heads: expected 0 to {score.shape[-1]} of the gates, got {heads}")
        heads, channels = sizes(score, value, heads)
    else:
        checks.tensor("value", value, 3, "[batch, time, channels]")
        heads, channels = sizes(score, value, heads)
        if value.shape[:2] != score.shape[:2]:
            expected = [*score.shape[:2], "channels"]
            raise ValueError(f"value: expected shape {expected} for {first}, got {list(value.shape)}")
        _same(first, score, "value", value)
    if (channels % heads or channels < heads) if heads else channels:
        name = "value" if value is not None else first
        raise ValueError(f"{name}: expected channels that {heads} heads divide, one or more each, got {channels}")
    batch, time, _ = score.shape
    # Not a bound of a length that is traced.
    if not torch.compiler.is_compiling() and batch * time * (heads + channels) > checks.MOST_ELEMENTS:
        raise ValueError(f"{first}: expected a size that 64 bits can address, got shape {list(score.shape)}")
    if isinstance(decay, Tensor) and decay.dim() != 1:
        checks.tensor("decay", decay, 3, "[heads] or [batch, time, heads]")
        if decay.shape != (batch, time, heads):
            raise ValueError(f"decay: expected shape {[batch, time, heads]} or [{heads}], got {list(decay.shape)}")
        _same(first, score, "decay", decay)
    elif decay is not None:
        checks.like("decay", decay, score, (heads,), "[heads]")
    if bonus is not None:
        checks.like("bonus", bonus, score, (heads,), "[heads]")
    if cu_seqlens is not None:
        checks.cu_seqlens(cu_seqlens, score)
        batch = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        columns = channels + 2 * heads
        checks.like("initial_state", initial_state, score, (batch, columns), "[sequences, channels + 2 heads]")


def _same(first: str, score: Tensor, name: str, t: Tensor) -> None:
    if t.dtype != score.dtype:
        raise TypeError(f"{name}: expected {first}'s dtype {score.dtype}, got {t.dtype}")
    if t.device != score.device:
        raise ValueError(f"{name}: expected {first}'s device {score.device}, got {t.device}")


def border_rows(time: int, chunk: int) -> int:
    """The number of states that the forward op saves of a batch row."""
    return max(time - 1, 0) // chunk


def unit_channels(t: Tensor) -> Tensor:
    return t if t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous()


def allocate(score: Tensor, value: Tensor | None, heads: int, cu_seqlens, chunk: int, save: bool) -> list[Tensor]:
    """Uninitialised results of the forward op: y, the final state and, with `save`, the borders."""
    heads, channels = sizes(score, value, heads)
    like = split_gates(unit_channels(score), heads)[1] if value is None else unit_channels(value)
    batch, time, _ = score.shape
    state, columns = state_dtype(score.dtype), channels + 2 * heads
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    results = [dense_like(like), score.new_empty((sequences, columns), dtype=state)]
    if save:
        results.append(score.new_empty((batch, border_rows(time, chunk), columns), dtype=state))
    return results


def allocate_backward(score: Tensor, value, decay, bonus, initial_state) -> list[Tensor]:
    """Uninitialised results of the backward op: a gradient of each tensor that is given, in this order."""
    given = [t for t in (score, value, decay, bonus, initial_state) if t is not None]
    return [dense_like(unit_channels(t)) if t.dim() == 3 else t.new_empty(t.shape) for t in given]
