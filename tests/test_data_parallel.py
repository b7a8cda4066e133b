"""Two gloo processes under DistributedDataParallel compute what one process computes."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import mru_kernels as mk
from tests import processes
from tests.drawn import draw
from tests.units import make


def _train(rank: int, world: int) -> None:
    for model in (_unit, _delays):
        _train_one(rank, world, model)


def _train_one(rank: int, world: int, make_model: Callable[[], torch.nn.Module]) -> None:
    model = make_model()
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    for x in _batches():
        optimizer.zero_grad()
        ddp(x[rank::world])[0].square().mean().backward()
        optimizer.step()
    if rank == 0:
        alone = make_model()
        optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
        for x in _batches():
            optimizer.zero_grad()
            alone(x)[0].square().mean().backward()
            optimizer.step()
        for (name, one), other in zip(model.named_parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(one, other, msg=lambda m, name=name: f"{name}: {m}")
        start = dict(make_model().named_parameters())
        assert not any(torch.equal(start[name], p) for name, p in model.named_parameters())


def _unit() -> torch.nn.Module:
    torch.manual_seed(0)
    return mk.BMRU(5, 8, 2, epsilon=0.5, bidirectional=True)


def _delays() -> torch.nn.Module:
    torch.manual_seed(0)
    return mk.DelayConv(5, 20, 3, learn_sigma=True)


def _batches() -> Tensor:
    return draw(3, 8, 70, 5)


@pytest.mark.check
def test_two_processes_train_as_one(tmp_path):
    """Training in two processes gives the parameters of training in one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        processes.run(_train, tmp_path / "rendezvous", 2)


def _train_in_two_processes(rank, results):
    bmru = make(mk.BMRU, 4, 6, 2, bidirectional=True, epsilon=0.5, dtype=torch.float64)
    mesa = make(mk.MesaNet, 4, 6, heads=2, chunk_size=8, dtype=torch.float64)
    units = {"mesa": {"heads": 2, "chunk_size": 8}, "bmru": {}}
    network = make(mk.MRUNetwork, 4, 3, width=6, num_blocks=1, units=units, conv_size=2, dtype=torch.float64)
    torch.manual_seed(7)
    x, hx = torch.randn(4, 33, 4, dtype=torch.float64), torch.randn(4, 4, 6, dtype=torch.float64)
    mine = slice(2 * rank, 2 * rank + 2)
    _gradients_are_those_of_one_process(bmru, x, mine, hx, hx[:, mine])
    for module in (mesa, network):
        state = tuple(s.detach() for s in module(x[:, :5])[1])
        _gradients_are_those_of_one_process(module, x, mine, state, tuple(s[mine] for s in state))
    results.put(rank)


def _gradients_are_those_of_one_process(module, x, mine, state, part):
    parallel = torch.nn.parallel.DistributedDataParallel(module)
    for whole, own in ((None, None), (state, part)):
        module.zero_grad()
        parallel(x[mine], own)[0].square().mean().backward()
        got = [p.grad.clone() for p in module.parameters()]
        module.zero_grad()
        module(x, whole)[0].square().mean().backward()
        for a, p in zip(got, module.parameters(), strict=True):
            torch.testing.assert_close(a, p.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.check
def test_distributed_data_parallel(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    processes.run(_train_in_two_processes, tmp_path / "rendezvous", results)
    assert {results.get(timeout=10), results.get(timeout=10)} == {0, 1}
