"""Cells that `define_cell` makes: equal to the cells by hand and to their own definitions, with every option."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import mru_kernels as mk
from bench import inputs
from mru_kernels import backends
from mru_kernels.define import comparison
from mru_kernels.define.plain import plain
from mru_kernels.define.torch_language import evaluate
from mru_kernels.define.trace import Functions, trace
from tests import calls
from tests.test_derivatives import hessian_products

DTYPES = list(inputs.DTYPES.values())


def bistable(candidate: Tensor, threshold: Tensor) -> mk.Write:
    return mk.Write(mk.heaviside(candidate.abs(), threshold=threshold.abs()), mk.sign(candidate))


def schmitt(candidate: Tensor, low: Tensor, high: Tensor) -> mk.Write:
    above_low, above_high = (mk.heaviside(candidate, threshold=edge) for edge in (low, high))
    return mk.Write(1 - above_low * (1 - above_high), above_high)


def leaky(input: Tensor, decay: Tensor) -> mk.Affine:
    return mk.Affine(decay, input)


def min_gru(candidate: Tensor, update: Tensor) -> mk.Affine:
    z = update.sigmoid()
    return mk.Affine(1 - z, z * torch.where(candidate >= 0, candidate + 0.5, candidate.sigmoid()))


def scaled(state: Tensor, gain: Tensor, power: Tensor) -> Tensor:
    return gain * state * power


BISTABLE = mk.define_cell("test_bistable", bistable)
LEAKY = mk.define_cell("test_leaky", leaky, output=lambda state: state.tanh())
MIN_GRU = mk.define_cell("test_min_gru", min_gru)
SCALED = mk.define_cell("test_scaled", bistable, output=scaled, scalars={"power": 2.0})


def by_hand(**arguments):
    """`BISTABLE` with the arguments of `mk.bmru`."""
    assert arguments.pop("surrogate_scale") == 1.0
    return BISTABLE(**arguments)


def drawn(cell: str, dtype: torch.dtype, **options) -> inputs.Call:
    options = {"batch": 3, "time": 200, "channels": 11} | options
    return inputs.case(cell, dtype, seed=5, **options).build()


# ---------------------------------------------------------------------------------------------- against cells by hand


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("segment", [0, 64])
@pytest.mark.parametrize(
    "options",
    [
        {"epsilon": 0.0, "initial_state": "real"},
        {"epsilon": 1.0, "reverse": True, "layout": "time-major"},
        {"epsilon": 0.5, "batch": "packed"},
        {"epsilon": 0.0, "resets": "to a state", "boundaries": True},
    ],
    ids=str,
)
def test_a_defined_bmru_is_the_one_by_hand(dtype, segment, options):
    call = drawn("bmru", dtype, **options)
    with calls.segments("cpu", segment):
        ours = calls.run(call, by_hand, torch.device("cpu"))
        theirs = calls.run(call, mk.bmru, torch.device("cpu"))
    assert ours.keys() == theirs.keys()
    for name, t in theirs.items():
        if name in ("h", "final_state", "boundaries"):
            assert torch.equal(ours[name], t), name
    calls.assert_right(call, by_hand, torch.device("cpu"))


def test_nonfinite_inputs_are_those_of_the_cell_by_hand():
    call = drawn("bmru", torch.float32, time=100)
    tensors = {name: t.clone() for name, t in call.tensors.items()}
    tensors["candidate"][0, 5, 0] = tensors["threshold"][1, 7, 1] = float("nan")
    tensors["candidate"][0, 9, 2] = tensors["threshold"][0, 9, 2] = float("inf")
    for a, b in zip(BISTABLE(**tensors), mk.bmru(**tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert BISTABLE(**tensors)[0].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("decay", ["stream", "channel"])
def test_a_defined_leaky_integrator_is_the_one_by_hand(dtype, decay):
    call = drawn("leaky_integrator", dtype, decay=decay, initial_state="real")
    ours, theirs = (calls.run(call, op, torch.device("cpu")) for op in (LEAKY, mk.leaky_integrator))
    for name, t in theirs.items():
        torch.testing.assert_close(ours[name], t, rtol=1e-6, atol=1e-6, msg=name)
    assert torch.equal(ours["h"], theirs["h"])
    calls.assert_right(call, LEAKY, torch.device("cpu"))


@pytest.mark.check
def test_a_defined_schmitt_trigger_is_the_one_by_hand():
    cell = mk.define_cell("test_schmitt", schmitt)
    call = drawn("schmitt", torch.float32, epsilon=0.5)
    tensors = {name: t.expand_as(call.tensors["candidate"]) for name, t in call.tensors.items()}
    ours, theirs = cell(**tensors, epsilon=0.5), mk.schmitt(**call.tensors, epsilon=0.5)
    assert all(map(torch.equal, ours, theirs))


# ---------------------------------------------------------------------------------------------- against definitions


def test_kernels_are_within_the_limits_of_their_definition():
    for cell in (BISTABLE, LEAKY, MIN_GRU):
        found = cell.compare()
        assert found.passes, str(found)
    found = SCALED.compare(*torch.randn(3, 2, 90, 5, dtype=torch.float64), power=-0.5, epsilon=0.25)
    assert found.passes, str(found)
    assert "grad of gain" in str(found)


def test_a_comparison_names_what_differs(monkeypatch):
    monkeypatch.setitem(comparison.LIMITS, torch.float32, 0.0)
    found = LEAKY.compare()
    assert not found.passes
    assert str(found).count("too large") == sum(not row.passes for row in found.rows) > 0
    assert all(row.limit == 0.0 for row in found.rows if not row.passes)


@pytest.mark.check
def test_inputs_may_have_the_names_of_a_kernel():
    cell = mk.define_cell("test_names", lambda s, m, g, after: mk.Affine(m.sigmoid() * g, s - after))
    found = cell.compare()
    assert found.passes, str(found)


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_by_differences(reverse):
    leaves = [t.requires_grad_() for t in torch.randn(3, 2, 20, 3, dtype=torch.float64)[:2]]
    state = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    op = partial(MIN_GRU, reverse=reverse)
    assert torch.autograd.gradcheck(
        lambda a, b, s: op(a, b, initial_state=s), [*leaves, state], check_forward_ad=True, fast_mode=True
    )


def test_steps_are_the_scan():
    x = torch.randn(3, 3, 9, 4)
    h, final = SCALED(*x, power=3.0, epsilon=0.5)
    state, outputs = torch.zeros(3, 4), []
    for t in range(9):
        output, state = SCALED.step(*x[:, :, t], state=state, power=3.0, epsilon=0.5)
        outputs.append(output)
    assert torch.equal(torch.stack(outputs, 1), h)
    assert torch.equal(state, final)
    slots = torch.zeros(5, 4)
    output, _ = SCALED.step(*x[:, :, 0], state=slots, state_indices=torch.tensor([4, 0, -1]))
    expected, after = SCALED.step(*x[:, :2, 0], state=torch.zeros(2, 4))
    assert torch.equal(output[:2], expected)
    assert torch.equal(slots[[4, 0]], after)
    assert not slots[1:4].any()


# ---------------------------------------------------------------------------------------------- tools of torch


def test_compile_makes_one_graph():
    x = torch.randn(2, 2, 30, 4, requires_grad=True)

    def loss(x):
        return MIN_GRU(*x)[0].square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (ours,), (theirs,) = (torch.autograd.grad(f(x), x) for f in (compiled, loss))
    torch.testing.assert_close(ours, theirs)


def test_vmap_opcheck_and_export():
    x = torch.randn(3, 2, 2, 20, 4)
    ours = torch.vmap(lambda c, u: MIN_GRU(c, u)[0])(x[:, 0], x[:, 1])
    assert torch.equal(ours, torch.stack([MIN_GRU(*t)[0] for t in x]))

    class Module(torch.nn.Module):
        def forward(self, c, u):
            return MIN_GRU(c, u)

    example = tuple(torch.randn(2, 2, 20, 4))
    time = {1: torch.export.Dim.AUTO}
    program = torch.export.export(Module(), example, dynamic_shapes=(time, time))
    longer = tuple(torch.randn(2, 2, 33, 4))
    assert torch.equal(program.module()(*longer)[0], MIN_GRU(*longer)[0])
    arguments = ([*example], 3, 0, [], None, None, None, None, False, 64, -1, True)
    torch.library.opcheck(torch.ops.mru.test_min_gru.cpu, arguments)


def test_sequence_parallel(group_of_one):
    x = torch.randn(2, 2, 50, 4, requires_grad=True)
    parallel = mk.distributed.sequence_parallel(MIN_GRU)
    ours, theirs = parallel(*x), MIN_GRU(*x)
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(*(torch.autograd.grad(h.sum(), x)[0] for h in (ours[0], theirs[0])))


# ---------------------------------------------------------------------------------------------- exponentials


def units(ours: Tensor, exact: Tensor) -> Tensor:
    """Errors in units in the last place of the exact value."""
    rounded = exact.to(ours.dtype)
    above = torch.nextafter(rounded.abs(), torch.full_like(ours, float("inf")))
    return (ours.double() - exact).abs() / (above - rounded.abs()).double()


def test_exponentials_over_the_whole_range():
    cell = mk.define_cell("test_exponential", lambda x: mk.Affine(0.0, x.exp()))
    finite = torch.cat([torch.linspace(-104, 88.7, 300_001), torch.linspace(-1e-3, 1e-3, 10_001)])
    h, _ = cell(finite.view(1, 1, -1))
    worst = units(h.flatten(), finite.double().exp()).max().item()
    assert worst < 1.6, worst
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), 89.0, -104.5, 0.0, -0.0])
    torch.testing.assert_close(cell(special.view(1, 1, -1))[0].flatten(), special.exp(), rtol=0, atol=0, equal_nan=True)
    wide = torch.linspace(-745, 709.7, 300_001, dtype=torch.float64)
    torch.testing.assert_close(cell(wide.view(1, 1, -1))[0].flatten(), wide.exp(), rtol=4e-16, atol=1e-323)


# ---------------------------------------------------------------------------------------------- surrogates


@pytest.mark.parametrize(
    ("surrogate", "expected"),
    [
        ("arctangent", lambda y: 2 / (1 + (2 * torch.pi * y) ** 2)),
        ("fast_sigmoid", lambda y: 2 / (1 + 2 * y.abs()) ** 2),
        ("sigmoid", lambda y: 2 * (2 * y).sigmoid() * (1 - (2 * y).sigmoid())),
        ("triangle", lambda y: 2 * (1 - 2 * y.abs()).clamp(min=0)),
        ("straight_through", lambda y: torch.full_like(y, 2)),
        (lambda y: y.cos(), torch.cos),
    ],
)
def test_surrogate_derivatives(surrogate, expected):
    x, threshold = torch.randn(2, 50, dtype=torch.float64).unbind()
    x.requires_grad_(), threshold.requires_grad_()
    y = mk.heaviside(x, 2.0, threshold=threshold, surrogate=surrogate)
    assert torch.equal(y, (x >= threshold).double())
    of_x, of_threshold = torch.autograd.grad(y.sum(), (x, threshold))
    torch.testing.assert_close(of_x, expected((x - threshold).detach()))
    assert torch.equal(of_threshold, -of_x)
    sign = mk.sign(x, 2.0, surrogate=surrogate)
    assert torch.equal(sign, torch.where(x >= 0, 1.0, -1.0).double())
    (grad,) = torch.autograd.grad(sign.sum(), x)
    torch.testing.assert_close(grad, 2 * expected(x.detach()))


# ---------------------------------------------------------------------------------------------- second derivatives


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
