"""Streams, graphs and several devices, which only a GPU has. `make gpu-check` runs these tests."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import mru_kernels as mk
from mru_kernels import backends
from mru_kernels.softmax import run
from tests import softmax_calls

SHAPES = [(8, 300, 64), (1, 20_000, 8)]  # [B, T, D]: whole sequences in parallel; one sequence in segments
_WAIT = 100_000_000  # cycles, tens of milliseconds


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    if device.type != "cuda":
        pytest.skip("needs a GPU: --device cuda")
    return device


def draw(shape: tuple[int, ...], device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Candidate, threshold and the gradient of h."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator).to(device) for _ in range(3))


def passes(candidate: Tensor, threshold: Tensor, grad_h: Tensor, backend: str) -> tuple[Tensor, ...]:
    """h, final state and the gradients of candidate and threshold."""
    given = [t.detach().requires_grad_() for t in (candidate, threshold)]
    h, final = mk.bmru(*given, backend=backend)
    return h.detach(), final.detach(), *torch.autograd.grad(h, given, grad_h)


def assert_same(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for result, other in zip(results, expected, strict=True):
        torch.testing.assert_close(result, other, rtol=0, atol=0)


def assert_graph_takes_new_inputs(
    run: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...], others: tuple[Tensor, ...]
) -> None:
    """A captured `run(*inputs)` whose inputs become `others` replays as `run(*others)`."""
    expected = run(*others)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        run(*inputs)  # the first call allocates what a capture cannot
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(*inputs)
    for x, other in zip(inputs, others, strict=True):
        x.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(results, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_run_on_the_current_stream(backend, gpu, shape):
    # The inputs get their values late, on this stream. Kernels on another stream would read NaN.
    values = draw(shape, gpu)
    expected = passes(*values, backend)
    late = [torch.full_like(x, math.nan) for x in values]
    torch.cuda.synchronize(gpu)
    with torch.cuda.stream(torch.cuda.Stream(gpu)):
        torch.cuda._sleep(_WAIT)
        for x, value in zip(late, values, strict=True):
            x.copy_(value)
        results = passes(*late, backend)
    torch.cuda.synchronize(gpu)
    assert_same(results, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_graph_of_both_passes_takes_new_inputs(backend, gpu, shape):
    run = functools.partial(passes, backend=backend)
    assert_graph_takes_new_inputs(run, draw(shape, gpu), draw(shape, gpu, seed=1))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_graph_of_a_step_takes_new_inputs(backend, gpu, shape, monkeypatch):
    monkeypatch.setattr(backends, "_CHOSEN", backend)
    shape = (shape[0], shape[2])
    assert_graph_takes_new_inputs(mk.bmru_step, draw(shape, gpu), draw(shape, gpu, seed=1))


def test_a_graph_of_a_step_in_slots_takes_new_indices(backend, gpu, monkeypatch):
    monkeypatch.setattr(backends, "_CHOSEN", backend)
    (x, b, _), slots = draw((4, 64), gpu), torch.zeros(9, 64, device=gpu)
    indices, others = torch.tensor([3, 0, -1, 8], device=gpu), torch.tensor([-1, 5, 2, 3], device=gpu)

    def run(x, b, indices):
        h, _ = mk.bmru_step(x, b, slots.zero_(), state_indices=indices)
        return h, slots.clone()

    assert_graph_takes_new_inputs(run, (x, b, indices), (b, x, others))


def test_a_graph_of_a_step_of_a_network_takes_new_inputs(backend, gpu, monkeypatch):
    monkeypatch.setattr(backends, "_CHOSEN", backend)
    network = mk.MRUNetwork(64, 5, width=64, num_blocks=2, units=("bmru", "min_gru"), conv_size=4, device=gpu)
    x, other, _ = draw((2, 64), gpu)
    _, state = network(draw((2, 9, 64), gpu, seed=1)[0])
    state = [t.detach() for t in state]
    others = [t + 1 for t in state]

    def run(x, *state):
        output, after = network.step(x, state)
        return output, *after

    assert_graph_takes_new_inputs(run, (x, *state), (other, *others))


@pytest.mark.parametrize("shape", SHAPES)
def test_tensors_on_a_device_that_is_not_the_current_one(backend, gpu, shape):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    values = draw(shape, torch.device("cuda", 0))
    expected = passes(*values, backend)
    with torch.cuda.device(0):
        results = passes(*(x.to("cuda:1") for x in values), backend)
        assert torch.cuda.current_device() == 0
    assert {x.device.index for x in results} == {1}
    assert_same(tuple(x.to("cuda:0") for x in results), expected)


@pytest.mark.parametrize(("heads", "group"), [(8, 1), (2, 24)])
@pytest.mark.parametrize("time", [300, 20_000])
def test_softmax_recurrence_equals_float64_on_the_cpu(backend, gpu, time, heads, group):
    """Results and gradients, whole and in segments; bounds of float32 with approximate exponentials."""
    if backend not in run._with_kernels():
        pytest.skip(f"{backend} has no kernels of it")
    call = softmax_calls.draw(
        time=time, heads=heads, group=group, decay="stream", bonus=True, state=True, scale=3.0, dtype=torch.float32
    )
    found = []
    for name, device, dtype in (("cpu", "cpu", torch.float64), (backend, gpu, torch.float32)):
        given = {k: t.detach().to(device, dtype).requires_grad_() for k, t in call.items()}
        results = mk.softmax_recurrence(**given, backend=name)
        torch.manual_seed(1)
        grad = torch.randn(results[0].shape)
        grads = torch.autograd.grad(results[0], list(given.values()), grad.to(device, dtype))
        found.append([t.detach().cpu() for t in (results[0], results[1][:, : heads * (group + 1)], *grads)])
    for wanted, got in zip(*found, strict=True):
        assert softmax_calls.error(got, wanted) < 1e-3
