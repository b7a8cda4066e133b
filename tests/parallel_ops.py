"""Jobs of processes: ops under sequence parallelism equal one process with the whole sequence."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import mru_kernels as mk
from bench import compare, errors, inputs
from mru_kernels.distributed import sequence_parallel

#: Steps of each rank's segment, by the number of ranks.
SEGMENTS = {1: [(130,)], 2: [(65, 65), (0, 130)], 3: [(100, 1, 29), (0, 0, 130)], 4: [(31, 0, 64, 35)]}

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
    ("bmru", torch.float32, {"epsilon": 0.0, "resets": "to a state", "initial_state": "real"}),
    ("schmitt", torch.float32, {"epsilon": 0.5, "resets": "to a state", "nonfinite": True, "reverse": True}),
    ("linear_recurrence", torch.complex64, {"resets": "to a state", "batch": "packed", "initial_state": "real"}),
    ("leaky_integrator", torch.float64, {"resets": "to zeros", "initial_state": "real"}),
    ("min_gru", torch.bfloat16, {"batch": "packed", "reverse": True, "initial_state": "real"}),
    ("min_lstm", torch.float32, {"resets": "to a state", "initial_state": "real"}),
    ("lif", torch.float32, {"initial_state": "real", "detach_reset": False}),
    ("lif", torch.float64, {"reset": "zero", "batch": "packed", "reverse": True, "resets": "to a state"}),
]


def segment(t: Tensor, spans: list[int], rank: int) -> Tensor:
    return t[:, spans[rank] : spans[rank + 1]]


def gathered(t: Tensor, times: tuple[int, ...]) -> Tensor:
    """The segments of all ranks, joined over time."""
    real = torch.view_as_real(t) if t.is_complex() else t
    segments = [real.new_empty((real.shape[0], n, *real.shape[2:])) for n in times]
    # gloo gathers tensors of equal sizes only, so each rank broadcasts its segment.
    for rank, segment in enumerate(segments):
        if rank == dist.get_rank():
            segment.copy_(real)
        dist.broadcast(segment, rank)
    whole = torch.cat(segments, 1)
    return torch.view_as_complex(whole) if t.is_complex() else whole


def summed(t: Tensor) -> Tensor:
    total = torch.view_as_real(t).clone() if t.is_complex() else t.clone()
    dist.all_reduce(total)
    return torch.view_as_complex(total) if t.is_complex() else total


def _results(call: inputs.Call, times: tuple[int, ...]) -> dict[str, Tensor]:
    """Results and gradients of the whole sequence, joined from the segments of all ranks."""
    rank, spans = dist.get_rank(), list(accumulate(times, initial=0))
    leaves = {name: segment(t, spans, rank) if t.dim() == 3 else t for name, t in call.tensors.items()}
    settings = dict(call.settings)
    if "resets" in settings:
        settings["resets"] = segment(settings["resets"], spans, rank)
    leaves = {name: t.detach().clone().requires_grad_() for name, t in leaves.items()}
    h, final = sequence_parallel(getattr(mk, call.cell))(**leaves, **settings)
    share = call.grad_final if rank == 0 else torch.zeros_like(call.grad_final)
    grads = torch.autograd.grad((h, final), list(leaves.values()), (segment(call.grad_h, spans, rank), share))
    results = {"h": gathered(h.detach(), times), "final_state": final.detach()}
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        results[name] = gathered(grad, times) if leaf.dim() == 3 else summed(grad)
    return results


def every_case(rank: int) -> None:
    count = dist.get_world_size()
    for i, (cell, dtype, options) in enumerate(CASES):
        call = inputs.case(cell, dtype, seed=i, time=130, channels=5, **options).build()
        for times in SEGMENTS[count]:
            first, again = _results(call, times), _results(call, times)
            failed = [r for r in compare.judge(call, first) if not r.passed]
            assert not failed, (cell, options, times, failed)
            for name, result in first.items():
                assert errors.same_values(result, again[name]), (cell, options, name)


THIRD = 70  # steps of each of three segments

#: Decay and update (None: random) of channel 0 in three segments, in scan order, and its initial state.
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

#: Epsilon, initial state of channel 0 and gradient of its final state. Channel 0 has no gradient of h.
UNITS = [(0.0, math.inf, 1.0), (0.0, math.nan, 1.0), (0.5, math.inf, 1.0), (0.125, 1e30, 1e30), (0.125, 1.0, math.inf)]


def _recurrence(name: str, dtype: torch.dtype, **options: Any) -> inputs.Call:
    decays, updates, state = RECURRENCES[name]
    call = inputs.case("linear_recurrence", dtype, time=3 * THIRD, channels=3, initial_state="real", **options).build()
    power = 8 if dtype == torch.float64 else 1  # its exponents reach 8 times as far as those of float32
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


def out_of_range(rank: int) -> None:
    """Segments in several processes equal one process, also where composed states leave the range of their dtype."""
    every = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
    packed = {"batch": "packed", "reverse": True}
    for options, dtypes in (({"batch": 2}, every), (packed, (torch.float32, torch.complex64))):
        calls = [(f"{name}, {dtype}", _recurrence(name, dtype, **options)) for name in RECURRENCES for dtype in dtypes]
        calls += [(f"{cell}, {u}", _unit(cell, *u, **options)) for cell in ("bmru", "schmitt") for u in UNITS]
        for label, call in calls:
            _equals_the_whole(label, call)


def large_states(rank: int) -> None:
    """The factor of a segment is exact enough for a state much larger than the values the segment writes."""
    ranks, low, high = dist.get_world_size(), torch.full((2,), 0.2), torch.full((2,), 0.5)
    parallel = sequence_parallel(mk.schmitt)
    state = torch.full((1, 2), 2.0**20)
    _, final = parallel(torch.ones(1, 1000, 2), low, high, state, epsilon=1.0)  # the state counts the steps
    assert torch.equal(final, state + 1000 * ranks)
    state = torch.full((1, 2), 2.0**45)
    _, final = parallel(torch.ones(1, 40, 2), low, high, state, epsilon=0.5)
    _, whole = mk.schmitt(torch.ones(1, 40 * ranks, 2), low, high, state, epsilon=0.5)
    h, _ = parallel(torch.ones(1, 40, 2), low, high, state, epsilon=0.5)
    h_whole, _ = mk.schmitt(torch.ones(1, 40 * ranks, 2), low, high, state, epsilon=0.5)
    torch.testing.assert_close(h, segment(h_whole, [0, 40, 80, 120], rank), rtol=2e-6, atol=0.0)
    torch.testing.assert_close(final, whole, rtol=2e-6, atol=0.0)


def _equals_the_whole(label: str, call: inputs.Call) -> None:
    leaves = {name: t.detach().clone().requires_grad_() for name, t in call.tensors.items()}
    h, final = getattr(mk, call.cell)(**leaves, **call.settings)
    grads = torch.autograd.grad((h, final), list(leaves.values()), (call.grad_h, call.grad_final))
    whole = {"h": h, "final_state": final} | dict(zip(leaves, grads, strict=True))
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(call.stream.dtype, 1e-5)
    for name, result in _results(call, (THIRD, THIRD, THIRD)).items():
        one, other = result, whole[name].detach()
        if name in leaves and h.isnan().any():  # only channel 0 has NaN, and its gradients are unspecified
            one, other = one[..., 1:], other[..., 1:]
        one, other = (torch.view_as_real(t) if t.is_complex() else t for t in (one, other))
        torch.testing.assert_close(
            one, other, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m, n=name: f"{label}, {n}: {m}"
        )
