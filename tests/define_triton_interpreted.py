"""Defined cells under Triton's interpreter. Run by test_define_triton.py, where TRITON_INTERPRET=1 is set in time."""

from __future__ import annotations

import math
import re

import pytest
import torch

import mru_kernels as mk
from bench.errors import same_values
from mru_kernels.define import cell as definitions
from mru_kernels.define.comparison import LIMITS
from mru_kernels.define.triton_page import page
from tests import calls
from tests.triton_defined import CELLS, bistable, latch, leaky, linear

# The cell, the inputs that come per channel, and options.
CASES = [
    ("min_gru", (), {}),
    ("min_gru", ("update",), {"reverse": True}),
    ("scaled", ("alpha",), {"epsilon": 0.0}),
    ("scaled", ("threshold", "alpha"), {"epsilon": 0.5, "reverse": True}),
    ("leaky", ("decay",), {"gain": -0.3}),
    ("latch", (), {"epsilon": 0.0}),
    ("latch", ("reset",), {"epsilon": 0.5}),
    ("functions", (), {}),
    ("lru", ("angle",), {"reverse": True}),
    ("waves", ("pole", "angle"), {}),
    ("resonator", ("pole",), {"k": -0.7}),
]
PACKED = torch.tensor([0, 5, 5, 72, 90])


def drawn(scan, channels, dtype=torch.float64, batch=1, time=150):
    generator = torch.Generator().manual_seed(len(channels))
    of_complex = mk.checks.complex_dtype(dtype)
    drawn = []
    for name in scan.inputs:
        size = (5,) if name in channels else (batch, time, 5)
        is_complex = name in scan._functions.complex_inputs
        wide = torch.randn(size, generator=generator, dtype=torch.complex128 if is_complex else torch.float64)
        drawn.append(wide.to(of_complex if is_complex else dtype))
    return drawn


def values(most, shape, dtype):
    """Numbers from -most to most; of complex ones, the imaginary parts are their squares."""
    numbers = torch.linspace(-most, most, math.prod(shape), dtype=torch.float64).view(shape)
    return (torch.complex(numbers, numbers.square()) if dtype.is_complex else numbers).to(dtype)


def wide(t):
    return t.to(torch.complex128 if t.is_complex() else torch.float64)


def results(scan, inputs, backend, **options):
    """h, the final state and the gradients of the inputs and of the initial state."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    n = len(options["cu_seqlens"]) - 1 if "cu_seqlens" in options else 1
    dtype = mk.checks.state_dtype(inputs[0].dtype)
    if scan._program.is_complex and not dtype.is_complex:
        dtype = mk.checks.complex_dtype(dtype)
    initial_state = values(2.0, (n, 5), dtype).requires_grad_()
    h, final = scan(*leaves, initial_state=initial_state, backend=backend, **options)
    cotangents = [values(1.0, t.shape, t.dtype) for t in (h, final)]
    grads = torch.autograd.grad([h, final], [*leaves, initial_state], cotangents, materialize_grads=True)
    return [h, final, *grads]


def assert_close(got, expected, limit):
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        error = ((wide(a) - wide(b)).abs().max() / b.abs().max().clamp(min=1e-30)).item()
        assert error <= limit, i


@pytest.mark.parametrize("segment", [0, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("name", "channels", "options"), CASES, ids=str)
def test_equals_the_definition(name, channels, options, dtype, segment):
    scan = CELLS[name]
    inputs = drawn(scan, channels, dtype)
    with calls.segments("triton", segment):
        got = results(scan, inputs, "triton", **options)
    expected = results(scan, list(map(wide, inputs)), "torch", **options)
    assert_close(got, expected, LIMITS[dtype])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_definition_of_the_linear_recurrence_is_the_linear_recurrence(dtype, reverse):
    """Bit for bit."""
    update, decay = drawn(CELLS["linear"], (), dtype.to_real())
    got = CELLS["linear"](update, 0.7 * decay, reverse=reverse, backend="triton")
    for backend in ("triton", "cpu"):
        expected = mk.linear_recurrence(0.7 * decay, update, reverse=reverse, backend=backend)
        assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("name", ["min_gru", "latch"])
def test_packed_sequences_and_resets(name):
    scan = CELLS[name]
    inputs = drawn(scan, (), time=90)
    resets = torch.rand(1, 90, generator=torch.Generator().manual_seed(0)) < 0.1
    for options in ({"cu_seqlens": PACKED}, {"resets": resets, "reset_state": torch.ones(1, 5, dtype=torch.float64)}):
        expected = results(scan, inputs, "torch", **options)
        with calls.segments("triton", 64):
            assert_close(results(scan, inputs, "triton", **options), expected, LIMITS[torch.float64])


@pytest.mark.parametrize(("name", "channels"), [("leaky", ("decay",)), ("scaled", ("alpha",))])
def test_equals_the_cpu_kernels(name, channels):
    inputs = drawn(CELLS[name], channels, batch=2)
    options = {"initial_state": torch.ones(2, 5, dtype=torch.float64)}
    h, state = CELLS[name](*inputs, backend="triton", **options)
    expected_h, expected_state = CELLS[name](*inputs, backend="cpu", **options)
    assert_close([h, state], [expected_h, expected_state], LIMITS[torch.float64])


@pytest.mark.parametrize("epsilon", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_definition_of_bmru_is_bmru(dtype, epsilon):
    """Bit for bit, with ties, zeros, NaN and infinities."""
    candidate, threshold, alpha = drawn(CELLS["scaled"], ("alpha",), dtype, batch=2)
    threshold[:, 3:20] = candidate[:, 3:20]
    candidate[:, 30], threshold[:, 31] = 0, -0.0
    candidate[0, 60, 0], threshold[0, 70, 1], candidate[0, 80, 2] = math.nan, math.nan, -math.inf
    got = CELLS["scaled"](candidate, threshold, alpha, epsilon=epsilon, backend="triton")
    expected = mk.bmru(candidate, threshold, alpha=alpha, epsilon=epsilon, backend="cpu")
    assert all(same_values(a, b) for a, b in zip(got, expected, strict=True))


def swapped_gradients(text: str) -> str:
    return re.sub(r"\((v\d+), (v\d+),\)", r"(\2, \1,)", text)


def without_conjugate(text: str) -> str:
    return text.replace("def pull(", "def unused(").replace("def push(", "def pull(").replace("push=push, ", "")


FAULTS = {
    "a factor that is not conjugated": (linear, None, {}, without_conjugate),
    "gradients of another order": (bistable, None, {}, swapped_gradients),
    "a write that keeps the state": (bistable, None, {}, lambda t: t.replace("scaled(m, p[0])", "m")),
    "constants in float32": (latch, None, {"on": 1.0}, lambda t: t.replace(", STATE)", ", tl.float32)")),
    "another scalar": (leaky, None, {"gain": 0.7}, lambda t: t.replace("p[0]", "0.5")),
    "an adjoint of another state": (
        latch, lambda state: (0.3 * state).sigmoid(), {"on": 1.0}, lambda t: t.replace("after * ", "s * "),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_caught(monkeypatch, name):
    gate, output, scalars, fault = FAULTS[name]
    complex_inputs = ("update", "decay") if gate is linear else ()
    made = "fault_" + "_".join(name.split())
    scan = mk.define_cell(made, gate, output=output, scalars=scalars, complex_inputs=complex_inputs)
    assert fault(page("of", scan._program)) != page("of", scan._program)
    monkeypatch.setattr(definitions, "page", lambda *arguments: fault(page(*arguments)))
    inputs = drawn(scan, ())
    with pytest.raises(AssertionError):
        assert_close(results(scan, inputs, "triton"), results(scan, inputs, "torch"), LIMITS[torch.float64])
