"""Registers fakes, autograd and vmap for the ops of every cell. Each backend registers its own kernels.

The extension defines the ops of its backends, so that a process without Python has them. The rest is
defined here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends, checks
from .autograd import differentiable, gradient, never_differentiated, not_differentiable, raise_no_derivative
from .batching import BACKWARD_NAMES, FORWARD_NAMES, fold_into_channels, fold_legacy_batch
from .layout import allocate, allocate_backward, as_streams, check, check_numbers, first_stream, sequences_of
from .schemas import SCHEMAS
from .spec import CELLS, Cell

backends.load_error("cpu")  # loads the extension, if there is one
_library = torch.library.Library("mru", "FRAGMENT")
_library.define("no_derivative(Tensor[] grads, Tensor[] inputs, str reason) -> Tensor[]")
_library.impl("no_derivative", raise_no_derivative, "CompositeExplicitAutograd")


@torch.library.register_fake("mru::no_derivative", lib=_library)
def _(grads, inputs, reason):
    return [torch.empty_like(t) for t in inputs]


def add_cell(cell: Cell, only: tuple[str, ...] | None = None) -> Cell:
    """Add `cell` to the table of cells, define its ops, and return it.

    The ops are those of the backends `only`, or of every backend that has ops.
    """
    CELLS[cell.name] = cell
    _ = cell.complex_names  # cached here: torch.compile cannot, and reads it before a backend is loaded
    for row in backends.TABLE.values():
        if not row.plain and (only is None or row.name in only):
            _define(cell, row.name)
    return cell


def add_backend(row: backends.Backend) -> None:
    """Add a row to the table of backends and define the ops of every cell for it."""
    backends.TABLE[row.name] = row
    for cell in CELLS.values():
        _define(cell, row.name)


def _define(cell: Cell, backend: str) -> None:
    """Define the ops of a cell for a backend, unless the extension has, and register what Python adds."""
    tables = {"": cell.forward, "_backward": cell.backward, "_step": cell.step, "_step_slots": cell.step_slots}
    for suffix, table in {**tables, "_map": cell.map}.items():
        if not hasattr(getattr(torch.ops.mru, cell.name + suffix, None), backend):
            _library.define(f"{cell.name}{suffix}.{backend}{SCHEMAS[suffix]}")
        table[backend] = getattr(getattr(torch.ops.mru, cell.name + suffix), backend)
    _register_fakes(cell, backend)

    def name(suffix: str) -> str:
        return f"mru::{cell.name}{suffix}.{backend}"

    instead = f"there is no derivative; use mru::{cell.name}"
    of_step = not_differentiable(cell.step[backend], f"mru::{cell.name}_step: {instead} with T = 1")
    of_slots = never_differentiated(cell.step_slots[backend], f"mru::{cell.name}_step_slots: {instead} with T = 1")
    of_map = not_differentiable(cell.map[backend], f"mru::{cell.name}_map: {instead}")
    _library.impl(name(""), differentiable(cell, backend), "Autograd")
    _library.impl(name("_backward"), gradient(cell, backend), "Autograd")
    _library.impl(name("_step"), of_step, "Autograd")
    _library.impl(name("_step_slots"), of_slots, "Autograd")
    _library.impl(name("_map"), of_map, "Autograd")
    for suffix, table, names in (("", cell.forward, FORWARD_NAMES), ("_backward", cell.backward, BACKWARD_NAMES)):
        op = table[backend]
        torch.library.register_vmap(name(suffix), fold_into_channels(cell, op, names), lib=_library)
        _library.impl(name(suffix), fold_legacy_batch(cell, op, names), "Batched")


def _register_fakes(cell: Cell, backend: str) -> None:
    def chunk_sizes() -> tuple[int, int]:
        return backends.TABLE[backend].module.CHUNK_SIZES

    def states(inputs, packed, cu_seqlens) -> Tensor:
        first = first_stream(inputs, packed)
        sizes = (sequences_of(inputs, cu_seqlens), first.shape[-1])
        return first.new_empty(sizes, dtype=cell.state_dtype(first.dtype))

    def check_step(inputs, given, packed, numbers, state) -> Tensor:
        """The first stream `[B, D]` of a step."""
        streams = as_streams(inputs)
        check(cell, streams, given, packed, state, None)
        check_numbers(cell, inputs, numbers, backends.CHUNK, 0, chunk_sizes())
        return first_stream(streams, packed).squeeze(1)

    @torch.library.register_fake(f"mru::{cell.name}.{backend}", lib=_library)
    def _(inputs, given, packed, numbers, initial_state, cu_seqlens, resets, reset_state, reverse, chunk, segment,
          save):  # fmt: skip
        check(cell, inputs, given, packed, initial_state, cu_seqlens, resets, reset_state)
        check_numbers(cell, inputs, numbers, chunk, segment, chunk_sizes())
        return allocate(cell, inputs, given, packed, cu_seqlens, chunk, segment, save)

    @torch.library.register_fake(f"mru::{cell.name}_backward.{backend}", lib=_library)
    def _(grad_h, grad_final, grad_checkpoints, inputs, given, packed, numbers, initial_state, cu_seqlens, resets,
          reset_state, reverse, chunk, segment, checkpoints, codes, wanted):  # fmt: skip
        check(cell, inputs, given, packed, initial_state, cu_seqlens, resets, reset_state)
        check_numbers(cell, inputs, numbers, chunk, segment, chunk_sizes())
        tensors = {"grad_h": grad_h, "grad_final": grad_final, "grad_checkpoints": grad_checkpoints}
        tensors |= {"checkpoints": checkpoints, "codes": codes}
        for name, t in tensors.items():
            if t is not None and t.device != inputs[0].device:
                raise ValueError(f"{name}: expected the streams' device {inputs[0].device}, got {t.device}")
        return allocate_backward(cell, inputs, initial_state, reset_state)

    @torch.library.register_fake(f"mru::{cell.name}_step.{backend}", lib=_library)
    def _(inputs, given, packed, numbers, state):
        first = check_step(inputs, given, packed, numbers, state)
        return first.new_empty(first.shape), first.new_empty(first.shape, dtype=cell.state_dtype(first.dtype))

    @torch.library.register_fake(f"mru::{cell.name}_step_slots.{backend}", lib=_library)
    def _(inputs, given, packed, numbers, state, state_indices):
        first = check_step(inputs, given, packed, numbers, None)
        checks.slots(state, state_indices, first, cell.state_dtype(first.dtype))
        return first.new_empty(first.shape)

    @torch.library.register_fake(f"mru::{cell.name}_map.{backend}", lib=_library)
    def _(inputs, given, packed, numbers, cu_seqlens, resets, reset_state, reverse, segment):
        check(cell, inputs, given, packed, None, cu_seqlens, resets, reset_state)
        check_numbers(cell, inputs, numbers, backends.CHUNK, segment, chunk_sizes())
        return states(inputs, packed, cu_seqlens), states(inputs, packed, cu_seqlens)
