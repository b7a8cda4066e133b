"""The entry: from the arguments of a public function to the op of a backend."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

from .. import backends, checks
from .. import torch_private as private
from .autograd import apply_scan, differentiable_inputs, raise_as_torch, requires_grad
from .layout import allocate, sequences_of
from .spec import Cell

SEGMENT = -1  # the argument of every call: the backend chooses. Tests and the bench set others

_TRACED_BACKEND = "cpu"  # TorchScript drops the name of an overload and calls the first, which is this backend's


class _Wanted(threading.local):
    maps = False


_wanted = _Wanted()


@contextmanager
def as_maps() -> Iterator[None]:
    """A context in which `scan` returns the map of each whole sequence, (factor, offset), both `[N, D]`.

    Those of a cell that does not compose are zeros, a guess: it has no such map. The softmax recurrence returns a
    `SegmentMap` (`mru_kernels.softmax.state`).
    """
    before, _wanted.maps = _wanted.maps, True
    try:
        yield
    finally:
        _wanted.maps = before


def wants_maps() -> bool:
    """Whether `as_maps` is entered in this thread."""
    return _wanted.maps


def scan(
    cell: Cell,
    inputs: list[Tensor],
    given: int,
    packed: int,
    numbers: list[float],
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    resets: Tensor | None,
    reset_state: Tensor | None,
    reverse: bool,
    chunk_size: int | None,
    backend: str | None,
    boundaries: bool = False,
) -> tuple[Tensor, ...]:
    """Run `cell` on the backend that `backend` resolves to.

    Args:
        inputs, given, packed, numbers, initial_state, cu_seqlens, resets, reset_state, reverse: those of the op, see
            `mru_kernels.ops`.
        chunk_size: the largest number of steps between checkpoints, and the number between boundaries; None saves none.
        backend: a name, or None for the first backend that can run on the device.
        boundaries: whether the checkpoints are a result.

    Returns:
        h `[B, T, D]` and the final state `[N, D]`; with `boundaries` also the checkpoints
        `[B, floor((T - 1) / chunk), D]`.
    """
    first = inputs[0]
    row = resolve(cell, backend, first)
    chunk = checks.chunk_size(chunk_size) or backends.CHUNK
    if chunk != backends.CHUNK:
        checks.check_chunk(chunk, row)
    if row.plain:
        if _wanted.maps:
            raise RuntimeError(f"backend: {row.name!r} cannot run this call: it has no sequence parallelism")
        every = chunk if boundaries else None
        return row.module.scan(
            cell, inputs, given, packed, numbers, initial_state, cu_seqlens, resets, reset_state, reverse, every
        )
    if _wanted.maps and not cell.composes:
        states = (sequences_of(inputs, cu_seqlens), first.shape[-1] // (packed.bit_count() or 1))
        zeros = first.new_zeros(states, dtype=checks.state_dtype(first.dtype))
        return zeros, zeros
    if _wanted.maps:
        with private.BelowAutograd():
            return cell.map[row.name](inputs, given, packed, numbers, cu_seqlens, resets, reset_state, reverse, SEGMENT)
    differentiated = torch.is_grad_enabled() and requires_grad((*inputs, initial_state, reset_state))
    compiling = torch.compiler.is_compiling()
    tracing = not compiling and private.is_tracing()
    if tracing and row.name != _TRACED_BACKEND:
        raise RuntimeError(
            f"backend: torch.jit.trace records {_TRACED_BACKEND!r} only, got {row.name!r}; trace the model on the CPU,"
            " or use torch.export"
        )
    # A recorded graph saves no checkpoints, so its backward pass scans again. Exactly one checkpoint would fix T, and
    # jit.trace compares its graph with one that is made under no_grad.
    recorded = tracing or (compiling and torch.compiler.is_exporting())
    if differentiated and not boundaries and not recorded:
        chunk = chunk_of(row, cell, chunk, first, packed)
    save = boundaries or (differentiated and chunk_size is not None and not recorded)
    segment = SEGMENT
    # A scan of whole sequences then saves no codes. Meta and fake tensors need no kernels, which know the length.
    if save and segment < 0 and not compiling and backends.load_error(row.name) is None:
        segment = segment_of(row, first, packed, cu_seqlens)
    arguments = (
        inputs, given, packed, numbers, initial_state, cu_seqlens, resets, reset_state, reverse, chunk, segment, save
    )  # fmt: skip
    if compiling or tracing or private.transforms_active():
        results = cell.forward[row.name](*arguments)
    else:
        results = _run(cell, row.name, arguments, differentiated)
    return _results(results, first, chunk, boundaries)


def _run(cell: Cell, backend: str, arguments: tuple, differentiated: bool) -> Sequence[Tensor]:
    """The results of the op in an eager call."""
    try:
        if differentiated or private.in_forward_mode():  # what the autograd kernel does, without the dispatcher
            return apply_scan(cell, backend, arguments, *differentiable_inputs(cell, arguments))
        with private.BelowAutograd():
            return cell.forward[backend](*arguments)
    except RuntimeError as error:
        inputs, given, packed, _, _, cu_seqlens, _, _, _, chunk, segment, save = arguments
        raise_as_torch(error, allocate, cell, inputs, given, packed, cu_seqlens, chunk, segment, save)
        raise


def _results(results: Sequence[Tensor], first: Tensor, chunk: int, boundaries: bool) -> tuple[Tensor, ...]:
    """The results of a public scan from those of the op."""
    if not boundaries:
        return results[0], results[1]
    batch, time, _ = first.shape
    rows = max(time - 1, 0) // chunk
    checkpoints = results[2].narrow(0, 0, batch * rows)
    return results[0], results[1], checkpoints.view(batch, rows, checkpoints.shape[-1])


def chunk_of(row: backends.Backend, cell: Cell, chunk: int, first: Tensor, packed: int) -> int:
    """The steps between two checkpoints: `chunk`, or fewer if it is the default."""
    channels = first.shape[-1]
    if chunk != backends.CHUNK or type(channels) is not int:  # not a number: a SymInt outside torch.compile
        return chunk
    return row.chunk(channels // (packed.bit_count() or 1) * cell.state_dtype(first.dtype).itemsize)


def segment_of(row: backends.Backend, first: Tensor, packed: int, cu_seqlens: Tensor | None) -> int:
    """The segment that a backend chooses for a call, in steps; 0 if it scans whole sequences."""
    batch, time, channels = first.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    channels //= packed.bit_count() or 1
    choose = row.module.segment
    sizes = (sequences, batch * time, channels)
    if any(type(size) is not int for size in sizes):  # they are symbolic, or tensors of a trace
        return choose(*sizes, first.itemsize, first.device)
    return _chosen(choose, *sizes, first.itemsize, first.device)


@lru_cache(maxsize=1024)
def _chosen(choose: Callable[..., int], *sizes: object) -> int:
    """A backend's choice, kept because the op that makes it takes 3 us."""
    return choose(*sizes)


def step(
    cell: Cell, inputs: Sequence[Tensor], given: int, packed: int, numbers: Sequence[float], state: Tensor
) -> tuple[Tensor, Tensor]:
    """`scan` of one step without gradients. Streams are `[B, D]`, and so are h and the state after the step."""
    row = resolve(cell, None, state)
    if row.plain:
        return row.module.step(cell, inputs, given, packed, numbers, state)
    op = cell.step[row.name]
    with private.BelowAutograd():
        return op(inputs, given, packed, numbers, state)


def step_slots(
    cell: Cell, inputs: Sequence[Tensor], given: int, packed: int, numbers: Sequence[float], state: Tensor,
    state_indices: Tensor,
) -> Tensor:  # fmt: skip
    """`step` on states in slots `[slots, D]`: row `state_indices[b]` is updated in place. Returns h `[B, D]`."""
    row = resolve(cell, None, state)
    if row.plain:
        return row.module.step_slots(cell, inputs, given, packed, numbers, state, state_indices)
    op = cell.step_slots[row.name]
    if torch.compiler.is_compiling():
        return op(inputs, given, packed, numbers, state, state_indices)
    with private.BelowAutograd():
        h = op(inputs, given, packed, numbers, state, state_indices)
    torch.autograd.graph.increment_version(state)
    return h


def resolve(cell: Cell, name: str | None, first: Tensor) -> backends.Backend:
    """The backend of a call. A fake tensor has one even if its device is absent."""
    try:
        row = backends.resolve(name, first.device)
        if row.name in cell.forward or row.plain:
            return row
        return backends.resolve(name, first.device, tuple(cell.forward))
    except RuntimeError:
        fake = backends.resolve_fake(name, first.device, tuple(cell.forward)) if private.is_fake(first) else None
        if fake is None:
            raise
        return fake
