"""Sequence parallelism: pieces of time in several gloo processes equal one process with the whole."""

from __future__ import annotations

import copy
import math
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

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


# ------------------------------------------------------------------------------------------------ out of range

THIRD = 70  # steps of one of three pieces

#: What channel 0 has in the three pieces in scan order: decay, update (None: random); and its initial state.
RECURRENCES = {
    "a factor overflows": ((4, 4, 4), (0, 0, 1e-30), 0.0),
    "at the first boundary alone": ((4, 0.5, 0.5), (0, 0, 0), 0.0),
    "at the last boundary alone": ((0.5, 4, 0.5), (0, 0, 0), 0.0),
    "grows, then shrinks": ((4, 0.25, 1), (0, 0, 0), 2.0**-100),
    "shrinks, then grows": ((0.25, 4, 1), (0, 0, 0), 2.0**100),
    "an infinity that stays": ((4, 4, 4), (None, None, None), 1.0),
    "an infinite state": ((0.25, 0.25, 0.25), (None, None, None), math.inf),
    "an infinite update": ((0.5, 0.5, 0.5), (None, math.inf, None), 1.0),
    "zeros": ((0.5, 0, 0.5), (None, None, None), math.inf),
}

#: Epsilon, the initial state and the gradient of the final state in channel 0, which has no other gradient.
UNITS = [(0.0, math.inf, 1.0), (0.0, math.nan, 1.0), (0.5, math.inf, 1.0), (0.125, 1e30, 1e30), (0.125, 1.0, math.inf)]


def _recurrence(name: str, dtype: torch.dtype, **options: Any) -> inputs.Call:
    decays, updates, state = RECURRENCES[name]
    call = inputs.case("linear_recurrence", dtype, time=3 * THIRD, channels=3, initial_state="real", **options).build()
    power = 8 if dtype == torch.float64 else 1  # its range is 8 times that of float32
    call.tensors["initial_state"] = call.tensors["initial_state"].to(errors.state_dtype(dtype))
    call.tensors["initial_state"][:, 0] = state**power
    for i, (decay, update) in enumerate(zip(decays, updates, strict=True)):
        first = THIRD * (2 - i if call.settings["reverse"] else i)
        call.tensors["decay"][:, first : first + THIRD, 0] = decay**power
        if update is not None:
            call.tensors["update"][:, first : first + THIRD, 0] = update
    return call


def _unit(cell: str, epsilon: float, state: float, grad: float, **options: Any) -> inputs.Call:
    given = {"epsilon": epsilon, "alpha": True, "parameters": "float32", **options}
    given |= {"threshold": "channel"} if cell == "bmru" else {}
    call = inputs.case(cell, torch.float32, time=3 * THIRD, channels=3, initial_state="real", **given).build()
    call.tensors["candidate"][..., 0].sign_().mul_(9.0)  # writes at every step
    call.tensors["initial_state"][:, 0] = state
    call.grad_h[..., 0] = 0.0
    call.grad_final[:, 0] = grad
    return call


def _out_of_range(rank: int) -> None:
    """Pieces of time equal one process, also where composed states leave the range of their dtype."""
    every = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
    packed = {"batch": "packed", "reverse": True}
    for options, dtypes in (({"batch": 2}, every), (packed, (torch.float32, torch.complex64))):
        calls = [(f"{name}, {dtype}", _recurrence(name, dtype, **options)) for name in RECURRENCES for dtype in dtypes]
        calls += [(f"{cell}, {u}", _unit(cell, *u, **options)) for cell in ("bmru", "schmitt") for u in UNITS]
        for label, call in calls:
            _equals_the_whole(label, call)


def _large_states(rank: int) -> None:
    """The factor of a piece is exact enough for a state much larger than what the piece writes."""
    ranks, low, high = dist.get_world_size(), torch.full((2,), 0.2), torch.full((2,), 0.5)
    parallel = sequence_parallel(mk.schmitt)
    state = torch.full((1, 2), 2.0**20)
    _, final = parallel(torch.ones(1, 1000, 2), low, high, state, epsilon=1.0)  # counts
    assert torch.equal(final, state + 1000 * ranks)
    state = torch.full((1, 2), 2.0**45)
    _, final = parallel(torch.ones(1, 40, 2), low, high, state, epsilon=0.5)
    _, whole = mk.schmitt(torch.ones(1, 40 * ranks, 2), low, high, state, epsilon=0.5)
    h, _ = parallel(torch.ones(1, 40, 2), low, high, state, epsilon=0.5)
    h_whole, _ = mk.schmitt(torch.ones(1, 40 * ranks, 2), low, high, state, epsilon=0.5)
    torch.testing.assert_close(h, _piece(h_whole, [0, 40, 80, 120], rank), rtol=2e-6, atol=0.0)
    torch.testing.assert_close(final, whole, rtol=2e-6, atol=0.0)


def _equals_the_whole(label: str, call: inputs.Call) -> None:
    leaves = {name: t.detach().clone().requires_grad_() for name, t in call.tensors.items()}
    h, final = getattr(mk, call.cell)(**leaves, **call.settings)
    grads = torch.autograd.grad((h, final), list(leaves.values()), (call.grad_h, call.grad_final))
    whole = {"h": h, "final_state": final} | dict(zip(leaves, grads, strict=True))
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(call.stream.dtype, 1e-5)
    for name, result in _results(call, (THIRD, THIRD, THIRD)).items():
        one, other = result, whole[name].detach()
        if name in leaves and h.isnan().any():  # in channel 0, whose gradients are unspecified
            one, other = one[..., 1:], other[..., 1:]
        one, other = (torch.view_as_real(t) if t.is_complex() else t for t in (one, other))
        torch.testing.assert_close(
            one, other, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m, n=name: f"{label}, {n}: {m}"
        )


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


# ------------------------------------------------------------------------------------------------ ways to use a module


class _Saves(TorchDispatchMode):
    """Whether each scan saved what a backward pass needs."""

    def __init__(self) -> None:
        super().__init__()
        self.saved: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() == "mru::bmru.cpu":
            self.saved.append(args[-1])
        return func(*args, **(kwargs or {}))


def _halves(rank: int) -> tuple[Tensor, Tensor]:
    """An input and this rank's half of it."""
    x = torch.randn(3, 40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x, x[:, 20 * rank : 20 * rank + 20]


def _without_gradients(rank: int) -> None:
    module = _module("BMRU")
    x, half = _halves(rank)
    expected = _halves_of(module(x), rank)
    parallel = sequence_parallel(module)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), _Saves() as saves:
            results = parallel(half)
        _same(results, expected)
        assert saves.saved
        assert not any(saves.saved)
    with torch.device("meta"):
        _same(parallel(half), expected)


def _halves_of(whole: tuple[Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    return whole[0][:, 20 * rank : 20 * rank + 20], whole[1]


def _same(results: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(results, expected, strict=True):
        torch.testing.assert_close(one.detach(), other.detach())


def _gradients(module: torch.nn.Module, outputs: tuple[Tensor, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(outputs[0].square().sum(), list(module.parameters())))


def _counted(buckets, bucket):
    """Gradients as they are, for DistributedDataParallel in a group of one."""
    buckets.append(bucket.index())
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def _compiled_and_wrapped(rank: int) -> None:
    """Compiled modules, those in DistributedDataParallel and those with hooks give what the module gives alone."""
    x, half = _halves(rank)
    module = _module("BMRU")
    whole = module(x)
    expected, grads = _halves_of(whole, rank), _gradients(module, whole)
    alone = [dist.new_group([r]) for r in range(dist.get_world_size())][rank]
    ddp = torch.nn.parallel.DistributedDataParallel(module, process_group=alone)
    buckets: list[int] = []
    ddp.register_comm_hook(buckets, _counted)
    graphs: list[object] = []
    hooked: list[Tensor] = []
    module.register_forward_hook(lambda _module, _args, output: hooked.append(output[0]))
    parallel = sequence_parallel(module)
    for make in (
        lambda: parallel,
        lambda: torch.compile(parallel, backend="eager"),
        lambda: sequence_parallel(torch.compile(module, backend=lambda g, _: graphs.append(g) or g.forward)),
    ):
        outputs = make()(half)
        _same(outputs, expected)
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
        _same(compiled(half, half.sin()), op(half, half.sin()))
    torch.compiler.reset()  # what ran in pieces is not compiled again
    for call, arguments in ((parallel, [half]), (op, [half, half])):
        with pytest.raises(RuntimeError, match="sequence_parallel: ranks exchange tensors"):
            torch.compile(call, backend="eager", fullgraph=True)(*arguments)


def _reparametrised(rank: int) -> None:
    """Modules that compute a parameter from others."""
    x, half = _halves(rank)
    names = torch.nn.utils
    for change in (
        lambda m: names.parametrizations.weight_norm(m, "weight_ih_l0"),
        lambda m: names.parametrizations.orthogonal(m, "weight_ih_l1"),
        lambda m: names.parametrizations.spectral_norm(m, "weight_ih_l0"),
        lambda m: names.spectral_norm(m, "weight_ih_l1"),
        lambda m: names.weight_norm(m, "weight_ih_l0"),
    ):
        torch.manual_seed(3)
        module = change(_module("BMRU")).eval()  # power iterations would go on in each call
        whole = module(x)
        outputs = sequence_parallel(module)(half)
        _same(outputs, _halves_of(whole, rank))
        for one, other in zip(_gradients(module, outputs), _gradients(module, whole), strict=True):
            torch.testing.assert_close(one, other)


def _copied(rank: int) -> None:
    """Copies share the group and no parameters; attributes of the module are read and set through the wrapper."""
    x, half = _halves(rank)
    parallel = sequence_parallel(_module("BMRU"))
    averaged = torch.optim.swa_utils.AveragedModel(parallel)
    copied = copy.deepcopy(parallel)
    with torch.no_grad():
        parallel.module.weight_ih_l0.zero_()
    for module in (copied, averaged):
        _same(module(half), _halves_of(_module("BMRU")(x), rank))
    with pytest.raises(TypeError, match="a process group cannot be pickled"):
        pickle.dumps(parallel)
    copied.epsilon = 0.5
    assert (copied.epsilon, copied.module.epsilon, parallel.epsilon) == (0.5, 0.5, 0.0)
    assert copied.hidden_size == 8
    _same(copied(half), _halves_of(copied.module(x), rank))
    for name in ("step", "nonsense"):
        with pytest.raises(AttributeError, match=name):
            getattr(copied, name)


# ------------------------------------------------------------------------------------------------ what goes wrong


def _raises(rank: int, failing: int, call: Callable[[], Any], error: type[Exception], message: str) -> None:
    """The failing rank raises its own error, the others one that quotes it."""
    if rank == failing:
        with pytest.raises(error, match=message):
            call()
    else:
        with pytest.raises(RuntimeError, match=f"rank {failing} of the group failed: {error.__name__}: .*{message}"):
            call()


def _one_rank_fails_before_the_exchange(rank: int) -> None:
    """All raise, and the next call is in line again; the last rank fails."""
    last = dist.get_world_size() - 1
    fails = rank == last
    op, c, state = sequence_parallel(mk.bmru), torch.randn(2, 10, 3), torch.zeros(2, 3)
    module = mk.BMRU(3, 4, num_layers=2)
    parallel = sequence_parallel(module)
    for call, error, message in (
        (lambda: op(c, c, nonsense=1) if fails else op(c, c), TypeError, "nonsense"),
        (lambda: op(c) if fails else op(c, c), TypeError, "threshold"),
        (lambda: op(c, c, reverse=1 if fails else True), TypeError, "reverse: expected"),
        (lambda: op(c, c, epsilon=2.0 if fails else 1.0), ValueError, "epsilon: expected"),
        (lambda: op(c, c[..., : 2 if fails else 3]), ValueError, "threshold: expected"),
        (lambda: op(c, c, state[: 1 if fails else 2]), ValueError, "initial_state: expected"),
        (lambda: op(c, c, state.to(torch.int32 if fails else torch.float32)), TypeError, "initial_state: expected"),
        (lambda: parallel([1] if fails else c), TypeError, "input: expected a tensor"),
        (lambda: parallel(c[..., : 2 if fails else 3]), ValueError, "input: expected 3 features"),
        (lambda: parallel(c, torch.zeros(1 if fails else 2, 2, 4)), ValueError, "hx: expected shape"),
    ):
        _raises(rank, last, call, error, message)
        _in_line(rank, op)
    # Between the scans of a module.
    if fails:
        module._output = lambda *_: (_ for _ in ()).throw(ValueError("no output"))
    _raises(rank, last, lambda: parallel(c), ValueError, "no output")
    _in_line(rank, op)
    # Within a scan: only this piece's length is wrong.
    error, message = (ValueError, "threshold: expected") if fails else (RuntimeError, f"rank {last} of the group")
    with pytest.raises(error, match=message):
        op(c, c[:, : 9 if fails else 10])
    _in_line(rank, op)
    _initial_state_is_wrong_everywhere(op)
    _in_line(rank, op)


def _initial_state_is_wrong_everywhere(op: Callable[..., Any]) -> None:
    """Also where a piece is empty, and where the state would broadcast."""
    for wrong in (torch.zeros(1, 3), torch.zeros(2, 3, 1)):
        with pytest.raises(ValueError, match="initial_state: expected"):
            op(torch.randn(2, 0, 3), torch.randn(2, 0, 3), wrong)


def _in_line(rank: int, op: Callable[..., Any]) -> None:
    """Ranks make the same call: each writes a 1 that the next one holds."""
    c = torch.full((1, 2, 1), 1.0 if rank == 0 else 0.0)
    h, _ = op(c, torch.full((1, 2, 1), 0.5))
    assert bool((h == 1.0).all())


def _one_rank_makes_another_call(rank: int) -> None:
    """Both calls are named on every rank, and the next call is in line again."""
    other = rank == dist.get_world_size() - 1
    c, one = torch.randn(2, 10, 3), torch.ones(3)
    ops = {op: sequence_parallel(op) for op in (mk.bmru, mk.schmitt, mk.linear_recurrence)}
    modules = {
        name: sequence_parallel(mk.BMRU(3, 4, **settings))
        for name, settings in {"one": {}, "two": {"num_layers": 2}, "scaled": {"surrogate_scale": 2.0}}.items()
    }
    op = ops[mk.bmru]
    pairs = {
        ("bmru", "linear_recurrence"): (lambda: op(c, c), lambda: ops[mk.linear_recurrence](c, c)),
        ("bmru", "schmitt"): (lambda: op(c, c), lambda: ops[mk.schmitt](c, one, one)),
        ("epsilon 0.5", "epsilon 0.25"): (lambda: op(c, c, epsilon=0.5), lambda: op(c, c, epsilon=0.25)),
        ("reverse True", "reverse False"): (lambda: op(c, c, reverse=True), lambda: op(c, c, reverse=False)),
        ("float32", "float64"): (lambda: op(c, c), lambda: op(c.double(), c.double())),
        (r"float32\[2, T, 3\]", r"float32\[1, T, 3\]"): (lambda: op(c, c), lambda: op(c[:1], c[:1])),
        ("surrogate_scale 1.0", "surrogate_scale 2.0"): (
            lambda: op(c, c, surrogate_scale=1.0), lambda: op(c, c, surrogate_scale=2.0),
        ),
        ("checksum", "checksum"): (
            lambda: op(c[:1], c[:1], cu_seqlens=torch.tensor([0, 3, 10 * dist.get_world_size()])),
            lambda: op(c[:1], c[:1], cu_seqlens=torch.tensor([0, 4, 10 * dist.get_world_size()])),
        ),
        ("with gradients", "bmru"): (lambda: op(c.clone().requires_grad_(), c), lambda: op(c, c)),
        ("BMRU", "bmru"): (lambda: modules["one"](c), lambda: op(c, c)),
        (r"BMRU\(3, 4, epsilon", "num_layers=2"): (lambda: modules["one"](c), lambda: modules["two"](c)),
        (r"BMRU\(3, 4, epsilon", "surrogate_scale=2.0"): (lambda: modules["one"](c), lambda: modules["scaled"](c)),
    }  # fmt: skip
    for (first, second), calls in pairs.items():
        with pytest.raises(RuntimeError, match=f"the same call on every rank; rank 0 .*{first}.*; rank .*{second}"):
            calls[other]()
        _in_line(rank, op)
    _one_rank_skips_the_backward_pass(other)


def _one_rank_skips_the_backward_pass(skips: bool) -> None:
    op = sequence_parallel(mk.bmru, dist.new_group())  # which stays out of line
    c = torch.randn(2, 10, 3, requires_grad=True)
    h, _ = op(c, c)
    with pytest.raises(RuntimeError, match=r"rank 0 of the group has backward pass of call 1, .*; rank . has call 2"):
        (lambda: op(c, c) if skips else h.sum().backward())()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"has call 2, .*; rank . has call 3|has call 3, .*; rank . has call 4"):
            op(c, c)


def _two_threads(rank: int) -> None:
    """A second thread is refused by name while one is in a call, and leaves that call alone."""
    module = _module("BMRU")
    parallel = sequence_parallel(module, dist.new_group())
    x, half = _halves(rank)
    expected = _halves_of(module(x), rank)
    refused: list[Exception] = []

    def other() -> None:
        try:
            parallel(half)
        except RuntimeError as error:
            refused.append(error)

    def run_another(*_: object) -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    hook = module.register_forward_pre_hook(run_another)
    _same(parallel(half), expected)
    hook.remove()
    assert [*module.state_dict()] == [*_module("BMRU").state_dict()]
    assert "expected one thread at a time in a group" in str(refused.pop())
    if rank == 1:  # a call that is refused on one rank alone leaves the ranks out of line
        hook = module.register_forward_pre_hook(run_another)
    parallel(half)
    hook.remove()
    with pytest.raises(RuntimeError, match=r"rank 0 of the group has call 4, .*; rank 1 has call 5"):
        parallel(half)


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
    with pytest.raises(ValueError, match="cu_seqlens: expected offsets that rise from 0 to the total length 20"):
        sequence_parallel(mk.bmru)(c, c, cu_seqlens=torch.tensor([0, 10]))
    with pytest.raises(ValueError, match="initial_state: expected"):
        sequence_parallel(mk.bmru)(c, c, torch.zeros(2, 3))
    loss = sequence_parallel(mk.bmru)(c.clone().requires_grad_(), c)[0].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward pass"):
        loss.backward()


#: What processes do, by their number: starting them takes longer than any of it.
JOBS = {
    1: [_ops],
    2: [
        *(_ops, _bad_arguments, _without_gradients, _compiled_and_wrapped, _reparametrised, _copied, _two_threads),
        _one_rank_makes_another_call,
    ],
    3: [_ops, _modules, _out_of_range, _large_states, _one_rank_fails_before_the_exchange],
    4: [_ops, _mesh, _fsdp],
}


def _all(rank: int) -> None:
    for job in JOBS[dist.get_world_size()]:
        job(rank)


@pytest.mark.parametrize("count", JOBS, ids=str)
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
