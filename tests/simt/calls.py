"""Calls of the ops under host execution, and what the checks of the battery share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

import mru_kernels as mk
import simt
from bench import compare, inputs
from mru_kernels import ops
from mru_kernels.backends import CHUNK
from mru_kernels.ops import entry


@contextmanager
def segments(steps: int):
    """Make `mru_kernels` cut time into segments of `steps` steps; 0: do not cut it."""
    with patch.object(entry, "SEGMENT", steps):
        yield


def require(condition: object, what: object) -> None:
    if not condition:
        raise AssertionError(what)


def cells_of(dtype: torch.dtype) -> list[str]:
    """The cells of the module that take streams of `dtype`."""
    built = simt.control().cells()
    return [cell for cell, declared in inputs.CELLS.items() if cell in built and dtype in declared.dtypes.values()]


def per_channel_options(cell: str) -> dict[str, object]:
    """Options of a case in which everything that may come per channel does, and alpha is given."""
    factors = inputs.CELLS[cell].factors
    options: dict[str, object] = {name: "channel" for name, values in factors.items() if "channel" in values}
    return options | {name: True for name in factors if name == "alpha"}


def results(call: inputs.Call, steps: int, backend: str = "simt") -> dict[str, Tensor]:
    with segments(steps):
        return compare.results_of(call, partial(getattr(mk, call.cell), backend=backend))


def measure(op: Callable, *arguments) -> tuple[Sequence[Tensor], dict[str, list[int]]]:
    """Results of an op, and the bytes that it read and wrote."""
    simt.control().reset_traffic()
    return op(*arguments), simt.control().traffic()


class Op:
    """The private ops of a cell with some of its inputs: a call below the public functions."""

    def __init__(self, cell: ops.Cell, arrays: dict[str, Tensor], reverse: bool = False, steps: int = 0,
                 cu_seqlens: Tensor | None = None, resets: Tensor | None = None) -> None:  # fmt: skip
        self.cell = cell
        least = {scalar.name: torch.tensor(scalar.least, dtype=torch.float64) for scalar in cell.scheduled}
        self.given = cell.mask(*arrays, *least)
        values = [(arrays | least)[name] for name in cell.names if name in arrays | least]
        numbers = [1.0 for _ in cell.numbers]
        self.arguments = (values, self.given, 0, numbers, None, cu_seqlens, resets, None, reverse, CHUNK, steps)

    def forward(self) -> list[Tensor]:
        return self.cell.forward["simt"](*self.arguments, True)

    def backward(self, results: list[Tensor]) -> list[Tensor]:
        h, final_state, *saved = results
        return self.cell.backward["simt"](h, final_state, None, *self.arguments, *saved, ops.ALL_WANTED)


def scan_once(call: inputs.Call) -> dict[str, Tensor]:
    """Results in segments. Requires that nothing is scanned again, which would hide a fault of `carry`."""
    cut, moved = measure(results, call, CHUNK)
    streams = [cut[name] for name in ("h", *call.tensors) if cut[name].dim() == 3]
    written = sum(t.nbytes for t in streams)
    require(moved["stream"][1] == written, f"scanned again: {moved['stream'][1]} bytes of streams for {written}")
    return cut
