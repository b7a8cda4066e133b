"""The memory units under compile, export, autocast, vmap and the profiler."""

import pytest
import torch

import mru_kernels as mk
from tests.units import SIGNED, integers, make


def step(module, x, hx=None):
    """Output, final state and all gradients of one training step."""
    module.zero_grad()
    output, h_n = module(x, hx)
    (output.square().sum() + h_n.sum()).backward()
    return [output, h_n, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize(
    ("cls", "options", "given"),
    [
        (mk.BMRU, {"num_layers": 2, "bidirectional": True}, True),
        (mk.CMRU, {"batch_first": False}, False),
        (mk.AlphaCMRU, {"bias": False}, False),
    ],
)
def test_compile(cls, options, given):
    torch._dynamo.reset()
    module = make(cls, 4, 6, epsilon=0.5, **options)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for time in (17, 65):
        x = torch.randn(time, 2, 4) if "batch_first" in options else torch.randn(2, time, 4)
        hx = torch.randn(4, 2, 6) if given else None
        for a, b in zip(step(compiled, x, hx), step(module, x, hx), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_compile_with_inductor():
    torch._dynamo.reset()
    module = make(mk.BMRU, 4, 6, 2, integer=True)
    x = integers(2, 33, 4)
    for a, b in zip(step(torch.compile(module, fullgraph=True), x), step(module, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_export():
    module = make(mk.BMRU, 4, 6, 2, integer=True)
    x = integers(2, 33, 4)
    time = torch.export.Dim("time", min=2, max=1000)
    with torch.no_grad():
        exported = torch.export.export(module, (x,), dynamic_shapes={"input": {1: time}})
    for steps in (33, 70):
        x = integers(2, steps, 4)
        assert all(torch.equal(a, b) for a, b in zip(exported.module()(x), module(x), strict=True))


def test_autocast():
    module = make(mk.BMRU, 4, 6, 2)
    x = torch.randn(2, 33, 4)
    for hx in (None, torch.ones(2, 2, 6), torch.ones(2, 2, 6, dtype=torch.bfloat16)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output, h_n = module(x, hx)
        assert output.dtype == torch.bfloat16
        assert h_n.dtype == torch.float32
        (output.float().sum() + h_n.sum()).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in module.parameters())


def test_vmap_over_an_ensemble():
    modules = [make(mk.CMRU, 4, 6, 2, integer=True, seed=i) for i in range(3)]
    parameters, buffers = torch.func.stack_module_state(modules)
    x = integers(2, 33, 4)

    def run(p, b):
        return torch.func.functional_call(modules[0], (p, b), (x,))

    output, h_n = torch.vmap(run)(parameters, buffers)
    for i, module in enumerate(modules):
        assert torch.equal(output[i], module(x)[0])
        assert torch.equal(h_n[i], module(x)[1])


@pytest.mark.parametrize("cls", SIGNED)
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_training_step_copies_no_stream_and_runs_no_cat(cls, batch_first):
    module = make(cls, 16, 32, batch_first=batch_first)
    sizes = (4, 128) if batch_first else (128, 4)
    x = torch.randn(*sizes, 16, requires_grad=True)
    gradient = torch.randn(*sizes, 32)
    module(x)[0].backward(gradient)  # the first call makes one-time allocations
    module.zero_grad(), setattr(x, "grad", None)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        output, _ = module(x)
        output.backward(gradient)
    names = [event.name for event in profile.events()]
    assert sum("mru::bmru" in name for name in names) == 2, names
    assert "aten::cat" not in names
    stream, gates = output.numel() * output.element_size(), len(module.gates)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    needed = (2 * gates + 1) * stream + x.grad.nbytes  # gates, gradient of the gates, output, gradient of x
    parameters = sum(p.nbytes for p in module.parameters())
    assert needed <= allocated < needed + parameters + stream / 4
