"""Arguments of the private ops `mru::*`, for tests that call these directly: one place that knows their schemas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mru_kernels import backends, ops

#: What the schemas of a cell's four ops name, in order.
INPUTS = ("inputs", "given", "packed", "numbers")
FORWARD = (*INPUTS, "initial_state", "cu_seqlens", "reverse", "chunk", "segment", "save")
BACKWARD = ("grad_h", "grad_final", *FORWARD[:-1], "checkpoints", "events")
STEP = ("inputs", "given", "numbers", "state")
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
        arrays: the array inputs that are given, by name; "gates" for those that lie side by side.
        packed: the names of these.
        scalars: the cell's scalars, by name.
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
    """The arguments of these names."""
    return [given[name] for name in names]
