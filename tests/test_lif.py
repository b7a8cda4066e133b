"""Leaky integrate-and-fire neurons: what tests of every cell do not show."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

import mru_kernels as mk
import python_ref
from bench import compare, errors, inputs, verify
from mru_kernels.cells.lif import RESETS
from mru_kernels.cells.spikes import SURROGATES
from tests import calls
from tests.by_hand import INF, NAN, assert_values, column

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float64]
MODES = list(product(RESETS, (True, False), SURROGATES, (False, True)))


def neurons(dtype: torch.dtype, time: int = 300, batch: int = 3, channels: int = 21) -> dict[str, Tensor]:
    """Currents, decays, thresholds and initial states, some of these above the threshold."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.rand(shape, generator=generator, dtype=dtype)  # noqa: E731
    return {
        "input": draw(batch, time, channels), "beta": draw(channels), "threshold": 0.3 + draw(channels),
        "initial_state": 2 * draw(batch, channels),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("membrane", [False, "only"])
@pytest.mark.parametrize("reset", RESETS)
def test_the_adjoint_equals_autograd_for_all_combinations(reset, membrane):
    for detach, surrogate, tie in product((True, False), SURROGATES, (False, True)):
        options = {"reset": reset, "detach_reset": detach, "surrogate": surrogate, "tie": tie, "membrane": membrane}
        sizes = {"time": 5, "batch": 2, "channels": 9, "initial_state": "real", "parameters": "as streams"}
        call = inputs.case("lif", torch.float64, surrogate_scale=1.5, **sizes, **options).build()
        by_autograd = compare.results_of(call, python_ref.lif)
        by_hand = python_ref.lif.adjoint(**call.tensors, **call.settings, **compare.grads_of(call))
        for name, expected in by_autograd.items():
            torch.testing.assert_close(by_hand[name], expected, rtol=1e-12, atol=1e-12, msg=f"{name} {options}")


@pytest.mark.parametrize("name", ["cpu", "torch"])
@pytest.mark.parametrize("membrane", [False, "only"])
@pytest.mark.parametrize("reset", RESETS)
def test_all_combinations_equal_the_reference(reset, membrane, name):
    sizes = {"time": 4, "batch": 2, "channels": 9, "initial_state": "real"}
    for i, (_, detach, surrogate, tie) in enumerate(mode for mode in MODES if mode[0] == reset):
        options = {"reset": reset, "detach_reset": detach, "surrogate": surrogate, "tie": tie, "membrane": membrane}
        call = inputs.case("lif", DTYPES[i % 2], seed=i, surrogate_scale=1.5, **sizes, **options).build()
        calls.assert_right(call, calls.op_of("lif", name), CPU)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["cpu", "torch"])
@pytest.mark.parametrize("k", [1.0, 2.5, 1e-30, 1e30])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_slopes(surrogate, k, name, dtype):
    """At the threshold, elsewhere, and where the membrane is infinite; for any steepness."""
    x = torch.tensor([0.0, 0.3, -0.3, 1.0, -2.0, 1e-3, INF, -INF], dtype=dtype, requires_grad=True)
    h, _ = mk.lif(
        x.view(1, 1, -1), torch.zeros(8), torch.zeros(8), surrogate=surrogate, surrogate_scale=k, backend=name
    )
    (got,) = torch.autograd.grad(h.sum(), x)
    far = k * x.detach().double().abs()
    expected = {
        "atan": k / (1 + (math.pi * far).square()),
        "fast_sigmoid": 1 / (1 + far).square(),
        "sigmoid": k * (-far).exp() / (1 + (-far).exp()).square(),
        "triangle": k * (1 - far).clamp(min=0),
        "straight_through": torch.ones(8, dtype=torch.float64),
    }[surrogate]
    limit = errors.LIMITS[dtype]
    torch.testing.assert_close(got, expected.to(dtype), rtol=20 * limit, atol=1e-38)
    assert (got[-2:] == (surrogate == "straight_through")).all()


def test_gradients_of_both_outputs_add_up():
    given = {name: t.requires_grad_() for name, t in neurons(torch.float64).items()}
    (spikes, membranes), state = mk.lif(**given, reset="zero", detach_reset=False, membrane=True)
    g = torch.randn(2, *spikes.shape, dtype=torch.float64)
    got = torch.autograd.grad((spikes, membranes, state), list(given.values()), (g[0], g[1], state.detach()))
    one, last = mk.lif(**given, reset="zero", detach_reset=False)
    other, _ = mk.lif(**given, reset="zero", detach_reset=False, membrane="only")
    assert torch.equal(one, spikes)
    assert torch.equal(other, membranes)
    assert torch.equal(membranes[:, -1], state)
    apart = torch.autograd.grad((one, last), list(given.values()), (g[0], state.detach()), retain_graph=True)
    more = torch.autograd.grad(other, list(given.values()), g[1])
    for a, b, c in zip(got, apart, more, strict=True):
        torch.testing.assert_close(a, b + c)


# ------------------------------------------------------------------------------------------ the same bits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reset", RESETS)
def test_the_forward_pass_is_the_same_bits_everywhere(reset, dtype):
    """As a loop in torch, for every chunk, number of threads, batch, direction and length; and step by step."""
    given = neurons(dtype)
    one, last = mk.lif(**given, reset=reset, membrane="only", backend="torch")
    spikes = (one > given["threshold"]).to(dtype)

    def check(got: tuple[Tensor, Tensor], expected: Tensor, of_state: Tensor) -> None:
        assert torch.equal(got[0], expected)
        assert torch.equal(got[1], of_state)

    for chunk, threads in ((16, 1), (64, 2), (4096, 3)):
        with verify.threads(threads):
            check(mk.lif(**given, reset=reset, chunk_size=chunk), spikes, last)
            check(mk.lif(**given, reset=reset, chunk_size=chunk, membrane="only"), one, last)
    backwards = given | {"input": given["input"].flip(1)}
    check(mk.lif(**backwards, reset=reset, reverse=True), spikes.flip(1), last)
    check(mk.lif(**{n: t[1:2] if t.dim() > 1 else t for n, t in given.items()}, reset=reset), spikes[1:2], last[1:2])
    for steps in (0, 64):
        with calls.segments("cpu", steps):
            check(mk.lif(**given, reset=reset), spikes, last)
    vectors, state = (given["beta"], given["threshold"]), given["initial_state"]
    for t in range(20):
        h, state = mk.lif_step(given["input"][:, t], *vectors, state, reset=reset)
        check((h, state), spikes[:, t], one[:, t])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
def test_spikes_and_membranes_are_those_of_snntorch(reset, dtype):
    snntorch = pytest.importorskip("snntorch")
    given = neurons(dtype)
    neuron = snntorch.Leaky(beta=given["beta"], threshold=given["threshold"], reset_mechanism=reset)
    state, rows = given["initial_state"], []
    for x in given["input"].unbind(1):
        spike, state = neuron(x, state)
        rows.append((spike.to(dtype), state))
    spikes, membranes = (torch.stack(row, 1) for row in zip(*rows, strict=True))
    got, last = mk.lif(**given, reset=reset, membrane=True)
    assert torch.equal(got[0], spikes)
    assert torch.equal(got[1], membranes)
    assert torch.equal(last, state)
    assert 0.01 < spikes.mean() < 0.99


@pytest.mark.parametrize(("tau", "limit"), [(2.0, 0.0), (3.7, 1e-14)])
def test_spikes_and_gradients_are_those_of_spikingjelly(tau, limit):
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    surrogate = pytest.importorskip("spikingjelly.activation_based.surrogate")
    node = neuron.LIFNode(tau=tau, decay_input=False, v_reset=None, step_mode="m", surrogate_function=surrogate.ATan())
    x = (2 * neurons(torch.float64)["input"]).requires_grad_()
    spikes = node(x.transpose(0, 1)).transpose(0, 1)
    beta = torch.full((21,), 1 - 1 / tau, dtype=torch.float64)
    threshold = torch.ones_like(beta)
    h, _ = mk.lif(x, beta, threshold, reset="subtract_decayed", tie=True, detach_reset=False)
    assert torch.equal(h, spikes)
    g = torch.randn_like(h)
    got, expected = (torch.autograd.grad(y, x, g)[0] for y in (h, spikes))
    assert (got - expected).abs().max() <= limit + 1e-15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_membranes_decide_before_they_are_rounded(dtype):
    given = neurons(torch.float32)
    given["input"] = given["input"].to(dtype)
    (spikes, membranes), state = mk.lif(**given, membrane=True)
    wide = given | {"input": given["input"].float()}
    (expected, exact), last = mk.lif(**wide, membrane=True)
    assert torch.equal(spikes.float(), expected)
    assert torch.equal(membranes, exact.to(dtype))
    assert torch.equal(state, last)
    assert ((membranes.float() > given["threshold"]) != (expected == 1)).any()


# ------------------------------------------------------------------------------------------ edges


@pytest.mark.parametrize("name", ["cpu", "torch"])
@pytest.mark.parametrize(
    ("reset", "spikes", "final"),
    [
        ("none", (1, 1, 1, 1, 1), 1.015625),
        ("subtract", (0, 0, 1, 0, 0), 0.453125),
        ("subtract_decayed", (0, 1, 0, 1, 0), 0.359375),
        ("zero", (0, 0, 1, 1, 0), 0),
        ("zero_input", (0, 0, 1, 0, 0), 0),
    ],
)
def test_states_by_hand(reset, spikes, final, name):
    """The initial membrane is above the threshold: the first step resets it."""
    x, initial = column(0.25, 0.75, 0.875, 1.25, 0.0), torch.tensor([[2.0]]).double()
    beta, threshold = torch.tensor([0.5]).double(), torch.tensor([1.0]).double()
    for h, state in (
        mk.lif(x.double(), beta, threshold, initial, reset=reset, backend=name),
        python_ref.lif(x.double(), beta, threshold, initial, reset=reset),
    ):
        assert_values(h, *spikes)
        assert_values(state, final)


@pytest.mark.parametrize("name", ["cpu", "torch"])
@pytest.mark.parametrize("tie", [False, True])
def test_a_tie_spikes_if_asked_to(tie, name):
    h, _ = mk.lif(column(1, 1, 1).float(), torch.zeros(1), torch.ones(1), tie=tie, reset="none", backend=name)
    assert_values(h, *[int(tie)] * 3)
    h, _ = mk.lif(column(1, 1, 1).float(), torch.zeros(1), torch.ones(1), tie=tie, backend=name)
    assert_values(h, int(tie), 0, int(tie))


@pytest.mark.parametrize("name", ["cpu", "torch"])
@pytest.mark.parametrize("reset", RESETS)
def test_nan_stays_in_every_reset(reset, name):
    given = {"input": column(0, 2, 0, 3).float(), "beta": torch.ones(1), "threshold": torch.ones(1)}
    for argument in given:
        spoilt = dict(given, initial_state=torch.full((1, 1), 2.0))  # above the threshold
        spoilt[argument] = given[argument].clone()
        spoilt[argument].view(-1)[2 if argument == "input" else 0] = NAN
        h, state = mk.lif(**spoilt, reset=reset, backend=name)
        start = 2 if argument == "input" else 0
        assert h[0, start:].isnan().all(), argument
        assert not h[0, :start].isnan().any(), argument
        assert state.isnan().all(), argument


@pytest.mark.parametrize("name", ["cpu", "torch"])
@pytest.mark.parametrize("reset", ["zero", "zero_input"])
def test_an_infinite_input_spikes_once_and_is_gone(reset, name):
    x = column(INF, 0.25, 0.5).double().requires_grad_()
    leaves = x, *(torch.tensor([v]).double().requires_grad_() for v in (0.5, 1.0))
    h, state = mk.lif(*leaves, reset=reset, detach_reset=reset == "zero_input", backend=name)
    assert_values(h.detach(), 1, 0, 0)
    assert_values(state.detach(), 0.625 if reset == "zero" else 0.5)
    for grad in torch.autograd.grad((h.sum(), state.sum()), leaves):
        assert grad.isfinite().all()


@pytest.mark.parametrize(("batch", "time", "channels"), [(2, 0, 3), (0, 4, 3), (2, 4, 0)])
def test_no_elements(batch, time, channels):
    shapes = ((batch, time, channels), (channels,), (channels,), (batch, channels))
    leaves = [torch.rand(shape, requires_grad=True) for shape in shapes]
    (spikes, membranes), state = mk.lif(*leaves, membrane=True)
    assert spikes.shape == membranes.shape == (batch, time, channels)
    assert torch.equal(state, leaves[-1]) or time
    grads = torch.autograd.grad((spikes, membranes, state), leaves, (spikes, membranes, torch.ones_like(state)))
    assert all((grad == 0).all() for grad in grads[:-1])
    assert (grads[-1] == 1).all()


# ------------------------------------------------------------------------------------------ bad input

GOOD = {"input": torch.rand(2, 5, 3), "beta": torch.rand(3), "threshold": torch.rand(3)}
BAD = [
    ({"reset": "soft"}, ValueError, "reset: expected one of none, subtract, subtract_decayed, zero, zero_input, got"),
    ({"reset": 1}, TypeError, "reset: expected a name, got int"),
    ({"reset": []}, TypeError, "reset: expected a name, got list"),
    ({"surrogate": "arctan"}, ValueError, "surrogate: expected one of atan, fast_sigmoid, sigmoid, triangle, straight"),
    ({"surrogate": "SFS"}, ValueError, "got 'SFS', a surrogate of snnTorch without a kernel here"),
    ({"surrogate": torch.sigmoid}, TypeError, "surrogate: expected a name, got builtin_function_or_method"),
    ({"surrogate_scale": 0.0}, ValueError, "surrogate_scale: expected a positive finite number, got 0.0"),
    ({"tie": None}, TypeError, "tie: expected a bool, got NoneType"),
    ({"detach_reset": "no"}, TypeError, "detach_reset: expected a bool, got str"),
    ({"membrane": "too"}, ValueError, "membrane: expected a bool or 'only', got 'too'"),
    ({"input": torch.rand(2, 5, 3, dtype=torch.complex64)}, TypeError, "input: expected"),
    ({"beta": torch.rand(4)}, ValueError, "beta: expected"),
    ({"threshold": torch.rand(2, 5, 3)}, ValueError, "threshold: expected"),
]  # fmt: skip


@pytest.mark.parametrize("name", ["cpu", "torch"])
@pytest.mark.parametrize(("changed", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input_names_the_argument(changed, error, message, name):
    with pytest.raises(error, match=message):
        mk.lif(**GOOD | changed, backend=name)


def test_a_second_derivative_is_refused():
    leaves = [t.double().requires_grad_() for t in GOOD.values()]
    h, _ = mk.lif(*leaves)
    (grad,) = torch.autograd.grad(h.sum(), leaves[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="lif: there is no second derivative"):
        grad.sum().backward()


def test_packed_sequences_are_apart():
    given = neurons(torch.float32, batch=1)
    offsets = torch.tensor([0, 100, 100, 257, 300])
    initial = torch.rand(4, 21) * 2
    call = inputs.call("lif", given | {"initial_state": initial}, {"cu_seqlens": offsets, "reset": "zero"})
    h, state = mk.lif(**call.tensors, **call.settings)
    for n in range(4):
        part = slice(*offsets[n : n + 2].tolist())
        own = replace(call, tensors=given | {"input": given["input"][:, part], "initial_state": initial[n : n + 1]})
        one, last = mk.lif(**own.tensors, reset="zero")
        assert torch.equal(one, h[:, part])
        assert torch.equal(last, state[n : n + 1])
