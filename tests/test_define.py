"""Cells that `define_cell` makes: equal to the cells by hand and to their own definitions, with every option."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

import mru_kernels as mk
from bench import inputs
from mru_kernels.define import comparison
from tests import calls

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


# ---------------------------------------------------------------------------------------------- elementary functions


def units(ours: Tensor, exact: Tensor) -> Tensor:
    """Errors in units in the last place of the exact value."""
    rounded = exact.to(ours.dtype)
    above = torch.nextafter(rounded.abs(), torch.full_like(ours, float("inf")))
    return (ours.double() - exact).abs() / (above - rounded.abs()).double()


@pytest.mark.parametrize(
    ("function", "most", "relative"),
    [
        (torch.exp, 1.1, 4e-16), (torch.expm1, 1.9, 6e-16), (torch.tanh, 2.6, 7e-16), (torch.log, 0.9, 4e-16),
        (torch.log1p, 2.5, 7e-16), (torch.sqrt, 0.51, 3e-16),
    ],
)  # fmt: skip
def test_elementary_functions_over_the_whole_range(function, most, relative):
    """Errors of float32 in units in the last place, of float64 beside torch's, and special values."""
    cell = mk.define_cell(f"test_{function.__name__}", lambda x: mk.Affine(1.0, function(x)))

    def ours(x: Tensor) -> Tensor:
        before = torch.full((1, len(x)), -0.0, dtype=x.dtype)  # -0 + -0 is the only sum that is -0
        return cell(x.view(1, 1, -1), initial_state=before)[0].flatten()

    finite = torch.cat([torch.linspace(-104, 88.7, 300_001), *(torch.linspace(-r, r, 100_001) for r in (9, 1, 1e-3))])
    finite = finite[function(finite).isfinite()]
    worst = units(ours(finite), function(finite.double())).max().item()
    assert most / 2 < worst < most, worst
    special = [math.inf, -math.inf, 89.0, -104.5, 3e38, -3e38, -1.0, 0.0, -0.0, 1e-40, math.nan]
    special = torch.tensor(special)
    torch.testing.assert_close(ours(special), function(special), rtol=3e-7, atol=0, equal_nan=True)
    number = ~function(special).isnan()
    assert torch.equal(ours(special)[number].signbit(), function(special)[number].signbit())
    wide = torch.cat([torch.linspace(-745, 709.7, 300_001), torch.linspace(-2, 2, 300_001)]).double()
    torch.testing.assert_close(ours(wide), function(wide), rtol=relative, atol=1e-323, equal_nan=True)


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
