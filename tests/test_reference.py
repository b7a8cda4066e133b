"""The reference itself, pinned by tables worked out by hand and by the hand-derived adjoint."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

import python_ref
from bench import errors, inputs
from python_ref.surrogate import select, sgn, unit_step

NAN, INF = math.nan, math.inf


def column(*values: complex) -> Tensor:
    """One channel of one sequence: `[1, T, 1]`."""
    return torch.tensor(values, dtype=_wide(values)).view(1, -1, 1)


def _wide(values: tuple) -> torch.dtype:
    return torch.complex128 if any(isinstance(x, complex) for x in values) else torch.float64


def state(*values: float) -> Tensor:
    """One channel of each of N sequences: `[N, 1]`."""
    return torch.tensor(values, dtype=torch.float64).view(-1, 1)


def assert_values(result: Tensor, *expected: complex) -> None:
    torch.testing.assert_close(
        result.flatten(), torch.tensor(expected, dtype=result.dtype), rtol=0, atol=0, equal_nan=True
    )


# ------------------------------------------------------------------------------------------ forward, by hand

# Write where |c| >= |b|: a +, a tie that writes -, a hold, a tie of zeros that writes +, a hold, a -, a hold.
C = column(3, -2, 1, 0, 0.5, -4, 0)
B = column(1, 2, 2, 0, -1, 1, 3)


@pytest.mark.parametrize(
    ("epsilon", "initial", "reverse", "expected", "final"),
    [
        (0, None, False, (1, -1, -1, 1, 1, -1, -1), -1),
        (1, None, False, (1, 0, 0, 1, 1, 0, 0), 0),
        (1, 5, False, (6, 5, 5, 6, 6, 5, 5), 5),
        (0.5, 4, False, (3, 0.5, 0.5, 1.25, 1.25, -0.375, -0.375), -0.375),
        (0, None, True, (1, -1, 1, 1, -1, -1, 0), 1),
        (1, None, True, (0, -1, 0, 0, -1, -1, 0), 0),
        (1, 5, True, (5, 4, 5, 5, 4, 4, 5), 5),
    ],
)
def test_states_by_hand(epsilon, initial, reverse, expected, final):
    initial = None if initial is None else state(initial)
    h, final_state = python_ref.bmru(C, B, initial, epsilon=epsilon, reverse=reverse)
    assert_values(h, *expected)
    assert_values(final_state, final)


# Between 1 and 3 hold: a tie that writes 1, a hold, a tie that holds, a 0, a hold, a 1, a 0.
LOW, HIGH = torch.tensor([1.0]), torch.tensor([3.0])
TRIGGER = column(3, 2, 1, 0.5, 2, 4, -1)


@pytest.mark.parametrize(
    ("epsilon", "initial", "reverse", "expected", "final"),
    [
        (0, None, False, (1, 1, 1, 0, 0, 1, 0), 0),
        (1, 5, False, (6, 6, 6, 6, 6, 7, 7), 7),
        (0.5, 4, False, (3, 3, 3, 1.5, 1.5, 1.75, 0.875), 0.875),
        (0, 7, True, (1, 0, 0, 0, 1, 1, 0), 1),
        (1, None, True, (2, 1, 1, 1, 1, 1, 0), 2),
    ],
)
def test_states_of_a_schmitt_trigger_by_hand(epsilon, initial, reverse, expected, final):
    initial = None if initial is None else state(initial)
    h, final_state = python_ref.schmitt(TRIGGER, LOW, HIGH, initial, epsilon=epsilon, reverse=reverse)
    assert_values(h, *expected)
    assert_values(final_state, final)


def test_a_schmitt_trigger_with_its_edges_crossed_never_holds():
    h, _ = python_ref.schmitt(TRIGGER, HIGH, LOW, state(5), alpha=torch.tensor([10.0]))
    assert_values(h, 10, 10, 10, 0, 10, 10, 0)


@pytest.mark.parametrize("where", ["candidate", "low", "high", "alpha"])
def test_nan_in_any_input_of_a_schmitt_trigger_makes_it_nan(where):
    given = {"candidate": TRIGGER.clone(), "low": LOW.clone(), "high": HIGH.clone(), "alpha": torch.ones(1)}
    given[where].view(-1)[1 if where == "candidate" else 0] = NAN
    h, final_state = python_ref.schmitt(**given)
    assert_values(h, *((1,) if where == "candidate" else (NAN,)), *[NAN] * 6)
    assert_values(final_state, NAN)


A = column(0.5, 2, 0, -1)
W = column(1, -3, 4, 0.5)


@pytest.mark.parametrize(
    ("initial", "reverse", "expected", "final"),
    [
        (None, False, (1, -1, 4, -3.5), -3.5),
        (6, False, (4, 5, 4, -3.5), -3.5),
        (2, True, (3.5, 5, 4, -1.5), 3.5),
    ],
)
def test_states_of_a_linear_recurrence_by_hand(initial, reverse, expected, final):
    initial = None if initial is None else state(initial)
    s, final_state = python_ref.linear_recurrence(A, W, initial, reverse=reverse)
    assert_values(s, *expected)
    assert_values(final_state, final)


def test_a_complex_linear_recurrence_turns_its_state():
    w = column(1, 0, 0, 1j, 0)
    s, final_state = python_ref.linear_recurrence(torch.tensor([2j]), w, state(1), dtype=torch.float64)
    assert_values(s, 1 + 2j, -4 + 2j, -4 - 8j, 16 - 7j, 14 + 32j)
    assert_values(final_state, 14 + 32j)


def test_nan_in_any_input_of_a_linear_recurrence_stays():
    for a, w in ((column(0.5, NAN, 0, 0), W), (A, column(1, NAN, 4, 1))):
        s, final_state = python_ref.linear_recurrence(a, w, state(6))
        assert_values(s, 4, NAN, NAN, NAN)
        assert_values(final_state, NAN)


def test_alpha_scales_the_output_alone_and_amplitude_what_is_written():
    alpha, amplitude = torch.tensor([10.0]), column(2, 3, 9, -1, 9, 7, 9)
    h, final_state = python_ref.bmru(C, B, epsilon=1, alpha=alpha, amplitude=amplitude)
    assert_values(h, 20, -10, -10, -20, -20, -90, -90)
    assert_values(final_state, -9)


def test_a_threshold_per_channel_is_that_of_every_step():
    c = column(1, -3, 1, 2)
    assert_values(python_ref.bmru(c, torch.tensor([2.0]), epsilon=1)[0], 0, -1, -1, 0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("reverse", "expected", "final"),
    [
        (False, (11, 10, 19, 20, 20, 19, 19), (10, 20, 19, 40)),
        (True, (10, 9, 19, 19, 18, 18, 19), (10, 20, 19, 40)),
    ],
)
def test_packed_sequences_by_hand(dtype, reverse, expected, final):
    offsets = torch.tensor([0, 2, 2, 7, 7], dtype=dtype)
    initial = state(10, 20, 19, 40)
    h, final_state = python_ref.bmru(C, B, initial, epsilon=1, reverse=reverse, cu_seqlens=offsets)
    assert_values(h, *expected)
    assert_values(final_state, *final)


# ------------------------------------------------------------------------------------------ edge rules


@pytest.mark.parametrize("epsilon", [0, 1])
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_both_zeros_write_plus_one(epsilon, zero):
    assert_values(python_ref.bmru(column(zero), column(0.0), epsilon=epsilon)[0], 1)
    assert_values(python_ref.bmru(column(zero), column(-0.0), epsilon=epsilon)[0], 1)


@pytest.mark.parametrize("epsilon", [0, 0.5, 1])
@pytest.mark.parametrize("argument", ["candidate", "threshold", "amplitude"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_nan_in_a_stream_lasts_from_its_step_on(epsilon, argument, reverse):
    streams = {"candidate": C.clone(), "threshold": B.clone(), "amplitude": torch.ones_like(C)}
    clean, _ = python_ref.bmru(**streams, epsilon=epsilon, reverse=reverse)
    streams[argument][0, 2] = NAN  # a step that holds; others before and after it write
    h, final_state = python_ref.bmru(**streams, epsilon=epsilon, reverse=reverse)
    before, after = (h[0, 3:], h[0, :3]) if reverse else (h[0, :2], h[0, 2:])
    assert torch.equal(before, clean[0, 3:] if reverse else clean[0, :2])
    assert after.isnan().all()
    assert_values(final_state, NAN)


@pytest.mark.parametrize("epsilon", [0, 0.5, 1])
@pytest.mark.parametrize("argument", ["threshold", "alpha", "initial_state"])
def test_a_nan_parameter_or_initial_state_is_there_from_the_start(epsilon, argument):
    two = C.expand(1, 7, 2)
    given = {"threshold": torch.ones(2), "alpha": torch.ones(2), "initial_state": torch.ones(1, 2)}
    clean, clean_final = python_ref.bmru(two, epsilon=epsilon, **given)
    given[argument][..., 1] = NAN
    h, final_state = python_ref.bmru(two, epsilon=epsilon, **given)
    assert torch.equal(h[..., 0], clean[..., 0])
    assert torch.equal(final_state[:, 0], clean_final[:, 0])
    assert h[..., 1].isnan().all()
    assert final_state[:, 1].isnan().all()


def test_a_nan_ends_with_its_sequence():
    c = C.clone()
    c[0, 1] = NAN
    h, final_state = python_ref.bmru(c, B, cu_seqlens=torch.tensor([0, 2, 2, 7]))
    assert_values(h, 1, NAN, 0, 1, 1, -1, -1)
    assert_values(final_state, NAN, 0, -1)


def test_a_nan_parameter_leaves_sequences_without_steps_alone():
    nan = torch.tensor([NAN])
    for given in ({"alpha": nan, "threshold": column(1)}, {"threshold": nan}):
        _, final_state = python_ref.bmru(
            column(1), initial_state=state(3, 4), cu_seqlens=torch.tensor([0, 0, 1]), **given
        )
        assert_values(final_state, 3, NAN)


@pytest.mark.parametrize("epsilon", [0, 1])
def test_infinite_candidates_write_and_have_no_slope(epsilon):
    c = column(INF, -INF, 0.5).requires_grad_()
    b = column(1, INF, 1).requires_grad_()
    h, _ = python_ref.bmru(c, b, epsilon=epsilon)
    assert_values(h, 1, *((-1, -1) if epsilon == 0 else (0, 0)))  # infinite against infinite is a tie
    h.sum().backward()
    assert c.grad[0, 0] == 0
    assert b.grad[0, 0] == 0
    assert c.grad[0, 2].isfinite()


def test_nothing_is_multiplied_by_zero():
    h, final_state = python_ref.bmru(column(0, 2), column(1, 1), state(INF), epsilon=0)
    assert_values(h, INF, 1)
    assert_values(final_state, 1)
    h, _ = python_ref.bmru(column(0, 2), column(1, 1), amplitude=column(INF, 1))
    assert_values(h, 0, 1)


@pytest.mark.parametrize(("batch", "time", "channels"), [(2, 0, 3), (0, 4, 3), (2, 4, 0)])
@pytest.mark.parametrize("reverse", [False, True])
def test_no_elements(batch, time, channels, reverse):
    c, b, m = (torch.randn(batch, time, channels, requires_grad=True) for _ in range(3))
    alpha = torch.randn(channels, requires_grad=True)
    initial = torch.randn(batch, channels, requires_grad=True)
    h, final_state = python_ref.bmru(c, b, initial, alpha=alpha, amplitude=m, reverse=reverse)
    assert h.shape == (batch, time, channels)
    assert torch.equal(final_state, initial.double())
    leaves = (c, b, m, alpha, initial)
    grads = torch.autograd.grad((h, final_state), leaves, (torch.ones_like(h), torch.ones_like(final_state)))
    assert [g.shape for g in grads] == [x.shape for x in leaves]
    assert all((g == 0).all() for g in grads[:-1])
    assert (grads[-1] == 1).all()


@pytest.mark.parametrize("offsets", [[0], [0, 0], [0, 0, 0]])
def test_packed_sequences_without_steps(offsets):
    sequences = len(offsets) - 1
    c, b = torch.randn(2, 1, 0, 3)
    initial = torch.randn(sequences, 3)
    h, final_state = python_ref.bmru(c, b, initial, cu_seqlens=torch.tensor(offsets))
    assert h.shape == (1, 0, 3)
    assert torch.equal(final_state, initial.double())


def test_arithmetic_is_in_float64_or_as_asked_and_gradients_in_the_arguments_dtype():
    c = torch.tensor([2.0], dtype=torch.bfloat16).view(1, 1, 1).requires_grad_()
    alpha = torch.tensor([1 / 3], dtype=torch.float32, requires_grad=True)
    h, final_state = python_ref.bmru(c, column(1), alpha=alpha)
    assert h.dtype == final_state.dtype == torch.float64
    h.sum().backward()
    assert c.grad.dtype == torch.bfloat16
    assert alpha.grad.dtype == torch.float32
    assert {x.dtype for x in python_ref.bmru(c, column(1), dtype=torch.float32)} == {torch.float32}


# ------------------------------------------------------------------------------------------ gradients


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
# c = (2, 1, -3), b = (1, 2, 1): write +, hold, write -; |c| - |b| = (1, -1, 2), slopes of the gate 1/2, 1/2,
# 1/5, of the sign twice 1/5, 1/2, 1/10. s_0 = 5, G = (1, 1, 1), F = 0.
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
    """Options of a cell: every optional input, each form of the others, and every value of epsilon."""
    factors = python_ref.CELLS[cell].factors
    values = {name: (True,) if set(x) == {False, True} else x for name, x in factors.items() if name != "writes"}
    values |= {"surrogate_scale": (1.5,), "epsilon": (0.0, 0.3, 1.0)}
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


# ------------------------------------------------------------------------------------------ absolute terms


def test_absolute_terms_by_hand():
    # As above with epsilon 1, s_0 = -5, G = (1, -1, 1): |s| adds up to (6, 6, 7), |lambda| to (3, 2, 1).
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
    if form.get("epsilon") == 0:  # a state sums nothing
        assert errors.same_values(terms["h"], values["h"].abs())
        assert errors.same_values(terms["final_state"], values["final_state"].abs())


# ------------------------------------------------------------------------------------------ other outputs

#: A cell whose output is not linear in its state.
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
    """To first order: |h| at least, and the slope at the state times the terms of the state."""
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
