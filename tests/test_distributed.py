"""Sequence parallelism: pieces of time in several gloo processes equal one process with the whole."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from itertools import accumulate
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard

import mru_kernels as mk
from bench import compare, errors, inputs
from mru_kernels.distributed import sequence_parallel
from tests import processes

pytestmark = pytest.mark.check

#: Steps of each rank's piece, by the number of ranks.
PIECES = {1: [(130,)], 2: [(65, 65), (0, 130)], 3: [(100, 1, 29), (0, 0, 130)], 4: [(31, 0, 64, 35)]}

CASES = [
    ("bmru", torch.float32, {"epsilon": 0.0, "amplitude": True, "alpha": True, "initial_state": "real"}),
    ("bmru", torch.float32, {"epsilon": 1.0, "threshold": "channel", "initial_state": "integer", "reverse": True}),
    ("bmru", torch.float64, {"epsilon": 0.5, "amplitude": True, "batch": "packed", "initial_state": "real"}),
    ("bmru", torch.bfloat16, {"epsilon": 0.9, "alpha": True, "batch": "packed", "reverse": True}),
    ("schmitt", torch.float32, {"epsilon": 0.0, "initial_state": "real"}),
    ("schmitt", torch.float32, {"epsilon": 0.9, "alpha": True, "batch": "packed", "reverse": True}),
    ("schmitt", torch.float32, {"epsilon": 1.0, "initial_state": "integer"}),
    ("linear_recurrence", torch.float32, {"decay": "channel", "initial_state": "real"}),
    ("linear_recurrence", torch.complex64, {"batch": "packed", "reverse": True, "initial_state": "real"}),
    ("bmru", torch.float32, {"epsilon": 0.5, "nonfinite": True, "initial_state": "real"}),
]


def _piece(t: Tensor, spans: list[int], rank: int) -> Tensor:
    return t[:, spans[rank] : spans[rank + 1]]


def _gathered(t: Tensor, times: tuple[int, ...]) -> Tensor:
    """The pieces of all ranks, side by side."""
    real = torch.view_as_real(t) if t.is_complex() else t
    pieces = [real.new_empty((real.shape[0], n, *real.shape[2:])) for n in times]
    # Broadcasts, as gloo gathers equal sizes only.
    for rank, piece in enumerate(pieces):
        if rank == dist.get_rank():
            piece.copy_(real)
        dist.broadcast(piece, rank)
    whole = torch.cat(pieces, 1)
    return torch.view_as_complex(whole) if t.is_complex() else whole


def _summed(t: Tensor) -> Tensor:
    total = torch.view_as_real(t).clone() if t.is_complex() else t.clone()
    dist.all_reduce(total)
    return torch.view_as_complex(total) if t.is_complex() else total


def _results(call: inputs.Call, times: tuple[int, ...]) -> dict[str, Tensor]:
    """Results and gradients of the whole, from the pieces of all ranks."""
    rank, spans = dist.get_rank(), list(accumulate(times, initial=0))
    leaves = {name: _piece(t, spans, rank) if t.dim() == 3 else t for name, t in call.tensors.items()}
    leaves = {name: t.detach().clone().requires_grad_() for name, t in leaves.items()}
    h, final = sequence_parallel(getattr(mk, call.cell))(**leaves, **call.settings)
    share = call.grad_final if rank == 0 else torch.zeros_like(call.grad_final)
    grads = torch.autograd.grad((h, final), list(leaves.values()), (_piece(call.grad_h, spans, rank), share))
    results = {"h": _gathered(h.detach(), times), "final_state": final.detach()}
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        results[name] = _gathered(grad, times) if leaf.dim() == 3 else _summed(grad)
    return results


def _ops(rank: int) -> None:
    count = dist.get_world_size()
    for i, (cell, dtype, options) in enumerate(CASES):
        call = inputs.case(cell, dtype, seed=i, time=130, channels=5, **options).build()
        for times in PIECES[count]:
            first, again = _results(call, times), _results(call, times)
            failed = [r for r in compare.judge(call, first) if not r.passed]
            assert not failed, (cell, options, times, failed)
            for name, result in first.items():
                assert errors.same_values(result, again[name]), (cell, options, name)


# ------------------------------------------------------------------------------------------------ modules

TIMES = (40, 0, 25)
MODULES = {
    "BMRU": {"epsilon": 0.0, "num_layers": 2},
    "AlphaCMRU": {"epsilon": 0.5, "num_layers": 2, "bidirectional": True},
    "FirstQuadrantBMRU": {"batch_first": False},
    "MinGRU": {"num_layers": 2, "bidirectional": True},
    "LRU": {"num_layers": 2},
}


def _module(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return getattr(mk, name)(5, 8, dtype=torch.float64, **MODULES[name])


def _backward(outputs: tuple[Tensor, Tensor], share: float) -> None:
    output, h_n = outputs
    (output.square().sum() + share * (h_n.abs() ** 2).sum()).backward()


def _modules(rank: int) -> None:
    for name in MODULES:
        _one_module(rank, name)


def _one_module(rank: int, name: str) -> None:
    torch.manual_seed(1)
    alone, module = _module(name), _module(name)
    time_dim = 1 if alone.batch_first else 0
    x = torch.randn(3, sum(TIMES), 5, dtype=torch.float64).transpose(0, 1 - time_dim)
    spans = list(accumulate(TIMES, initial=0))
    hx = torch.randn_like(alone(x)[1])
    for state in (None, hx):
        whole = alone(x, state)
        _backward(whole, 1.0)
        piece = x.narrow(time_dim, spans[rank], TIMES[rank])
        output, h_n = sequence_parallel(module)(piece, state)
        torch.testing.assert_close(output, whole[0].narrow(time_dim, spans[rank], TIMES[rank]), msg=name)
        torch.testing.assert_close(h_n, whole[1], msg=name)
        _backward((output, h_n), 1.0 if rank == 1 else 0.0)
    for (parameter, one), other in zip(module.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=lambda m, p=parameter: f"{name}.{p}: {m}")


def _mesh(rank: int) -> None:
    """A batch over the rows of a 2 by 2 mesh, time over its columns."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("batch", "time"))
    torch.manual_seed(1)
    x = torch.randn(4, 60, 5, dtype=torch.float64)
    alone, module = _module("BMRU"), _module("BMRU")
    alone(x)[0].square().mean().backward()
    parallel = sequence_parallel(module, mesh["time"])
    ddp = torch.nn.parallel.DistributedDataParallel(parallel, process_group=mesh["batch"].get_group())
    row, column = mesh.get_coordinate()
    output, _ = ddp(x[2 * row : 2 * row + 2, 30 * column : 30 * column + 30])
    (output.square().sum() / (2 * 60 * 8)).backward()  # the mean over this row of the mesh
    for one, other in zip(module.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def _fsdp(rank: int) -> None:
    """Parameters in shards (FSDP2) over the rows of the mesh, time over its columns; networks without a cut of time."""
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
        return mk.MRUNetwork(5, 4, width=8, num_blocks=2, units=("bmru", "lru"), dtype=torch.float64)

    alone, model = _module("BMRU"), _module("BMRU")
    parallel = fully_shard(sequence_parallel(model, mesh["time"]), mesh=mesh["batch"])
    trained(parallel, x[2 * row : 2 * row + 2, 30 * column : 30 * column + 30], 2)
    pairs = [*zip(parallel.parameters(), trained(alone, x, 1).parameters(), strict=True)]
    sharded = network()
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh["batch"])
    trained(fully_shard(sharded, mesh=mesh["batch"]), x[2 * row : 2 * row + 2], 1)
    pairs += zip(sharded.parameters(), trained(network(), x, 1).parameters(), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one.full_tensor(), other.detach())


# ------------------------------------------------------------------------------------------------ what goes wrong


def _one_rank_raises(rank: int) -> None:
    for kind in ("shape", "batch"):
        _one_rank_has_another(kind, rank)


def _one_rank_has_another(kind: str, rank: int) -> None:
    c = torch.randn(2, 10, 3)
    b = torch.randn(2, 10, 4 if rank == 1 and kind == "shape" else 3)
    if kind == "batch" and rank == 1:
        c, b = c[:1], b[:1]
    error, message = (ValueError, "threshold: expected") if kind == "shape" and rank == 1 else (RuntimeError, "rank 1")
    if kind == "batch":
        message = "the same batch, channels and dtype"
    with pytest.raises(error, match=message):
        sequence_parallel(mk.bmru)(c, b)
    h, _ = sequence_parallel(mk.bmru)(torch.randn(2, 10, 3), torch.randn(2, 10, 3))  # the group is as it was
    assert h.shape == (2, 10, 3)


TIMEOUT = 20


def _one_rank_is_gone(rank: int) -> None:
    if rank == 1:
        os._exit(0)
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        sequence_parallel(mk.bmru)(torch.randn(2, 10, 3), torch.randn(2, 10, 3))
    assert time.monotonic() - start < 2 * TIMEOUT
    os._exit(0)  # the group cannot be taken down any more


def test_a_rank_that_is_gone_is_an_error_and_no_hang(tmp_path):
    processes.run(_one_rank_is_gone, tmp_path / "rendezvous", count=3, timeout=TIMEOUT)


def _bad_arguments(rank: int) -> None:
    with pytest.raises(TypeError, match=r"op_or_module: expected one of bmru, .* got"):
        sequence_parallel(torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"mesh_or_group: expected .* got str"):
        sequence_parallel(mk.bmru, "gloo")
    with pytest.raises(TypeError, match="input: expected a tensor, got list"):
        sequence_parallel(mk.BMRU(3, 4))([1])
    c = torch.randn(1, 10, 3)
    with pytest.raises(ValueError, match="cu_seqlens: expected offsets from 0 to the length of all pieces, 20"):
        sequence_parallel(mk.bmru)(c, c, cu_seqlens=torch.tensor([0, 10]))
    with pytest.raises(ValueError, match="initial_state: expected"):
        sequence_parallel(mk.bmru)(c, c, torch.zeros(2, 3))
    loss = sequence_parallel(mk.bmru)(c.requires_grad_(), c)[0].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward pass"):
        loss.backward()


#: What processes do, by their number: starting them takes longer than any of it.
JOBS = {1: [_ops], 2: [_ops, _bad_arguments], 3: [_ops, _modules, _one_rank_raises], 4: [_ops, _mesh, _fsdp]}


def _all(rank: int) -> None:
    for job in JOBS[dist.get_world_size()]:
        job(rank)


@pytest.mark.parametrize("count", JOBS, ids=lambda n: "-".join(job.__name__.strip("_") for job in JOBS[n]))
def test_processes(tmp_path, count):
    """Results equal one process's, where equality is promised and else nearly, and are the same from run to run."""
    processes.run(_all, tmp_path / "rendezvous", count=count)


def test_the_example():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "examples.sequence_parallel", "--steps", "2000"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=240)
    assert done.returncode == 0, done.stderr
    assert "2,000 steps" in done.stdout
    assert "| alone" in done.stdout


def test_without_a_group_it_says_so():
    with pytest.raises(RuntimeError, match=r"torch\.distributed to be initialised"):
        sequence_parallel(mk.bmru)
