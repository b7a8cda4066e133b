"""`mk.snn`: calls, layouts, options and errors, without snnTorch. tests/test_snntorch.py compares with it."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import math
import weakref

import pytest
import torch
from torch import nn

import mru_kernels as mk
from mru_kernels import snn
from mru_kernels.snn import surrogates

TIME, BATCH = 12, 3
MAKE = {
    "Leaky": lambda **o: snn.Leaky(0.9, **o),
    "Lapicque": lambda **o: snn.Lapicque(0.8, **o),
    "Synaptic": lambda **o: snn.Synaptic(0.8, 0.9, **o),
    "Alpha": lambda **o: snn.Alpha(0.9, 0.8, **{"reset_mechanism": "none", **o}),
}
STATES = {"Leaky": 1, "Lapicque": 1, "Synaptic": 2, "Alpha": 3}
all_neurons = pytest.mark.parametrize("name", MAKE)


def drawn(*features, dtype=torch.float32, time=TIME):
    return 3 * torch.randn(time, BATCH, *features, generator=torch.Generator().manual_seed(0)).to(dtype)


@all_neurons
def test_features_of_any_shape_and_strides(name):
    neuron, x = MAKE[name](), drawn(4, 5)
    expected = neuron(x)
    for other in (x.transpose(2, 3).contiguous().transpose(2, 3), x.transpose(0, 1).contiguous().transpose(0, 1)):
        for got, whole in zip(neuron(other), expected, strict=True):
            assert torch.equal(got, whole)
    for got, whole in zip(neuron(x.flatten(2)), expected, strict=True):
        assert torch.equal(got, whole.flatten(2))
        assert got.is_contiguous()


@all_neurons
def test_a_second_call_and_steps_continue_the_sequence(name):
    neuron, x = MAKE[name](), drawn(4, 5)
    whole = neuron(x)
    _, *states = neuron(x[:7])
    assert torch.equal(neuron(x[7:], *(s[-1] for s in states))[0], whole[0][7:])
    spikes, *states = neuron(x[:7], membrane=False)
    assert torch.equal(spikes, whole[0][:7])
    assert all(s.shape == (BATCH, 4, 5) for s in states)
    for t in range(7, TIME):
        spikes, *states = neuron.step(x[t], *states)
        assert torch.equal(spikes, whole[0][t])
        assert all(torch.equal(s, record[t]) for s, record in zip(states, whole[1:], strict=True))
    names = list(inspect.signature(neuron.forward).parameters)[1 : 1 + STATES[name]]
    assert torch.equal(neuron.step(x[t], **dict(zip(names, states, strict=True)))[0], neuron.step(x[t], *states)[0])
    assert not any(t.requires_grad for t in neuron.step(x[t].requires_grad_(), *states))


@all_neurons
def test_no_state_stays_in_a_module(name):
    neuron, x = MAKE[name](), drawn(4)
    before = copy.deepcopy(neuron.state_dict())
    first, second = neuron(x), neuron(x)
    assert all(map(torch.equal, first, second))
    assert neuron.state_dict().keys() == before.keys()
    assert all(torch.equal(neuron.state_dict()[key], before[key]) for key in before)
    start = neuron.reset_mem()
    assert start in (None, (None,) * STATES[name])
    init = getattr(neuron, {"Leaky": "init_leaky", "Lapicque": "init_lapicque"}.get(name, f"init_{name.lower()}"))
    assert init() == start
    alive = weakref.ref(neuron)
    del neuron, init
    gc.collect()
    assert alive() is None  # no list of instances keeps it


@all_neurons
def test_empty_sequences(name):
    neuron = MAKE[name]()
    for shape in ((0, 3, 4), (5, 0, 4), (5, 3, 0), (5, 3, 2, 0)):
        x = torch.zeros(shape, requires_grad=True)
        outputs = neuron(x)
        assert all(t.shape == shape for t in outputs)
        sum(t.sum() for t in outputs).backward()
        assert x.grad.shape == shape
    state = torch.rand(3, 4)
    given = [state] * STATES[name]
    _, *after = neuron(torch.zeros(0, 3, 4), *given, membrane=False)
    expected = given if name != "Alpha" else given[:2]
    assert all(map(torch.equal, after[: len(expected)], expected))


@all_neurons
def test_a_nan_stays_in_its_neuron(name):
    x = drawn(4)
    x[5, 1, 2] = math.nan
    for record in MAKE[name]()(x):
        assert record[5:, 1, 2].isnan().all()
        assert record[:5].isfinite().all()
        assert record.isnan().sum() == TIME - 5


@all_neurons
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, dtype):
    neuron, x = MAKE[name](), drawn(4, dtype=dtype)
    spikes, *states = neuron(x)
    assert {t.dtype for t in (spikes, *states)} == {dtype}
    assert set(spikes.unique().tolist()) == {0.0, 1.0}
    if name in ("Leaky", "Synaptic"):  # the others scale their input or membrane, which rounds
        exact, *_ = neuron(x.float())
        assert torch.equal(spikes, exact.to(dtype))
    neuron.to(dtype)
    assert neuron(x)[0].dtype == dtype


@all_neurons
def test_a_membrane_equal_to_the_threshold_does_not_spike(name):
    neuron, x = MAKE[name](), drawn(4)
    x = x[: 2 if name == "Alpha" else 1]  # its membrane is 0 in the first step
    *_, mem = neuron(x)
    neuron.threshold = mem.max()
    spikes, *_, again = neuron(x)
    assert again.max() == neuron.threshold > 0
    assert not spikes.any()


def test_the_reset_may_change_at_any_time():
    neuron, x = snn.Leaky(0.9), drawn(4)
    neuron.reset_mechanism = "zero"
    assert int(neuron.reset_mechanism_val) == 1
    assert torch.equal(neuron(x)[1], snn.Leaky(0.9, reset_mechanism="zero")(x)[1])
    with pytest.raises(ValueError, match=r"^reset_mechanism: expected one of 'subtract', 'zero', 'none', got 'soft'"):
        neuron.reset_mechanism = "soft"


def test_values_that_are_learned():
    neuron = snn.Synaptic(torch.rand(5), 1, learn_alpha=True, learn_beta=True, learn_threshold=True)
    assert {n for n, _ in neuron.named_parameters()} == {"alpha", "beta", "threshold"}
    sum(t.sum() for t in neuron(drawn(4, 5))).backward()
    for p in neuron.parameters():
        assert p.grad.shape == p.shape
        assert p.grad.isfinite().all()
    assert {n for n, _ in snn.Leaky(0.9).named_buffers()} == {
        "beta", "threshold", "graded_spikes_factor", "reset_mechanism_val",
    }  # fmt: skip


def test_copies_files_and_devices():
    neuron, x = snn.Leaky(torch.rand(4), graded_spikes_factor=2.0, reset_mechanism="zero"), drawn(4)
    file = io.BytesIO()
    torch.save(neuron, file)
    file.seek(0)
    for other in (copy.deepcopy(neuron), torch.load(file, weights_only=False)):
        assert torch.equal(other(x)[0], neuron(x)[0])
    meta = snn.Leaky(torch.rand(4), graded_spikes_factor=2.0).to("meta")
    meta.load_state_dict(neuron.state_dict(), assign=True)
    assert meta.reset_mechanism == "zero"
    assert torch.equal(meta(x)[0], neuron(x)[0])


def test_repr():
    assert repr(snn.Leaky(0.9)) == "Leaky(beta=0.9, threshold=1, spike_grad='atan', reset_mechanism='subtract')"
    assert repr(snn.Synaptic(0.8, torch.rand(3), spike_grad="sigmoid", reset_mechanism="zero")) == (
        "Synaptic(alpha=0.8, beta=[3], threshold=1, spike_grad='sigmoid', reset_mechanism='zero')"
    )


def test_a_compiled_neuron():
    neuron, x = snn.Leaky(0.9, learn_beta=True), drawn(4)
    compiled = torch.compile(neuron, backend="eager", fullgraph=True)
    assert all(map(torch.equal, compiled(x), neuron(x)))


def test_surrogates_and_slopes():
    assert surrogates.surrogate(None, None) == ("atan", 1.0)
    assert surrogates.surrogate("fast_sigmoid", None) == ("fast_sigmoid", 25.0)
    assert surrogates.surrogate("sigmoid", 3) == ("sigmoid", 3.0)
    x = drawn(4).requires_grad_()
    beta, threshold = torch.full((4,), 0.9), torch.ones(4)
    spikes, _ = mk.lif(x.transpose(0, 1), beta, threshold, surrogate="sigmoid", surrogate_scale=3.0)
    (expected,) = torch.autograd.grad(spikes.sum(), x)
    (got,) = torch.autograd.grad(snn.Leaky(0.9, spike_grad="sigmoid", slope=3)(x)[0].sum(), x)
    assert torch.equal(got, expected)


# ------------------------------------------------------------------------------------------------ errors

BAD = [
    (lambda: snn.Leaky(), TypeError, "Leaky: missing a required argument: 'beta'"),
    (lambda: snn.Leaky(0.9, betta=1), TypeError, "Leaky: unknown argument 'betta'; did you mean 'beta'"),
    (lambda: snn.Leaky("fast"), TypeError, "beta: expected a float or a tensor, got str"),
    (lambda: snn.Leaky(0.9, threshold=None), TypeError, "threshold: expected a float or a tensor, got NoneType"),
    (lambda: snn.Leaky(0.9, learn_beta=1), TypeError, "learn_beta: expected"),
    (lambda: snn.Leaky(0.9, init_hidden=True), ValueError, "init_hidden: expected False, got True; no state lives"),
    (lambda: snn.Leaky(0.9, inhibition=True), ValueError, "inhibition: expected False, got True; only the neuron"),
    (lambda: snn.Leaky(0.9, state_quant=round), ValueError, "state_quant: expected False, got <built-in.*; its func"),
    (lambda: snn.Leaky(0.9, reset_delay=False), ValueError, "reset_delay: expected True, got False; its reset takes"),
    (lambda: snn.Leaky(0.9, spike_grad=3), TypeError, "spike_grad: expected a name, a function of snntorch.surrogate"),
    (lambda: snn.Leaky(0.9, spike_grad="SSO"), ValueError, "spike_grad: expected one of 'atan', "),
    (lambda: snn.Leaky(0.9, spike_grad=nn.functional.relu), ValueError, "spike_grad: expected one of atan, .*got relu"),
    (lambda: snn.Leaky(0.9, slope=0), ValueError, "slope: expected a positive finite number, got 0"),
    (lambda: snn.Leaky(0.9, slope="2"), TypeError, "slope: expected a float, got str"),
    (lambda: snn.Leaky(0.9, reset_mechanism="soft"), ValueError, "reset_mechanism: expected one of 'subtract', 'zero'"),
    (lambda: snn.Lapicque(), ValueError, "beta, R, C: expected beta, or two of the three, got none"),
    (lambda: snn.Lapicque(R=2.0), ValueError, "beta, R, C: expected beta, or two of the three, got R"),
    (lambda: snn.Lapicque(0.9, 1.0, 1.0), ValueError, "beta, R, C: expected .* got beta and R and C"),
    (lambda: snn.Lapicque(0.9, learn_beta=True), ValueError, "learn_beta: expected False, got True; beta enters"),
    (lambda: snn.Alpha(0.9, 0.8), ValueError, "reset_mechanism: expected one of 'none', got 'zero'"),
    (lambda: snn.Alpha(0.8, 0.9, reset_mechanism="none"), ValueError, "alpha, beta: expected 0 < beta < alpha < 1"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=f"^{message}"):
        make()


CALLS = [
    ((3,), TypeError, r"input_: expected a tensor \[time, batch, ...\], got int"),
    ((torch.zeros(5, 3),), ValueError, r"input_: expected \[time, batch, ...\] with features, got shape \[5, 3\]"),
    ((torch.zeros(5, 3, 4), 3), TypeError, "(mem|syn|syn_exc): expected a tensor or None, got int"),
    (
        (torch.zeros(5, 3, 4), torch.zeros(5, 3, 4)),
        ValueError,
        r"(mem|syn|syn_exc): expected shape \[3, 4\] \[batch, ...\], the state before a sequence, got \[5, 3, 4\]",
    ),
    ((torch.zeros(5, 3, 4, dtype=torch.int64),), TypeError, "input: expected a dtype of"),
]


@all_neurons
@pytest.mark.parametrize(("arguments", "error", "message"), CALLS)
def test_bad_calls(name, arguments, error, message):
    with pytest.raises(error, match=f"^{message}"):
        MAKE[name]()(*arguments)


def test_values_that_do_not_fit_the_features():
    with pytest.raises(ValueError, match=r"^beta: expected one value or a shape that broadcasts .*\[4\], got \[3\]"):
        snn.Leaky(torch.rand(3))(drawn(4))
    with pytest.raises(TypeError, match=r"^threshold: expected a dtype of float32, got torch.float64"):
        snn.Leaky(0.9, torch.rand(4).double())(drawn(4))
    with pytest.raises(TypeError, match=r"^input_: expected a tensor \[batch, ...\], got int"):
        snn.Leaky(0.9).step(3)
