"""Forward mode of every cell, and second derivatives of the linear recurrence."""

from __future__ import annotations

from functools import partial
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import mru_kernels as mk
import python_ref
from bench import errors, inputs
from mru_kernels import backends
from mru_kernels.cells.bmru import bmru_packed
from mru_kernels.cells.min_gru import min_gru_packed
from mru_kernels.cells.min_lstm import min_lstm_packed
from mru_kernels.ops import CELLS as CELL_OF
from tests.calls import CELLS, cases, op_of, segments
from tests.drawn import as_real, assert_close, assert_equal, draw, from_real

DOUBLE = torch.float64
GATED = {"min_gru": min_gru_packed, "min_lstm": min_lstm_packed}


def changes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A tangent for each tensor, normally distributed."""
    return {name: draw(*t.shape, dtype=t.dtype, seed=7 + i) for i, (name, t) in enumerate(tensors.items())}


def small_call(cell: str, dtype: torch.dtype = DOUBLE, last: bool = True, **options) -> inputs.Call:
    """A call with the last value of each of the cell's factors, or the first."""
    factors = {name: values[-1 if last else 0] for name, values in inputs.CELLS[cell].factors.items()}
    options = {"time": 7, "batch": 2, "channels": 3, "initial_state": "real", "parameters": "as streams"} | options
    return inputs.case(cell, dtype, 1, **factors | options).build()


def function(call: inputs.Call, op):
    """The call as a function of its tensors, and these."""
    names = list(call.tensors)
    return lambda *x: op(**dict(zip(names, x, strict=True)), **call.settings), tuple(call.tensors.values())


# ------------------------------------------------------------------------------------------------ the reference


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("options", [{}, {"reverse": True, "batch": "packed"}, {"initial_state": "none"}], ids=str)
def test_the_tangent_of_the_reference_is_that_of_its_gradient(cell, options):
    """It equals the derivative of the gradient by the gradient of h, by autograd."""
    for dtype in {DOUBLE, torch.complex128} & set(inputs.CELLS[cell].dtypes.values()):
        call = small_call(cell, dtype, **options)
        tangents, reference = changes(call.tensors), python_ref.CELLS[cell]
        op, x = function(call, reference)
        _, expected = torch.autograd.functional.jvp(op, x, tuple(tangents.values()))
        got = reference.tangent(**call.tensors, **call.settings, tangents=tangents)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=15)
@given(st.data())
def test_tangents_equal_the_reference(backend, device, largest, data):
    """They are within the limit of the dtype, the values are those without a tangent, and gradients are consistent."""
    steps = data.draw(st.sampled_from([None, 64]))
    call = data.draw(cases((min(largest[0], 150), min(largest[1], 20)), nonfinite=False)).build()
    tangents, settings_ = changes(call.tensors), call.to(device).settings
    with segments(backend, steps):
        op, x = function(call.to(device), op_of(call.cell, backend))
        values, results = jvp(op, x, tuple(t.to(device) for t in tangents.values()))
        assert_equal(list(values), list(op_of(call.cell, backend)(**call.to(device).tensors, **settings_)))
    reference = python_ref.CELLS[call.cell]
    expected = reference.tangent(**call.tensors, **call.settings, tangents=tangents)
    terms = reference.tangent(**call.tensors, **call.settings, tangents=tangents, term=abs)
    for result, value, wide, of_terms in zip(results, values, expected, terms, strict=True):
        assert result.dtype == value.dtype
        verdict = errors.judge(result.cpu(), wide, of_terms.abs())
        assert verdict.passed, verdict


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("batch", [2, "packed"])
def test_tangents_and_gradients_are_transposes(backend, device, cell, batch):
    """<w, J v> equals <J^T w, v>."""
    for dtype in {DOUBLE, torch.complex128} & set(inputs.CELLS[cell].dtypes.values()):
        call = small_call(cell, dtype, batch=batch).to(device)
        op, x = function(call, op_of(cell, backend))
        v = tuple(t.to(device) for t in changes(call.tensors).values())
        w = (call.grad_h, call.grad_final)
        (_, results), (_, pull) = jvp(op, x, v), vjp(op, *x)
        one, other = (
            sum((a.conj() * b).sum().real for a, b in zip(*p, strict=True)) for p in ((w, results), (pull(w), v))
        )
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_tangents_of_packed_gates(backend, device):
    gates, alpha, state = (draw(*s, dtype=DOUBLE, device=device) for s in ((2, 7, 9), (3,), (2, 3)))
    changed = [draw(*t.shape, dtype=DOUBLE, seed=1, device=device) for t in (gates, alpha, state)]

    def packed(gates, alpha, state):
        return bmru_packed(gates, state, alpha=alpha, amplitude=True, epsilon=0.5, backend=backend)

    def apart(gates, alpha, state):
        c, b, m = gates.chunk(3, -1)
        return mk.bmru(c, b, state, amplitude=m, alpha=alpha, epsilon=0.5, backend=backend)

    assert_close(*(jvp(op, (gates, alpha, state), tuple(changed))[1] for op in (packed, apart)))


def test_inputs_without_a_tangent(backend, device):
    """A tangent that is absent is zeros."""
    for cell in CELLS:
        op, x = function(small_call(cell).to(device), op_of(cell, backend))

        def of_reals(*pairs, op=op, x=x):
            return tuple(map(as_real, op(*map(from_real, pairs, [t.is_complex() for t in x]))))

        whole = jacrev(of_reals, tuple(range(len(x))))(*map(as_real, x))
        zeros = tuple(map(torch.zeros_like, x))
        for i, t in enumerate(x):
            v = draw(*t.shape, dtype=t.dtype, seed=3, device=device)
            expected = [torch.tensordot(j[i], as_real(v), as_real(v).dim()) for j in whole]
            only = partial(lambda t, op, i, x: op(*x[:i], t, *x[i + 1 :]), op=op, i=i, x=x)
            assert_close(map(as_real, jvp(only, (t,), (v,))[1]), expected)
            assert_close(map(as_real, jvp(op, x, (*zeros[:i], v, *zeros[i + 1 :]))[1]), expected)


@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 4, 3), (2, 4, 0)], ids=str)
def test_empty_calls(backend, device, shape):
    for cell in CELLS:
        batch, time, channels = shape
        call = small_call(cell, time=time, channels=max(channels, 1)).to(device)
        call.tensors.update({n: t[..., :channels] for n, t in call.tensors.items()})
        call.tensors.update({n: t[:batch] for n, t in call.tensors.items() if t.dim() > 1})
        op, x = function(call, op_of(cell, backend))
        v = tuple(torch.ones_like(t) for t in x)
        values, results = jvp(op, x, v)
        assert [t.shape for t in results] == [t.shape for t in values] == [shape, (batch, channels)]
        if time == 0:
            assert torch.equal(results[1], v[-1])


# ------------------------------------------------------------------------------------------------ numbers


def recurrence(dtype: torch.dtype, per_channel: bool, packed: bool, reverse: bool, backend: str, device):
    batch, sequences = (1, 3) if packed else (2, 2)
    offsets = torch.tensor([0, 2, 2, 4], device=device) if packed else None
    decay = draw(*((2,) if per_channel else (batch, 4, 2)), dtype=dtype, device=device)
    update, state = (
        draw(batch, 4, 2, dtype=dtype, seed=1, device=device),
        draw(sequences, 2, dtype=dtype, device=device),
    )
    op = partial(mk.linear_recurrence, reverse=reverse, cu_seqlens=offsets, backend=backend)
    return op, [t.requires_grad_() for t in (decay, update, state)]


@pytest.mark.parametrize("dtype", [DOUBLE, torch.complex128], ids=str)
@pytest.mark.parametrize(
    ("per_channel", "packed", "reverse"), [(False, False, False), (True, True, False), (False, True, True)]
)
def test_derivatives_of_the_linear_recurrence_by_differences(backend, device, dtype, per_channel, packed, reverse):
    op, leaves = recurrence(dtype, per_channel, packed, reverse, backend, device)
    options = {"fast_mode": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(op, leaves, check_forward_ad=True, **options)
    assert torch.autograd.gradgradcheck(op, leaves, check_fwd_over_rev=True, check_rev_over_rev=True, **options)


@pytest.mark.parametrize("cell", GATED)
@pytest.mark.parametrize(
    ("batch", "resets", "reverse"),
    [(2, False, False), (2, True, True), ("offsets", False, True), ("offsets", True, False), ("gates", True, False)],
)
def test_derivatives_of_gated_cells_by_differences(backend, device, cell, batch, resets, reverse):
    """Of streams and states, also of packed sequences, with resets, and of gates that lie side by side."""
    count, packed = len(CELL_OF[cell].inputs), GATED[cell]
    rows, sequences = (1, 3) if batch == "offsets" else (2, 2)
    settings_ = {"reverse": reverse, "backend": backend}
    if batch == "offsets":
        settings_["cu_seqlens"] = torch.tensor([0, 2, 2, 4], device=device)
    if resets:
        settings_["resets"] = torch.tensor([[False, True, True, False]] * rows, device=device)

    def op(*tensors):
        *streams, state = tensors
        states = {"initial_state": state} | ({"reset_state": 0.5 * state.sin()} if resets else {})
        if batch == "gates":
            return packed(*streams, **states, **settings_)
        return op_of(cell, backend)(*streams, **states, **{k: v for k, v in settings_.items() if k != "backend"})

    sizes = [2 * count] if batch == "gates" else [2] * count
    shapes = [*((rows, 4, size) for size in sizes), (sequences, 2)]
    leaves = [draw(*s, dtype=DOUBLE, seed=i, device=device).requires_grad_() for i, s in enumerate(shapes)]
    options = {"fast_mode": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(op, leaves, check_forward_ad=True, **options)
    assert torch.autograd.gradgradcheck(op, leaves, check_fwd_over_rev=True, check_rev_over_rev=True, **options)


@pytest.mark.parametrize("cell", GATED)
def test_hessians_of_gated_cells(backend, device, cell):
    """Also of boundary states, and by vmap; autograd through the loop of plain torch gives the same."""
    x = draw(2, 33, 2 * len(CELL_OF[cell].inputs), dtype=DOUBLE, device=device)

    def hessians(backend):
        op = partial(op_of(cell, backend), chunk_size=16, return_boundaries=True)

        def loss(x):
            h, final, boundaries = op(*x.chunk(len(CELL_OF[cell].inputs), -1))
            return h.pow(3).sum() + final.exp().sum() + boundaries.square().sum()

        def of_one(x):
            return grad(lambda x: op(*x.unsqueeze(0).chunk(len(CELL_OF[cell].inputs), -1))[0].pow(3).sum())(x)

        yield hessian(loss)(x)
        yield jacfwd(grad(loss))(x)
        yield vmap(lambda x, v: jvp(of_one, (x,), (v,))[1])(x, x.cos())
        yield vmap(of_one)(x)

    (one, other, *rest), expected = hessians(backend), list(hessians("torch"))
    assert_close([one, other, *rest], [expected[0], expected[0], *expected[2:]])


@pytest.mark.parametrize("reverse", [False, True])
def test_tangents_of_the_leaky_integrator_by_differences(backend, device, reverse):
    leaves = [draw(*s, dtype=DOUBLE, device=device).requires_grad_() for s in ((2, 4, 2), (2,), (2, 2))]
    op = partial(mk.leaky_integrator, reverse=reverse, backend=backend)
    assert torch.autograd.gradcheck(op, leaves, check_forward_ad=True)


def hessian_products(loss, x: Tensor, v: Tensor):
    """H v in four ways, and the derivative of v H v."""
    yield jvp(grad(loss), (x,), (v,))[1]
    yield grad(lambda x: (grad(loss)(x) * v).sum())(x)
    yield grad(lambda x: jvp(loss, (x,), (v,))[1])(x)
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    yield torch.autograd.grad(first, leaf, v)[0]
    yield grad(lambda x: jvp(lambda x: jvp(loss, (x,), (v,))[1], (x,), (v,))[1])(x)


@pytest.mark.parametrize("make", [mk.MinGRU, mk.MinLSTM, mk.LRU], ids=str)
def test_second_derivatives_of_modules(backend, device, make):
    """By inputs and by parameters; autograd through the loop of plain torch gives the same."""
    torch.manual_seed(0)
    module = make(3, 4, 2, bidirectional=True, dtype=DOUBLE).to(device)
    x, v = (draw(2, 6, 3, dtype=DOUBLE, seed=i, device=device) for i in range(2))
    name = "weight_ih_l0"
    weight = module.get_parameter(name).detach()

    def of_input(x):
        output, h_n = module(x)
        return output.pow(3).sum() + h_n.abs().square().sum()

    def of_weight(weight):
        return functional_call(module, {name: weight}, (x,))[0].pow(3).sum()

    for loss, point, direction in ((of_input, x, v), (of_weight, weight, draw(*weight.shape, dtype=DOUBLE))):
        with patch.object(backends, "_CHOSEN", "torch"):
            expected = list(hessian_products(loss, point, direction))
        with patch.object(backends, "_CHOSEN", backend):
            got = list(hessian_products(loss, point, direction))
        assert_close(expected[1:4], expected[:1] * 3)
        assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64], ids=str)
def test_second_derivatives_in_every_dtype(backend, device, dtype):
    """Those of positive numbers, where nothing cancels, are within the limit."""

    def products(*tensors):
        op, leaves = partial(mk.linear_recurrence, backend=backend), [t.requires_grad_() for t in tensors]
        weights = [t.to(r.dtype) for t, r in zip(of_results, op(*leaves), strict=True)]
        first = torch.autograd.grad(op(*leaves), leaves, weights, create_graph=True)
        return torch.autograd.grad(first, leaves, [t.to(x.dtype) for t, x in zip(directions, leaves, strict=True)])

    shapes = (3,), (2, 20, 3), (2, 3)
    x = [draw(*s, dtype=dtype, device=device).abs().clamp(0.1, 0.9).to(dtype) for s in shapes]
    directions = [draw(*s, dtype=dtype, seed=1, device=device).abs().to(dtype) for s in shapes]
    of_results = [draw(*s, dtype=dtype, seed=2, device=device).abs().to(dtype) for s in shapes[1:]]
    for got, expected in zip(products(*x), products(*map(errors.wide, x)), strict=True):
        assert got.dtype == dtype
        assert errors.relative_error(got, expected, expected.abs()) <= errors.LIMITS[dtype]
