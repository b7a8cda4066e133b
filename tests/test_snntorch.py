"""`mk.snn` and `mk.synaptic` against snnTorch 1.0: spikes and states bit for bit, gradients, state dicts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mru_kernels as mk

snntorch = pytest.importorskip("snntorch", reason="snntorch, the peer of these tests, is not installed")

TIME, BATCH, FEATURES = 40, 3, (4, 2)
PER_NEURON = {"threshold": torch.linspace(0.4, 1.5, 8).view(FEATURES)}
DECAYS = torch.linspace(0.3, 0.99, 8).view(FEATURES)
#: Class, arguments, scale of the input, number of states.
CASES = [
    ("Leaky", {"beta": 0.9}, 1.5, 1),
    ("Leaky", {"beta": DECAYS, **PER_NEURON}, 1.5, 1),
    ("Leaky", {"beta": torch.tensor([0.8, 1.3]), "graded_spikes_factor": 0.5}, 1.5, 1),  # clamped; broadcasts
    ("Lapicque", {"beta": 0.9}, 6.0, 1),
    ("Lapicque", {"R": 5.1, "C": 0.5, "time_step": 0.1, **PER_NEURON}, 3.0, 1),
    ("Lapicque", {"beta": 0.8, "R": 2.0}, 3.0, 1),
    ("Lapicque", {"beta": 0.8, "C": 3.0, "time_step": 2}, 3.0, 1),
    ("Synaptic", {"alpha": 0.8, "beta": 0.9}, 0.7, 2),
    ("Synaptic", {"alpha": DECAYS.flip(0), "beta": DECAYS, **PER_NEURON}, 0.7, 2),
    ("Alpha", {"alpha": 0.9, "beta": 0.8}, 1.5, 3),
]
RESETS = {"Alpha": ["none"]}
CALLS = [
    pytest.param(name, {**options, "reset_mechanism": reset}, scale, states, id=f"{name}{i}-{reset}")
    for i, (name, options, scale, states) in enumerate(CASES)
    for reset in RESETS.get(name, ["subtract", "zero", "none"])
]
SURROGATES = {
    "atan": lambda: snntorch.surrogate.atan(alpha=3.0),
    "fast_sigmoid": lambda: snntorch.surrogate.fast_sigmoid(slope=10),
    "sigmoid": lambda: snntorch.surrogate.sigmoid(slope=4),
    "straight_through": lambda: snntorch.surrogate.straight_through_estimator(),
}
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def drawn(scale, states, dtype=torch.float32, time=TIME, features=FEATURES):
    """A sequence, and initial states, many of them above the threshold. Their values are those of float32."""
    torch.manual_seed(0)
    x = (scale * torch.randn(time, BATCH, *features)).to(dtype)
    return x, [3 * torch.rand(BATCH, *features).to(dtype) for _ in range(states)]


def looped(neuron, x, states):
    """What snnTorch's users stack: spikes and states of every step."""
    records = []
    for step in x.unbind():
        spikes, *states = neuron(step, *states)
        records.append((spikes, *states))
    return [torch.stack(record) for record in zip(*records, strict=True)]


def assert_equal(got, expected):
    assert len(got) == len(expected)
    for i, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(ours, theirs.to(ours.dtype)), i  # spikes of snnTorch are float32, whatever the input


@both_dtypes
@pytest.mark.parametrize(("name", "options", "scale", "states"), CALLS)
def test_spikes_and_states_are_those_of_snntorch_bit_for_bit(name, options, scale, states, dtype):
    theirs, ours = getattr(snntorch, name)(**options), getattr(mk.snn, name)(**options)
    x, initial = drawn(scale, states, dtype)
    for start in (initial, [None] * states):
        expected = looped(theirs, x, start)
        assert 0.02 < expected[0].count_nonzero() / x.numel() < 0.9
        got = ours(x, *start)
        assert got[0].dtype == dtype
        assert_equal(got, expected)
        theirs.reset_mem()
    assert_equal(ours(x, *start, membrane=False)[1:], [record[-1] for record in expected[1:]])
    stepped = looped(type("Step", (), {"__call__": lambda _, *a: ours.step(*a)})(), x[:5], start)
    assert_equal(stepped, [record[:5] for record in expected])
    assert_equal(mk.snn.from_snntorch(theirs)(x, *start), expected)


#: The first call with every surrogate, the others with one each.
WITH_SURROGATE = [
    pytest.param(surrogate, *call.values, id=f"{call.id}-{surrogate}")
    for i, call in enumerate(CALLS)
    for j, surrogate in enumerate(SURROGATES)
    if i == 0 or i % len(SURROGATES) == j
]


@pytest.mark.parametrize(("surrogate", "name", "options", "scale", "states"), WITH_SURROGATE)
def test_gradients_are_those_of_snntorch(surrogate, name, options, scale, states):
    learned = {"Leaky": ["beta"], "Synaptic": ["alpha", "beta"]}.get(name, [])  # their Alpha cannot learn its decays
    learn = dict.fromkeys([f"learn_{n}" for n in [*learned, "threshold"]], True)
    theirs = getattr(snntorch, name)(**options, **learn, spike_grad=SURROGATES[surrogate]()).double()
    x, initial = drawn(scale, states, torch.float64)
    leaves = [t.requires_grad_() for t in (x, *initial)]
    results = []
    for neuron, run in ((theirs, looped), (mk.snn.from_snntorch(theirs), lambda n, x, s: n(x, *s))):
        outputs = run(neuron, x, initial)
        torch.manual_seed(1)
        weights = [torch.randn(TIME, BATCH, *FEATURES).to(o.dtype) for o in outputs]
        named = dict(sorted(neuron.named_parameters()))
        inputs = [*leaves, *named.values()]
        results.append(torch.autograd.grad(outputs, inputs, weights, allow_unused=True, materialize_grads=True))
    for leaf, expected, got in zip(inputs, *results, strict=True):
        name = next((name for name, p in named.items() if p is leaf), "input or state")
        in_float32 = name == "threshold" and leaf.dim() == 0  # theirs multiplies it by spikes of float32
        limit = 1e-5 if in_float32 else 1e-11
        torch.testing.assert_close(got, expected, rtol=limit, atol=limit, msg=lambda m, name=name: f"{name}: {m}")


def test_a_learned_factor_of_spikes_has_the_gradient_of_snntorch():
    theirs = snntorch.Leaky(0.9, graded_spikes_factor=1.0, learn_graded_spikes_factor=True)
    ours = mk.snn.Leaky(0.9, graded_spikes_factor=1.0, learn_graded_spikes_factor=True)
    x, _ = drawn(1.5, 1)
    spikes, _ = ours(x)
    spikes.square().sum().backward()
    looped(theirs, x, [None])[0].square().sum().backward()
    assert theirs.graded_spikes_factor.grad != 0
    torch.testing.assert_close(ours.graded_spikes_factor.grad, theirs.graded_spikes_factor.grad)


def test_surrogate_disable_cuts_the_gradient_of_spikes_only():
    options = {"beta": 0.9, "surrogate_disable": True}
    theirs, ours = snntorch.Leaky(**options), mk.snn.Leaky(**options)
    x, _ = drawn(1.5, 1)
    x.requires_grad_()
    spikes, mem = ours(x)
    assert not spikes.requires_grad
    expected = looped(theirs, x, [None])
    assert_equal((spikes, mem), expected)
    assert_equal(mk.snn.from_snntorch(theirs)(x), expected)
    grads = [torch.autograd.grad(m.sum(), x)[0] for m in (mem, expected[1])]
    torch.testing.assert_close(*grads)


# ------------------------------------------------------------------------------------------------ state dicts, models


@pytest.mark.parametrize(("name", "options", "scale", "states"), CALLS)
def test_state_dicts_go_both_ways(name, options, scale, states):
    other = {**options, "threshold": torch.full_like(torch.as_tensor(options.get("threshold", 1.0)), 0.6)}
    theirs, ours = getattr(snntorch, name)(**options), getattr(mk.snn, name)(**other)
    x, initial = drawn(scale, states)
    ours.load_state_dict(theirs.state_dict())
    expected = looped(theirs, x, initial)
    assert_equal(ours(x, *initial), expected)
    loaded = getattr(snntorch, name)(**other)
    loaded.load_state_dict(ours.state_dict())
    assert_equal(looped(loaded, x, initial), expected)


def test_a_state_dict_sets_the_reset_and_the_factor():
    """In snnTorch the reset of a loaded neuron is that of its constructor."""
    ours = mk.snn.Leaky(0.9)
    theirs = snntorch.Leaky(0.9, reset_mechanism="zero", graded_spikes_factor=0.5)
    ours.load_state_dict(theirs.state_dict())
    assert ours.reset_mechanism == "zero"
    x, initial = drawn(1.5, 1)
    assert_equal(ours(x, *initial), looped(theirs, x, initial))
    with pytest.raises(ValueError, match=r"^reset_mechanism: expected one of 'none', got 'zero'"):
        mk.snn.Alpha(0.9, 0.8, reset_mechanism="none").load_state_dict(snntorch.Alpha(0.9, 0.8).state_dict())


class Model(nn.Module):
    """A tutorial's model, whose forward pass is without its loop over time."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.lif1 = snntorch.Leaky(beta=torch.rand(8), learn_beta=True)
        self.fc2 = nn.Linear(8, 4)
        self.others = nn.ModuleList([snntorch.Synaptic(0.8, 0.9, spike_grad=snntorch.surrogate.fast_sigmoid())])
        self.again = [self.lif1]

    def forward(self, x):
        mem1 = self.lif1.init_leaky()
        syn2, mem2 = self.others[0].reset_mem()
        spk1, mem1 = self.lif1(self.fc1(x), mem1)
        return self.others[0](self.fc2(spk1), syn2, mem2)

    def looped(self, x):
        mem1, (syn2, mem2), records = self.lif1.reset_mem(), self.others[0].reset_mem(), []
        for step in x.unbind():
            spk1, mem1 = self.lif1(self.fc1(step), mem1)
            records.append(self.others[0](self.fc2(spk1), syn2, mem2))
            _, syn2, mem2 = records[-1]
        return [torch.stack(record) for record in zip(*records, strict=True)]


def test_a_model_trains_alike():
    torch.manual_seed(0)
    model = Model()
    instances = len(snntorch.SpikingNeuron.instances)
    ours = mk.snn.from_snntorch(model)
    assert len(snntorch.SpikingNeuron.instances) == instances
    assert isinstance(ours, Model)
    assert ours.again[0] is ours.lif1
    assert type(ours.lif1) is mk.snn.Leaky
    assert ours.state_dict().keys() == model.state_dict().keys()
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in model.named_parameters()]
    x = 2 * torch.randn(30, 5, 6)
    torch.testing.assert_close(ours(x), tuple(model.looped(x)))  # matrix products of other sizes round differently
    for module, run in ((ours, ours), (model, model.looped)):
        spikes, _, mem = run(x)
        (spikes.mean() + mem.square().mean()).backward()
        assert module.lif1.beta.grad.abs().sum() > 0
    for (name, a), (_, b) in zip(ours.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_training_mode_and_frozen_parameters_are_kept():
    theirs = snntorch.Leaky(0.9, learn_beta=True, learn_threshold=True).eval()
    theirs.beta.requires_grad_(False)
    ours = mk.snn.from_snntorch(theirs)
    assert not ours.training
    assert isinstance(ours.beta, nn.Parameter)
    assert not ours.beta.requires_grad
    assert ours.threshold.requires_grad
    assert ours.beta is not theirs.beta


class Mine(snntorch.Leaky):
    """A user's neuron, which may compute anything."""


def set_later():
    neuron = snntorch.Leaky(0.9)
    neuron.reset_mechanism = "zero"  # their setter changes nothing that is computed
    return neuron


REFUSED = [
    (lambda: snntorch.Leaky(0.9, init_hidden=True), ValueError, "module: init_hidden: expected False, got True; no st"),
    (lambda: snntorch.Leaky(0.9, state_quant=torch.round), ValueError, "module: state_quant: expected False, got "),
    (
        lambda: snntorch.Leaky(0.9, reset_delay=False),
        ValueError,
        "module: reset_delay: expected True.*subtract_decayed",
    ),
    (lambda: snntorch.Alpha(0.9, 0.8), ValueError, "module: reset_mechanism: expected one of 'none', got 'zero'"),
    (lambda: snntorch.Lapicque(0.9, learn_beta=True), ValueError, "module: learn_beta: expected False, got True"),
    (
        lambda: snntorch.Leaky(0.9, spike_grad=snntorch.surrogate.SSO()),
        ValueError,
        "module: spike_grad: expected one of atan, .*straight_through_estimator of snntorch.surrogate, got SSO",
    ),
    (
        lambda: nn.Sequential(nn.Linear(2, 2), snntorch.RLeaky(0.9, linear_features=2)),
        TypeError,
        "module.1: expected one of Leaky, Lapicque, Synaptic, Alpha of snnTorch, got RLeaky",
    ),
    (lambda: Mine(0.9), TypeError, "module: expected one of Leaky, .* of snnTorch, got Mine"),
    (set_later, ValueError, "module: reset_mechanism: expected 'subtract', .* got 'zero', set later"),
    (lambda: nn.Linear(2, 2), ValueError, "module: expected a neuron of snnTorch or a module that contains one"),
    (lambda: 3, TypeError, "module: expected a torch.nn.Module, got int"),
]


@pytest.mark.parametrize(("make", "error", "message"), REFUSED)
def test_what_has_no_counterpart_is_refused_by_name(make, error, message):
    with pytest.raises(error, match=f"^{message}"):
        mk.snn.from_snntorch(make())


def test_inhibition_is_refused():
    with pytest.warns(UserWarning, match="Inhibition"):
        theirs = snntorch.Leaky(0.9, inhibition=True)
    with pytest.raises(ValueError, match=r"^module: inhibition: expected False, got True; only the neuron"):
        mk.snn.from_snntorch(theirs)
