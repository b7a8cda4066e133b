"""Jobs of processes: modules under sequence parallelism equal one process with the whole sequence."""

from __future__ import annotations

import copy
import pickle
from itertools import accumulate

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

import mru_kernels as mk
from mru_kernels.distributed import sequence_parallel

TIMES = (40, 0, 25)
MODULES = {
    "BMRU": {"epsilon": 0.0, "num_layers": 2},
    "AlphaCMRU": {"epsilon": 0.5, "num_layers": 2, "bidirectional": True},
    "FirstQuadrantBMRU": {"batch_first": False},
    "MinGRU": {"num_layers": 2, "bidirectional": True},
    "LRU": {"num_layers": 2},
    "Aaren": {"num_layers": 2, "num_heads": 2, "learn_initial_state": True},
}


def make_module(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return getattr(mk, name)(5, 8, dtype=torch.float64, **MODULES[name])


def _backward(outputs: tuple[Tensor, Tensor], share: float) -> None:
    output, h_n = outputs
    (output.square().sum() + share * (h_n.abs() ** 2).sum()).backward()


def every_module(rank: int) -> None:
    for name in MODULES:
        _one_module(rank, name)


def _one_module(rank: int, name: str) -> None:
    torch.manual_seed(1)
    alone, module = make_module(name), make_module(name)
    time_dim = 1 if alone.batch_first else 0
    x = torch.randn(3, sum(TIMES), 5, dtype=torch.float64).transpose(0, 1 - time_dim)
    spans = list(accumulate(TIMES, initial=0))
    hx = torch.randn_like(alone(x)[1])
    resets = torch.rand(x.shape[:-1]) < 0.1
    for state, given in ((None, None), (hx, None), (hx, resets)):
        if given is not None and alone.bidirectional:
            with pytest.raises(ValueError, match=r"resets: expected None for a bidirectional module"):
                sequence_parallel(module)(x, state, resets=given)
            continue
        whole = alone(x, state, resets=given)
        _backward(whole, 1.0)
        segment = x.narrow(time_dim, spans[rank], TIMES[rank])
        own = None if given is None else given.narrow(time_dim, spans[rank], TIMES[rank])
        output, h_n = sequence_parallel(module)(segment, state, resets=own)
        torch.testing.assert_close(output, whole[0].narrow(time_dim, spans[rank], TIMES[rank]), msg=name)
        torch.testing.assert_close(h_n, whole[1], msg=name)
        _backward((output, h_n), 1.0 if rank == 1 else 0.0)
    for (parameter, one), other in zip(module.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=lambda m, p=parameter: f"{name}.{p}: {m}")


def two_dimensional_mesh(rank: int) -> None:
    """The rows of a 2 by 2 mesh split the batch, its columns split time."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("batch", "time"))
    torch.manual_seed(1)
    x = torch.randn(4, 60, 5, dtype=torch.float64)
    alone, module = make_module("BMRU"), make_module("BMRU")
    alone(x)[0].square().mean().backward()
    parallel = sequence_parallel(module, mesh["time"])
    ddp = torch.nn.parallel.DistributedDataParallel(parallel, process_group=mesh["batch"].get_group())
    row, column = mesh.get_coordinate()
    output, _ = ddp(x[2 * row : 2 * row + 2, 30 * column : 30 * column + 30])
    (output.square().sum() / (2 * 60 * 8)).backward()  # this row's share of the mean
    for one, other in zip(module.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def sharded_parameters(rank: int) -> None:
    """FSDP2 shards parameters over the rows of the mesh, and the columns split time."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("batch", "time"))
    row, column = mesh.get_coordinate()
    torch.manual_seed(1)
    x = torch.randn(4, 60, 5, dtype=torch.float64)

    def trained(model: torch.nn.Module, x: Tensor, share: int) -> torch.nn.Module:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            (model(x)[0].square().mean() / share).backward()
            optimizer.step()
        return model

    def network() -> mk.MRUNetwork:
        torch.manual_seed(0)
        units, delay = ("bmru", "lru"), {"taps": 9, "count": 2}
        return mk.MRUNetwork(5, 4, width=8, num_blocks=2, units=units, delay=delay, dtype=torch.float64)

    mine = x[2 * row : 2 * row + 2]
    segment = mine[:, 30 * column : 30 * column + 30]
    pairs = []
    for make in (lambda: make_module("BMRU"), network):
        parallel = fully_shard(sequence_parallel(make(), mesh["time"]), mesh=mesh["batch"])
        trained(parallel, segment, 2)
        pairs += zip(parallel.parameters(), trained(make(), x, 1).parameters(), strict=True)
    sharded = network()
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh["batch"])
    with pytest.raises(ValueError, match="module: expected no fully_shard inside sequence_parallel"):
        sequence_parallel(sharded, mesh["time"])(segment)
    trained(fully_shard(sharded, mesh=mesh["batch"]), mine, 1)
    pairs += zip(sharded.parameters(), trained(network(), x, 1).parameters(), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one.full_tensor(), other.detach())


class _Saves(TorchDispatchMode):
    """Records whether each scan saves tensors for the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.saved: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() == "mru::bmru.cpu":
            self.saved.append(args[-1])
        return func(*args, **(kwargs or {}))


def halves(rank: int) -> tuple[Tensor, Tensor]:
    """An input [3, 40, 5] and the half of its steps that belongs to this rank."""
    x = torch.randn(3, 40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x, x[:, 20 * rank : 20 * rank + 20]


def without_gradients(rank: int) -> None:
    module = make_module("BMRU")
    x, half = halves(rank)
    expected = halves_of(module(x), rank)
    parallel = sequence_parallel(module)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), _Saves() as saves:
            results = parallel(half)
        assert_close(results, expected)
        assert saves.saved
        assert not any(saves.saved)
    with torch.device("meta"):
        assert_close(parallel(half), expected)


def halves_of(whole: tuple[Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    return whole[0][:, 20 * rank : 20 * rank + 20], whole[1]


def assert_close(results: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(results, expected, strict=True):
        torch.testing.assert_close(one.detach(), other.detach())


def _gradients(module: torch.nn.Module, outputs: tuple[Tensor, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(outputs[0].square().sum(), list(module.parameters())))


def _counted(buckets, bucket):
    """A communication hook of DistributedDataParallel that returns the gradients unchanged and records the call."""
    buckets.append(bucket.index())
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def compiled_and_wrapped(rank: int) -> None:
    """Compiled modules, modules in DistributedDataParallel and modules with hooks equal the plain module."""
    x, half = halves(rank)
    module = make_module("BMRU")
    whole = module(x)
    expected, grads = halves_of(whole, rank), _gradients(module, whole)
    alone = [dist.new_group([r]) for r in range(dist.get_world_size())][rank]
    ddp = torch.nn.parallel.DistributedDataParallel(module, process_group=alone)
    buckets: list[int] = []
    ddp.register_comm_hook(buckets, _counted)
    graphs: list[object] = []
    hooked: list[Tensor] = []
    module.register_forward_hook(lambda make_module, _args, output: hooked.append(output[0]))
    parallel = sequence_parallel(module)
    for make in (
        lambda: parallel,
        lambda: torch.compile(parallel, backend="eager"),
        lambda: sequence_parallel(torch.compile(module, backend=lambda g, _: graphs.append(g) or g.forward)),
    ):
        outputs = make()(half)
        assert_close(outputs, expected)
        for one, other in zip(_gradients(module, outputs), grads, strict=True):
            torch.testing.assert_close(one, other)
        assert hooked.pop() is not None
    assert graphs
    output, _ = sequence_parallel(ddp)(half)
    output.square().sum().backward()
    for parameter, other in zip(module.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, other)
    assert buckets
    op = sequence_parallel(mk.bmru)
    for compiled in (torch.compile(op, backend="eager"), torch.compile(lambda c, b: op(c, b), backend="eager")):
        assert_close(compiled(half, half.sin()), op(half, half.sin()))
    torch.compiler.reset()  # compile anew, without the graphs that broke at an exchange
    for call, arguments in ((parallel, [half]), (op, [half, half])):
        with pytest.raises(RuntimeError, match="sequence_parallel: ranks exchange tensors"):
            torch.compile(call, backend="eager", fullgraph=True)(*arguments)


def reparametrised(rank: int) -> None:
    """Modules that compute a parameter from other parameters equal one process."""
    x, half = halves(rank)
    names = torch.nn.utils
    for change in (
        lambda m: names.parametrizations.weight_norm(m, "weight_ih_l0"),
        lambda m: names.parametrizations.orthogonal(m, "weight_ih_l1"),
        lambda m: names.parametrizations.spectral_norm(m, "weight_ih_l0"),
        lambda m: names.spectral_norm(m, "weight_ih_l1"),
        lambda m: names.weight_norm(m, "weight_ih_l0"),
    ):
        torch.manual_seed(3)
        module = change(make_module("BMRU")).eval()  # in training mode each call would run a power iteration
        whole = module(x)
        outputs = sequence_parallel(module)(half)
        assert_close(outputs, halves_of(whole, rank))
        for one, other in zip(_gradients(module, outputs), _gradients(module, whole), strict=True):
            torch.testing.assert_close(one, other)


def copies(rank: int) -> None:
    """Copies share the group but no parameters. The wrapper reads and sets attributes of its module."""
    x, half = halves(rank)
    parallel = sequence_parallel(make_module("BMRU"))
    averaged = torch.optim.swa_utils.AveragedModel(parallel)
    copied = copy.deepcopy(parallel)
    with torch.no_grad():
        parallel.module.weight_ih_l0.zero_()
    for module in (copied, averaged):
        assert_close(module(half), halves_of(make_module("BMRU")(x), rank))
    with pytest.raises(TypeError, match="a process group cannot be pickled"):
        pickle.dumps(parallel)
    copied.epsilon = 0.5
    assert (copied.epsilon, copied.module.epsilon, parallel.epsilon) == (0.5, 0.5, 0.0)
    assert copied.hidden_size == 8
    assert_close(copied(half), halves_of(copied.module(x), rank))
    for name in ("step", "nonsense"):
        with pytest.raises(AttributeError, match=name):
            getattr(copied, name)
