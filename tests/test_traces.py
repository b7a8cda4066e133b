"""`mk.stream(module, gradient="traces")`: the gradients of all chunks sum to those of one pass over the whole."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import mru_kernels as mk
from mru_kernels.nn import traces
from mru_kernels.streaming import traced
from tests.traced_gradients import CUTS, KINDS, Gradients, close, differ, draw, drawn, gradients, loss, streamed, whole


class Leaky(mk.nn.MRUBase):
    """A unit of a user. Both of its vectors have the same gradient."""

    gates = {"update": None}
    per_channel = {"decay": 0.5, "more_decay": 0.3}

    def _scan(self, gates, initial_state, *, decay, more_decay, **options):
        return mk.linear_recurrence(decay + more_decay, gates, initial_state, **options)


# ------------------------------------------------------------------------------------------------ exact


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_one_layer_is_exact(kind, batch):
    cls, options = KINDS[kind]
    module, x = drawn(cls, 4, 6, **options), draw(batch, 24, 4)
    time = 1
    if not module.batch_first:
        x, time = x.transpose(0, 1), 0
    output, h_n = module(x)
    loss(output, time=time).backward()
    expected = gradients(module)
    for name, cuts in CUTS.items():
        feed = mk.stream(module, gradient="traces")
        streamed(feed, x, cuts, time=time)
        close(gradients(module), expected)
        torch.testing.assert_close(feed.state, h_n, rtol=1e-12, atol=1e-12)
        streamed(mk.stream(module), x, cuts, time=time)
        assert differ(gradients(module), expected, "weight_ih_l0") == (name != "whole")


def test_a_unit_of_a_user_is_exact():
    module, x = drawn(Leaky, 4, 6), draw(3, 24, 4)
    expected = whole(module, x)
    streamed(mk.stream(module, gradient="traces"), x, CUTS["unequal"])
    close(gradients(module), expected)


def test_real_vectors_of_complex_states_raise():
    class Rotating(mk.LRU):
        def _vectors(self, p):
            return super()._vectors(p) | {"nu": p["nu_log"]}

        def _scan(self, gates, initial_state, *, nu, **options):
            return super()._scan(gates, initial_state, **options)

    with pytest.raises(TypeError, match=r"^nu: expected a complex tensor"):
        mk.stream(Rotating(3, 4), gradient="traces")(torch.randn(2, 5, 3))


def test_units_side_by_side_are_exact():
    """So is all above the units; what is below them has the gradient of the chunks only."""
    units = ("bmru", "alpha_cmru", "schmitt", "min_lstm", "lru")
    module, x = drawn(mk.MRUBlock, 4, units=units, conv_size=3), draw(3, 24, 4)
    expected = whole(module, x)
    streamed(mk.stream(module, gradient="traces"), x, CUTS["one step"])
    got = gradients(module)
    close(got, expected, lambda name: not name.startswith(("norm.", "conv.")))
    assert differ(got, expected, "norm.weight")
    assert differ(got, expected, "conv.weight")


def test_no_batch():
    module, x = drawn(mk.MinGRU, 4, 6), draw(24, 4)
    loss(module(x)[0], time=0).backward()
    expected = gradients(module)
    feed = mk.stream(module, gradient="traces")
    resets = {8: torch.tensor(False)}
    streamed(feed, x, CUTS["equal"], resets, time=0)
    close(gradients(module), expected)
    feed(x[:8], torch.tensor(True))
    torch.testing.assert_close(feed.state, module(x[:8])[1])


def test_chunks_without_gradient_advance_the_traces():
    module, x = drawn(mk.FirstQuadrantBMRU, 4, 6), draw(3, 24, 4)
    loss(module(x)[0][:, 16:], 16).backward()
    expected = gradients(module)
    feed = mk.stream(module, gradient="traces")
    with torch.no_grad():
        assert not feed(x[:, :16]).requires_grad
    loss(feed(x[:, 16:]), 16).backward()
    close(gradients(module), expected)


def test_parameters_that_are_frozen_have_no_gradient():
    module, x = drawn(mk.BMRU, 4, 6, epsilon=0.5), draw(3, 24, 4)
    expected = whole(module, x)
    module.weight_ih_l0.requires_grad_(False)
    streamed(mk.stream(module, gradient="traces"), x, CUTS["equal"])
    assert module.weight_ih_l0.grad is None
    torch.testing.assert_close(module.bias_ih_l0.grad, expected["bias_ih_l0"], rtol=1e-12, atol=1e-12)
    assert not mk.stream(module.requires_grad_(False), gradient="traces")(x).requires_grad


# ------------------------------------------------------------------------------------------------ several layers


def through_the_layer_above(module: mk.nn.MRUBase, x: Tensor, cuts: Sequence[int]) -> Gradients:
    """Of the gradients of layer 0 of 2, what passes the starts of chunks in the state of layer 1."""
    lower = {name: p for name, p in module.named_parameters() if name.endswith("_l0")}
    missing = {name: torch.zeros_like(p) for name, p in lower.items()}
    start = cuts[0]
    for steps in cuts[1:]:
        _, state = module(x[:, :start])
        entry = state.detach().requires_grad_()
        output, _ = module(x[:, start : start + steps], entry)
        (of_state,) = torch.autograd.grad(loss(output, start), entry)
        found = torch.autograd.grad(state[1], list(lower.values()), of_state[1], materialize_grads=True)
        for name, grad in zip(lower, found, strict=True):
            missing[name] += grad
        start += steps
    return missing


@pytest.mark.parametrize("kind", ["BMRU, epsilon 0.5", "FirstQuadrantBMRU", "MinGRU", "LRU"])
def test_of_two_layers_the_lower_one_misses_the_paths_through_the_state_above(kind):
    cls, options = KINDS[kind]
    module, x = drawn(cls, 4, 6, 2, **options), draw(3, 24, 4)
    expected = whole(module, x)
    for cuts in ([1] * 24, [5, 12, 7]):
        streamed(mk.stream(module, gradient="traces"), x, cuts)
        got = gradients(module)
        close(got, expected, lambda name: name.endswith("_l1"))
        missing = through_the_layer_above(module, x, cuts)
        recurrent = [n for n in missing if not n.startswith(("weight_ho", "skip", "alpha"))]  # these act on the output
        close({n: got[n] + missing[n] for n in recurrent}, {n: expected[n] for n in recurrent})
        assert any(differ(got, expected, n) for n in recurrent)


def test_of_a_network_the_last_units_and_all_above_are_exact():
    module, x = drawn(mk.MRUNetwork, 4, 3, width=4, num_blocks=2, units=("cmru", "min_gru"), pool=None), draw(3, 24, 4)
    expected = whole(module, x)
    streamed(mk.stream(module, gradient="traces"), x, [5, 12, 7])
    got = gradients(module)
    exact = ("blocks.1.units", "blocks.1.gate", "blocks.1.out", "blocks.1.mlp", "norm", "head")
    close(got, expected, lambda name: name.startswith(exact))
    others = [name for name in expected if not name.startswith(exact)]
    assert all(differ(got, expected, name) for name in others if "alpha" not in name)
    streamed(mk.stream(module), x, [5, 12, 7])
    truncated = gradients(module)

    def distance(other: Gradients) -> float:
        return sum((other[n] - expected[n]).norm().item() for n in others)

    assert distance(got) < distance(truncated)


# ------------------------------------------------------------------------------------------------ new sequences

RESETS = {8: torch.tensor([True, False, False]), 16: torch.tensor([True, False, True])}
SEQUENCES = [[8, 8, 8], [24], [16, 8]]  # steps of the sequences in each row


def alone(module: torch.nn.Module, x: Tensor) -> tuple[Gradients, Tensor]:
    """Gradients and outputs of the sequences of `SEQUENCES`, each in a call of its own."""
    outputs = []
    for row, steps in zip(x, SEQUENCES, strict=True):
        pieces = [module(piece.unsqueeze(0))[0] for piece in row.split(steps)]
        outputs.append(torch.cat(pieces, 1))
    output = torch.cat(outputs)
    loss(output).backward()
    return gradients(module), output.detach()


@pytest.mark.parametrize("kind", KINDS)
def test_resets_begin_new_sequences(kind):
    cls, options = KINDS[kind]
    module, x = drawn(cls, 4, 6, **options | {"batch_first": True}), draw(3, 24, 4)
    expected, _ = alone(module, x)
    streamed(mk.stream(module, gradient="traces"), x, CUTS["equal"], RESETS)
    close(gradients(module), expected)


@pytest.mark.parametrize("gradient", [None, "traces"])
def test_resets_restart_every_state(gradient):
    module, x = (
        drawn(mk.MRUNetwork, 4, 3, width=4, num_blocks=2, units=("cmru", "lru", "gru"), conv_size=3),
        draw(3, 24, 4),
    )
    if gradient:
        module = drawn(mk.MRUNetwork, 4, 3, width=4, num_blocks=2, units=("cmru", "lru"), conv_size=3)
    _, expected = alone(module, x)
    feed = mk.stream(module, gradient=gradient)
    outputs = [feed(chunk, RESETS.get(8 * i)) for i, chunk in enumerate(x.split(8, 1))]
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=1e-12, atol=1e-12)


def test_after_a_reset_the_first_state_has_its_gradient_without_traces_too():
    module, x = drawn(mk.CMRU, 4, 6, 2), draw(3, 8, 4)
    expected = whole(module, x)
    feed = mk.stream(module)
    feed(x)
    loss(feed(x, torch.ones(3, dtype=torch.bool))).backward()
    close(gradients(module), expected)


def test_reset_drops_the_traces():
    module, x = drawn(mk.BMRU, 4, 6), draw(3, 24, 4)
    expected = whole(module, x)
    feed = mk.stream(module, gradient="traces")
    feed(x)
    feed.reset()
    assert feed.traces is None
    streamed(feed, x, CUTS["equal"])
    close(gradients(module), expected)


@pytest.mark.parametrize(
    ("resets", "error"),
    [
        ([True], TypeError), (torch.ones(3), TypeError), (torch.ones(2, dtype=torch.bool), ValueError),
        (torch.ones(1, 3, dtype=torch.bool), ValueError), (torch.ones(3, dtype=torch.bool, device="meta"), ValueError),
    ],
)  # fmt: skip
def test_resets_that_do_not_fit_raise(resets, error):
    feed, x = mk.stream(drawn(mk.LRU, 4, 6), gradient="traces"), draw(3, 8, 4)
    feed(x)
    before = feed.state
    with pytest.raises(error, match=r"^resets: expected"):
        feed(x, resets)
    assert feed.state is before


# ------------------------------------------------------------------------------------------------ faults are seen


def decay_dropped(past, before, x, of_gates, of_state, of_vectors):
    return ADVANCED(past, before, x, of_gates, torch.ones_like(of_state), of_vectors)


def inputs_dropped(past, before, x, of_gates, of_state, of_vectors):
    return ADVANCED(past, before, x, torch.zeros_like(of_gates), of_state, of_vectors)


def vectors_dropped(past, before, x, of_gates, of_state, of_vectors):
    return ADVANCED(past, before, x, of_gates, of_state, {n: torch.zeros_like(t) for n, t in of_vectors.items()})


def all_to_zero(before, resets):
    return {name: t * ~resets.reshape(-1, *[1] * (t.dim() - 1)) for name, t in before.items()}


ADVANCED = traces._advanced
FAULTS = [
    (traces, "_advanced", decay_dropped), (traces, "_advanced", inputs_dropped), (traces, "_advanced", vectors_dropped),
    (traced, "restarted", lambda traces, resets: traces),
    (traced, "restarted", all_to_zero),
]  # fmt: skip


@pytest.mark.parametrize(("module", "function", "fault"), FAULTS)
@pytest.mark.parametrize("kind", ["FirstQuadrantBMRU, epsilon 0.5", "LRU"])
def test_a_planted_fault_is_seen(monkeypatch, kind, module, function, fault):
    """A trace that is not decayed, lacks a chunk, is not reset, or is reset to 0 for the initial state."""
    monkeypatch.setattr(module, function, fault)
    with pytest.raises(AssertionError):
        test_resets_begin_new_sequences(kind)
