"""What the public functions of all cells have in common: autocast, checks, and the way to `ops.scan`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends, checks, ops
from .. import torch_private as private
from ..scalars import has_value


def call(
    cell: ops.Cell,
    arrays: Sequence[Tensor | None],
    scalars: Sequence[float | Tensor],
    initial_state: Tensor | None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: Tensor | None = None,
    chunk_size: int | None = backends.CHUNK,
    return_boundaries: bool = False,
    backend: str | None = None,
    packed: int = 0,
) -> tuple[Tensor, ...]:
    """Run `cell` on its array inputs and scalars, in the cell's order; None for an input that is absent.

    With `packed`, a mask of inputs, these lie side by side in the first array, which is named "gates".

    Eager calls skip these checks, which cost as much as a short scan. If the kernel rejects the call, they run here and
    raise an error that names the caller's argument.
    """
    kernel_first = cu_seqlens is None and not (torch.compiler.is_compiling() or private.any_autocast())
    if not kernel_first:
        arrays, initial_state, reset_state = _autocast(arrays, initial_state, reset_state)
        _check(cell, arrays, initial_state, cu_seqlens, resets, reset_state, packed)
    boundaries = checks.flag("return_boundaries", return_boundaries)
    if boundaries and chunk_size is None:
        raise ValueError("chunk_size: expected the steps between two boundaries, got None")
    try:
        inputs, given, numbers = _as_op_takes(cell, arrays, scalars, packed)
        return ops.scan(
            cell, inputs, given, packed, numbers, initial_state, cu_seqlens, resets,
            _of_sequences(reset_state, inputs, cu_seqlens), checks.flag("reverse", reverse), chunk_size, backend,
            boundaries,
        )  # fmt: skip
    except Exception:
        if kernel_first:
            try:
                _check(cell, arrays, initial_state, cu_seqlens, resets, reset_state, packed)
            except (TypeError, ValueError) as reason:
                raise reason from None
        raise


def step(
    cell: ops.Cell,
    arrays: Sequence[Tensor | None],
    scalars: Sequence[float | Tensor],
    state: Tensor,
    state_indices: Tensor | None = None,
    packed: int = 0,
) -> tuple[Tensor, Tensor]:
    """`call` on a single step: streams are `[B, D]`, and so are the results. There is no gradient.

    With `state_indices [B]`, states are in slots `[slots, D]`, which are updated in place and returned.
    """
    if torch.is_grad_enabled():
        for name, value in (*_named(cell, arrays, packed).items(), ("state", state)):
            if isinstance(value, Tensor) and value.requires_grad:
                raise RuntimeError(
                    f"{cell.name}_step: {name} requires grad, but the step has no gradient; use {cell.name} with T = 1,"
                    " or no_grad"
                )
    refused = None
    try:
        if state_indices is not None:
            return _step_in_slots(cell, arrays, scalars, state, state_indices, packed), state
        if _is_plain() and private.FakeTensor not in map(type, scalars):
            inputs, given, numbers = _as_op_takes(cell, arrays, scalars, packed)
            return ops.step(cell, inputs, given, packed, numbers, state)
        if isinstance(state, Tensor):  # None would be zeros
            h, after = call(cell, _as_scan(cell, arrays), scalars, state, packed=packed)
            return h.squeeze(1), after
    except Exception as error:
        refused = error
    _check_step(cell, arrays, scalars, state, state_indices, packed)
    raise refused


def _step_in_slots(cell: ops.Cell, arrays, scalars, state: Tensor, state_indices: Tensor, packed: int) -> Tensor:
    """`step` on states in slots; returns h. The kernel reads the indices, and only on the CPU it checks them."""
    if not _is_plain():
        if not torch.compiler.is_compiling() and _is_transformed():
            raise RuntimeError(
                "state_indices: expected None under torch.jit.trace, a transform of torch.func and forward-mode"
                " differentiation, as states in slots are updated in place"
            )
        arrays, *_ = _autocast(arrays, None, None)
        _check_step(cell, arrays, scalars, state, state_indices, packed)
    inputs, given, numbers = _as_op_takes(cell, arrays, scalars, packed)
    return ops.step_slots(cell, inputs, given, packed, numbers, state, state_indices)


def _check_step(cell: ops.Cell, arrays, scalars, state, state_indices: Tensor | None, packed: int) -> None:
    """Raise an error that names the argument of a step which is not as it must be."""
    named = _named(cell, arrays, packed)
    (first_name, first), *others = named.items()
    checks.tensor(first_name, first, 2, "[batch, channels]")
    batch, width = first.shape[0], first.shape[1] // (packed.bit_count() or 1)
    if state_indices is None:
        others = [("state", state), *others]
    for name, value in others:
        if name == "state" or not _is_per_channel(cell, name, value):
            checks.like(name, value, first, (batch, width), "[batch, channels]", name in cell.complex_names)
    _check(cell, _as_scan(cell, arrays), None, packed=packed)
    if state_indices is not None:
        checks.slots(state, state_indices, first[:, :width], cell.state_dtype(first.dtype))
        if state.device.type == "cpu" and not torch.compiler.is_compiling() and has_value(state_indices):
            checks.slot_values(state_indices, state.shape[0])
    for scalar, number in zip(cell.scalars, scalars, strict=True):
        scalar.tensor(number) if scalar.scheduled else scalar.number(number)


def _as_op_takes(
    cell: ops.Cell, arrays: Sequence[Tensor | None], scalars: Sequence[float | Tensor], packed: int = 0
) -> tuple[list[Tensor], int, list[float]]:
    """The arguments `inputs`, `given` and `numbers` of an op."""
    inputs, given, numbers = [], packed, []
    bit = 1
    for array in arrays:
        if array is not None:
            given |= bit
            inputs.append(array)
        bit <<= 1
    for scalar, value in zip(cell.scalars, scalars, strict=True):
        if scalar.scheduled:
            given |= bit
            inputs.append(scalar.tensor(value))
            bit <<= 1
        else:
            numbers.append(scalar.number(value))
    return inputs, given, numbers


def _as_scan(cell: ops.Cell, arrays: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The inputs of a step as those of a scan with T = 1."""
    return [
        value if value is None or _is_per_channel(cell, i.name, value) else value.unsqueeze(1)
        for i, value in zip(cell.inputs, arrays, strict=True)
    ]


def _named(cell: ops.Cell, arrays: Sequence[Tensor | None], packed: int = 0) -> dict[str, Any]:
    """The arrays by name: those that are given, and those that must be."""
    named: dict[str, Any] = {}
    for i, (spec, value) in enumerate(zip(cell.inputs, arrays, strict=True)):
        if i == 0 and packed:
            named["gates"] = value
        elif value is not None or not (spec.optional or packed >> i & 1):
            named[spec.name] = value
    return named


def _of_sequences(state: Tensor | None, inputs: Sequence[Tensor], cu_seqlens: Tensor | None) -> Tensor | None:
    """A state `[D]` as `[N, D]`; others as they are."""
    if isinstance(state, Tensor) and state.dim() == 1:
        return state.expand(ops.sequences_of(inputs, cu_seqlens), -1)
    return state


def _check(cell: ops.Cell, arrays, initial_state, cu_seqlens=None, resets=None, reset_state=None, packed=0) -> None:
    """Raise an error that names the argument which is not as it must be."""
    named = _named(cell, arrays, packed)
    channel = {name: value for name, value in named.items() if _is_per_channel(cell, name, value)}
    streams = {name: value for name, value in named.items() if name not in channel}
    states = {"initial_state": initial_state}
    if isinstance(reset_state, Tensor) and reset_state.dim() == 1:
        channel["reset_state"] = reset_state
        if resets is None:
            raise ValueError("reset_state: expected resets with it, got None")
    else:
        states["reset_state"] = reset_state
    gates = packed.bit_count()
    checks.arguments(streams, channel, states, cu_seqlens, resets, gates, cell.dtypes, cell.complex_names)
    if cu_seqlens is not None:
        checks.offsets(cu_seqlens, next(iter(named.values())).shape[1])


def _is_per_channel(cell: ops.Cell, name: str, value: Tensor | None) -> bool:
    kind = next((i.kind for i in cell.inputs if i.name == name), "stream")
    return kind == "channel" or (kind == "either" and isinstance(value, Tensor) and value.dim() == 1)


def _autocast(
    arrays: Sequence[Tensor | None], initial_state: Tensor | None, reset_state: Tensor | None
) -> tuple[Sequence[Tensor | None], Tensor | None, Tensor | None]:
    """Cast the floating streams to the autocast dtype, so that different ones may meet; float64 stays.

    Other tensors in a half precision that is not the autocast dtype become float32.
    """
    first = arrays[0]
    dtype = checks.autocast_dtype(first.device) if isinstance(first, Tensor) else None
    if dtype is None:
        return arrays, initial_state, reset_state

    def cast(t):
        if not isinstance(t, Tensor):
            return t
        if t.dim() != 1:
            return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t
        return state(t)

    def state(t):
        return t.float() if isinstance(t, Tensor) and t.dtype in checks.HALF_DTYPES and t.dtype != dtype else t

    return [cast(t) for t in arrays], state(initial_state), state(reset_state)


def _is_plain() -> bool:
    """Whether the call is eager: no compilation, autocast, tracing, transform or forward-mode differentiation."""
    return not (torch.compiler.is_compiling() or private.any_autocast() or _is_transformed())


def _is_transformed() -> bool:
    """Whether tracing, a transform or forward-mode differentiation is active."""
    return private.is_tracing() or private.transforms_active() or private.in_forward_mode()
