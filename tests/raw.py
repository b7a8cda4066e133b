"""Arguments of the private ops `mru::*`, for tests that call these ops directly. Only this file knows the schemas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import inputs
from mru_kernels import backends, ops

#: Argument names in the schemas of a cell's ops, in order.
INPUTS = ("inputs", "given", "packed", "numbers")
FORWARD = (*INPUTS, "initial_state", "cu_seqlens", "reverse", "chunk", "segment", "save")
BACKWARD = ("grad_h", "grad_final", *FORWARD[:-1], "checkpoints", "events")
STEP = (*INPUTS, "state")
STEP_SLOTS = (*STEP, "state_indices")
MAP = (*INPUTS, "cu_seqlens", "reverse", "segment")

DEFAULTS = {"epsilon": 0.0, "surrogate_scale": 1.0}


def arguments(
    cell: ops.Cell,
    arrays: Mapping[str, Tensor],
    *,
    packed: Sequence[str] = (),
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    chunk: int = backends.CHUNK,
    segment: int = 0,
    save: bool = True,
    **scalars: float,
) -> dict[str, Any]:
    """Arguments of the forward op by name, in the order of its schema.

    Args:
        arrays: array inputs by name. "gates" [B, T, k D] contains k streams in one tensor.
        packed: names of the streams in "gates".
        scalars: scalars of the cell by name.
    """
    scalars = DEFAULTS | scalars
    order = ["gates", *(i.name for i in cell.inputs)]
    inputs = [arrays[name] for name in order if name in arrays]
    inputs += [torch.tensor(scalars[s.name], dtype=torch.float64) for s in cell.scheduled]
    given = cell.mask(*(name for name in arrays if name != "gates"), *packed, *(s.name for s in cell.scheduled))
    return {
        "inputs": inputs,
        "given": given,
        "packed": cell.mask(*packed),
        "numbers": [scalars[s.name] for s in cell.numbers],
        "initial_state": initial_state,
        "cu_seqlens": cu_seqlens,
        "reverse": reverse,
        "chunk": chunk,
        "segment": segment,
        "save": save,
    }


def of(names: Sequence[str], given: Mapping[str, Any]) -> list[Any]:
    """The values of these arguments, in order."""
    return [given[name] for name in names]


def scan(call: inputs.Call, *, gates: bool = False, **options: Any) -> dict[str, Any]:
    """Arguments of the forward op for a call, by name. With `gates`, one tensor [B, T, k D] contains all streams."""
    cell = ops.CELLS[call.cell]
    arrays = {i.name: call.tensors[i.name] for i in cell.inputs if i.name in call.tensors}
    packed = [name for name, t in arrays.items() if t.dim() == 3] if gates else []
    if packed:
        joined = torch.cat([arrays.pop(name) for name in packed], -1)
        arrays = {"gates": joined, **arrays}
    return arguments(
        cell, arrays, packed=packed, initial_state=call.tensors.get("initial_state"), **call.settings, **options
    )


def backward(scan: Mapping[str, Any], results: Sequence[Tensor]) -> dict[str, Any]:
    """Arguments of the backward op. The results h and final state of the forward op serve as gradients."""
    names = ("grad_h", "grad_final", "checkpoints", "events")
    return dict(zip(BACKWARD, of(BACKWARD, {**scan, **dict(zip(names, results, strict=True))}), strict=True))


def step(call: inputs.Call) -> dict[str, Any]:
    """Arguments of the step op, for the first step of a call."""
    named = scan(call)
    rows = [t[:, 0] if t.dim() == 3 else t for t in named["inputs"]]
    state = named["initial_state"]
    named |= {"inputs": rows, "state": torch.zeros_like(call.grad_final) if state is None else state}
    return dict(zip(STEP, of(STEP, named), strict=True))


def run(op: torch._ops.OpOverload, arguments: Mapping[str, Any]) -> Any:
    """Call an op with arguments that are given by name."""
    return op(*(arguments[argument.name] for argument in op._schema.arguments))


def tensors_of(arguments: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that have gradients, in the order of the backward op's results."""
    arrays = [t for t in arguments["inputs"] if t.dim() > 0]
    return arrays if arguments["initial_state"] is None else [*arrays, arguments["initial_state"]]


def with_tensors(arguments: Mapping[str, Any], tensors: Sequence[Tensor]) -> dict[str, Any]:
    """The arguments, with `tensors` in the order of `tensors_of`."""
    left = iter(tensors)
    inputs = [next(left) if t.dim() > 0 else t for t in arguments["inputs"]]
    state = None if arguments["initial_state"] is None else next(left)
    return {**arguments, "inputs": inputs, "initial_state": state}
