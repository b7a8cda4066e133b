"""Drawn calls of every cell, and what two ways to the same results must agree in."""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from hypothesis import strategies as st

import mru_kernels as mk
import python_ref
from bench import compare, errors, inputs
from mru_kernels.ops import entry

CELLS = list(inputs.CELLS)
SEGMENTS = st.sampled_from([0, 64])


@st.composite
def cases(draw, largest: tuple[int, int], cell: str | None = None, **fixed) -> inputs.Case:
    """A case of any cell: sizes up to `largest`, any epsilon, any value of each factor that `fixed` does not set."""
    cell = cell or draw(st.sampled_from(CELLS))
    factors = {name: st.sampled_from(values) for name, values in inputs.CELLS[cell].factors.items()}
    factors |= {name: st.sampled_from(values) for name, values in inputs.COMMON_FACTORS.items()}
    factors["time"] = st.integers(0, largest[0])
    factors["channels"] = st.integers(1, largest[1])
    factors["batch"] |= st.integers(1, 4)
    if "epsilon" in factors:
        factors["epsilon"] |= st.floats(0.0, 1.0)
    factors |= {name: st.just(value) for name, value in fixed.items()}
    options = {name: draw(values) for name, values in factors.items()}
    dtype = draw(st.sampled_from(list(inputs.CELLS[cell].dtypes.values())))
    return inputs.Case(cell, dtype, options, draw(st.integers(0, 2**31)))


@contextmanager
def segments(backend: str, steps: int | None):
    """Set the length of segments; 0 disables splitting, None leaves the choice to the backend."""
    with patch.object(entry, "SEGMENT", -1 if steps is None else steps):
        yield


def op_of(cell: str, backend: str):
    return partial(getattr(mk, cell), backend=backend)


def run(call: inputs.Call, op, device: torch.device) -> dict[str, torch.Tensor]:
    """Results and gradients of a call on the CPU, by name. A gradient has the name of its argument."""
    return compare.results_of(call.to(device), op)


def assert_right(call: inputs.Call, op, device: torch.device) -> None:
    """All results and gradients of the call agree with the reference."""
    failed = [result for result in compare.judge(call, run(call, op, device)) if not result.passed]
    assert not failed


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    def bits(t: torch.Tensor) -> torch.Tensor:
        return t.clone(memory_format=torch.contiguous_format).view(torch.uint8)

    differ = [name for name in a if not torch.equal(bits(a[name]), bits(b[name]))]
    assert not differ


def assert_agree(call: inputs.Call, one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Two results are equal where the forward pass is exact, and elsewhere agree within the limit."""
    terms = python_ref.CELLS[call.cell].adjoint(**call.tensors, **call.settings, **compare.grads_of(call), term=abs)
    exact = compare.is_exact(call)
    for name, result in one.items():
        if exact and name in compare.FORWARD:
            assert errors.same_values(result, other[name]), name
        else:
            verdict = errors.judge(result, errors.wide(other[name]), terms[name])
            assert verdict.passed, (name, verdict)


def part_of(
    arguments: dict[str, Any], rows: slice = slice(None), times: slice = slice(None), states: slice = slice(None)
) -> dict[str, Any]:
    """The arguments of a part of a call: batch rows and time steps of its streams, and rows of its states."""

    def part(name: str, x: Any) -> Any:
        if name in ("initial_state", "reset_state"):
            return x if x is None else x[states]
        return x[rows, times] if name == "resets" or (isinstance(x, torch.Tensor) and x.dim() == 3) else x

    return {name: part(name, x) for name, x in arguments.items()}


def factors_of(cell: str) -> dict[str, tuple]:
    """The factors of a cell, with those that all cells share."""
    return inputs.COMMON_FACTORS | inputs.CELLS[cell].factors


def step_settings(call: inputs.Call) -> dict[str, Any]:
    """The call's settings that the cell's step takes."""
    parameters = inspect.signature(getattr(mk, f"{call.cell}_step")).parameters
    return {name: x for name, x in call.settings.items() if name in parameters}
