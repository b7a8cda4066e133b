"""From the arguments of a public function to the op of a backend."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import backends, checks
from .. import torch_private as private
from ..ops import entry
from ..ops.autograd import raise_as_torch
from . import plain
from .layout import allocate, chunk_of, chunk_sizes, sizes
from .registration import FORWARD, apply_scan, differentiable_inputs
from .state import SegmentMap

SEGMENT = -1  # the argument of every call: the backend chooses. Tests set others

_TRACED_BACKEND = "cpu"  # TorchScript drops the name of an overload and calls the first, which is this backend's


def run(arguments: tuple[Any, ...], chunk_size: int | None, backend: str | None) -> tuple[Tensor, Tensor]:
    """Return y `[B, T, D]` and the final state `[N, D + 2 H]`; within `ops.as_maps` a `SegmentMap` instead.

    Args:
        arguments: those of the op up to `reverse`.
        chunk_size: steps between two borders; None to save none.
        backend: a name, or None for the first backend that can run on the device.
    """
    score, value, heads, _, _, _, cu_seqlens, _ = arguments
    row = _resolve(backend, score)
    chunk = chunk_size or backends.CHUNK
    if chunk != backends.CHUNK:
        checks.check_chunk(chunk, row, None if row.plain else chunk_sizes(row.name))
    chunk = chunk_of(row, chunk, score, value, heads)
    if entry.wants_maps():
        return _segment_map(row, arguments, chunk)
    if row.plain:
        return plain.scan(*(*arguments, chunk))
    inputs = differentiable_inputs(arguments)
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    compiling = torch.compiler.is_compiling()
    tracing = not compiling and private.is_tracing()
    if tracing and row.name != _TRACED_BACKEND:
        raise RuntimeError(f"backend: torch.jit.trace records {_TRACED_BACKEND!r} only, got {row.name!r}")
    # A recorded graph saves no borders, whose number would fix T; its backward pass scans again.
    recorded = tracing or (compiling and torch.compiler.is_exporting())
    save = differentiated and chunk_size is not None and not recorded
    call = (*arguments, chunk, SEGMENT, save)
    if compiling or tracing or private.transforms_active():
        y, final, *_ = FORWARD[row.name](*call)
        return y, final
    try:
        if differentiated or private.in_forward_mode():  # what the autograd kernel does, without the dispatcher
            y, final, *_ = apply_scan(row.name, call, *inputs)
        else:
            with private.BelowAutograd():
                y, final, *_ = FORWARD[row.name](*call)
    except RuntimeError as error:
        raise_as_torch(error, allocate, score, value, heads, cu_seqlens, chunk, save)
        raise
    return y, final


def _segment_map(row: backends.Backend, arguments: tuple[Any, ...], chunk: int) -> SegmentMap:
    """The map of each whole sequence. The bonus and the initial state have no part in it."""
    if row.plain:
        raise RuntimeError(f"backend: {row.name!r} cannot run this call: it has no sequence parallelism")
    score, value, heads, decay, _, _, cu_seqlens, reverse = arguments

    def final(*call: Any) -> Tensor:
        with private.BelowAutograd():
            return FORWARD[row.name](*call, cu_seqlens, reverse, chunk, SEGMENT, False)[1]

    state = final(score, value, heads, decay, None, None)
    heads, _ = sizes(score, value, heads)
    if decay is None:
        return SegmentMap(state, state.new_zeros(len(state), 2 * heads))
    # Masked steps only decay a state, so the op adds the decays in two numbers.
    masked, zeros = (score.new_full((heads,), x).expand(*score.shape[:2], heads) for x in (-torch.inf, 0.0))
    start = state.new_zeros(len(state), 3 * heads)
    return SegmentMap(state, final(masked, zeros, 0, decay, None, start)[:, heads:])


def _resolve(name: str | None, score: Tensor) -> backends.Backend:
    """The backend of a call. A fake tensor has one even if its device is absent."""
    try:
        return backends.resolve(name, score.device, _with_kernels())
    except RuntimeError:
        fake = backends.resolve_fake(name, score.device, tuple(FORWARD)) if private.is_fake(score) else None
        if fake is None:
            raise
        return fake


@private.assume_constant_result
def _with_kernels() -> tuple[str, ...]:
    return _find_kernels()


@cache
def _find_kernels() -> tuple[str, ...]:
    """The backends that have kernels of the op in this process."""
    found = []
    for row in backends.TABLE.values():
        keys = [device.upper() for device in row.device_types]
        if row.plain or backends.load_error(row.name) is not None:
            continue
        if row.name == "triton":
            importlib.import_module(f"{__package__}.triton").register()  # others are registered by the extension
        if any(private.has_kernel(f"mru::softmax_recurrence.{row.name}", key) for key in keys):
            found.append(row.name)
    return tuple(found)
