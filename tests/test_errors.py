"""How a result is judged: its error, the limits of the error, and where equality is required."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bench import errors, inputs

NAN, INF = math.nan, math.inf
DTYPES = list(inputs.DTYPES.values())


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ the error


def test_error_is_the_rms_of_the_difference_over_the_rms_of_the_terms():
    reference, terms = f64(1, 2, -3, 4), f64(10, 20, 30, 40)
    result = reference + f64(0.1, -0.1, 0.3, 0.5)
    expected = math.sqrt(0.36 / 4) / math.sqrt(3000 / 4)
    assert errors.relative_error(result, reference, terms) == pytest.approx(expected, rel=1e-12)


def test_the_error_is_robust_to_cancellation_and_a_zero_reference():
    cancelled = errors.relative_error(f64(1e-9), f64(0), f64(1))
    assert cancelled == pytest.approx(1e-9)
    assert errors.relative_error(f64(0), f64(0), f64(0)) == 0
    assert errors.relative_error(f64(1e-30), f64(0), f64(0)) > 1  # any value is wrong where the terms add up to nothing
    assert errors.relative_error(f64(), f64(), f64()) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_to_the_result_is_within_the_limit_down_to_its_smallest_numbers(dtype):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    smallest = torch.finfo(dtype).smallest_normal
    for size in (1.0, 1e-3, smallest, smallest / 50):
        assert errors.judge((size * x).to(dtype), size * x, (size * x).abs()).passed
    assert not errors.judge((1.02 * x).to(dtype), x, x.abs()).passed


@pytest.mark.parametrize(
    ("result", "reference", "met"),
    [
        ((1, NAN), (1, NAN), True),
        ((1, NAN), (1, 2), False),
        ((NAN, NAN), (1, 2), False),
        ((1, 2), (1, NAN), False),
        ((NAN, 1), (1, NAN), False),
        ((1, INF), (1, INF), True),
        ((1, -INF), (1, INF), False),
        ((1, INF), (1, 1e30), False),
        ((1, 1e30), (1, INF), False),
        ((1, NAN), (1, INF), False),
        ((1, INF), (1, NAN), False),
        ((NAN, INF), (NAN, INF), True),
        ((2, NAN), (1, NAN), False),
    ],
)
def test_nan_and_infinities_are_where_the_reference_has_them(result, reference, met):
    for dtype in (torch.float32, torch.float64):
        given = torch.tensor(result, dtype=dtype), f64(*reference), f64(*reference).abs()
        assert errors.judge(*given).passed is met
        assert not math.isnan(errors.relative_error(*given))
        assert errors.judge_exact(*given, torch.float64).passed is met


def test_an_overflow_of_the_result_is_infinite():
    reference = f64(1, 70000, -70000)
    for second, expected in ((INF, 0), (65504, INF)):
        result = torch.tensor([1, second, -INF], dtype=torch.float16)
        assert errors.relative_error(result, reference, reference.abs()) == expected


def test_non_finite_terms_do_not_hide_an_error():
    for terms in (f64(1, INF), f64(1, NAN)):
        assert errors.relative_error(f64(1, 3), f64(1, 2), terms) == INF


def test_a_result_of_another_shape_does_not_pass():
    assert errors.relative_error(f64(1), f64(1, 1), f64(1, 1)) == INF
    assert not errors.judge_exact(f64(1), f64(1, 1), f64(1, 1), torch.float64).passed


# ------------------------------------------------------------------------------------------------ limits


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)],
)
def test_limits(dtype, limit):
    reference = torch.ones(4, dtype=torch.float64)
    for share, met in ((0.8, True), (1.2, False)):
        # The terms set the relative error, because not every dtype represents a difference this small.
        difference = 2.0**-4 * torch.ones(4, dtype=torch.float64)
        result = (reference + difference).to(dtype)
        verdict = errors.judge(result, reference, difference / (share * limit))
        assert verdict.limit == limit
        assert verdict.error == pytest.approx(share * limit)
        assert verdict.passed is met


@pytest.mark.parametrize("dtype", DTYPES)
def test_twice_the_error_of_a_float32_loop_is_accepted_where_larger(dtype):
    reference = torch.ones(4, dtype=torch.float64)
    result, loop = (1.25 * reference).to(dtype), (1.125 * reference).float()
    assert errors.judge(result, reference, reference, lambda: loop).passed is (dtype != torch.float64)
    result = (1.375 * reference).to(dtype)
    assert not errors.judge(result, reference, reference, lambda: loop).passed
    assert not errors.judge(result, reference, reference, lambda: torch.full((4,), NAN)).passed


def test_the_float32_loop_does_not_run_where_it_cannot_decide():
    def loop():
        raise AssertionError

    one = f64(1)
    assert errors.judge(one.float(), one, one, loop).passed
    assert not errors.judge(2 * one, one, one, loop).passed


# ------------------------------------------------------------------------------------------------ equality


def test_equality_ignores_the_sign_of_zero_and_nothing_else():
    assert errors.same_values(f64(0, NAN, 1), f64(-0.0, NAN, 1))
    assert not errors.same_values(f64(1), f64(1 + 2**-52))
    assert not errors.same_values(f64(1, 1), f64(1))


def test_exact_results_are_rounded_to_the_state_and_then_once_more():
    # Rounded to bfloat16 at once, the reference goes up. Rounded to float32 first, it is a tie and goes to even.
    reference = f64(1 + 2.0**-8 + 2.0**-30)
    for result, met in ((1.0, True), (1 + 2.0**-7, False)):
        result = torch.tensor([result], dtype=torch.bfloat16)
        assert errors.judge_exact(result, reference, reference, torch.float32).passed is met


@pytest.mark.parametrize(
    ("epsilon", "amplitude", "initial_state", "time", "state", "exact"),
    [
        (0.0, False, None, 10, torch.float32, True),
        (0.0, True, f64(0.3), 2**25, torch.float32, True),
        (0.5, False, None, 10, torch.float64, False),
        (None, False, None, 10, torch.float64, False),
        (1.0, False, None, 10, torch.float32, True),
        (1.0, True, None, 10, torch.float32, False),
        (1.0, False, f64(3, -7, -0.0), 10, torch.float32, True),
        (1.0, False, f64(3, 0.5), 10, torch.float32, False),
        (1.0, False, f64(3, NAN), 10, torch.float32, True),
        (1.0, False, f64(3, INF), 10, torch.float32, False),
        (1.0, False, f64(-(2.0**24) + 10), 10, torch.float32, True),
        (1.0, False, f64(-(2.0**24) + 10), 11, torch.float32, False),
        (1.0, False, f64(-(2.0**24) + 10), 11, torch.float64, True),
        (1.0, False, f64(2.0**53), 1, torch.float64, False),
        (1.0, False, torch.empty(0, 3), 0, torch.float32, True),
    ],
)
def test_where_the_forward_pass_is_exact(epsilon, amplitude, initial_state, time, state, exact):
    assert exact is errors.is_exact(
        epsilon=epsilon, amplitude=amplitude, states=[] if initial_state is None else [initial_state], time=time,
        state=state,
    )  # fmt: skip
