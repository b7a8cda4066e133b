"""The ops under torch.func. tests/test_forward_mode.py has forward mode and second derivatives."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

import mru_kernels as mk
from bench import inputs
from mru_kernels import ops
from mru_kernels.cells.bmru import bmru_packed
from tests import raw
from tests.drawn import as_real, assert_close, assert_equal, draw, from_real

CELL = ops.CELLS["bmru"]


# ------------------------------------------------------------------------------------------------ torch.func


def loss(c, b, state=None, **settings):
    h, final_state = mk.bmru(c, b, state, epsilon=0.5, **settings)
    return h.square().sum() + final_state.sum()


@pytest.mark.parametrize(
    ("in_dims", "shapes"),
    [
        ((0, 0, 0), [(4, 2, 70, 3), (4, 2, 70, 3), (4, 2, 3)]),
        ((0, None, None), [(4, 2, 70, 3), (2, 70, 3), (2, 3)]),
        ((None, 1, 0), [(2, 70, 3), (2, 4, 70, 3), (4, 2, 3)]),
        ((3, 2, 1), [(2, 70, 3, 4), (2, 70, 4, 3), (2, 4, 3)]),
        ((0, 0, None), [(4, 2, 70, 3), (4, 3), (2, 3)]),
        ((0, None, None), [(4, 2, 70, 3), (3,), (2, 3)]),
        ((None, 1, None), [(2, 70, 3), (3, 4), (2, 3)]),
    ],
    ids=str,
)
def test_vmap(backend, device, in_dims, shapes):
    """Mapped ops, mapped gradients of its gradient and gradients through vmap equal a loop over the rows."""
    inputs = [draw(*shape, seed=i, device=device) for i, shape in enumerate(shapes)]

    def rows():
        for i in range(4):
            yield [x if d is None else x.select(d, i) for x, d in zip(inputs, in_dims, strict=True)]

    def op(*x):
        return mk.bmru(*x, epsilon=0.5, backend=backend)

    def op_loss(*x):
        return loss(*x, backend=backend)

    loop = [torch.stack(results) for results in zip(*(op(*row) for row in rows()), strict=True)]
    assert_equal(list(torch.vmap(op, in_dims)(*inputs)), loop)

    grad = torch.func.grad(op_loss, argnums=(0, 1, 2))
    leaves = [[x.detach().requires_grad_() for x in row] for row in rows()]
    grads = [torch.autograd.grad(op_loss(*row), row) for row in leaves]
    loop = [torch.stack(each) for each in zip(*grads, strict=True)]
    for got, expected in zip(torch.vmap(grad, in_dims)(*inputs), loop, strict=True):
        torch.testing.assert_close(got, expected)

    leaves = [x.clone().requires_grad_() for x in inputs]
    through = torch.autograd.grad(torch.vmap(op_loss, in_dims)(*leaves).sum(), leaves)
    for got, expected, d in zip(through, loop, in_dims, strict=True):
        torch.testing.assert_close(got, expected.sum(0) if d is None else expected.movedim(0, d))


def test_vmap_of_packed_gates(backend, device):
    gates = draw(4, 2, 70, 9, device=device)

    def op(g, alpha):
        return bmru_packed(g, alpha=alpha, amplitude=True, epsilon=0.5, backend=backend)

    def op_loss(*x):
        h, final_state = op(*x)
        return h.square().sum() + final_state.sum()

    alpha = draw(3, device=device)
    loop = [torch.stack(results) for results in zip(*(op(g, alpha) for g in gates), strict=True)]
    assert_equal(list(torch.vmap(op, (0, None))(gates, alpha)), loop)
    assert_equal(list(torch.vmap(op, (3, None))(gates.movedim(0, 3), alpha)), loop)
    leaf = gates.clone().requires_grad_()
    (expected,) = torch.autograd.grad(sum(op_loss(g, alpha) for g in leaf), leaf)
    got = torch.vmap(torch.func.grad(op_loss), (0, None))(gates, alpha)
    assert torch.equal(got, expected)


def test_vmap_refuses_to_map_offsets_and_epsilons(backend, device):
    x, offsets = draw(1, 5, 2, device=device), torch.tensor([[0, 5], [0, 5]], device=device)
    epsilons = torch.tensor([0.0, 0.5])

    def grad(epsilon):
        return torch.func.grad(lambda c: mk.bmru(c, c, epsilon=epsilon, backend=backend)[0].sum())(x)

    with pytest.raises(ValueError, match="cu_seqlens: expected one tensor"):
        torch.vmap(lambda o: mk.bmru(x, x, cu_seqlens=o, backend=backend))(offsets)
    with pytest.raises(ValueError, match="cu_seqlens: expected one tensor"):
        torch.vmap(lambda o, y: mk.linear_recurrence(y, y, cu_seqlens=o, backend=backend))(offsets, torch.stack([x, x]))
    for mapped in (epsilons, epsilons.double()):
        with pytest.raises(ValueError, match="epsilon: expected one tensor"):
            torch.vmap(lambda e: mk.bmru(x, x, epsilon=e, backend=backend))(mapped)
        with pytest.raises(ValueError, match="epsilon: expected one tensor"):
            torch.vmap(grad)(mapped)


def test_gradients_outside_a_transform(backend, device):
    """Autograd and an outer transform can differentiate the value that `grad_and_value` returns."""
    x, b = draw(2, 50, 3, device=device), draw(2, 50, 3, seed=1, device=device)
    weight = draw(3, seed=2, device=device).requires_grad_()

    def op_loss(w):
        return loss(x * w, b, backend=backend)

    (expected,) = torch.autograd.grad(op_loss(weight), weight)
    grad, value = torch.func.grad_and_value(op_loss)(weight)
    assert torch.equal(grad, expected)
    assert torch.equal(torch.autograd.grad(value, weight)[0], expected)

    def inner(w):
        return torch.func.grad_and_value(lambda one: one * op_loss(w))(torch.ones((), device=device))[1]

    assert torch.equal(torch.func.grad(inner)(weight.detach()), expected)


#: Cell, dtype, and the index of the value of each factor of the cell.
CALLS = [
    (cell, dtype, index)
    for cell, declared in inputs.CELLS.items()
    for dtype in ("fp32", "c64")
    if dtype in declared.dtypes
    for index in (0, 1)
]


def rows_of(cell: str, dtype: str, index: int, device: torch.device):
    """A function of the cell's tensors, and four rows of each."""
    values = {name: x[index % len(x)] for name, x in inputs.CELLS[cell].factors.items()}
    values |= {"initial_state": "real", "parameters": "as streams", "reverse": index == 1}
    calls = [
        inputs.case(cell, inputs.CELLS[cell].dtypes[dtype], seed, time=20, batch=2, channels=3, **values).build()
        for seed in range(4)
    ]
    names, op, settings = list(calls[0].tensors), getattr(mk, cell), calls[0].settings

    def function(*tensors: Tensor, backend: str):
        return op(**dict(zip(names, tensors, strict=True)), **settings, backend=backend)

    return function, [torch.stack([call.tensors[name] for call in calls]).to(device) for name in names]


@pytest.fixture(params=CALLS, ids=str)
def call(request, backend, device):
    """A call of a cell, a loss of it, and four rows of its inputs."""
    function, rows = rows_of(*request.param, device)

    def op(*inputs):
        return function(*inputs, backend=backend)

    def op_loss(*inputs):
        h, final_state = op(*inputs)
        return h.abs().square().sum() + final_state.abs().square().sum()

    return op, op_loss, rows


def loop(op_loss, rows: list[Tensor]) -> list[Tensor]:
    """Gradients of each row, by one call of autograd for each row."""
    leaves = [[t.clone().requires_grad_() for t in row] for row in zip(*rows, strict=True)]
    grads = [torch.autograd.grad(op_loss(*row), row) for row in leaves]
    return [torch.stack(each) for each in zip(*grads, strict=True)]


def test_transforms_of_every_cell(call):
    op, op_loss, rows = call
    every = tuple(range(len(rows)))
    expected = loop(op_loss, rows)
    assert_close(torch.func.grad(op_loss, every)(*(t[0] for t in rows)), [t[0] for t in expected])
    assert_close(torch.vmap(torch.func.grad(op_loss, every))(*rows), expected)
    assert_close(torch.func.grad(lambda *x: torch.vmap(op_loss)(*x).sum(), every)(*rows), expected)
    halves = [t.unflatten(0, (2, 2)) for t in rows]
    nested = torch.vmap(torch.vmap(torch.func.grad(op_loss, every)))(*halves)
    assert_close([t.flatten(0, 1) for t in nested], expected)
    plain = [torch.stack(each) for each in zip(*(op(*row) for row in zip(*rows, strict=True)), strict=True)]
    assert_equal(list(torch.vmap(op)(*rows)), plain)
    assert_equal([t.flatten(0, 1) for t in torch.vmap(torch.vmap(op))(*halves)], plain)


def test_a_batch_of_gradients_of_every_cell(call):
    """`is_grads_batched` equals one call for each gradient, also where one result has no gradient."""
    op, _, rows = call
    leaves = [t[0].clone().requires_grad_() for t in rows]
    results = op(*leaves)
    weights = [draw(5, *t.shape, dtype=t.dtype, seed=i, device=t.device) for i, t in enumerate(results)]
    for used in ([0, 1], [0], [1]):
        outputs, given = [results[i] for i in used], [weights[i] for i in used]
        one_by_one = [
            torch.autograd.grad(outputs, leaves, list(each), retain_graph=True) for each in zip(*given, strict=True)
        ]
        batch = torch.autograd.grad(outputs, leaves, given, retain_graph=True, is_grads_batched=True)
        assert_close(batch, [torch.stack(each) for each in zip(*one_by_one, strict=True)])


def test_jacobians(backend, device):
    c, b, m = (draw(1, 6, 2, seed=i, device=device) for i in range(3))
    gates = torch.cat([c, b, m], -1)
    for op, x in (
        (lambda c: mk.bmru(c, b, epsilon=0.5, backend=backend)[0], c),
        (lambda g: bmru_packed(g, amplitude=True, epsilon=0.5, backend=backend)[0], gates),
    ):
        expected = torch.autograd.functional.jacobian(op, x)
        torch.testing.assert_close(torch.func.jacrev(op)(x), expected)
        torch.testing.assert_close(torch.autograd.functional.jacobian(op, x, vectorize=True), expected)


@pytest.mark.parametrize("cell", inputs.CELLS)
def test_compiled_and_exported_transforms(backend, device, cell):
    function, given = rows_of(cell, "fp32", 0, device)
    rows, are_complex = [as_real(t) for t in given], [t.is_complex() for t in given]

    class Loss(torch.nn.Module):
        def forward(self, *inputs):
            arrays = [from_real(*pair) for pair in zip(inputs, are_complex, strict=True)]
            h, final_state = function(*arrays, backend=backend)
            return h.square().sum() + as_real(final_state).square().sum()

    def transforms(op_loss, rows):
        every = tuple(range(len(rows)))
        first = [t[0] for t in rows]
        yield from torch.func.grad(op_loss, every)(*first)
        yield from torch.vmap(torch.func.grad(op_loss, every))(*rows)
        yield from torch.func.jacrev(op_loss, every)(*first)

    expected = list(transforms(Loss(), rows))
    assert_close(expected[len(rows) : 2 * len(rows)], loop(Loss(), rows))
    compiled = torch.compile(lambda rows: list(transforms(Loss(), rows)), fullgraph=True, backend="aot_eager")
    assert_close(compiled(rows), expected)
    exported = torch.export.export(Loss(), tuple(t[0] for t in rows)).module()
    assert_close(list(transforms(exported, rows)), expected)


@pytest.mark.parametrize("make", [mk.BMRU, mk.FirstQuadrantBMRU, mk.MinGRU, mk.LRU, "network"], ids=str)
def test_transforms_of_modules(device, make):
    """Per-sample gradients and gradients of an ensemble equal autograd on each sample and each module."""

    def module(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        made = mk.MRUNetwork(4, 2, width=6, num_blocks=1) if make == "network" else make(4, 6)
        return made.to(device)

    x = draw(2, 20, 4, device=device)
    modules = [module(seed) for seed in range(2)]

    def module_loss(parameters, buffers, x):
        output, _ = torch.func.functional_call(modules[0], (parameters, buffers), (x.unsqueeze(0),))
        return output.square().sum()

    def by_autograd(module, x):
        module.zero_grad()
        module(x.unsqueeze(0))[0].square().sum().backward()
        return {name: p.grad for name, p in module.named_parameters()}

    def compare(got, expected):
        for name in got:
            torch.testing.assert_close(got[name], torch.stack([each[name] for each in expected]))

    grad = torch.func.grad(module_loss)
    parameters = {name: p.detach() for name, p in modules[0].named_parameters()}
    buffers = dict(modules[0].named_buffers())
    compare(torch.vmap(grad, (None, None, 0))(parameters, buffers, x), [by_autograd(modules[0], row) for row in x])
    stacked = torch.func.stack_module_state(modules)
    pairs = zip(modules, x, strict=True)
    compare(torch.vmap(grad)(*stacked, x), [by_autograd(module, row) for module, row in pairs])
    compare(torch.vmap(grad, (0, 0, None))(*stacked, x[0]), [by_autograd(module, x[0]) for module in modules])


@pytest.mark.parametrize("op", [mk.bmru, lambda k, v: mk.wkv(k, v, k.new_full((2,), -1.0), k.new_zeros(2))])
def test_a_tensor_that_outlives_its_transform_keeps_its_graph(device, op):
    kept = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x.sum()

    leaf, other = draw(1, 5, 2, device=device).requires_grad_(), draw(1, 5, 2, seed=1, device=device)
    torch.func.grad(keep)(leaf)
    found, expected = (torch.autograd.grad(op(x, other)[0].sum(), leaf) for x in (kept[0], leaf))
    assert torch.equal(*found, *expected)


def test_transforms_in_other_modes(backend, device):
    """Transforms work under no_grad, inference mode, anomaly detection, functionalize and save_on_cpu."""
    x, b = draw(2, 20, 3, device=device), draw(2, 20, 3, seed=1, device=device)

    def op_loss(c):
        return loss(c, b, backend=backend)

    def held(c):
        with torch.no_grad():
            h, _ = mk.bmru(c, b, backend=backend)
        return (h * c).sum()

    grad = torch.func.grad(op_loss)
    expected = grad(x)
    with torch.no_grad():
        assert torch.equal(grad(x), expected)
    with torch.inference_mode():
        differentiates = torch.func.grad(lambda c: c.sin().sum())(x).any()  # torch 2.11 gives its own ops zeros
        assert torch.equal(grad(x), expected if differentiates else torch.zeros_like(x))
    with warnings.catch_warnings(), torch.autograd.detect_anomaly():
        warnings.simplefilter("ignore")
        assert torch.equal(grad(x), expected)
    assert torch.equal(torch.func.functionalize(grad)(x), expected)
    assert torch.equal(torch.func.grad(torch.func.functionalize(op_loss))(x), expected)
    assert torch.equal(torch.func.grad(held)(x), mk.bmru(x, b, backend=backend)[0])
    _, pull = torch.func.vjp(op_loss, x)
    assert torch.equal(pull(torch.ones((), device=device))[0], expected)  # after the transform has returned
    leaf = x.clone().requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        mapped = torch.vmap(lambda c, b: loss(c[None], b[None], backend=backend))(leaf, b)
        assert_close(torch.autograd.grad(mapped.sum(), leaf), [expected])


def test_the_op_of_a_step_has_no_derivative(backend, device):
    x, state = draw(2, 2, 3, device=device)
    row = x[:, None]

    def op(x):
        call = inputs.call("bmru", {"candidate": row, "threshold": row}, {"epsilon": 0.5})
        named = raw.step(call)
        return raw.run(CELL.step[backend], named | {"inputs": [x, x, *named["inputs"][2:]], "state": state})[0]

    with pytest.raises(NotImplementedError, match="bmru_step: there is no derivative"):
        op(x.clone().requires_grad_()).sum().backward()
    with pytest.raises(NotImplementedError, match="bmru_step: there is no derivative"):
        torch.func.grad(lambda x: op(x).sum())(x)
    with pytest.raises(NotImplementedError, match="bmru_step: there is no derivative"):
        torch.func.jvp(op, (x,), (x,))


def test_second_derivative_raises_under_torch_func(backend, device):
    c, b = draw(2, 20, 3, device=device), draw(2, 20, 3, seed=1, device=device)

    def op_loss(c):
        return loss(c, b, backend=backend)

    with pytest.raises(RuntimeError, match="second derivative"):
        torch.func.grad(lambda c: torch.func.grad(op_loss)(c).sum())(c)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.func.jacrev(torch.func.jacrev(op_loss))(c)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.func.grad(op_loss)(c.requires_grad_()).sum().backward()
    (expected,) = torch.autograd.grad(op_loss(c), c)
    assert torch.equal(torch.func.grad(op_loss)(c.detach()), expected)
