"""The ops in torch: opcheck, compile, export, autocast and other modes."""

from __future__ import annotations

import io
import itertools

import pytest
import torch
from torch import Tensor

import mru_kernels as mk
from bench import inputs
from mru_kernels import backends, ops
from mru_kernels.cells.bmru import bmru_packed
from tests import raw
from tests.drawn import assert_equal, draw, results_and_grads

CELL = ops.CELLS["bmru"]


LAYOUTS = {
    "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "time-major": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "windows": lambda t: t.flatten(1)[:, : t.shape[1] + t.shape[2] - 1].unfold(1, t.shape[2], 1),
}

#: Dtype, index into the values of each factor of the cell, options, and words. A word is a layout; "gates" puts all
#: streams into one tensor; "segments" cuts time.
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
    """Arguments of the forward op of a variant. All tensors require gradients."""
    cell, dtype, index, options, words = variant
    factors = inputs.CELLS[cell].factors
    values = {name: x[index % len(x)] for name, x in factors.items()} | {"batch": 2, "parameters": "as streams"}
    if "gates" in words:
        values |= {name: "stream" for name, x in factors.items() if "stream" in x}
    values |= {"epsilon": 0.5} if "epsilon" in factors else {}
    case = inputs.case(cell, inputs.CELLS[cell].dtypes[dtype], time=150, channels=5, **values | options)
    call = case.build().to(device)
    arguments = raw.scan(call, gates="gates" in words, segment=backends.CHUNK if "segments" in words else 0, save=save)
    relaid = next((LAYOUTS[word] for word in words.split() if word in LAYOUTS), lambda t: t)
    tensors = [relaid(t) if t.dim() == 3 else t for t in raw.tensors_of(arguments)]
    return raw.with_tensors(arguments, [t.detach().requires_grad_() for t in tensors])


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_opcheck(backend, device, variant):
    arguments, cell = raw_arguments(variant, device), ops.CELLS[variant[0]]
    torch.library.opcheck(cell.forward[backend], tuple(arguments.values()))
    results = raw.run(cell.forward[backend], arguments)
    of_backward = torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, raw.backward(arguments, results))
    if cell.name == "linear_recurrence":  # a second derivative of the others raises
        for t in (of_backward["grad_h"], of_backward["grad_final"], *of_backward["inputs"]):
            t.requires_grad_()
    torch.library.opcheck(cell.backward[backend], tuple(of_backward.values()))


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("cell", ops.CELLS)
def test_an_op_that_decides_how_time_is_cut(backend, device, cell, cut):
    """It gives what the same cut gives if the caller asks for it, whether the states are kept or scanned again."""
    time = (1030 if backend == "cpu" else 300) if cut else 9
    dtype = next(iter(inputs.CELLS[cell].dtypes.values()))
    call = inputs.case(cell, dtype, batch=2, time=time, channels=3, initial_state="real").build().to(device)
    row, forward, backward = (
        backends.TABLE[backend],
        ops.CELLS[cell].forward[backend],
        ops.CELLS[cell].backward[backend],
    )
    own = row.module.segment(2, 2 * time, 3, call.stream.itemsize, device)
    assert (own > 0) == cut or backend == "simt"
    kept, expected = (raw.run(forward, raw.scan(call, segment=segment)) for segment in (-1, own))
    for a, b in zip(kept[:2], expected[:2], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(kept[2:], expected[2:], strict=True):
        assert torch.equal(a[: len(b)], b)
        assert not a[len(b) :].any()
    grads = [
        raw.run(backward, raw.backward(raw.scan(call, segment=segment), [*expected[:2], *saved]))
        for segment, saved in ((own, expected[2:]), (-1, kept[2:]), (-1, (None, None)))
    ]
    for others in zip(*grads, strict=True):
        assert all(torch.equal(others[0], t) for t in others)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_map_of_a_scan(backend, device, variant):
    """The map op returns a factor and an offset that take the initial state to the final state."""
    cell = ops.CELLS[variant[0]]
    if not cell.composes:
        arguments = raw_arguments(variant, device)
        with pytest.raises(RuntimeError, match="map: expected a cell whose steps compose"):
            raw.run(cell.map[backend], arguments)
        return
    arguments = torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, raw_arguments(variant, device))
    torch.library.opcheck(cell.map[backend], raw.of(raw.MAP, arguments))
    factor, offset = raw.run(cell.map[backend], arguments)
    state = torch.full_like(offset, 0.5)
    _, final_state, *_ = raw.run(cell.forward[backend], arguments | {"initial_state": state})
    assert final_state.dtype == factor.dtype == offset.dtype
    torch.testing.assert_close(factor * state + offset, final_state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_raw_op_is_differentiable_by_itself(backend, device, variant):
    """The dispatcher gives the same gradients whether checkpoints are saved or not, also under torch.func."""
    arguments = raw_arguments(variant, device)
    leaves = raw.tensors_of(arguments)
    op = ops.CELLS[variant[0]].forward[backend]

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
    """The segment size is computed from T and does not specialise the graph on T."""
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
        # A linear layer under autocast returns the autocast dtype, so streams of several dtypes meet.
        mixed = results_and_grads(op, c.to(dtype), b, m, alpha, state)
        kept = results_and_grads(lambda *x: mk.bmru(*x, backend=backend), c.double(), b.double())
    plain = results_and_grads(op, c.to(dtype), b.to(dtype), m.to(dtype), alpha, state)
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float32
    assert [t.dtype for t in got[2:]] == [torch.float32] * 5  # gradients have the dtype of the inputs
    assert_equal([t.float() for t in got], [t.float() for t in plain])
    assert_equal([t.float() for t in mixed], [t.float() for t in plain])
    assert all(t.dtype == torch.float64 for t in kept)


def test_autocast_leaves_a_threshold_per_channel_in_float32(backend, device):
    candidate = torch.full((1, 1, 1), 0.30078125, device=device)  # exact in bfloat16
    threshold = torch.full((1,), 0.301, device=device)  # slightly larger, and equal after rounding to bfloat16
    assert threshold.bfloat16().item() == candidate.item()
    with torch.autocast(device.type, torch.bfloat16):
        h, _ = mk.bmru(candidate, threshold, backend=backend)
    assert h.dtype == torch.bfloat16
    assert h.item() == 0.0


def test_grad_scaler(backend):
    """GradScaler scales the loss up and the gradients down by the same power of two."""
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
    assert torch.equal(scaled, weight.grad)  # exact, because the scale is a power of two


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
    assert_equal(list(mk.bmru(x, b, epsilon=0.5, backend=backend)), expected)  # outside of inference mode


def test_a_model_that_was_evaluated_first_can_be_trained(backend, device):
    """The cached epsilon of a call in inference mode is no inference tensor."""
    c, b = draw(2, 9, 3, device=device), draw(2, 9, 3, seed=1, device=device)
    epsilon = 0.71828  # no other test uses this value, so this call caches it
    with torch.inference_mode():
        mk.bmru(c, b, epsilon=epsilon, backend=backend)
    h, _ = mk.bmru(c.requires_grad_(), b, epsilon=epsilon, backend=backend)
    h.sum().backward()


def test_negated_view(backend, device):
    """The imaginary part of a conjugate is a view whose memory stores the negated values."""
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
    torch.library.opcheck(ops.CELLS[cell].step[backend], tuple(raw.step(call).values()))


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
