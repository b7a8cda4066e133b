"""The gradients of the reference: by hand, by autograd, and as the adjoint."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch

import python_ref
from bench import errors, inputs
from python_ref.surrogate import select, sgn, unit_step
from tests.by_hand import INF, NAN, B, C, assert_values, column, state


@pytest.mark.parametrize("k", [1.0, 2.5])
def test_surrogate_slopes(k):
    x = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.3, INF, -INF], dtype=torch.float64, requires_grad=True)
    expected = torch.tensor([k / (1 + (math.pi * k * v) ** 2) for v in x.tolist()], dtype=torch.float64)
    step, zero = unit_step(x, torch.zeros_like(x), k), torch.zeros_like(x, requires_grad=True)
    assert_values(step.detach(), 1, 1, 1, 0, 1, 1, 0)
    assert_values(sgn(x.detach(), k), 1, 1, 1, -1, 1, 1, -1)
    torch.testing.assert_close(torch.autograd.grad(step.sum(), x)[0], expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(torch.autograd.grad(sgn(x, k).sum(), x)[0], 2 * expected, rtol=1e-14, atol=0)
    (of_threshold,) = torch.autograd.grad(unit_step(x.detach(), zero, k).sum(), zero)
    torch.testing.assert_close(of_threshold, -expected, rtol=1e-14, atol=0)
    assert expected[0] == k
    assert expected[-1] == 0


def test_select_takes_one_branch_and_has_the_gradients_of_the_formula():
    z = torch.tensor([1.0, 0.0], requires_grad=True)
    one = torch.tensor([3.0, INF], requires_grad=True)
    zero = torch.tensor([NAN, 7.0], requires_grad=True)
    assert_values(select(z, one, zero).detach(), 3, 7)
    one = torch.tensor([3.0, 4.0], requires_grad=True)
    zero = torch.tensor([1.0, 7.0], requires_grad=True)
    grads = torch.autograd.grad(select(z, one, zero), (z, one, zero), torch.tensor([10.0, 100.0]))
    for grad, expected in zip(grads, [(20, -300), (10, 0), (0, 100)], strict=True):
        assert_values(grad, *expected)


# With k = 1/pi the slopes are 1/(pi (1 + x^2)), so pi times the gradients of c and b are rational.
# c = (2, 1, -3), b = (1, 2, 1): the steps write +, hold, write -. |c| - |b| = (1, -1, 2). Pi times the slopes of the
# gate: 1/2, 1/2, 1/5. Pi times the slopes of the sign: twice 1/5, 1/2, 1/10. s_0 = 5, G = (1, 1, 1), F = 0.
BY_HAND = {
    # a = (1, 1, 1)   lambda = (3, 2, 1)   s = (6, 6, 5)   dz = lambda v = (3, 2, -1)
    1: {"c": (27 / 10, 1, 2 / 5), "b": (-3 / 2, -1, 1 / 5), "m": (3, 0, -1), "alpha": 17, "s": 3},
    # a = (0, 1, 0)   lambda = (2, 1, 1)   s = (1, 1, -1)  dz = lambda (v - s_before) = (-8, 0, -2)
    0: {"c": (-16 / 5, 0, 3 / 5), "b": (4, 0, 2 / 5), "m": (2, 0, -1), "alpha": 1, "s": 0},
    # a = (1/2, 1, 1/2)   lambda = (5/2, 3/2, 1)   s = (7/2, 7/2, 3/4)   dz = lambda (v - s_before/2)
    #   = (5/2 (1 - 5/2), 3/2 (1 - 7/4), -1 - 7/4) = (-15/4, -9/8, -11/4)
    0.5: {
        "c": (-15 / 8 + 1, -9 / 16, 11 / 20 + 1 / 5),
        "b": (15 / 8, 9 / 16, 11 / 20),
        "m": (5 / 2, 0, -1),
        "alpha": 31 / 4,
        "s": 5 / 4,
    },
}


@pytest.mark.parametrize("epsilon", BY_HAND)
@pytest.mark.parametrize("derivation", ["autograd", "adjoint"])
def test_gradients_by_hand(epsilon, derivation):
    c, b, m, s, alpha = column(2, 1, -3), column(1, 2, 1), column(1, 1, 1), state(5), torch.ones(1).double()
    leaves = {"candidate": c, "threshold": b, "initial_state": s, "amplitude": m, "alpha": alpha}
    settings = {"epsilon": epsilon, "surrogate_scale": 1 / math.pi}
    if derivation == "autograd":
        for x in leaves.values():
            x.requires_grad_()
        h, _ = python_ref.bmru(**leaves, **settings)
        grads = dict(zip(leaves, torch.autograd.grad(h.sum(), list(leaves.values())), strict=True))
    else:
        grads = python_ref.bmru.adjoint(**leaves, **settings, grad_h=torch.ones_like(c), grad_final=state(0))
    grads = [math.pi * grads["candidate"], math.pi * grads["threshold"], grads["amplitude"]] + [
        grads[name] for name in ("alpha", "initial_state")
    ]
    for grad, expected in zip(grads, BY_HAND[epsilon].values(), strict=True):
        expected = torch.tensor(expected, dtype=torch.float64).flatten()
        torch.testing.assert_close(grad.flatten(), expected, rtol=1e-14, atol=1e-15)


def test_the_sign_of_the_threshold_and_zeros_have_the_slopes_of_abs():
    for value, sign in ((2.0, 1), (-2.0, -1), (0.0, 0), (-0.0, 0)):
        b = column(value).requires_grad_()
        python_ref.bmru(column(1), b, surrogate_scale=1 / math.pi)[0].sum().backward()
        x = 1 - abs(value)
        assert b.grad.item() == pytest.approx(-sign / math.pi / (1 + x * x), rel=1e-14)


def forms(cell: str) -> list[dict]:
    """Options of a cell: all optional inputs, every combination of the other factors, several values of epsilon.

    Of a cell that has many, each value; test_lif.py has all of its combinations.
    """
    factors = python_ref.CELLS[cell].factors
    values = {name: (True,) if set(x) == {False, True} else x for name, x in factors.items() if name != "writes"}
    values |= {"surrogate_scale": (1.5,), "epsilon": (0.0, 0.3, 1.0)}
    values = {name: x for name, x in values.items() if name in factors}
    if math.prod(len(x) for x in values.values()) > 16:
        return [{name: x[i % len(x)] for name, x in values.items()} for i in range(max(map(len, values.values())))]
    named = [[(name, x) for x in values[name]] for name in factors if name in values]
    return [dict(options) for options in product(*named)]


WIDE = (torch.float64, torch.complex128)
FORMS = [
    (cell, dtype, form)
    for cell, declared in python_ref.CELLS.items()
    for dtype in WIDE
    if dtype in declared.dtypes.values()
    for form in forms(cell)
]


@pytest.mark.parametrize(("cell", "dtype", "form"), FORMS, ids=str)
@pytest.mark.parametrize("batch", [1, 3, "packed"])
@pytest.mark.parametrize("reverse", [False, True])
def test_adjoint_equals_autograd(cell, dtype, form, batch, reverse):
    options = {"batch": batch, "reverse": reverse, "initial_state": "real", "parameters": "as streams"} | form
    for seed, time in enumerate((0, 1, 2, 40)):
        call = inputs.case(cell, dtype, seed, time=time, **options).build()
        leaves = {name: x.requires_grad_() for name, x in call.tensors.items()}
        outputs = python_ref.CELLS[cell](**leaves, **call.settings)
        grads = torch.autograd.grad(outputs, list(leaves.values()), (call.grad_h, call.grad_final))
        given = leaves | call.settings | {"grad_h": call.grad_h, "grad_final": call.grad_final}
        derived = python_ref.CELLS[cell].adjoint(**given)
        expected = dict(zip(("h", "final_state", *leaves), (*outputs, *grads), strict=True))
        assert derived.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(derived[name], expected[name], rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------ absolute terms


def test_absolute_terms_by_hand():
    # As in BY_HAND, with epsilon 1, s_0 = -5, G = (1, -1, 1). The terms of s sum to (6, 6, 7), of lambda to (3, 2, 1).
    c, b, m, s, alpha = column(2, 1, -3), column(1, 2, 1), column(1, 1, 1), state(-5), torch.ones(1).double()
    terms = python_ref.bmru.adjoint(
        candidate=c, threshold=b, initial_state=s, epsilon=1, alpha=-alpha, amplitude=m, surrogate_scale=1 / math.pi,
        grad_h=column(1, -1, 1), grad_final=state(0), term=abs,
    )  # fmt: skip
    expected = {
        "h": (6, 6, 7),
        "final_state": (7,),
        "candidate": ((3 / 2 + 6 / 5) / math.pi, 1 / math.pi, (1 / 5 + 1 / 5) / math.pi),
        "threshold": (3 / 2 / math.pi, 1 / math.pi, 1 / 5 / math.pi),
        "initial_state": (3,),
        "alpha": (19,),
        "amplitude": (3, 0, 1),
    }
    assert terms.keys() == expected.keys()
    for name, values in expected.items():
        values = torch.tensor(values, dtype=torch.float64)
        torch.testing.assert_close(terms[name].flatten(), values, rtol=1e-14, atol=0)


@pytest.mark.parametrize(("cell", "dtype", "form"), FORMS, ids=str)
@pytest.mark.parametrize("batch", [3, "packed"])
def test_absolute_terms_bound_the_values(cell, dtype, form, batch):
    call = inputs.case(cell, dtype, batch=batch, initial_state="real", reverse=True, **form).build()
    given = {**call.tensors, **call.settings, "grad_h": call.grad_h, "grad_final": call.grad_final}
    adjoint = python_ref.CELLS[cell].adjoint
    values, terms = adjoint(**given), adjoint(**given, term=abs)
    for name, value in values.items():
        assert (terms[name] >= value.abs() * (1 - 1e-12)).all(), name
    if form.get("epsilon") == 0:  # the state is a selected value, not a sum
        assert errors.same_values(terms["h"], values["h"].abs())
        assert errors.same_values(terms["final_state"], values["final_state"].abs())


# ------------------------------------------------------------------------------------------------ other outputs

#: A cell whose output is not a linear function of its state.
SQUASHED = replace(
    python_ref.linear_recurrence,
    output=lambda s, **_: s.tanh(),
    slope=lambda s, **_: 1 - s.tanh().square(),
)


def squashed_call(dtype: torch.dtype) -> inputs.Call:
    options = {"batch": "packed", "initial_state": "real", "reverse": True, "parameters": "as streams"}
    return inputs.case("linear_recurrence", dtype, **options).build()


def test_the_adjoint_of_an_output_that_is_not_the_state():
    call = squashed_call(torch.float64)
    leaves = {name: x.requires_grad_() for name, x in call.tensors.items()}
    outputs = SQUASHED(**leaves, **call.settings)
    grads = torch.autograd.grad(outputs, list(leaves.values()), (call.grad_h, call.grad_final))
    given = leaves | call.settings | {"grad_h": call.grad_h, "grad_final": call.grad_final}
    derived = SQUASHED.adjoint(**given)
    for name, expected in zip(("h", "final_state", *leaves), (*outputs, *grads), strict=True):
        torch.testing.assert_close(derived[name], expected, rtol=1e-12, atol=1e-12)


def test_the_terms_of_an_output_that_is_not_the_state():
    """The terms of h are |h| plus the slope at the state times the terms of the state beyond |s|."""
    call = squashed_call(torch.float32)
    given = {**call.tensors, **call.settings, "grad_h": call.grad_h, "grad_final": call.grad_final}
    values, terms = SQUASHED.adjoint(**given), SQUASHED.adjoint(**given, term=abs)
    of_state = python_ref.linear_recurrence.adjoint(**given, term=abs)["h"]
    size = values["h"].abs()
    slope = 1 - size.square()
    torch.testing.assert_close(terms["h"], size + slope * (of_state - size.atanh()))
    assert (terms["h"] >= size).all()
    h, _ = SQUASHED(**call.tensors, **call.settings, dtype=torch.float32)
    assert errors.judge(h, values["h"], terms["h"]).passed


def test_a_name_that_no_cell_takes_is_refused():
    with pytest.raises(TypeError, match=r"^bmru: expected some of candidate, .*, got colour$"):
        python_ref.bmru(C, B, colour="red")
