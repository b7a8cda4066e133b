"""Second derivatives of cells that `define_cell` makes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import mru_kernels as mk
from mru_kernels import backends
from mru_kernels.define.plain import plain
from mru_kernels.define.torch_language import evaluate
from mru_kernels.define.trace import Functions, trace
from tests.test_define import BISTABLE, MIN_GRU, leaky
from tests.test_derivatives import hessian_products


def damped(input: Tensor, decay: Tensor, k: Tensor) -> mk.Affine:
    return mk.Affine(decay.sigmoid() * k, input.sin())


DAMPED = mk.define_cell("test_damped", damped, output=lambda state, input: state.tanh() * input, scalars={"k": 0.9})


@pytest.mark.parametrize("place", ["candidate", "both", "stream", "channel"])
def test_second_derivatives_are_those_of_the_loop(place):
    """In reverse and forward mode, mixed, and third ones."""
    torch.manual_seed(0)
    x, other, v = torch.randn(3, 2, 6, 3, dtype=torch.float64)
    vector = torch.randn(3, dtype=torch.float64)
    op, point, direction = {
        "candidate": (lambda x: MIN_GRU(x, other), x, v),
        "both": (lambda x: MIN_GRU(x, x.sin(), initial_state=x[:, 0]), x, v),
        "stream": (lambda x: DAMPED(x, vector), x, v),
        "channel": (lambda d: DAMPED(x, d, reverse=True), vector, vector.cos()),
    }[place]

    def loss(x):
        h, state = op(x)
        return h.pow(3).sum() + state.square().sum()

    products = {}
    for backend in ("torch", "cpu"):
        with patch.object(backends, "_CHOSEN", backend):
            products[backend] = list(hessian_products(loss, point, direction))
    for ours, theirs in zip(products["cpu"], products["torch"], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_second_derivatives_of_packed_sequences_and_resets():
    leaves = [t.requires_grad_() for t in torch.randn(2, 1, 7, 2, dtype=torch.float64)]
    state = torch.randn(1, 2, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([0, 3, 7])
    resets = torch.tensor([[False, True, False, False, True, False, False]])
    assert torch.autograd.gradgradcheck(partial(MIN_GRU, cu_seqlens=offsets), leaves)
    assert torch.autograd.gradgradcheck(lambda a, b, s: MIN_GRU(a, b, resets=resets, reset_state=s), [*leaves, state])


@pytest.mark.check
def test_second_derivatives_of_an_input_that_only_a_mask_reads():
    """Its gradient is a constant."""
    cell = mk.define_cell("test_masked", lambda x, y, a: mk.Affine(torch.where(y > 0, a, 0.5), x))
    torch.manual_seed(0)
    leaves = [t.requires_grad_() for t in torch.randn(3, 1, 4, 2, dtype=torch.float64)]
    assert torch.autograd.gradgradcheck(cell, leaves)
    x = [t.detach() for t in leaves]
    products = {}
    for backend in ("cpu", "torch"):
        gradient = torch.func.grad(lambda *x, b=backend: cell(*x, backend=b)[0].pow(3).sum(), (0, 1, 2))
        products[backend] = torch.func.vjp(gradient, *x)[1](tuple(x))
    torch.testing.assert_close(products["cpu"], products["torch"])
    of_y, of_a = torch.autograd.grad(cell(*leaves)[0].sum(), leaves[1:], create_graph=True)
    assert not torch.autograd.grad(of_y.sum(), leaves, retain_graph=True, materialize_grads=True)[0].any()
    assert torch.autograd.grad(of_a.sum(), leaves, materialize_grads=True)[0].any()


def assert_second_derivatives_of_a_step(gate: Callable[..., mk.Affine], *leaves: Tensor) -> None:
    """The derivatives of the recorded gradients are those of torch's gradients; no kernel runs."""
    names = tuple(inspect.signature(gate).parameters)
    complex_inputs = frozenset(n for n, t in zip(names, leaves, strict=True) if t.is_complex())
    functions = Functions(gate, None, names, (), complex_inputs)
    vjp = plain(functions, trace(functions)).vjp
    assert vjp is not None
    leaves = tuple(t.detach().requires_grad_() for t in leaves)
    state = leaves[0].detach().cos()
    cotangent = state.sin()
    factor, offset = gate(*leaves)
    firsts = {
        "ours": vjp(leaves, state, state, cotangent, cotangent, []),
        "theirs": torch.autograd.grad(factor * state + offset, leaves, cotangent, create_graph=True),
    }
    found = {}
    for name, first in firsts.items():
        grads = [torch.autograd.grad((t * cotangent).sum().abs().square(), leaves, retain_graph=True,
                                     allow_unused=True, materialize_grads=True) for t in first]  # fmt: skip
        found[name] = [*first, *(t for each in grads for t in each)]
    for ours, theirs in zip(found["ours"], found["theirs"], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "function",
    [
        torch.relu,
        lambda t: t.clamp(-1, 0.5),
        lambda t: t.clamp(0.5, -1),
        lambda t: t.clamp(min=-1),
        lambda t: t.clamp(max=0.5),
        lambda t: torch.clamp(t, min=t.square() - 0.25, max=2 * t - 1),
        lambda t: torch.maximum(t, -t),
        lambda t: torch.minimum(t, t.square()),
        torch.nn.functional.hardtanh,
        torch.nn.functional.relu6,
        torch.nn.functional.leaky_relu,
        torch.nn.functional.logsigmoid,
        lambda t: torch.nn.functional.threshold(t, 0.5, 0.0),
    ],
)
def test_second_derivatives_at_ties_are_those_of_torch(function):
    ties = torch.tensor([-1.0, -0.5, 0.0, 0.3, 0.5, 1.0, 6.0], dtype=torch.float64)
    assert_second_derivatives_of_a_step(lambda x, a: mk.Affine(0.5 * x * a, function(x) * a), ties, ties.exp())


def test_clamps_keep_nan():
    nan, one = torch.tensor([float("nan"), 1.0, float("nan"), 2.0]), torch.tensor([1.0, float("nan"), float("nan"), 3])
    functions = Functions(
        lambda x, a: mk.Affine(x.relu() + x.clamp(0.5, 4) * x.clamp(max=9), torch.clamp(x, a, a + 1)),
        None,
        ("x", "a"),
        (),
    )
    program = trace(functions)
    factor, offset = evaluate(program.graph, [program.write, program.value], {"x[0]": nan, "x[1]": one}, nan)
    expected = functions.gates({"x": nan, "a": one})
    for ours, theirs in zip((factor, offset), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def of_a_constant_size(x: Tensor, a: Tensor) -> mk.Affine:
    with torch.no_grad():
        size = a.abs()
    return mk.Affine(a.tanh() * size, x)


def of_its_own_tensor(x: Tensor, a: Tensor) -> mk.Affine:
    y = a.sin()
    y.detach_()
    return mk.Affine(a.sigmoid(), x * y)


def of_a_first_derivative(x: Tensor, a: Tensor) -> mk.Affine:
    (slope,) = torch.autograd.grad(a.sin(), a, torch.ones_like(a))
    return mk.Affine(a * slope, x)


@pytest.mark.parametrize(
    ("gate", "stops"),
    [
        (lambda x, a: mk.Affine(a * a.detach(), x), True),
        (lambda x, a: mk.Affine(a + (a.sign() - a).detach(), x), True),
        (lambda x, a: mk.Affine(a * a.data, x), True),
        (lambda x, a: mk.Affine(a, torch.where(x.detach() > 0, x, a)), True),
        (of_a_constant_size, True),
        (of_its_own_tensor, True),
        (of_a_first_derivative, True),
        (lambda x, a, k: mk.Affine(a * k.detach(), x * torch.ones_like(x).detach()), False),
        (lambda x, a, k: mk.Affine(a.exp().tanh() * k, (x > 0).to(x.dtype) * x.sign() + a.sqrt().sigmoid()), False),
    ],
)
def test_gates_whose_gradients_stop_are_found(gate, stops):
    scalars = ("k",) if "k" in gate.__code__.co_varnames else ()
    assert trace(Functions(gate, None, ("x", "a"), scalars)).surrogates == stops
    assert trace(Functions(leaky, lambda state: state.detach() * state, ("input", "decay"), ())).surrogates


@pytest.mark.check
def test_second_derivatives_where_gradients_stop_are_refused():
    cell = mk.define_cell("test_stops", of_a_constant_size)
    x = torch.randn(2, 1, 5, 3, requires_grad=True)
    (first,) = torch.autograd.grad(cell(*x)[0].sum(), x, create_graph=True)
    torch.testing.assert_close(first, torch.autograd.grad(cell(*x, backend="torch")[0].sum(), x)[0])
    with pytest.raises(NotImplementedError, match=r"^mru::test_stops: there is no second derivative"):
        first.sum().backward()


def test_second_derivatives_of_surrogates_are_refused():
    steps = mk.define_cell("test_steps", lambda x, a: mk.Affine(a.sigmoid(), mk.heaviside(x)))
    for cell in (BISTABLE, steps):
        x = torch.randn(2, 1, 5, 3, requires_grad=True)
        (first,) = torch.autograd.grad(cell(*x)[0].sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match=f"^mru::{cell.name}: there is no second derivative"):
            first.sum().backward()
