"""Modules in other forms: programs of torch's ops only, C, and NIR."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .. import ops
from ..backends import plain
from .c_program import CProgram
from .to_c import c
from .to_nir import nir

__all__ = ["CProgram", "c", "decompositions", "nir"]


def decompositions() -> dict[Any, Callable]:
    """The table of torch's decompositions, with entries that decompose the scans of this package into ops of torch.

    Pass the table to `torch.export.ExportedProgram.run_decompositions`. The program that it returns has no op of this
    package, so exporters such as those for ONNX and ExecuTorch can read it. A scan over T that may vary becomes one
    `torch.ops.higher_order.scan`. A scan over fixed T is unrolled. The program is for inference: its gates have no
    surrogate derivatives.

    Returns:
        A new dict from ops to functions. `run_decompositions` raises RuntimeError for a program with `cu_seqlens`,
        whose values are not known when it is recorded.

    Example::

        >>> program = torch.export.export(mk.BMRU(3, 8), (torch.randn(2, 10, 3),))
        >>> program = program.run_decompositions(mk.export.decompositions())
        >>> any("mru" in str(node.target) for node in program.graph.nodes)
        False
    """
    table = torch.export.default_decompositions()
    for cell in ops.CELLS.values():
        for op in cell.forward.values():
            table[op] = partial(_scan, cell)
    return table


def _scan(
    cell: ops.Cell, inputs, given, packed, numbers, initial_state, cu_seqlens, resets, reset_state, reverse, chunk,
    segment, save,
) -> list[torch.Tensor]:  # fmt: skip
    call = (inputs, given, packed, numbers, initial_state, cu_seqlens, resets, reset_state, reverse)
    if not save:
        return list(plain.scan(cell, *call))
    h, final, boundaries = plain.scan(cell, *call, chunk)
    spare = final.new_zeros((ops.spare_rows(segment), final.shape[-1]))
    codes = ops.allocate_codes(cell, inputs, given, packed, cu_seqlens, segment).zero_()
    return [h, final, torch.cat([boundaries.flatten(0, 1), spare]), codes]
