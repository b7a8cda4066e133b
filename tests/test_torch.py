"""What the ops are to the rest of torch: opcheck, compile, export, autocast, torch.func, saved memory, processes."""

from __future__ import annotations

import io
import itertools
import warnings
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import mru_kernels as mk
from bench import inputs
from mru_kernels import backends, checks, ops
from mru_kernels.cells.bmru import bmru_packed
from tests import processes, raw

CELL = raw.CELLS["bmru"]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    wide = torch.complex64 if dtype.is_complex else torch.float32
    return torch.randn(shape, generator=generator, dtype=wide).to(device, dtype)


LAYOUTS = {
    "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "time-major": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "windows": lambda t: t.flatten(1)[:, : t.shape[1] + t.shape[2] - 1].unfold(1, t.shape[2], 1),
}

#: Dtype, the index of the value of each factor of the cell, options, and words: a layout, "gates" for streams in one
#: tensor, "segments".
FORMS = [
    ("fp32", 0, {}, ""),
    ("fp64", 1, {"initial_state": "real"}, "segments"),
    ("bf16", 1, {"initial_state": "real", "reverse": True}, "segments"),
    ("fp16", 2, {"batch": "packed"}, ""),
    ("fp32", 1, {"batch": "packed", "initial_state": "real", "reverse": True}, "gates segments"),
    ("c64", 1, {"initial_state": "real"}, "segments"),
    ("c64", 0, {"batch": "packed", "reverse": True}, "gates"),
    ("fp32", 0, {}, "transposed"),
    ("fp32", 1, {}, "windows"),
    ("bf16", 0, {"initial_state": "real"}, "gates time-major"),
]
VARIANTS = [(cell, *form) for cell, declared in inputs.CELLS.items() for form in FORMS if form[0] in declared.dtypes]


def raw_arguments(variant: tuple, device: torch.device, save: bool = True) -> dict:
    """Arguments of the forward op of a variant's cell, whose tensors require gradients."""
    cell, dtype, index, options, words = variant
    factors = inputs.CELLS[cell].factors
    values = {name: x[index % len(x)] for name, x in factors.items()} | {"batch": 2, "parameters": "as streams"}
    if "gates" in words:
        values |= {name: "stream" for name, x in factors.items() if "stream" in x}
    values |= {"epsilon": 0.5} if "epsilon" in factors else {}
    case = inputs.case(cell, inputs.CELLS[cell].dtypes[dtype], time=150, channels=5, **values | options)
    call = case.build().to(device)
    gates = raw.gates_of(call) if "gates" in words else None
    arguments = raw.scan(call, gates=gates, segment=backends.CHUNK if "segments" in words else 0, save=save)
    relaid = next((LAYOUTS[word] for word in words.split() if word in LAYOUTS), lambda t: t)
    tensors = [relaid(t) if t.dim() == 3 else t for t in raw.tensors_of(arguments)]
    return raw.with_tensors(arguments, [t.detach().requires_grad_() for t in tensors])


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_opcheck(backend, device, variant):
    arguments, cell = raw_arguments(variant, device), raw.CELLS[variant[0]]
    torch.library.opcheck(cell.forward[backend], tuple(arguments.values()))
    results = raw.run(cell.forward[backend], arguments)
    # Second derivatives raise, so nothing that requires grad goes into the backward op.
    frozen = torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, raw.backward(arguments, results))
    torch.library.opcheck(cell.backward[backend], tuple(frozen.values()))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_raw_op_is_differentiable_by_itself(backend, device, variant):
    """Through the dispatcher, with boundary states saved or not, as through the public function."""
    arguments = raw_arguments(variant, device)
    leaves = raw.tensors_of(arguments)
    op = raw.CELLS[variant[0]].forward[backend]

    def op_loss(leaves: list[Tensor], save: bool = True) -> Tensor:
        h, final_state, *_ = raw.run(op, raw.with_tensors(arguments, leaves) | {"save": save})
        return h.abs().float().square().sum() + final_state.abs().square().sum()

    def grads(save: bool):
        return torch.autograd.grad(op_loss(leaves, save), leaves)

    for one, other in zip(grads(True), grads(False), strict=True):
        assert one.shape == other.shape
        assert torch.equal(one, other)
    detached = [t.detach() for t in leaves]
    assert_equal(torch.func.grad(op_loss)(detached), list(grads(True)))
    mapped = torch.vmap(torch.func.grad(op_loss))([torch.stack([t, t]) for t in detached])
    for one, other in zip(mapped, grads(True), strict=True):
        torch.testing.assert_close(one[1], other)


# ------------------------------------------------------------------------------------------------ compile, export


def results_and_grads(op, *inputs: Tensor, **settings) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    h, final_state = op(*leaves, **settings)
    loss = h.float().square().sum() + final_state.square().sum()
    return [h.detach(), final_state.detach(), *torch.autograd.grad(loss, leaves)]


def assert_equal(one: list[Tensor], other: list[Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.fixture
def recompiling_fails():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_with_dynamic_time(backend, device, recompiling_fails, compiler):
    def op(candidate, threshold, state, alpha, epsilon):
        return mk.bmru(candidate, threshold, state, epsilon=epsilon, alpha=alpha, backend=backend)

    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend=compiler)
    times = (200, 150, 333, 1000) if compiler == "aot_eager" else (200, 150)
    for i, time in enumerate(times):
        inputs = [draw(2, time, 5, seed=i, device=device), draw(2, time, 5, seed=9 + i, device=device)]
        inputs += [draw(2, 5, device=device), draw(5, device=device)]
        epsilon = torch.tensor(0.25 * i)
        assert_equal(
            results_and_grads(lambda *x, e=epsilon: compiled(*x, e), *inputs),
            results_and_grads(lambda *x, e=epsilon: op(*x, e), *inputs),
        )


def test_compile_with_dynamic_time_where_it_is_cut(backend, device, recompiling_fails):
    """The length of a segment follows from T, and does not pin it."""
    if backend != "cpu":
        pytest.skip("the lengths are those at which the CPU backend cuts time")

    def op(candidate, threshold):
        return mk.bmru(candidate, threshold, epsilon=0.5, backend=backend)

    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend="aot_eager")
    for time in (70_000, 80_001, 120_000):
        inputs = [draw(1, time, 1, device=device), draw(1, time, 1, seed=1, device=device)]
        assert_equal(results_and_grads(compiled, *inputs), results_and_grads(op, *inputs))


def test_twenty_epsilons_with_one_compilation(backend, device, recompiling_fails):
    def op(candidate, threshold, *, epsilon):
        return mk.bmru(candidate, threshold, epsilon=epsilon, backend=backend)

    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    inputs = [draw(2, 100, 5, device=device), draw(2, 100, 5, seed=1, device=device)]
    epsilon = torch.zeros(())
    seen = []
    for i in range(20):
        epsilon.fill_(i / 19)
        got = results_and_grads(compiled, *inputs, epsilon=epsilon)
        assert_equal(got, results_and_grads(op, *inputs, epsilon=epsilon))
        seen.append(got[0])
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(seen))


@pytest.mark.parametrize("value", [-0.5, 1.5, float("nan")])
@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_compiled_code_refuses_an_epsilon_out_of_range(backend, device, kind, value):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def op(candidate, threshold, epsilon):
        return mk.bmru(candidate, threshold, epsilon=epsilon, backend=backend)

    x = draw(1, 3, 2, device=device)
    op(x, x, kind(0.5))
    with pytest.raises(RuntimeError, match="epsilon: expected a value in"):
        op(x, x, kind(value))


@pytest.mark.parametrize(
    "cu_seqlens", [[0, 2, 99], [0, 9, 2, 5], [-3, 2, 5], [0, 2, 4], [1, 5], [0, 2**40, 5], [0]], ids=str
)
def test_compiled_code_refuses_offsets_out_of_range(backend, device, cu_seqlens):
    if backend != "cpu":
        pytest.skip("kernels for devices clamp offsets, they do not check them")

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def op(candidate, threshold, cu_seqlens):
        return mk.bmru(candidate, threshold, cu_seqlens=cu_seqlens, backend=backend)

    x = draw(1, 5, 2)
    op(x, x, torch.tensor([0, 2, 5]))
    with pytest.raises(RuntimeError, match="cu_seqlens: expected"):
        op(x, x, torch.tensor(cu_seqlens))


@pytest.mark.parametrize("packed", [False, True])
def test_compile_of_packed_sequences_reverse_and_packed_gates(backend, device, packed):
    def op(candidate, threshold, state, cu_seqlens):
        others = {"reverse": True, "cu_seqlens": cu_seqlens, "epsilon": 1.0, "backend": backend}
        if packed:
            return bmru_packed(torch.cat([candidate, threshold], -1), state, **others)
        return mk.bmru(candidate, threshold, state, **others)

    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend="aot_eager")
    for time in (130, 77):
        inputs = [draw(1, time, 3, device=device), draw(1, time, 3, seed=1, device=device), draw(3, 3, device=device)]
        offsets = torch.tensor([0, 50, 50, time], device=device)
        assert_equal(
            results_and_grads(lambda *x, o=offsets: compiled(*x, o), *inputs),
            results_and_grads(lambda *x, o=offsets: op(*x, o), *inputs),
        )


class Op(torch.nn.Module):
    def __init__(self, backend: str):
        super().__init__()
        self.backend = backend
        self.alpha = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
        self.register_buffer("epsilon", torch.tensor(0.5, dtype=torch.float64))

    def forward(self, candidate, threshold):
        return mk.bmru(candidate, threshold, epsilon=self.epsilon, alpha=self.alpha, backend=self.backend)


def test_export(backend, device):
    module = Op(backend).to(device)
    module.epsilon = module.epsilon.cpu()
    inputs = (draw(2, 100, 3, device=device), draw(2, 100, 3, seed=1, device=device))
    time = torch.export.Dim("time", min=70, max=1000)
    program = torch.export.export(module, inputs, dynamic_shapes=({1: time}, {1: time}))
    assert any(node.target is CELL.forward[backend] for node in program.graph.nodes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for length in (100, 71, 999):
        inputs = (draw(2, length, 3, device=device), draw(2, length, 3, seed=1, device=device))
        assert_equal(list(loaded(*inputs)), list(module(*inputs)))


# ------------------------------------------------------------------------------------------------ autocast, modes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend, device, dtype):
    c, b, m = (draw(2, 40, 3, seed=i, device=device) for i in range(3))
    alpha, state = draw(3, device=device), draw(2, 3, device=device)

    def op(c, b, m, alpha, state):
        return mk.bmru(c, b, state, epsilon=0.5, amplitude=m, alpha=alpha, backend=backend)

    with torch.autocast(device.type, dtype):
        got = results_and_grads(op, c, b, m, alpha, state)
        # as after a linear layer: streams of several dtypes meet
        mixed = results_and_grads(op, c.to(dtype), b, m, alpha, state)
        kept = results_and_grads(lambda *x: mk.bmru(*x, backend=backend), c.double(), b.double())
    plain = results_and_grads(op, c.to(dtype), b.to(dtype), m.to(dtype), alpha, state)
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float32
    assert [t.dtype for t in got[2:]] == [torch.float32] * 5  # gradients in the dtype of what was given
    assert_equal([t.float() for t in got], [t.float() for t in plain])
    assert_equal([t.float() for t in mixed], [t.float() for t in plain])
    assert all(t.dtype == torch.float64 for t in kept)


def test_autocast_leaves_a_threshold_per_channel_in_float32(backend, device):
    candidate = torch.full((1, 1, 1), 0.30078125, device=device)  # a bfloat16 number
    threshold = torch.full((1,), 0.301, device=device)  # a little more, and the same when rounded
    assert threshold.bfloat16().item() == candidate.item()
    with torch.autocast(device.type, torch.bfloat16):
        h, _ = mk.bmru(candidate, threshold, backend=backend)
    assert h.dtype == torch.bfloat16
    assert h.item() == 0.0


def test_grad_scaler(backend):
    """A loss scaled up and gradients scaled down again; an overflow skips the step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    weight = torch.nn.Parameter(torch.tensor([0.5, 0.25]))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    x = draw(2, 30, 2)
    h, _ = mk.bmru(x * weight, torch.full((2,), 0.1), epsilon=0.5, backend=backend)
    scaler.scale(h.square().mean()).backward()
    scaler.unscale_(optimizer)
    scaled = weight.grad.clone()
    weight.grad = None
    h, _ = mk.bmru(x * weight, torch.full((2,), 0.1), epsilon=0.5, backend=backend)
    h.square().mean().backward()
    assert torch.equal(scaled, weight.grad)  # scaled by a power of two


def test_inference_mode_and_no_grad(backend, device):
    c, b = draw(2, 90, 3, device=device).requires_grad_(), draw(2, 90, 3, seed=1, device=device)
    expected = [t.detach() for t in mk.bmru(c, b, epsilon=0.5, backend=backend)]
    with torch.no_grad():
        assert_equal(list(mk.bmru(c, b, epsilon=0.5, backend=backend)), expected)
    with torch.inference_mode():
        got = mk.bmru(c, b, epsilon=0.5, backend=backend)
        assert all(t.is_inference() for t in got)
        assert_equal(list(got), expected)
        x = draw(2, 90, 3, device=device)
    assert_equal(list(mk.bmru(x, b, epsilon=0.5, backend=backend)), expected)  # inference tensors outside


def test_a_model_that_was_evaluated_first_can_be_trained(backend, device):
    """Nothing that a call keeps is an inference tensor."""
    c, b = draw(2, 9, 3, device=device), draw(2, 9, 3, seed=1, device=device)
    epsilon = 0.71828  # used nowhere else
    with torch.inference_mode():
        mk.bmru(c, b, epsilon=epsilon, backend=backend)
    h, _ = mk.bmru(c.requires_grad_(), b, epsilon=epsilon, backend=backend)
    h.sum().backward()


def test_negated_view(backend, device):
    """The imaginary part of a conjugate: a view whose memory holds the negative of its values."""
    view = torch.randn(2, 40, 1, dtype=torch.complex64, device=device).conj().imag
    assert view.is_neg()
    plain = view.clone().resolve_neg().contiguous()
    for op in (mk.bmru, lambda *x, **settings: mk.bmru(x[0], 0.5 * x[1], **settings)):
        one = op(view, view, epsilon=1.0, backend=backend)
        assert_equal(list(one), list(op(plain, plain, epsilon=1.0, backend=backend)))


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("cell", inputs.CELLS)
def test_opcheck_of_a_step(backend, device, cell, index):
    options = {name: values[index % len(values)] for name, values in inputs.CELLS[cell].factors.items()}
    call = inputs.case(cell, torch.float32, time=1, batch=4, channels=9, **options).build().to(device)
    torch.library.opcheck(raw.CELLS[cell].step[backend], tuple(raw.step(call).values()))


def test_a_step_compiled_mapped_and_under_autocast(backend, device, monkeypatch):
    monkeypatch.setattr(backends, "_CHOSEN", backend)
    c, b, s = torch.randn(3, 4, 9, device=device).unbind()
    plain = mk.bmru_step(c, b, s, epsilon=0.5)
    assert_equal(list(torch.compile(mk.bmru_step, fullgraph=True, backend="eager")(c, b, s, epsilon=0.5)), list(plain))
    rows = torch.func.vmap(lambda c, b, s: mk.bmru_step(c, b, s, epsilon=0.5))(c[:, None], b[:, None], s[:, None])
    assert_equal([t[:, 0] for t in rows], list(plain))
    with torch.autocast(device.type, torch.bfloat16):
        h, after = mk.bmru_step(c, b.bfloat16(), s)
    assert (h.dtype, after.dtype) == (torch.bfloat16, torch.float32)


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
    """Of the op, of its gradient, and the gradient through it, against a loop; thresholds per channel as well."""
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
    """The value that `grad_and_value` returns is itself differentiable, by autograd and by an outer transform."""
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
    """A call of a cell, its loss, and four rows of its inputs."""
    function, rows = rows_of(*request.param, device)

    def op(*inputs):
        return function(*inputs, backend=backend)

    def op_loss(*inputs):
        h, final_state = op(*inputs)
        return h.abs().square().sum() + final_state.abs().square().sum()

    return op, op_loss, rows


def loop(op_loss, rows: list[Tensor]) -> list[Tensor]:
    """The gradient of each row by itself, without torch.func."""
    leaves = [[t.clone().requires_grad_() for t in row] for row in zip(*rows, strict=True)]
    grads = [torch.autograd.grad(op_loss(*row), row) for row in leaves]
    return [torch.stack(each) for each in zip(*grads, strict=True)]


def assert_close(one, other) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b)


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
    """`is_grads_batched`, also where one result has no gradient, against one call for each gradient."""
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
    function, rows = rows_of(cell, "fp32", 0, device)

    class Loss(torch.nn.Module):
        def forward(self, *inputs):
            h, final_state = function(*inputs, backend=backend)
            return h.square().sum() + final_state.square().sum()

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
    """Gradients per sample, of an ensemble and of a stack of networks, against autograd on each by itself."""

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


def test_transforms_in_other_modes(backend, device):
    """Gradients are off, or inside; anomalies are looked for; tensors are functional, or saved elsewhere."""
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
        differentiates = torch.func.grad(lambda c: c.sin().sum())(x).any()  # torch 2.11 gives zeros for its own ops too
        assert torch.equal(grad(x), expected if differentiates else torch.zeros_like(x))
    with warnings.catch_warnings(), torch.autograd.detect_anomaly():
        warnings.simplefilter("ignore")
        assert torch.equal(grad(x), expected)
    assert torch.equal(torch.func.functionalize(grad)(x), expected)
    assert torch.equal(torch.func.grad(torch.func.functionalize(op_loss))(x), expected)
    assert torch.equal(torch.func.grad(held)(x), mk.bmru(x, b, backend=backend)[0])
    _, pull = torch.func.vjp(op_loss, x)
    assert torch.equal(pull(torch.ones((), device=device))[0], expected)  # outside of the transform
    leaf = x.clone().requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        mapped = torch.vmap(lambda c, b: loss(c[None], b[None], backend=backend))(leaf, b)
        assert_close(torch.autograd.grad(mapped.sum(), leaf), [expected])


FORWARD_MODE = {
    "jvp": lambda op, x: torch.func.jvp(op, (x,), (x,)),
    "jacfwd": lambda op, x: torch.func.jacfwd(op)(x),
    "hessian": lambda op, x: torch.func.hessian(lambda x: op(x).sum())(x),
    "vmap": lambda op, x: torch.vmap(lambda x: torch.func.jvp(op, (x,), (x,)))(torch.stack([x, x])),
    "around vjp": lambda op, x: torch.func.jvp(lambda x: torch.func.vjp(op, x)[0], (x,), (x,)),
    "functional": lambda op, x: torch.autograd.functional.jvp(op, (x,), (x,)),
    "vectorize": lambda op, x: torch.autograd.functional.jacobian(op, x, vectorize=True, strategy="forward-mode"),
    "dual": lambda op, x: with_tangent(op, x),
}


def with_tangent(op, x):
    with torch.autograd.forward_ad.dual_level():
        return op(torch.autograd.forward_ad.make_dual(x, x))


@pytest.mark.parametrize("way", FORWARD_MODE)
def test_forward_mode_raises(backend, device, monkeypatch, way):
    """Of ops, steps and modules; what comes afterwards is not disturbed."""
    monkeypatch.setattr(backends, "_CHOSEN", backend)
    x, state, low = draw(2, 20, 3, device=device), draw(2, 3, device=device), draw(3, device=device)
    module = mk.BMRU(3, 3).to(device)
    ops = [
        (lambda c: mk.bmru(c, c)[0], x),
        (lambda c: mk.schmitt(c, low, low)[0], x),
        (lambda c: mk.linear_recurrence(low, c)[0], x),
        (lambda c: module(c)[0], x),
    ]
    if way not in ("around vjp", "functional", "hessian"):  # these take a first derivative, which a step refuses
        ops.append((lambda c: mk.bmru_step(c, c, state)[0], state))
    for op, point in ops:
        with pytest.raises(NotImplementedError, match="no forward-mode"):
            FORWARD_MODE[way](op, point)
    expected = torch.autograd.functional.vjp(lambda c: mk.bmru(c, c)[0].sum(), x)[1]
    assert torch.equal(torch.func.grad(lambda c: mk.bmru(c, c)[0].sum())(x), expected)
    with torch.autograd.forward_ad.dual_level():  # without a tangent
        mk.bmru(x, x)


def test_the_op_of_a_step_has_no_derivative(backend, device):
    x, state = draw(2, 2, 3, device=device)
    row = x[:, None]

    def op(x):
        call = inputs.call("bmru", {"candidate": row, "threshold": row}, {"epsilon": 0.5})
        return raw.run(CELL.step[backend], raw.step(call) | {"first": x, "second": x, "state": state})[0]

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


# ------------------------------------------------------------------------------------------------ torch.jit


TRACED = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*deprecated:DeprecationWarning")


class Scaled(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4))

    def forward(self, x):
        return mk.bmru(x * self.weight, 0.5 * x, epsilon=0.171828)  # used nowhere else


TRACED_MODULES = {
    "op": Scaled,
    "bmru": lambda: mk.BMRU(4, 6, 2, bidirectional=True),
    "schmitt": lambda: mk.FirstQuadrantBMRU(4, 6),
    "lru": lambda: mk.LRU(4, 6),
    "network": lambda: mk.MRUNetwork(4, 2, width=6, num_blocks=1),
}


@TRACED
@pytest.mark.parametrize("make", TRACED_MODULES.values(), ids=TRACED_MODULES)
def test_jit_trace(backend, device, monkeypatch, make):
    """With gradients, and at other lengths than that which was traced; other backends refuse, by name."""
    monkeypatch.setattr(backends, "_CHOSEN", backend)
    torch.manual_seed(0)
    module = make().to(device, torch.float64)  # a cut of time, which a trace does not see, rounds differently
    x = draw(2, 9, 4, dtype=torch.float64, device=device)
    if backend != "cpu":
        with pytest.raises(RuntimeError, match=r"backend: torch\.jit\.trace records 'cpu' only"):
            torch.jit.trace(module, x)
        return
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(module, x), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for shape in ((3, 150, 4), (1, 1500, 4)):
        x = draw(*shape, dtype=torch.float64)
        results = []
        for run in (module, loaded):
            output, _ = run(x)
            grads = torch.autograd.grad(output.square().sum(), run.parameters(), allow_unused=True)
            results.append([output.detach(), *(t for t in grads if t is not None)])
        assert_close(*results)


@TRACED
def test_jit_trace_of_a_step(backend, device, monkeypatch):
    monkeypatch.setattr(backends, "_CHOSEN", backend)
    x, y = draw(3, 2, 4, device=device), draw(3, 5, 4, device=device)

    def op(c, b, s):
        return mk.bmru_step(c, b, s, epsilon=0.271828)

    if backend != "cpu":
        with pytest.raises(RuntimeError, match=r"backend: torch\.jit\.trace records 'cpu' only"):
            torch.jit.trace(op, tuple(x))
        return
    assert_equal(list(torch.jit.trace(op, tuple(x))(*y)), list(op(*y)))


@TRACED
def test_jit_script_raises(device):
    for module in (mk.BMRU(4, 6), torch.nn.Sequential(torch.nn.Linear(4, 4), mk.LRU(4, 6))):
        with pytest.raises(RuntimeError, match=r"(BMRU|LRU): torch\.jit\.script cannot compile this module"):
            torch.jit.script(module)


# ------------------------------------------------------------------------------------------------ fake, meta


def _refused_second_derivative(op, x: Tensor) -> None:
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.func.grad(lambda x: torch.func.grad(op)(x).sum())(x)


def _nested_gradients(op, x: Tensor) -> None:
    scale = torch.ones((), device=x.device)
    second = torch.func.grad(lambda outer: torch.func.grad(lambda inner: inner * op(x))(outer))(scale)
    assert second.item() == 0.0


def _fake(op, x: Tensor) -> None:
    with FakeTensorMode():
        assert op(torch.empty(x.shape, device=x.device)).shape == ()


def _traced(mode: str, transform=lambda op: op):
    def trace(op, x: Tensor) -> None:
        program = make_fx(transform(op), tracing_mode=mode)(x)
        assert torch.equal(program(x), transform(op)(x))

    return trace


#: What a call may run under; none of it may change later calls.
SURROUNDINGS = {
    "nested grad": _nested_gradients,
    "refused second derivative": _refused_second_derivative,
    "jacrev": lambda op, x: torch.func.jacrev(op)(x),
    "vmap": lambda op, x: torch.vmap(op)(x.expand(3, *x.shape)),
    "FakeTensorMode": _fake,
    "make_fx real": _traced("real"),
    "make_fx fake": _traced("fake"),
    "make_fx symbolic": _traced("symbolic"),
    "make_fx of grad": _traced("fake", torch.func.grad),
    "inference_mode": lambda op, x: torch.inference_mode()(op)(x),
}


@pytest.mark.parametrize("first", SURROUNDINGS)
def test_a_call_leaves_nothing_of_what_it_runs_under(backend, device, first, monkeypatch):
    """Every surrounding in turn makes the cached epsilon; then calls of every kind use it."""
    monkeypatch.setattr(checks, "_epsilons", {})
    x = draw(1, 5, 2, device=device)

    def op(x):
        return mk.bmru(x, 0.5 * x, epsilon=0.25, backend=backend)[0].sum()

    SURROUNDINGS[first](op, x)
    leaf = x.clone().requires_grad_()
    op(leaf).backward()
    assert torch.equal(torch.func.grad(op)(x), leaf.grad)
    for surrounding in SURROUNDINGS.values():
        surrounding(op, x)
    assert all(type(t) is Tensor and t.item() == number for number, t in checks._epsilons.items())


def _every_call(device: str) -> list[inputs.Call]:
    """Two calls of each cell, which differ in every factor."""
    return [
        inputs.case(
            cell, torch.float32, time=900, batch=2, channels=4, initial_state="real", reverse=index == 1,
            **{name: x[index % len(x)] for name, x in declared.factors.items()},
        ).build().to(device)
        for cell, declared in inputs.CELLS.items()
        for index in (0, 1)
    ]  # fmt: skip


def _described(results: Iterable[Tensor]) -> list[tuple]:
    return [(t.shape, t.dtype, t.stride()) for t in results]


@pytest.mark.parametrize("name", [None, *backends.TABLE])
def test_meta(name):
    """Every backend gives the shapes of its results and gradients for tensors on meta, without its kernels."""
    for real, on_meta in zip(_every_call("cpu"), _every_call("meta"), strict=True):
        op, step = getattr(mk, real.cell), getattr(mk, f"{real.cell}_step")
        leaves = {key: t.requires_grad_() for key, t in on_meta.tensors.items()}
        results = op(**leaves, **on_meta.settings, backend=name)
        assert _described(results) == _described(op(**real.tensors, **real.settings))
        gradients = torch.autograd.grad([t.sum() for t in results], list(leaves.values()))
        assert [t.shape for t in gradients] == [t.shape for t in leaves.values()]
        assert all(t.is_meta for t in (*results, *gradients))
        first, expected = (
            {key: t.detach()[:, 0] if t.dim() == 3 else t.detach() for key, t in each.tensors.items()}
            for each in (on_meta, real)
        )
        first["state"], expected["state"] = first.pop("initial_state"), expected.pop("initial_state")
        assert _described(step(**first)) == _described(step(**expected))
    x, offsets = torch.empty(1, 900, 4, device="meta"), torch.tensor([0, 300, 900], device="meta")
    h, final = mk.bmru(x, x, cu_seqlens=offsets, backend=name)
    assert (h.shape, final.shape) == ((1, 900, 4), (2, 4))
    assert set(mk.available_backends("meta").values()) == {None}


def test_bad_input_on_meta():
    x = torch.empty(2, 9, 4, device="meta")
    with pytest.raises(ValueError, match=r"threshold: expected .*got \[2, 9, 3\]"):
        mk.bmru(x, x[..., :3])
    with pytest.raises(ValueError, match=r"threshold: expected .*got \[2, 3\]"):
        mk.bmru_step(x[:, 0], x[:, 0, :3], x[:, 0])
    for op, arguments in ((mk.bmru, (x, x)), (mk.bmru_step, x.unbind(1)[:3])):
        with pytest.raises(ValueError, match=r"epsilon: expected a value in \[0, 1\], got 1.5"):
            op(*arguments, epsilon=1.5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_fake_tensors_on_a_device_that_is_not_there():
    calls = _every_call("cpu")
    with FakeTensorMode(), torch.no_grad():
        for call in calls:
            tensors = {name: torch.empty(t.shape, device="cuda") for name, t in call.tensors.items()}
            op, step = getattr(mk, call.cell), getattr(mk, f"{call.cell}_step")
            for backend in (None, "cuda", "triton"):
                results = op(**tensors, **call.settings, backend=backend)
                assert {t.device.type for t in results} == {"cuda"}
            row = {name: torch.empty(2, 4, device="cuda") if t.dim() == 3 else t for name, t in tensors.items()}
            row["state"] = row.pop("initial_state")
            assert {t.device.type for t in step(**row)} == {"cuda"}
        x, vector = torch.empty(2, 900, 4, device="cuda"), torch.empty(4, device="cuda")
        with pytest.raises(RuntimeError, match="backend: 'cpu' cannot run this call: needs CPU tensors"):
            mk.bmru(x, vector, backend="cpu")
    with pytest.raises(RuntimeError, match="torch finds no CUDA"):
        backends.resolve(None, torch.device("cuda"))


# ------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("dtype", checks.STREAM_DTYPES, ids=str)
@pytest.mark.parametrize("segment", [0, 128])
@pytest.mark.parametrize("chunk_size", [64, 16, 256, None])
def test_saved_memory(backend, device, dtype, chunk_size, segment, monkeypatch):
    """Beyond the inputs, a boundary state a chunk, by default 1/32 of a stream at most; in segments, 2 bits a step."""
    least, most = backends.TABLE[backend].module.CHUNK_SIZES
    if chunk_size is not None and not least <= chunk_size <= most:
        pytest.skip(f"{backend} takes chunk sizes from {least} to {most}")
    monkeypatch.setattr(backends.TABLE[backend].module, "segment", lambda *sizes: segment)
    shape = (2, 1000, 16)
    c, b = (draw(*shape, dtype=dtype, seed=i, device=device).requires_grad_() for i in range(2))
    alpha, state = draw(16, device=device).requires_grad_(), draw(2, 16, device=device).to(ops.state_dtype(dtype))
    epsilon = torch.tensor(0.5, dtype=torch.float64)
    given = {t.data_ptr() for t in (c, b, alpha, state, epsilon)}
    saved = {}

    def pack(t):
        if t.data_ptr() not in given:
            saved[t.data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        h, _ = mk.bmru(c, b, state, epsilon=epsilon, alpha=alpha, chunk_size=chunk_size, backend=backend)
    events = sum(t.nbytes for t in saved.values() if t.dtype == torch.int32)
    states = sum(t.nbytes for t in saved.values() if t.dtype != torch.int32)
    rows = (shape[1] - 1) // chunk_size if chunk_size else 0
    assert states == rows * state.nbytes
    if chunk_size == 64:
        assert states <= c.nbytes / 32
    words = shape[1] // 16 + 1
    assert events == (4 * shape[0] * words * shape[2] if segment and chunk_size else 0)
    h.float().sum().backward()


def test_recomputed_or_kept_elsewhere(backend, device):
    """Under activation checkpointing, and with what is saved moved to host memory, gradients are the same bits."""
    c, b = (draw(2, 200, 5, seed=i, device=device) for i in range(2))
    state = draw(2, 5, device=device)

    def op(*inputs):
        return mk.bmru(*inputs, epsilon=0.5, backend=backend)

    def recomputed(*inputs):
        return torch.utils.checkpoint.checkpoint(op, *inputs, use_reentrant=False)

    def kept_elsewhere(*inputs):
        with torch.autograd.graph.save_on_cpu():
            return op(*inputs)

    plain = results_and_grads(op, c, b, state)
    assert_equal(results_and_grads(recomputed, c, b, state), plain)
    assert_equal(results_and_grads(kept_elsewhere, c, b, state), plain)


def test_nothing_is_saved_without_gradients(backend, device):
    """A call whose inputs need no gradient computes no boundary states."""
    x = draw(1, 1000, 4, device=device)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            results = func(*args, **(kwargs or {}))
            if func is CELL.forward[backend]:
                seen.append(results)
            return results

    with Watch():
        mk.bmru(x, x, backend=backend)
        mk.bmru(x.clone().requires_grad_(), x, backend=backend)
    without, with_ = seen
    assert len(without) == 2
    assert with_[2].numel() > 0


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_stand_for_the_gradient_of_a_result_that_is_not_used_and_for_no_other(backend, device, dtype, packed):
    c, b = (draw(1, 200, 4, seed=seed, device=device).to(dtype).requires_grad_() for seed in (0, 1))
    settings = {"backend": backend, "epsilon": 0.5}
    if packed:
        settings["cu_seqlens"] = torch.tensor([0, 50, 200], device=device)
    filled = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if "zeros" in str(func):
                filled.append(result.numel())
            return result

    sequences = 2 if packed else 1
    for used, numel in enumerate((sequences * 4, c.numel())):
        results = mk.bmru(c, b, **settings)
        grad = torch.ones_like(results[used])
        zeros = torch.zeros_like(results[1 - used])
        whole = torch.autograd.grad(results, (c, b), (zeros, grad) if used else (grad, zeros), retain_graph=True)
        filled.clear()
        with Watch():
            one = torch.autograd.grad(results[used], (c, b), grad)
        assert filled == [numel]
        assert all(map(torch.equal, one, whole))


def test_saved_inputs_may_not_be_changed_before_the_backward(backend, device):
    x = draw(1, 10, 2, device=device)
    weight = torch.ones(2, device=device, requires_grad=True)
    candidate = x * weight
    h, _ = mk.bmru(candidate, x, backend=backend)
    candidate.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


def test_a_subset_of_gradients(backend, device):
    """Whichever inputs require grad, each gets the same gradient; the others get none."""
    shapes = [(2, 70, 3)] * 3 + [(3,), (2, 3)]
    full = [draw(*shape, seed=i, device=device) for i, shape in enumerate(shapes)]

    def grads(mask: int) -> list[Tensor | None]:
        c, b, m, alpha, state = leaves = [t.clone().requires_grad_(bool(mask >> i & 1)) for i, t in enumerate(full)]
        h, final_state = mk.bmru(c, b, state, epsilon=0.5, alpha=alpha, amplitude=m, backend=backend)
        (h.square().sum() + final_state.sum()).backward()
        return [t.grad for t in leaves]

    whole = grads(0b11111)
    for mask in range(1, 31):
        for i, grad in enumerate(grads(mask)):
            assert (grad is not None) == bool(mask >> i & 1)
            assert grad is None or torch.equal(grad, whole[i])


@pytest.mark.parametrize("used", [0, 1])
def test_one_result_alone_has_gradients(backend, device, used):
    c, b = (draw(2, 70, 3, seed=i, device=device).requires_grad_() for i in range(2))
    results = mk.bmru(c, b, epsilon=0.5, backend=backend)
    alone = torch.autograd.grad(results[used].sum(), (c, b), retain_graph=True)
    weights = [torch.full_like(t, float(i == used)) for i, t in enumerate(results)]
    assert_equal(list(alone), list(torch.autograd.grad(results, (c, b), weights)))


# ------------------------------------------------------------------------------------------------ processes


def _train(rank: int, world: int) -> None:
    model = _model()
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    for x in _batches():
        optimizer.zero_grad()
        ddp(x[rank::world])[0].square().mean().backward()
        optimizer.step()
    if rank == 0:
        alone = _model()
        optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
        for x in _batches():
            optimizer.zero_grad()
            alone(x)[0].square().mean().backward()
            optimizer.step()
        for (name, one), other in zip(model.named_parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(one, other, msg=lambda m, name=name: f"{name}: {m}")
        start = dict(_model().named_parameters())
        assert not any(torch.equal(start[name], p) for name, p in model.named_parameters())


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    return mk.BMRU(5, 8, 2, epsilon=0.5, bidirectional=True)


def _batches() -> Tensor:
    return draw(3, 8, 70, 5)


@pytest.mark.check
def test_two_processes_train_as_one(tmp_path):
    """DistributedDataParallel over gloo."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        processes.run(_train, tmp_path / "rendezvous", 2)


@pytest.mark.parametrize("cls", [mk.BMRU, mk.MinGRU])
def test_a_compiled_transform_of_what_requires_grad(cls):
    """The first derivative is as in eager mode; the second raises where it is asked for, not where it is traced."""
    unit, x = cls(3, 4), torch.randn(2, 5, 3, requires_grad=True)

    def gradient(x):
        return torch.func.grad(lambda x: unit(x)[0].square().sum())(x)

    got = torch.compile(gradient, backend="aot_eager")(x)
    torch.testing.assert_close(got, gradient(x))
    with pytest.raises(NotImplementedError, match="no second derivative"):
        got.sum().backward()
