"""Jobs of processes: convolutions, blocks and networks under sequence parallelism equal one process with the whole."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import mru_kernels as mk
from mru_kernels.distributed import sequence_parallel

#: Steps of each rank's segment. A convolution of 9 taps reads 8 steps: less than a segment, all of several, and none.
TIMES = {1: [(40,)], 2: [(17, 23), (38, 2)], 3: [(20, 3, 17), (2, 3, 35)], 4: [(25, 3, 2, 10)]}
EMPTY = {1: [(0,)], 2: [(0, 40), (40, 0)], 3: [(5, 0, 35), (0, 0, 40)], 4: [(0, 3, 0, 37)]}

Make = Callable[[], torch.nn.Module]


def _layer(taps: int = 9) -> torch.nn.Module:
    torch.manual_seed(0)
    return mk.DelayConv(4, taps, 3, learn_sigma=True, dtype=torch.float64)


def _network(**options) -> torch.nn.Module:
    torch.manual_seed(0)
    options = {"units": ("bmru", "min_gru"), "num_blocks": 2, "delay": {"taps": 9, "count": 3}} | options
    return mk.MRUNetwork(4, 3, width=6, **options, dtype=torch.float64)


def _block() -> torch.nn.Module:
    torch.manual_seed(0)
    return mk.MRUBlock(4, "lru", delay={"taps": 24, "count": 3}, dtype=torch.float64)


def every_halo(rank: int) -> None:
    count = dist.get_world_size()
    short_convolution = {"delay": None, "conv_size": 4}
    makers: list[Make] = [_layer, _network, _block, lambda: _network(**short_convolution)]
    for make in makers:
        for times in TIMES[count]:
            _equals_the_whole(rank, make, times)
    for taps in (1, 9, 40):
        for times in (*EMPTY[count], *TIMES[count]):
            _equals_the_whole(rank, lambda taps=taps: _layer(taps), times)


def _equals_the_whole(rank: int, make: Make, times: tuple[int, ...]) -> None:
    """Outputs, states, and gradients of parameters, input and state; without and with a state, and with episodes."""
    torch.manual_seed(1)
    alone, module = make(), make()
    x = torch.randn(2, sum(times), 4, dtype=torch.float64, requires_grad=True)
    span = slice(*list(accumulate(times, initial=0))[rank : rank + 2])
    given = [torch.randn_like(t, requires_grad=True) for t in alone(x)[1]]
    resets = torch.rand(2, sum(times)) < 0.1
    resets[1] = False
    for state, mask in ((None, None), (given, None), (given, resets)):
        whole, last = alone(x, state, resets=mask)
        segment = x[:, span].detach().requires_grad_()
        output, after = sequence_parallel(module)(segment, state, resets=None if mask is None else mask[:, span])
        torch.testing.assert_close(output, whole[:, span])
        torch.testing.assert_close(after, last)
        leaves = [] if state is None else given
        of_whole = torch.autograd.grad(_loss(whole, last, 1.0), [x, *leaves, *alone.parameters()])
        share = (rank + 1) / sum(range(len(times) + 1))
        of_segment = torch.autograd.grad(_loss(output, after, share), [segment, *leaves, *module.parameters()])
        torch.testing.assert_close(of_segment[0], of_whole[0][:, span])
        for one, other in zip(of_segment[1 : 1 + len(leaves)], of_whole[1:], strict=False):
            dist.all_reduce(one)  # ranks have parts of the gradient of the state
            torch.testing.assert_close(one, other)
        torch.testing.assert_close(of_segment[1 + len(leaves) :], of_whole[1 + len(leaves) :])


def _loss(output: Tensor, state: tuple[Tensor, ...], share: float) -> Tensor:
    return output.square().sum() + share * sum((t.abs() ** 2).sum() for t in state)


def nan_before_a_reset(rank: int) -> None:
    """A NaN of an earlier episode stays on its own rank."""
    x = torch.zeros(1, 6, 4, dtype=torch.float64)
    resets = torch.zeros(1, 6, dtype=torch.bool)
    if rank == 0:
        x[0, 1], resets[0, 4] = torch.nan, True
    output, (after,) = sequence_parallel(_layer())(x, resets=resets)
    assert output[:, 4:].isfinite().all()
    assert output.isfinite().all() == (rank > 0)
    assert after.isfinite().all()


def halves_of_precision(rank: int) -> None:
    """Steps in half precision arrive without a change."""
    module = mk.DelayConv(4, 9, 3, dtype=torch.bfloat16)
    with torch.no_grad():
        for p in module.parameters():
            dist.broadcast(p.float(), 0)
    x = torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    torch.manual_seed(0)
    module.reset_parameters()
    _, (last,) = module(x)
    output, (after,) = sequence_parallel(module)(x[:, 15 * rank : 15 * rank + 15])
    assert torch.equal(after, last)
    torch.testing.assert_close(output, module(x)[0][:, 15 * rank : 15 * rank + 15])


def wrapped(rank: int) -> None:
    """Networks that are compiled, or in DistributedDataParallel along the batch, equal the plain network."""
    x = torch.randn(4, 40, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    half = x[:, 20 * rank : 20 * rank + 20]
    whole = _network()
    expected, _ = whole(x)
    expected.square().mean().backward()
    alone = [dist.new_group([r]) for r in range(dist.get_world_size())][rank]
    for wrap in (
        lambda n: sequence_parallel(torch.compile(n, backend="eager")),
        lambda n: torch.compile(sequence_parallel(n), backend="eager"),
        lambda n: sequence_parallel(torch.nn.parallel.DistributedDataParallel(n, process_group=alone)),
        lambda n: torch.nn.parallel.DistributedDataParallel(sequence_parallel(n), process_group=alone),
    ):
        network = _network()
        output, _ = wrap(network)(half)
        torch.testing.assert_close(output, expected[:, 20 * rank : 20 * rank + 20])
        (output.square().sum() / expected.numel()).backward()
        for one, other in zip(network.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)
    network.epsilon = 0.5
    assert sequence_parallel(network).epsilon == 0.5


def refused(rank: int) -> None:
    for options, error, message in (
        ({"pool": "mean"}, ValueError, "pool: expected None for a network over several ranks, got 'mean'"),
        ({"units": "gru"}, TypeError, "units: expected units of one scan over several ranks, got GRU"),
        ({"units": "mesa"}, TypeError, "got MesaNet"),
        ({"cache": {"segment": 64}}, TypeError, "got MemoryCache"),
    ):
        with pytest.raises(error, match=message):
            sequence_parallel(_network(**options))
    parallel, x = sequence_parallel(_layer()), torch.randn(2, 10, 4, dtype=torch.float64)
    wrong = [torch.zeros(2, 7 + rank, 4, dtype=torch.float64)]  # right on rank 1 alone
    for call, first in (
        (lambda: parallel(x, wrong), r"state: expected shape \[2, 8, 4\] for tensor 0, got \[2, 7, 4\]"),
        (lambda: sequence_parallel(_network())(x[:, : 10 * rank]), r"input: expected shape \[batch, time >= 1"),
    ):
        error, message = (ValueError, first) if rank == 0 else (RuntimeError, f"rank 0 of the group failed: .*{first}")
        with pytest.raises(error, match=message):
            call()
    with pytest.raises(RuntimeError, match="expected the same call on every rank"):
        sequence_parallel(_layer(9 + rank))(x)
    assert parallel(x)[0].shape == x.shape
