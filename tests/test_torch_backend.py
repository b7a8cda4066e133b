"""The backend "torch": every cell in plain torch, where it is chosen, and its graphs for exporters."""

from __future__ import annotations

import warnings
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import mru_kernels as mk
import python_ref
from bench import inputs
from mru_kernels import backends, ops
from tests.calls import CELLS, assert_agree, cases, op_of, run
from tests.drawn import assert_close, assert_equal, draw, results_and_grads

CPU = torch.device("cpu")
ANY = torch.export.Dim.AUTO


def plain_bmru(candidate, threshold, epsilon=0.5, **options):
    return mk.bmru(candidate, threshold, epsilon=epsilon, backend="torch", **options)


# ------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("cell", CELLS)
@given(data=st.data())
@settings(settings.get_profile("few"))
def test_equals_the_kernels(cell, data):
    """Results and gradients of every cell, dtype, direction and packing. test_op.py runs with `--backend torch` too."""
    call = data.draw(cases((30, 6), cell=cell, nonfinite=False)).build()
    assert_agree(call, run(call, op_of(cell, "torch"), CPU), run(call, op_of(cell, "cpu"), CPU))


SPECIAL = [torch.nan, 0.0, -0.0, 1e-40, -1e-40]
INFINITE = [torch.inf, -torch.inf]  # not of complex numbers: torch's sum of them has a product with 1 + 0i


def with_special_values(call: inputs.Call) -> inputs.Call:
    tensors = {}
    for name, t in call.tensors.items():
        values = torch.tensor(SPECIAL if t.is_complex() else SPECIAL + INFINITE).to(t.dtype)
        drawn = values[torch.randint(len(values), t.shape)]
        tensors[name] = torch.where(torch.rand(t.shape) < (0.05 if t.dim() == 3 else 0.1), drawn, t)
    return replace(call, tensors=tensors)


def over_time(t: torch.Tensor) -> torch.Tensor:
    """Whether all values of a sequence's channel are finite, `[B, D]` or `[D]`."""
    return t.isfinite().all(1) if t.dim() == 3 else t.isfinite()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("cell", "epsilon"), [(c, e) for c in CELLS for e in inputs.CELLS[c].factors.get("epsilon", [None])]
)
def test_special_values_equal_the_kernels(cell, epsilon, reverse):
    """NaN, infinities, zeros of both signs and subnormal numbers; gradients of channels that stay finite."""
    sizes = {"time": 12, "batch": 2, "channels": 64, "initial_state": "real", "reverse": reverse}
    options = {} if epsilon is None else {"epsilon": epsilon}
    torch.manual_seed(0)
    for dtype in inputs.CELLS[cell].dtypes.values():
        call = with_special_values(inputs.case(cell, dtype, **sizes, **options).build())
        ours, kernels = (run(call, op_of(cell, backend), CPU) for backend in ("torch", "cpu"))
        finite = torch.ones(2, 64, dtype=torch.bool)
        for t in (*call.tensors.values(), *ours.values()):
            finite = finite & over_time(t)
        assert 10 < finite.sum() < 120
        for name, result in ours.items():
            keep = torch.tensor(True)
            if name in call.tensors:  # a gradient
                keep = finite.all(0) if result.dim() == 1 else finite.reshape(2, *[1] * (result.dim() - 2), 64)
            one, other = (torch.where(keep, t, 0.0) for t in (result, kernels[name]))
            torch.testing.assert_close(one, other, equal_nan=True)


@pytest.mark.parametrize("cell", CELLS)
def test_a_step_equals_the_kernels(cell):
    call = inputs.case(cell, torch.float32, time=1, batch=3, channels=5, initial_state="real").build()
    row = {name: t[:, 0] if t.dim() == 3 else t for name, t in call.tensors.items()}
    row["state"] = row.pop("initial_state")
    step = getattr(mk, f"{cell}_step")
    with patch.object(backends, "_CHOSEN", "torch"):
        got = step(**row)
    assert_close(got, step(**row))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("time", "offsets"), [(3, None), (0, None), (3, [0, 0, 3]), (0, [0, 0])])
@pytest.mark.parametrize("result", [0, 1])
def test_one_result_alone_has_the_gradients_of_the_kernels(cell, time, offsets, result):
    """Where an input does not change the result, zeros: alpha and the final state, no step and the initial state."""
    options = {} if offsets is None else {"cu_seqlens": torch.tensor(offsets)}
    call = inputs.case(cell, torch.float64, time=time, batch=1, channels=2, initial_state="real").build()
    state = torch.randn(len(offsets or [0, 0]) - 1, 2, dtype=call.grad_final.dtype)
    tensors = {**call.tensors, "initial_state": state}
    if any(i.name == "alpha" for i in ops.CELLS[cell].inputs):
        tensors["alpha"] = torch.randn(2, dtype=torch.float64)
    grads = []
    for backend in ("torch", "cpu"):
        leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
        of = getattr(mk, cell)(**leaves, **options, backend=backend)[result]
        grads.append(torch.autograd.grad(of, list(leaves.values()), torch.ones_like(of)))
    assert_close(*grads)


def test_long_sequences():
    """Neither the backward pass nor the end of a graph of many steps overflows the stack."""
    x = torch.ones(1, 20_000, 1, requires_grad=True)
    h, _ = plain_bmru(x, x, epsilon=1.0)
    assert h[0, -1].item() == 20_000
    h.sum().backward()
    assert x.grad.isfinite().all()
    plain_bmru(x, x)  # and its graph is dropped


def test_any_chunk_size_is_taken():
    x = draw(1, 5, 3)
    assert_equal(plain_bmru(x, x, chunk_size=16 * 10**9), plain_bmru(x, x))
    with pytest.raises(ValueError, match="chunk_size: expected a positive multiple of 16"):
        plain_bmru(x, x, chunk_size=17)


# ------------------------------------------------------------------------------------------ choice


@pytest.fixture
def forgetful():
    """Choices and warnings of earlier calls are forgotten, and those of this test afterwards."""
    caches = (backends._resolve, backends._warn_of_plain)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def test_is_never_chosen_where_there_are_kernels(forgetful, monkeypatch):
    assert list(backends.TABLE)[-1] == "torch"
    assert backends.resolve(None, CPU).name == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"^backend: none can run on cuda \(cpu: .*torch: runs if it is named\)$"):
        backends.resolve(None, torch.device("cuda"))
    monkeypatch.setattr(backends, "load_error", lambda name: "it is broken" if name == "cpu" else None)
    backends._resolve.cache_clear()
    with pytest.raises(RuntimeError, match="none can run on cpu"):
        backends.resolve(None, CPU)
    assert backends.resolve("torch", CPU).name == "torch"


def on_device(device: str) -> set[str]:
    """The types of the devices of the results of each cell for fake tensors."""
    with FakeTensorMode(), torch.no_grad():
        x, row, vector = (torch.empty(*shape, device=device) for shape in ((2, 5, 3), (2, 3), (3,)))
        results = [
            *mk.bmru(x, vector, alpha=vector),
            *mk.schmitt(x, vector, vector),
            *mk.linear_recurrence(vector, x, reverse=True),
            *mk.leaky_integrator(x, x),
            *mk.bmru_step(row, vector, row),
        ]
        return {t.device.type for t in results}


def test_is_chosen_on_other_devices_with_one_warning(forgetful):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert on_device("xpu") == {"xpu"}
        assert on_device("mps") == {"mps"}
    assert [str(w.message) for w in caught if "'torch'" in str(w.message)] == [str(caught[0].message)]
    assert mk.available_backends("mps")["torch"] is None


def test_computes_where_no_kernel_is_for_the_device(forgetful):
    """The choice on another device, made here by a table in which kernels run elsewhere."""
    rows = backends.TABLE.items()
    elsewhere = {name: row if row.plain else replace(row, device_types=("xpu",)) for name, row in rows}
    x, y = draw(2, 9, 3), draw(2, 9, 3, seed=1)
    expected = results_and_grads(mk.bmru, x, y)
    backends._resolve.cache_clear()
    with patch.object(backends, "TABLE", elsewhere), pytest.warns(UserWarning, match="'torch'"):
        got = results_and_grads(mk.bmru, x, y)
    assert_close(got, expected)


def test_a_name_runs_without_a_warning(forgetful):
    x = draw(1, 5, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain_bmru(x, x)


# ------------------------------------------------------------------------------------------ refusals


def test_a_cell_without_plain_torch_is_named():
    cell = replace(ops.CELLS["leaky_integrator"], plain=None)
    x = draw(1, 5, 3)
    with pytest.raises(RuntimeError, match=r"'torch' cannot run this call: .* the cell leaky_integrator"):
        ops.scan(cell, [x, x], 3, 0, [], None, None, None, None, False, None, "torch")


def test_sequence_parallelism_is_refused(group_of_one):
    x = draw(1, 5, 3)
    with (
        patch.object(backends, "_CHOSEN", "torch"),
        pytest.raises(RuntimeError, match="'torch' cannot run this call: it has no sequence parallelism"),
    ):
        mk.distributed.sequence_parallel(mk.bmru)(x, x)


def test_offsets_that_have_no_values_yet_are_refused():
    offsets = torch.tensor([0, 2, 5])
    op = torch.compile(plain_bmru, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="it reads cu_seqlens, whose values are not known yet"):
        op(draw(1, 5, 3), draw(1, 5, 3), cu_seqlens=offsets)


# ------------------------------------------------------------------------------------------ transforms and graphs


def test_second_derivatives_are_those_of_the_surrogate():
    """The kernels refuse them."""
    x, y = draw(2, 5, 3, dtype=torch.float64), draw(2, 5, 3, dtype=torch.float64, seed=1)

    def second(op):
        return torch.func.grad(lambda x: torch.func.grad(lambda x: op(x, y, epsilon=0.5)[0].square().sum())(x).sum())(x)

    leaf = x.clone().requires_grad_()
    h, _ = python_ref.bmru(leaf, y, epsilon=0.5)
    (first,) = torch.autograd.grad(h.square().sum(), leaf, create_graph=True)
    (expected,) = torch.autograd.grad(first.sum(), leaf)
    assert_close([second(plain_bmru)], [expected])


def test_compiled():
    """Values, gradients and refusals do not change, and an epsilon that varies compiles once."""
    compiled = torch.compile(plain_bmru, backend="aot_eager", fullgraph=True)
    x, y = draw(2, 6, 3), draw(2, 6, 3, seed=1)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for value in (0.0, 0.3, 1.0):
            epsilon = torch.tensor(value, dtype=torch.float64)
            assert_close(
                results_and_grads(compiled, x, y, epsilon=epsilon), results_and_grads(mk.bmru, x, y, epsilon=value)
            )
        with pytest.raises(RuntimeError, match=r"epsilon: expected a value in \[0, 1\]"):
            compiled(x.requires_grad_(), y.requires_grad_(), epsilon=torch.tensor(1.5, dtype=torch.float64))


def test_mapped_and_traced():
    x, y = draw(4, 2, 6, 3), draw(4, 2, 6, 3, seed=1)

    def gradient(op):
        return torch.func.grad(lambda x, y: op(x, y, epsilon=0.5)[0].square().sum())

    mapped = torch.func.vmap(gradient(plain_bmru))(x, y)
    assert_close(mapped, [gradient(mk.bmru)(*each) for each in zip(x, y, strict=True)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jit.trace is deprecated
        traced = torch.jit.trace(plain_bmru, (x[0], y[0]))
    assert_equal(traced(x[1], y[1]), plain_bmru(x[1], y[1]))


class Scan(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, x, y):
        return plain_bmru(x, y, **self.options)


def targets(program: torch.export.ExportedProgram) -> set[str]:
    """The names of all ops of a program, those in the bodies of its loops included."""
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    return {str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, torch.tensor(0.0, dtype=torch.float64)])
def test_exported_by_name(epsilon, reverse):
    """A time that may vary gives one loop, a fixed one gives none."""
    scan, x, y = Scan(epsilon=epsilon, reverse=reverse), draw(2, 5, 3), draw(2, 5, 3, seed=1)
    fixed = torch.export.export(scan, (x, y))
    any_size = torch.export.export(scan, (x, y), dynamic_shapes=({0: ANY, 1: ANY},) * 2)
    assert "scan" in targets(any_size)
    assert "scan" not in targets(fixed)
    assert not any("mru" in name for name in targets(fixed) | targets(any_size))
    assert_equal(fixed.module()(x, y), scan(x, y))
    for shape in ((1, 2, 3), (3, 40, 3)):
        x, y = draw(*shape), draw(*shape, seed=1)
        assert_equal(any_size.module()(x, y), scan(x, y))


MODULES = {cls.__name__: lambda cls=cls: cls(4, 6) for cls in (mk.AlphaCMRU, mk.FirstQuadrantBMRU, mk.LRU)}
MODULES |= {
    "both directions": lambda: mk.BMRU(4, 6, 2, bidirectional=True, batch_first=False),
    "half precision": lambda: mk.CMRU(4, 6, dtype=torch.bfloat16),
    "network": lambda: mk.MRUNetwork(4, 3, width=6, num_blocks=1, units=("bmru", "min_gru"), conv_size=3),
}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_decomposed_modules(make):
    """No op of the package is left in an exported module, and its results have the same bits."""
    torch.manual_seed(0)
    module = make().eval().requires_grad_(False)
    dtype = next(module.parameters()).dtype
    program = torch.export.export(module, (draw(3, 5, 4, dtype=dtype),), dynamic_shapes=({0: ANY, 1: ANY},))
    program = program.run_decompositions(mk.export.decompositions())
    assert not any("mru" in name for name in targets(program))
    run = program.module()
    for shape in ((2, 2, 4), (3, 12, 4)):
        x = draw(*shape, dtype=dtype)
        assert_close(torch.utils._pytree.tree_leaves(run(x)), torch.utils._pytree.tree_leaves(module(x)))


def test_a_decomposed_step_has_no_loop():
    unit = mk.BMRU(4, 6, 2).requires_grad_(False)
    step = torch.nn.Module()
    step.unit = unit
    step.forward = unit.step
    x, hx = draw(2, 4), draw(2, 2, 6)
    program = torch.export.export(step, (x, hx)).run_decompositions(mk.export.decompositions())
    assert all(name.startswith("aten.") for name in targets(program))
    assert_equal(program.module()(x, hx), unit.step(x, hx))
