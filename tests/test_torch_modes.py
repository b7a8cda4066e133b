"""The ops and torch.jit, fake and meta tensors, saved memory, several processes."""

from __future__ import annotations

import io
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import mru_kernels as mk
from bench import inputs
from mru_kernels import backends, checks, ops
from mru_kernels.scalars import EPSILON
from tests.drawn import assert_close, assert_equal, draw, results_and_grads

CELL = ops.CELLS["bmru"]


# ------------------------------------------------------------------------------------------------ torch.jit


TRACED = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*deprecated:DeprecationWarning")


class Scaled(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4))

    def forward(self, x):
        return mk.bmru(x * self.weight, 0.5 * x, epsilon=0.171828)  # no other test uses this epsilon


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
    """A trace runs at other lengths and has gradients. Backends other than cpu raise and name themselves."""
    monkeypatch.setattr(backends, "_CHOSEN", backend)
    torch.manual_seed(0)
    module = make().to(device, torch.float64)  # a trace fixes the segment size, so float32 would round differently
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


#: Modes and transforms that a call may run under. None may change later calls.
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
def test_a_call_under_a_mode_does_not_change_later_calls(backend, device, first, monkeypatch):
    """Each surrounding in turn creates the cached epsilon. Calls under all surroundings then use it."""
    EPSILON._known.clear()
    x = draw(1, 5, 2, device=device)

    def op(x):
        return mk.bmru(x, 0.5 * x, epsilon=0.25, backend=backend)[0].sum()

    SURROUNDINGS[first](op, x)
    leaf = x.clone().requires_grad_()
    op(leaf).backward()
    assert torch.equal(torch.func.grad(op)(x), leaf.grad)
    for surrounding in SURROUNDINGS.values():
        surrounding(op, x)
    assert all(type(t) is Tensor and t.item() == number for number, t in EPSILON._known.items())


def _every_call(device: str, time: int = 900) -> list[inputs.Call]:
    """Two calls of each cell, which differ in every factor."""
    return [
        inputs.case(
            cell, torch.float32, time=time, batch=2, channels=4, initial_state="real", reverse=index == 1,
            **{name: x[index % len(x)] for name, x in declared.factors.items()},
        ).build().to(device)
        for cell, declared in inputs.CELLS.items()
        for index in (0, 1)
    ]  # fmt: skip


def _described(results: Iterable[Tensor]) -> list[tuple]:
    return [(t.shape, t.dtype, t.stride()) for t in results]


@pytest.mark.parametrize("name", [None, *backends.TABLE])
def test_meta(name):
    """Every backend returns results and gradients of the right shapes for tensors on meta, without its kernels."""
    time = 30 if name == "torch" else 900  # which loops over time in Python
    for real, on_meta in zip(_every_call("cpu", time), _every_call("meta", time), strict=True):
        op, step = getattr(mk, real.cell), getattr(mk, f"{real.cell}_step")
        leaves = {key: t.requires_grad_() for key, t in on_meta.tensors.items()}
        results = op(**leaves, **on_meta.settings, backend=name)
        assert _described(results) == _described(op(**real.tensors, **real.settings))
        gradients = torch.autograd.grad(results, list(leaves.values()), list(map(torch.ones_like, results)))
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_fake_tensors_on_a_missing_device():
    calls = _every_call("cpu")
    with FakeTensorMode(), torch.no_grad():
        for call in calls:
            tensors = {name: torch.empty(t.shape, dtype=t.dtype, device="cuda") for name, t in call.tensors.items()}
            op, step = getattr(mk, call.cell), getattr(mk, f"{call.cell}_step")
            for backend in (None, "cuda", "triton"):
                results = op(**tensors, **call.settings, backend=backend)
                assert {t.device.type for t in results} == {"cuda"}
            row = {
                name: torch.empty(2, 4, dtype=t.dtype, device="cuda") if t.dim() == 3 else t
                for name, t in tensors.items()
            }
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
    """A scan saves a checkpoint per chunk, by default at most 1/32 of a narrow stream. Segments add 2 bits per step."""
    least, most = backends.TABLE[backend].module.CHUNK_SIZES
    if chunk_size is not None and not least <= chunk_size <= most:
        pytest.skip(f"{backend} supports chunk sizes from {least} to {most}")
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
    codes = sum(t.nbytes for t in saved.values() if t.dtype == torch.int32)
    states = sum(t.nbytes for t in saved.values() if t.dtype != torch.int32)
    rows = (shape[1] - 1) // chunk_size if chunk_size else 0
    assert states == rows * state.nbytes
    if chunk_size == 64:
        assert states <= c.nbytes / 32
    words = shape[1] // 16 + 1
    assert codes == (4 * shape[0] * words * shape[2] if segment and chunk_size else 0)
    h.float().sum().backward()


def test_recomputed_or_kept_elsewhere(backend, device):
    """Activation checkpointing and `save_on_cpu` do not change a bit of the gradients."""
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
    """A call whose inputs need no gradient computes no checkpoints."""
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
def test_only_an_unused_h_gets_a_gradient_of_zeros(backend, device, dtype, packed):
    """The op takes no gradient of an unused final state, and fills the zeros itself."""
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

    for used, expected in enumerate(([], [c.numel()])):
        results = mk.bmru(c, b, **settings)
        grad = torch.ones_like(results[used])
        zeros = torch.zeros_like(results[1 - used])
        whole = torch.autograd.grad(results, (c, b), (zeros, grad) if used else (grad, zeros), retain_graph=True)
        filled.clear()
        with Watch():
            one = torch.autograd.grad(results[used], (c, b), grad)
        assert filled == expected
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
    """The gradient of an input does not depend on which other inputs require grad."""
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


@pytest.mark.parametrize("cls", [mk.BMRU, mk.MinGRU])
def test_a_compiled_transform_of_inputs_that_require_grad(cls):
    """A compiled first derivative equals the eager one. A refused second raises in the backward call only."""
    unit, x = cls(3, 4), torch.randn(2, 5, 3, requires_grad=True)

    def gradient(x):
        return torch.func.grad(lambda x: unit(x)[0].square().sum())(x)

    got = torch.compile(gradient, backend="aot_eager")(x)
    torch.testing.assert_close(got, gradient(x))
    if cls is mk.MinGRU:
        (expected,) = torch.autograd.grad(gradient(x).sum(), x)
        torch.testing.assert_close(torch.autograd.grad(got.sum(), x)[0], expected)
        return
    with pytest.raises(NotImplementedError, match="no second derivative"):
        got.sum().backward()
