"""The reference against values worked out by hand: forward passes and edge rules."""

from __future__ import annotations

import pytest
import torch

import python_ref
from tests.by_hand import INF, NAN, B, C, assert_values, column, state


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


# Candidates in [1, 3) hold. The steps write 1 at a tie, hold, hold at a tie, write 0, hold, write 1, write 0.
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


def test_a_complex_linear_recurrence_rotates_its_state():
    w = column(1, 0, 0, 1j, 0)
    s, final_state = python_ref.linear_recurrence(torch.tensor([2j]), w, state(1), dtype=torch.float64)
    assert_values(s, 1 + 2j, -4 + 2j, -4 - 8j, 16 - 7j, 14 + 32j)
    assert_values(final_state, 14 + 32j)


def test_nan_in_any_input_of_a_linear_recurrence_stays():
    for a, w in ((column(0.5, NAN, 0, 0), W), (A, column(1, NAN, 4, 1))):
        s, final_state = python_ref.linear_recurrence(a, w, state(6))
        assert_values(s, 4, NAN, NAN, NAN)
        assert_values(final_state, NAN)


def test_alpha_scales_the_output_and_amplitude_scales_the_writes():
    alpha, amplitude = torch.tensor([10.0]), column(2, 3, 9, -1, 9, 7, 9)
    h, final_state = python_ref.bmru(C, B, epsilon=1, alpha=alpha, amplitude=amplitude)
    assert_values(h, 20, -10, -10, -20, -20, -90, -90)
    assert_values(final_state, -9)


def test_a_per_channel_threshold_applies_to_every_step():
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


# ------------------------------------------------------------------------------------------------ edge rules


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
    streams[argument][0, 2] = NAN  # a step that holds, with steps that write before and after it
    h, final_state = python_ref.bmru(**streams, epsilon=epsilon, reverse=reverse)
    before, after = (h[0, 3:], h[0, :3]) if reverse else (h[0, :2], h[0, 2:])
    assert torch.equal(before, clean[0, 3:] if reverse else clean[0, :2])
    assert after.isnan().all()
    assert_values(final_state, NAN)


@pytest.mark.parametrize("epsilon", [0, 0.5, 1])
@pytest.mark.parametrize("argument", ["threshold", "alpha", "initial_state"])
def test_a_nan_parameter_or_initial_state_lasts_from_the_first_step(epsilon, argument):
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
    assert_values(h, 1, *((-1, -1) if epsilon == 0 else (0, 0)))  # infinity against infinity is a tie, which writes
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


def test_arithmetic_is_in_float64_and_gradients_have_the_argument_dtype():
    c = torch.tensor([2.0], dtype=torch.bfloat16).view(1, 1, 1).requires_grad_()
    alpha = torch.tensor([1 / 3], dtype=torch.float32, requires_grad=True)
    h, final_state = python_ref.bmru(c, column(1), alpha=alpha)
    assert h.dtype == final_state.dtype == torch.float64
    h.sum().backward()
    assert c.grad.dtype == torch.bfloat16
    assert alpha.grad.dtype == torch.float32
    assert {x.dtype for x in python_ref.bmru(c, column(1), dtype=torch.float32)} == {torch.float32}
