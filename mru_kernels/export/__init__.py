"""Exported programs without the ops of this package, for exporters that know the ops of torch only."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .. import ops
from ..backends import plain

__all__ = ["decompositions"]


def decompositions() -> dict[Any, Callable]:
    """The table of torch's decompositions, and those of the scans of this package into ops of torch.

    `torch.export.ExportedProgram.run_decompositions` takes the table. The program that it returns has no op of this
    package, so that other exporters can read it, such as ONNX and ExecuTorch. In it a scan over a time that may vary is
    one `torch.ops.higher_order.scan`; a scan over a fixed time is unrolled. The program is for inference: gates have no
    surrogate derivatives in it.

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
    cell: ops.Cell, inputs, given, packed, numbers, initial_state, cu_seqlens, reverse, *_chunk_segment_save
) -> list[torch.Tensor]:
    return list(plain.scan(cell, inputs, given, packed, numbers, initial_state, cu_seqlens, reverse))
