"""`mk.mesa(backend="fla")` with a stand-in for fla: arguments, results, the comparison before the first use, errors."""

from __future__ import annotations

import sys
import types

import pytest
import torch

import mru_kernels as mk
from bench import mesa as bench
from mru_kernels import mesa_fla

pytestmark = pytest.mark.usefixtures("one_thread")  # the tensors are too small for two


def stand_in(q, k, v, g, beta, lamb, h_kk_init=None, h_kv_init=None, output_final_state=False,
             max_CG_iteration=30, use_qk_l2norm_in_kernel=False, cu_seqlens=None, cu_seqlens_cpu=None):  # noqa: N803  # fmt: skip
    """fla-core 0.6.0's `chunk_mesa_net`: its signature, what it asserts and what it returns."""
    batch, time, heads, key = q.shape
    assert k.shape == v.shape == (batch, time, heads, key)
    assert g.shape == beta.shape == (batch, time, heads)
    assert lamb.shape == (heads, key)
    assert q.dtype == k.dtype == v.dtype != torch.float32
    assert {s.dtype for s in (g, beta, lamb, h_kk_init, h_kv_init)} == {torch.float32}
    assert cu_seqlens is None or cu_seqlens.dtype == torch.int64
    assert output_final_state
    assert not use_qk_l2norm_in_kernel
    q, k, v, *rest = (s.double() for s in (q, k, v, g, beta, lamb, h_kk_init, h_kv_init))
    output, states, _ = mk.mesa(q, k, v, *rest[:3], tuple(rest[3:]), steps=max_CG_iteration, cu_seqlens=cu_seqlens)
    return output.to(torch.bfloat16), *(s.float() for s in states)


@pytest.fixture
def fla(monkeypatch):
    """A function that puts a `chunk_mesa_net` into the package fla, and lets the backend take CPU tensors."""

    def install(function) -> None:
        module = types.ModuleType("fla.ops.mesa_net")
        module.chunk_mesa_net = function
        monkeypatch.setitem(sys.modules, "fla", types.ModuleType("fla"))
        monkeypatch.setitem(sys.modules, "fla.ops", types.ModuleType("fla.ops"))
        monkeypatch.setitem(sys.modules, "fla.ops.mesa_net", module)
        mesa_fla.compare.cache_clear()

    monkeypatch.setattr(mesa_fla, "DEVICES", ("cpu",))
    yield install
    mesa_fla.compare.cache_clear()


def inputs(dtype=torch.bfloat16, key=8, value=8, time=70) -> list[torch.Tensor]:
    torch.manual_seed(1)
    q, k = torch.nn.functional.normalize(torch.randn(2, 2, time, 2, key), dim=-1).to(dtype).unbind(0)
    v, gates = torch.randn(2, time, 2, value).to(dtype), torch.rand(2, time, 2)
    tensors = [q, k, v, -0.1 * gates, gates, 0.5 + torch.rand(2, key)]
    root = torch.randn(2, 2, key, key)
    return [t.requires_grad_() for t in (*tensors, root @ root.mT, torch.randn(2, 2, key, value))]


def run(tensors, **options):
    return mk.mesa(*tensors[:6], tuple(tensors[6:]), **options)


def gradients(result, tensors):
    output, states, _ = result
    return torch.autograd.grad(output.float().square().sum() + sum(s.square().sum() for s in states), tensors)


@pytest.mark.parametrize("offset", [None, torch.tensor([0, 30, 70], dtype=torch.int32)])
def test_results_and_gradients(fla, offset):
    calls = []
    fla(lambda **given: calls.append(given["q"].shape) or stand_in(**given))
    tensors = inputs()
    if offset is not None:
        tensors = [t[:1].detach().requires_grad_() if t.dim() in (3, 4) and i < 5 else t for i, t in enumerate(tensors)]
    got, right = (run(tensors, cu_seqlens=offset, backend=name) for name in ("fla", "torch"))
    assert [t.dtype for t in (got[0], *got[1])] == [torch.bfloat16, torch.float32, torch.float32]
    assert got[2].unique().tolist() == [30]
    torch.testing.assert_close(got[:2], right[:2], rtol=1e-2, atol=1e-2)
    for one, other in zip(gradients(got, tensors), gradients(right, tensors), strict=True):
        assert one.dtype == other.dtype
        assert (one - other).norm() < 0.02 * other.norm()
    assert len(calls) == 2  # one in the comparison
    run(tensors, cu_seqlens=offset, backend="fla")
    assert len(calls) == 3
    run(tensors, cu_seqlens=offset)
    assert len(calls) == 3


def test_options_and_calls_without_a_state(fla):
    fla(stand_in)
    tensors = inputs()[:6]
    for steps in (2, 30):
        got, right = (mk.mesa(*tensors, steps=steps, backend=name) for name in ("fla", None))
        torch.testing.assert_close(got[:2], right[:2], rtol=1e-2, atol=1e-2)
    with torch.inference_mode():
        fla(stand_in)
        assert not mk.mesa(*tensors, backend="fla")[0].requires_grad
    assert mk.mesa(*inputs(time=0)[:6], backend="fla")[0].shape == (2, 0, 2, 8)


def test_a_module_and_its_steps(fla):
    fla(stand_in)
    torch.manual_seed(0)
    module = mk.MesaNet(4, 16, heads=2, backend="fla", dtype=torch.bfloat16)
    x = torch.randn(2, 5, 4, dtype=torch.bfloat16)
    output, state = module(x)
    module.backend = None
    right, _ = module(x)
    torch.testing.assert_close(output, right, rtol=0.1, atol=0.05)
    module.backend = "fla"
    module.step(x[:, 0], state)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = mk.MesaNet(4, 16, heads=2, backend="fla")
        mixed(x.float())[0].sum().backward()
        assert mixed.taken.unique().tolist() == [30]


@pytest.mark.check
def test_a_compiled_call_breaks_the_graph(fla):
    fla(stand_in)
    tensors = inputs(time=5)
    right = run(tensors, backend="fla")
    wanted = gradients(right, tensors)

    def function(*tensors):
        output, states, taken = run([t * 1 for t in tensors], backend="fla")
        return output * 2, states, taken

    got = torch.compile(function, backend="aot_eager")(*tensors)
    torch.testing.assert_close((got[0] / 2, *got[1:]), right, rtol=0, atol=0)
    torch.testing.assert_close(gradients((got[0] / 2, *got[1:]), tensors), wanted)


WRONG = {
    "beta and decay in turn": lambda g, beta, **rest: stand_in(g=-beta, beta=-g, **rest),
    "states in turn": lambda h_kk_init, h_kv_init, **rest: stand_in(h_kk_init=h_kv_init, h_kv_init=h_kk_init, **rest),
    "no regularizer": lambda lamb, **rest: stand_in(lamb=0 * lamb + 1e-3, **rest),
    "a transposed state": lambda **given: (lambda o, kk, kv: (o, kk, kv.mT))(*stand_in(**given)),
    "results in turn": lambda **given: (lambda o, kk, kv: (o, kv, kk))(*stand_in(**given)),
    "a small error": lambda **given: (lambda o, kk, kv: (o * 1.05, kk, kv))(*stand_in(**given)),
    "one gradient": lambda v, **rest: stand_in(v=v + (v - v.detach()) * 0.05, **rest),
    "not a number": lambda **given: (lambda o, kk, kv: (o * torch.nan, kk, kv))(*stand_in(**given)),
}


@pytest.mark.parametrize("fault", WRONG)
@pytest.mark.parametrize("packed", [False, True])
def test_wrong_numbers_are_refused(fla, fault, packed):
    fla(WRONG[fault])
    tensors = [t[:1] if packed and i < 5 else t for i, t in enumerate(inputs())]
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^backend: 'fla' cannot run this call: expected .* within 3% of"):
            run(tensors, cu_seqlens=torch.tensor([0, 30, 70]) if packed else None, backend="fla")


@pytest.mark.parametrize(
    ("sizes", "options", "match"),
    [
        ({"dtype": torch.float32}, {}, "it takes bfloat16 or float16 streams, got torch.float32"),
        ({"value": 4}, {}, "it takes equal key and value sizes up to 128, got 8 and 4"),
        ({"key": 144, "value": 144, "time": 1}, {}, "it takes equal key and value sizes up to 128, got 144 and 144"),
        ({}, {"solver": "direct"}, "it takes solver='cg', got 'direct'"),
        ({}, {"tolerance": 1e-3}, "it takes tolerance=0, got 0.001"),
        ({}, {"chunk_size": 32}, "it takes chunk_size=64, got 32"),
    ],
)
def test_calls_that_fla_does_not_take(fla, sizes, options, match):
    fla(stand_in)
    with pytest.raises(RuntimeError, match=f"^backend: 'fla' cannot run this call: {match}"):
        run(inputs(**sizes), backend="fla", **options)


def test_an_empty_sequence_is_refused(fla):
    fla(stand_in)
    tensors = [t[:1] for t in inputs()[:5]]
    with pytest.raises(RuntimeError, match=r"cannot run this call: it takes packed sequences of one step or more"):
        mk.mesa(*tensors, torch.ones(2, 8), cu_seqlens=torch.tensor([0, 30, 30, 70]), backend="fla")


def test_the_cpu_and_an_absent_fla(monkeypatch):
    tensors = inputs()
    with pytest.raises(
        RuntimeError, match=r"^backend: 'fla' cannot run this call: it takes CUDA tensors, got a q on cpu"
    ):
        run(tensors, backend="fla")
    monkeypatch.setattr(mesa_fla, "DEVICES", ("cpu",))
    monkeypatch.setitem(sys.modules, "fla", None)
    with pytest.raises(RuntimeError, match=r"^backend: 'fla' cannot run this call: it needs fla-core"):
        run(tensors, backend="fla")


def test_the_bench_measures_it(fla, capsys, monkeypatch):
    fla(stand_in)
    monkeypatch.setattr(bench.timing.measure, "__defaults__", (0.0,))
    assert bench.main(["--shape", "1,8,1", "--key-size", "3", "--steps", "2", "--fla"]) == 0
    rows = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert rows[-1].split()[:3] == ["3", "fla,", "bfloat16"]


def test_bad_names():
    for bad, error, match in (
        ("cuda", ValueError, "None or one of 'torch', 'fla', got 'cuda'"),
        (1, TypeError, "None"),
    ):
        with pytest.raises(error, match=f"^backend: expected {match}"):
            run(inputs(), backend=bad)
        with pytest.raises(error, match=f"^backend: expected {match}"):
            mk.MesaNet(3, 4, backend=bad)
