"""The comparison of a defined cell's kernels with its own functions in float64, one step after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import checks

if TYPE_CHECKING:
    from .cell import DefinedCell

#: The most that a result may differ from the float64 loop, relative to its largest value, by its dtype.
LIMITS = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
LIMITS |= {torch.complex128: LIMITS[torch.float64], torch.complex64: LIMITS[torch.float32]}


@dataclass(frozen=True)
class Row:
    """A result of a call: its name, the dtype of the streams, its greatest error and the most allowed.

    Errors are relative to the largest value.
    """

    result: str
    dtype: torch.dtype
    error: float
    limit: float

    @property
    def passes(self) -> bool:
        return self.error <= self.limit


@dataclass(frozen=True)
class Comparison:
    """What `DefinedCell.compare` found: a row for each result and dtype. As a text it is a table."""

    name: str
    rows: tuple[Row, ...]

    @property
    def passes(self) -> bool:
        return all(row.passes for row in self.rows)

    def __str__(self) -> str:
        lines = [f"{self.name}: kernels against the definition in float64"]
        for row in self.rows:
            dtype = str(row.dtype).removeprefix("torch.")
            verdict = "" if row.passes else "  too large"
            lines.append(f"{row.result:16} {dtype:9} error {row.error:.1e}  limit {row.limit:.0e}{verdict}")
        return "\n".join(lines)


def compare(cell: DefinedCell, tensors: list[Tensor], options: dict[str, Any]) -> Comparison:
    """Compare on inputs in float64 or complex128, for each dtype: kernels and loop get the inputs rounded to it."""
    rows: list[Row] = []
    for dtype in checks.COMPLEX_DTYPES if tensors[0].is_complex() else checks.STREAM_DTYPES:
        rounded = [t.to(_dtype_of(t, dtype)) for t in tensors]
        ours = _results(cell, rounded, dtype, "cpu", options)
        theirs = _results(cell, [t.to(_dtype_of(t, torch.float64)) for t in rounded], dtype, "torch", options)
        for (name, a), b in zip(ours.items(), theirs.values(), strict=True):
            scale = b.abs().max().item() or 1.0
            rows.append(Row(name, dtype, ((a.to(b.dtype) - b).abs().max() / scale).item(), LIMITS[a.dtype]))
    return Comparison(cell.name, tuple(rows))


def _dtype_of(t: Tensor, stream: torch.dtype) -> torch.dtype:
    """The dtype of an input or of h for streams of the dtype `stream`: complex if `t` is, else real."""
    state = checks.state_dtype(stream)
    if t.is_complex():
        return state if state.is_complex else checks.complex_dtype(state)
    return state.to_real() if state.is_complex else stream


def _results(
    cell: DefinedCell, tensors: list[Tensor], dtype: torch.dtype, backend: str, options: dict[str, Any]
) -> dict[str, Tensor]:
    """Results and gradients by name. The gradient of h is rounded to streams of `dtype`."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    h, state = cell(*leaves, backend=backend, **options)
    cotangent = torch.linspace(-1, 1, h.numel(), dtype=torch.float64, device=h.device).view(h.shape)
    if h.is_complex():
        cotangent = torch.complex(cotangent, cotangent.square())
    cotangent = cotangent.to(_dtype_of(h, dtype)).to(h.dtype)
    grads = torch.autograd.grad(h, leaves, cotangent, allow_unused=True)
    results = {"h": h.detach(), "state": state.detach()}
    for name, t, leaf in zip(cell.inputs, grads, leaves, strict=True):
        results[f"grad of {name}"] = torch.zeros_like(leaf) if t is None else t
    return results
