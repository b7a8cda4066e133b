"""`mk.synaptic` and `mk.synaptic_step` against a loop over time in torch, and their errors."""

from __future__ import annotations

import itertools

import pytest
import torch

import mru_kernels as mk
from mru_kernels.cells.lif import RESETS
from mru_kernels.cells.spikes import spike

BATCH, TIME, CHANNELS = 3, 40, 6


def drawn(dtype=torch.float64, batch=BATCH, time=TIME):
    torch.manual_seed(0)
    x = 0.8 * torch.randn(batch, time, CHANNELS)
    vectors = torch.rand(CHANNELS), torch.rand(CHANNELS), 0.5 + torch.rand(CHANNELS)
    states = 2 * torch.randn(batch, CHANNELS), 2 * torch.rand(batch, CHANNELS)
    return x.to(dtype), [v.to(dtype) for v in vectors], [s.to(dtype) for s in states]


def loop(x, alpha, beta, threshold, states, *, reset="subtract", tie=False, detach_reset=True, surrogate="atan"):
    """Spikes, currents and membranes of every step."""
    Y, U = states  # noqa: N806
    S = spike(U, threshold.expand_as(U), tie, surrogate, 1.0)  # noqa: N806
    records = []
    for current in x.unbind(1):
        if detach_reset:
            S = S.detach()  # noqa: N806
        Y = alpha * Y + current  # noqa: N806
        U = {  # noqa: N806
            "none": beta * U + Y,
            "subtract": beta * U + Y - threshold * S,
            "subtract_decayed": beta * (U - threshold * S) + Y,
            "zero": beta * U * (1 - S) + Y,
            "zero_input": (beta * U + Y) * (1 - S),
        }[reset]
        S = spike(U, threshold.expand_as(U), tie, surrogate, 1.0)  # noqa: N806
        records.append((S, Y, U))
    return tuple(torch.stack(record, 1) for record in zip(*records, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reset", RESETS)
def test_spikes_currents_and_membranes_are_those_of_a_loop_bit_for_bit(reset, dtype):
    x, vectors, states = drawn(dtype)
    expected = loop(x, *vectors, states, reset=reset)
    got, final = mk.synaptic(x, *vectors, tuple(states), reset=reset, membrane=True)
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert 0.05 < got[0].mean() < 0.9
    for ours, theirs in zip(final, expected[1:], strict=True):
        assert torch.equal(ours, theirs[:, -1])
    spikes, _ = mk.synaptic(x, *vectors, tuple(states), reset=reset)
    assert torch.equal(spikes, got[0])


@pytest.mark.parametrize(("reset", "detach_reset"), list(itertools.product(RESETS, [True, False])))
def test_gradients_are_those_of_the_loop(reset, detach_reset):
    x, vectors, states = drawn()
    leaves = [t.requires_grad_() for t in (x, *vectors, *states)]
    options = {"reset": reset, "detach_reset": detach_reset, "surrogate": "fast_sigmoid"}
    expected = loop(x, *vectors, states, **options)
    got, final = mk.synaptic(x, *vectors, tuple(states), membrane=True, **options)
    outputs = (*got, *final), (*expected, *(record[:, -1] for record in expected[1:]))
    weights = [torch.randn_like(o) for o in outputs[0]]
    grads = [torch.autograd.grad(o, leaves, weights, retain_graph=True) for o in outputs]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        assert ours.count_nonzero()


def test_reverse_packed_sequences_and_resets():
    x, vectors, states = drawn()
    whole = mk.synaptic(x, *vectors, tuple(states), membrane=True)
    flipped, final = mk.synaptic(x.flip(1), *vectors, tuple(states), membrane=True, reverse=True)
    assert all(torch.equal(a.flip(1), b) for a, b in zip(flipped, whole[0], strict=True))
    assert all(map(torch.equal, final, whole[1]))
    packed, final = mk.synaptic(
        x.flatten(0, 1).unsqueeze(0), *vectors, tuple(states), membrane=True, cu_seqlens=torch.tensor([0, 40, 80, 120])
    )
    assert all(torch.equal(a.view_as(x), b) for a, b in zip(packed, whole[0], strict=True))
    assert all(map(torch.equal, final, whole[1]))
    resets = torch.zeros(BATCH, TIME, dtype=torch.bool)
    resets[:, 25] = True
    begun = torch.rand(CHANNELS, dtype=torch.float64), torch.full((CHANNELS,), 3.0, dtype=torch.float64)
    cut = mk.synaptic(x, *vectors, tuple(states), resets=resets, reset_state=begun)
    after = mk.synaptic(x[:, 25:], *vectors, tuple(s.expand(BATCH, -1) for s in begun))
    assert torch.equal(cut[0][:, 25:], after[0])
    assert all(map(torch.equal, cut[1], after[1]))


def test_parts_and_steps_continue_the_sequence():
    x, vectors, states = drawn()
    whole, final = mk.synaptic(x, *vectors, tuple(states), reset="zero_input", tie=True)
    first, state = mk.synaptic(x[:, :33], *vectors, tuple(states), reset="zero_input", tie=True)
    pieces = [first]
    for step in x[:, 33:].unbind(1):
        spikes, state = mk.synaptic_step(step, *vectors, state, reset="zero_input", tie=True)
        pieces.append(spikes.unsqueeze(1))
    assert torch.equal(torch.cat(pieces, 1), whole)
    assert all(map(torch.equal, state, final))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_the_spikes_of_float32(dtype):
    x, vectors, states = drawn(dtype)
    wide = [v.float() for v in vectors]
    (spikes, currents, membranes), final = mk.synaptic(x, *vectors, tuple(states), membrane=True)
    expected, expected_final = mk.synaptic(x.float(), *wide, tuple(s.float() for s in states), membrane=True)
    assert {t.dtype for t in (spikes, currents, membranes)} == {dtype}
    for got, exact in zip((spikes, currents, membranes), expected, strict=True):
        assert torch.equal(got, exact.to(dtype))
    assert all(map(torch.equal, final, expected_final))
    with torch.autocast("cpu", torch.bfloat16):
        (spikes, *_), final = mk.synaptic(x.float(), *wide, membrane=True)
    assert spikes.dtype == torch.bfloat16
    assert final[0].dtype == torch.float32
    step, state = mk.synaptic_step(x[:, 0], *vectors, tuple(s.float() for s in states))
    assert step.dtype == dtype
    assert state[0].dtype == state[1].dtype == torch.float32


def test_empty_and_not_finite():
    x, vectors, states = drawn(torch.float32)
    spikes, final = mk.synaptic(x[:, :0], *vectors, tuple(states))
    assert spikes.shape == (BATCH, 0, CHANNELS)
    assert all(map(torch.equal, final, states))
    x[0, 5, 0], x[1, 5, 1] = float("nan"), float("inf")
    (spikes, currents, membranes), _ = mk.synaptic(x, *vectors, membrane=True)
    for t in (spikes, currents, membranes):
        assert t[0, 5:, 0].isnan().all()
        assert t[0, :5, 0].isfinite().all()
    assert spikes[1, 5, 1] == 1
    assert spikes[2].isfinite().all()


ONES = torch.ones(CHANNELS)
BAD = [
    ({"input": 3}, TypeError, r"input: expected a tensor \[batch, time, channels\], got int"),
    ({"input": torch.zeros(2, 3, 6, dtype=torch.int64)}, TypeError, "input: expected a dtype of"),
    ({"alpha": 0.9}, TypeError, "alpha: expected a tensor"),
    ({"alpha": torch.ones(5)}, ValueError, r"alpha: expected shape \[6\] \[channels\], got \[5\]"),
    ({"alpha": ONES.double()}, TypeError, "alpha: expected a dtype of float32, got torch.float64"),
    ({"beta": torch.ones(5)}, ValueError, r"beta: expected shape \[6\]"),
    ({"threshold": ONES.double()}, TypeError, "threshold: expected"),
    ({"initial_state": torch.zeros(2, 6)}, TypeError, "initial_state: expected a pair of current and membrane, got Te"),
    ({"initial_state": (None,)}, TypeError, "initial_state: expected a pair of current and membrane, got 1 values"),
    ({"initial_state": (None, torch.zeros(3, 6))}, ValueError, r"initial_state: expected shape \[2, 6\]"),
    ({"reset": "soft"}, ValueError, "reset: expected one of none, "),
    ({"surrogate": "SSO"}, ValueError, "surrogate: expected one of atan"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), BAD)
def test_bad_input(wrong, error, message):
    arguments = {"input": torch.zeros(2, 3, 6), "alpha": ONES, "beta": ONES, "threshold": ONES, **wrong}
    with pytest.raises(error, match=f"^{message}"):
        mk.synaptic(**arguments)
    if wrong.keys() & {"alpha", "beta", "threshold"}:
        with pytest.raises(error, match=f"^{message}"):
            mk.synaptic_step(**{**arguments, "input": torch.zeros(2, 6)}, state=(torch.zeros(2, 6),) * 2)
