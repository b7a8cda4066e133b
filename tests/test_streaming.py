"""`mk.stream`: chunks of any length equal the whole sequence and need constant memory."""

from __future__ import annotations

import pytest
import torch

import mru_kernels as mk
from mru_kernels.nn.wrappers import unwrapped
from tests import processes

CUTS = [1, 40, 0, 25, 34]  # steps of each chunk; one chunk is empty


def _module(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    where = {"dtype": torch.float64}
    match kind:
        case "network":
            units = {"bmru": {}, "min_gru": {}, "lru": {}}
            return mk.MRUNetwork(5, 3, width=8, num_blocks=2, units=units, conv_size=3, **where)
        case "block":
            return mk.MRUBlock(5, "cmru", **where)
    return getattr(mk, kind)(5, 8, 2, **where)


KINDS = ["BMRU", "AlphaCMRU", "FirstQuadrantBMRU", "MinLSTM", "LIF", "LRU", "block", "network"]


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_equal_the_whole(kind):
    module = _module(kind)
    x = torch.randn(3, sum(CUTS), 5, dtype=torch.float64)
    whole, state = module(x)
    feed = mk.stream(module)
    cuts = [n for n in CUTS if n > 0] if kind in ("block", "network") else CUTS
    for _ in range(2):
        pieces = [feed(chunk) for chunk in x.split(cuts, 1)]
        torch.testing.assert_close(torch.cat(pieces, 1), whole)
        torch.testing.assert_close(feed.state, state)
        feed.reset()
        assert feed.state is None


def test_integers_are_exact():
    """With integer weights and inputs, gates do not depend on the chunks, so no bit does."""
    torch.manual_seed(0)
    module = mk.CMRU(5, 8)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randint(-3, 4, parameter.shape))
    x = torch.randint(-3, 4, (3, sum(CUTS), 5)).float()
    whole, h_n = module(x)
    feed = mk.stream(module)
    assert torch.equal(torch.cat([feed(chunk) for chunk in x.split(CUTS, 1)], 1), whole)
    assert torch.equal(feed.state, h_n)


@pytest.mark.parametrize("kind", ["AlphaCMRU", "block", "network"])
def test_no_gradient_passes_between_chunks(kind):
    module = _module(kind)
    x = torch.randn(3, 60, 5, dtype=torch.float64)
    feed = mk.stream(module)
    feed(x[:, :30]).sum().backward()
    states = [feed.state] if isinstance(feed.state, torch.Tensor) else feed.state
    assert not any(s.requires_grad for s in states)
    module.zero_grad()
    feed(x[:, 30:]).square().sum().backward()
    got = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    _, state = module(x[:, :30])
    state = state.detach() if isinstance(state, torch.Tensor) else tuple(s.detach() for s in state)
    module(x[:, 30:], state)[0].square().sum().backward()
    for one, parameter in zip(got, module.parameters(), strict=True):
        assert torch.equal(one, parameter.grad)


def test_a_saved_state_continues_in_another_stream(tmp_path):
    """The other stream has another module with the same weights."""
    module, other = _module("network"), _module("network")
    x = torch.randn(3, 60, 5, dtype=torch.float64)
    feed, again = mk.stream(module), mk.stream(other)
    feed(x[:, :30])
    torch.save(feed.state, tmp_path / "state")
    again.state = torch.load(tmp_path / "state", weights_only=True)
    assert torch.equal(feed(x[:, 30:]), again(x[:, 30:]))


def test_a_state_that_does_not_fit_raises():
    feed, x = mk.stream(_module("BMRU")), torch.randn(3, 4, 5, dtype=torch.float64)
    feed(x)
    state = feed.state
    for bad, error in (
        (state[:1], ValueError), (state[:, :2], ValueError), (state.to(torch.bfloat16), TypeError),
        (state.tolist(), TypeError), (state.to("meta"), ValueError),
    ):  # fmt: skip
        feed.state = bad
        with pytest.raises(error, match=r"^hx: expected"):
            feed(x)


def test_a_module_that_cannot_stream_raises():
    for other in (torch.nn.GRU(3, 4), torch.compile(torch.nn.GRU(3, 4)), "GRU"):
        with pytest.raises(TypeError, match=r"^module: expected a recurrent module.*(GRU|str)"):
            mk.stream(other)
    with pytest.raises(ValueError, match=r"^module: expected one direction"):
        mk.stream(torch.compile(mk.BMRU(3, 4, bidirectional=True)))
    for wrap in (lambda m: m, torch.compile):
        with pytest.raises(ValueError, match=r"^module: .*mean"):
            mk.stream(wrap(mk.MRUNetwork(3, 4, width=4, num_blocks=1, pool="mean")))


@pytest.mark.parametrize("kind", ["BMRU", "block"])
def test_a_stream_calls_the_wrapper_of_its_module(kind, group_of_one):
    """Every backward pass runs the hook of DistributedDataParallel, so it synchronises gradients."""
    torch._dynamo.reset()
    module = _module(kind)
    x = torch.randn(3, 20, 5, dtype=torch.float64)
    whole, _ = module(x)
    parallel = torch.nn.parallel.DistributedDataParallel(module)
    synchronised = []

    def hook(state, bucket):
        synchronised.append(bucket.index())
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    parallel.register_comm_hook(None, hook)
    compiled = [(torch.compile(parallel, backend="eager"), 2), (torch.compile(module, backend="eager"), 0)]
    for wrapper, times in [(parallel, 2), *compiled]:
        assert unwrapped(wrapper) is module
        synchronised.clear()
        feed = mk.stream(wrapper)
        assert feed.module is wrapper
        for chunk, expected in zip(x.split(10, 1), whole.split(10, 1), strict=True):
            output = feed(chunk)
            torch.testing.assert_close(output, expected)
            output.sum().backward()
        assert len(synchronised) == times


PROGRAM = """
import sys, torch
import mru_kernels as mk
torch.set_num_threads(1)
torch.manual_seed(0)
feed, chunk = mk.stream(mk.MRUNetwork(4, 16, width=8, num_blocks=1, units=("bmru", "lru"))), torch.randn(1, 1000, 4)
with torch.no_grad():
    for _ in range(int(sys.argv[1])):
        feed(chunk)
"""


@pytest.mark.check
def test_a_million_steps_need_the_memory_of_a_few():
    few, many = (processes.peak_memory(PROGRAM, chunks) for chunks in (20, 1000))
    assert many < few + 8 * 1024  # the outputs of all chunks are 61 MiB
