"""Traces in training: saved, under autocast, compiled and in several processes; and what has no traces."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mru_kernels as mk
from tests import processes
from tests.traced_gradients import CUTS, close, draw, drawn, gradients, loss, streamed, whole

# ------------------------------------------------------------------------------------------------ saved and loaded


def test_saved_traces_continue_in_another_stream(tmp_path):
    module, x = drawn(mk.MRUNetwork, 4, 3, width=4, num_blocks=2, units=("schmitt", "lru")), draw(3, 24, 4)
    feed = mk.stream(module, gradient="traces")
    streamed(feed, x[:, :16], [5, 11])
    torch.save({"state": feed.state, "traces": feed.traces}, tmp_path / "saved")
    module.zero_grad()
    loss(feed(x[:, 16:])).backward()
    expected = gradients(module)
    saved = torch.load(tmp_path / "saved", weights_only=True)
    other = drawn(mk.MRUNetwork, 4, 3, width=4, num_blocks=2, units=("schmitt", "lru"))
    again = mk.stream(other, gradient="traces")
    again.state, again.traces = saved["state"], saved["traces"]
    loss(again(x[:, 16:])).backward()
    for name, grad in gradients(other).items():
        assert torch.equal(grad, expected[name]), name
    for name, trace in feed.traces.items():
        assert torch.equal(trace, again.traces[name]), name


def test_a_state_without_traces_is_a_constant():
    module, x = drawn(mk.LRU, 4, 6), draw(3, 24, 4)
    _, state = module(x[:, :8])
    for start, expected in ((state.detach(), None), (None, None)):
        module.zero_grad()
        loss(module(x[:, 8:], start)[0]).backward()
        expected = gradients(module)
        feed = mk.stream(module, gradient="traces")
        feed.state = start
        streamed(feed, x[:, 8:], [5, 11])
        close(gradients(module), expected)


def test_traces_that_do_not_fit_raise():
    x = draw(3, 8, 4)
    feed = mk.stream(drawn(mk.BMRU, 4, 6), gradient="traces")
    feed(x)
    good, state = feed.traces, feed.state
    for other, error, message in (
        ([good], TypeError, r"^traces: expected a dict"),
        ({}, ValueError, r"^traces: expected the names .* bias_ih_l0, initial_state_l0, weight_ih_l0"),
        (good | {"more": good["weight_ih_l0"]}, ValueError, r"^traces: .* differ in more"),
        (good | {"weight_ih_l0": 1.0}, TypeError, r"^traces\['weight_ih_l0'\]: expected a tensor"),
        (
            good | {"weight_ih_l0": good["bias_ih_l0"]},
            ValueError,
            r"^traces\['weight_ih_l0'\]: expected shape \[3, 12, 4\]",
        ),
        (good | {"bias_ih_l0": good["bias_ih_l0"].float()}, TypeError, r"^traces\['bias_ih_l0'\]: expected dtype"),
    ):
        with pytest.raises(error, match=message):
            feed.traces = other
        assert feed.traces is good
    for module in (mk.BMRU(4, 5), mk.LRU(4, 6), mk.BMRU(4, 6, 2), mk.MRUBlock(4)):
        with pytest.raises((TypeError, ValueError), match=r"^traces"):
            mk.stream(module.double(), gradient="traces").traces = good
    with pytest.raises(ValueError, match=r"^traces: expected None, got traces"):
        mk.stream(feed.module).traces = good
    feed.state = None
    with pytest.raises(ValueError, match=r"^traces: expected None without a state"):
        feed(x)
    feed.state = state
    for wrong in ({name: t[:2] for name, t in good.items()}, {name: t.to("meta") for name, t in good.items()}):
        feed.traces = wrong
        with pytest.raises(ValueError, match=r"^traces\['.*_l0'\]: expected (shape|the module's device)"):
            feed(x)


# ------------------------------------------------------------------------------------------------ training


def test_a_step_of_an_optimiser_leaves_the_trace_of_the_older_parameters():
    module, x = drawn(mk.CMRU, 4, 6), draw(3, 24, 4)
    feed = mk.stream(module, gradient="traces")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    older = drawn(mk.CMRU, 4, 6)
    loss(feed(x[:, :8])).backward()
    optimizer.step()
    module.zero_grad()
    loss(feed(x[:, 8:])).backward()
    got = gradients(module)
    _, state = older(x[:, :8])
    loss(module(x[:, 8:], state)[0]).backward()
    of_older, expected = gradients(older), gradients(module)
    close(got, {name: grad + of_older[name] for name, grad in expected.items()})
    assert of_older["weight_ih_l0"].norm() > 0


@pytest.mark.parametrize("how", ["autocast", "parameters"])
@pytest.mark.parametrize("cls", [mk.MinGRU, mk.AlphaCMRU, mk.LRU])
def test_half_precision_has_traces_of_its_states(cls, how):
    if cls is mk.LRU and how == "parameters":
        pytest.skip("an LRU has no half precision")
    dtype = torch.float32 if how == "autocast" else torch.bfloat16
    module, x = drawn(cls, 4, 6, dtype=dtype), torch.randint(-2, 3, (3, 24, 4)).to(dtype)
    with torch.no_grad():  # of integers, gates are the same in every dtype and every cut
        module.weight_ih_l0.copy_(torch.randint(-2, 3, module.weight_ih_l0.shape))
    exact = drawn(cls, 4, 6)
    exact.load_state_dict(module.double().state_dict() if how == "autocast" else module.state_dict())
    module.to(dtype)
    expected = whole(exact, x.double())
    feed = mk.stream(module, gradient="traces")
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        start = 0
        for chunk in x.split(CUTS["unequal"], 1):
            loss(feed(chunk).double(), start).backward()
            start += chunk.shape[1]
    states = {torch.complex64 if cls is mk.LRU else torch.float32}
    assert {t.dtype for t in feed.traces.values()} == states
    for name, grad in gradients(module).items():
        assert grad.dtype == dtype
        assert (grad.double() - expected[name]).norm() < 0.02 * expected[name].norm(), name


def test_several_losses_in_one_backward_pass():
    module, x = drawn(mk.MinLSTM, 4, 6), draw(3, 24, 4)
    expected = whole(module, x)
    feed = mk.stream(module, gradient="traces")
    sum(loss(feed(chunk), 8 * i) for i, chunk in enumerate(x.split(8, 1))).backward()
    close(gradients(module), expected)


def test_parametrized_weights():
    module, x = drawn(mk.BMRU, 4, 6, epsilon=0.5), draw(3, 24, 4)
    torch.nn.utils.parametrizations.weight_norm(module, "weight_ih_l0")
    expected = whole(module, x)
    streamed(mk.stream(module, gradient="traces"), x, CUTS["unequal"])
    close(gradients(module), expected)


def test_a_compiled_module_raises_and_a_compiled_training_step_runs():
    torch._dynamo.reset()
    block, x = drawn(mk.MRUBlock, 4), draw(3, 24, 4)
    with pytest.raises(ValueError, match=r"^module: expected an eager one"):
        mk.stream(torch.compile(block, backend="eager"), gradient="traces")
    feed = mk.stream(block, gradient="traces")

    @torch.compile(backend="eager")
    def step(chunk: Tensor) -> Tensor:
        return feed(2.0 * chunk).square().sum()

    step(x[:, :12]).backward()
    step(x[:, 12:]).backward()
    got = gradients(block)
    feed.reset()
    for chunk in x.split(12, 1):
        feed(2.0 * chunk).square().sum().backward()
    close(got, gradients(block))
    block.units[0].compile(backend="eager")
    with pytest.raises(ValueError, match=r"^module: expected an eager one"):
        mk.stream(block, gradient="traces")
    with pytest.raises(ValueError, match=r"^module: expected an eager one"):
        feed(x)


def test_distributed_data_parallel(group_of_one):
    module, x = drawn(mk.BMRU, 4, 6, 2, epsilon=0.5), draw(3, 24, 4)
    streamed(mk.stream(module, gradient="traces"), x, CUTS["equal"])
    expected = gradients(module)
    streamed(mk.stream(torch.nn.parallel.DistributedDataParallel(module), gradient="traces"), x, CUTS["equal"])
    close(gradients(module), expected)


def _train_in_two_processes(rank: int, results) -> None:
    module, x = drawn(mk.CMRU, 4, 6), draw(4, 24, 4)
    streamed(mk.stream(module, gradient="traces"), x, CUTS["unequal"])
    expected = gradients(module)
    parallel = torch.nn.parallel.DistributedDataParallel(module)
    streamed(mk.stream(parallel, gradient="traces"), x[2 * rank : 2 * rank + 2], CUTS["unequal"])
    close({name: 2 * grad for name, grad in gradients(module).items()}, expected)  # the mean over two processes
    results.put(rank)


@pytest.mark.check
def test_two_processes_train_as_one(tmp_path):
    results = torch.multiprocessing.get_context("spawn").Queue()
    processes.run(_train_in_two_processes, tmp_path / "rendezvous", results)
    assert {results.get(timeout=10), results.get(timeout=10)} == {0, 1}


# ------------------------------------------------------------------------------------------------ refused


def test_what_has_no_traces_raises():
    for other in (torch.nn.GRU(3, 4), "GRU", torch.nn.Linear(3, 4)):
        with pytest.raises(TypeError, match=r"^module: expected a recurrent module"):
            mk.stream(other, gradient="traces")
    with pytest.raises(ValueError, match=r"^module: expected one direction"):
        mk.stream(mk.BMRU(3, 4, bidirectional=True), gradient="traces")
    with pytest.raises(TypeError, match=r"^module: expected units of this package .* got a GRU"):
        mk.stream(mk.MRUNetwork(3, 4, width=4, num_blocks=1, units=("bmru", "gru")), gradient="traces")
    for unit in (mk.PRF, mk.Aaren):
        with pytest.raises(TypeError, match=rf'^module: expected no {unit.__name__} with gradient="traces"'):
            mk.stream(unit(3, 4), gradient="traces")
    for gradient in ("trace", True, 1):
        with pytest.raises(ValueError, match=r'^gradient: expected None or "traces", got'):
            mk.stream(mk.BMRU(3, 4), gradient=gradient)
    feed = mk.stream(mk.BMRU(3, 4), gradient="traces")
    with pytest.raises(TypeError, match=r"^input: expected a tensor.*PackedSequence"):
        feed(torch.nn.utils.rnn.pack_sequence([torch.randn(5, 3)]))
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inference mode"):
        feed(torch.randn(2, 5, 3))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_raises(reentrant):
    class Checkpointed(mk.MRUBlock):
        def forward(self, *arguments):
            return torch.utils.checkpoint.checkpoint(super().forward, *arguments, use_reentrant=reentrant)

    feed = mk.stream(Checkpointed(4), gradient="traces")
    with pytest.raises(RuntimeError, match=r"^module: expected one .*activation checkpointing"):
        feed(torch.randn(2, 5, 4, requires_grad=True))


# ------------------------------------------------------------------------------------------------ memory

PROGRAM = """
import sys, torch
import mru_kernels as mk
torch.set_num_threads(1)
torch.manual_seed(0)
module = mk.MRUNetwork(4, 16, width=8, num_blocks=1, units=("bmru", "lru"))
optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
feed, chunk = mk.stream(module, gradient="traces"), torch.randn(1, 1000, 4)
for _ in range(int(sys.argv[1])):
    feed(chunk).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


@pytest.mark.check
def test_a_million_steps_need_the_memory_of_a_few():
    few, many = (processes.peak_memory(PROGRAM, chunks) for chunks in (20, 1000))
    assert many < few + 8 * 1024  # the inputs of all units are 61 MiB
