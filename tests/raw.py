"""Arguments of the private ops `mru::*`, for tests that call these ops directly. Only this file knows the schemas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import inputs
from mru_kernels import backends, ops
from mru_kernels.cells import lif, resonate

#: Argument names in the schemas of a cell's ops, in order.
INPUTS = ("inputs", "given", "packed", "numbers")
RESETS = ("cu_seqlens", "resets", "reset_state")
FORWARD = (*INPUTS, "initial_state", *RESETS, "reverse", "chunk", "segment", "save")
BACKWARD = ("grad_h", "grad_final", "grad_checkpoints", *FORWARD[:-1], "checkpoints", "codes", "wanted")
STEP = (*INPUTS, "state")
STEP_SLOTS = (*STEP, "state_indices")
MAP = (*INPUTS, *RESETS, "reverse", "segment")

STATES = ("initial_state", "reset_state")
DEFAULTS = {"epsilon": 0.0, "surrogate_scale": 1.0}


def arguments(
    cell: ops.Cell,
    arrays: Mapping[str, Tensor],
    *,
    packed: Sequence[str] = (),
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: Tensor | None = None,
    reverse: bool = False,
    chunk: int = backends.CHUNK,
    segment: int = 0,
    save: bool = True,
    **scalars: Any,
) -> dict[str, Any]:
    """Arguments of the forward op by name, in the order of its schema.

    Args:
        arrays: array inputs by name. "gates" [B, T, k D] contains k streams in one tensor.
        packed: names of the streams in "gates".
        scalars: scalars of the cell by name, or arguments of its public function that are not those of other ops.
    """
    if any(scalar.name == "mode" for scalar in cell.scalars):
        scalars["mode"] = {"lif": lif, "resonate": resonate}[cell.name].number_of(**scalars)
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
        "resets": resets,
        "reset_state": reset_state,
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
        cell, arrays, packed=packed, initial_state=call.tensors.get("initial_state"),
        reset_state=call.tensors.get("reset_state"), **call.settings, **options,
    )  # fmt: skip


def backward(scan: Mapping[str, Any], results: Sequence[Tensor]) -> dict[str, Any]:
    """Arguments of the backward op. The results h and final state of the forward op serve as gradients."""
    names = ("grad_h", "grad_final", "checkpoints", "codes")
    given = {**scan, "grad_checkpoints": None, "wanted": ops.ALL_WANTED, **dict(zip(names, results, strict=True))}
    return dict(zip(BACKWARD, of(BACKWARD, given), strict=True))


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
    return [*arrays, *(arguments[name] for name in STATES if arguments[name] is not None)]


def with_tensors(arguments: Mapping[str, Any], tensors: Sequence[Tensor]) -> dict[str, Any]:
    """The arguments, with `tensors` in the order of `tensors_of`."""
    left = iter(tensors)
    inputs = [next(left) if t.dim() > 0 else t for t in arguments["inputs"]]
    states = {name: None if arguments[name] is None else next(left) for name in STATES}
    return {**arguments, "inputs": inputs, **states}
