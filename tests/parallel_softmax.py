"""Jobs of processes: the softmax recurrence under sequence parallelism equals one process with the whole sequence."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import mru_kernels as mk
from mru_kernels.distributed import sequence_parallel
from mru_kernels.softmax import split_state
from tests.parallel_ops import SEGMENTS, gathered, segment, summed
from tests.softmax_calls import draw, error, gradients, leaves

OFFSETS = torch.tensor([0, 0, 31, 70, 70, 101, 130])
PACKED: dict[str, Any] = {"batch": 1, "sequences": len(OFFSETS) - 1}

#: The arguments of `draw`, and the options of the call.
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"group": 4, "scale": 30.0, "masked": 0.3}, {"reverse": True}),
    ({"decay": "head", "bonus": True, "state": True}, {}),
    ({"decay": "head", "group": 2, "state": True, "scale": 10.0}, {"reverse": True}),
    ({"decay": "stream", "bonus": True, "state": True, "masked": 0.9, "fastest": -80.0, "scale": 30.0}, {}),
    ({"decay": "stream", "group": 5, "state": True, "shift": 1000.0}, {"chunk_size": None}),
    ({"decay": "stream", "bonus": True, "state": True, **PACKED}, {"cu_seqlens": OFFSETS}),
    ({"decay": "head", "group": 3, "state": True, **PACKED}, {"cu_seqlens": OFFSETS, "reverse": True}),
    ({"bonus": True, "masked": 0.95, **PACKED}, {"cu_seqlens": OFFSETS, "reverse": True}),
]


def _whole(call: dict[str, Tensor], options: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """Results and gradients of the call in one process."""
    given = leaves(call, dtype)
    y, final = mk.softmax_recurrence(**given, **options)
    return {"y": y.detach(), "final_state": final.detach()} | gradients(given, (y, final))


def _results(call: dict[str, Tensor], options: dict[str, Any], times: tuple[int, ...]) -> dict[str, Tensor]:
    """The same from the segments of all ranks; the last rank differentiates the loss of the final state."""
    rank, spans = dist.get_rank(), list(accumulate(times, initial=0))
    given = leaves({name: segment(t, spans, rank) if t.dim() == 3 else t for name, t in call.items()})
    y, final = sequence_parallel(mk.softmax_recurrence)(**given, **options)
    torch.manual_seed(1)  # as `gradients`
    of_y = torch.randn(y.shape[0], sum(times), y.shape[2], dtype=torch.float64)
    of_final = torch.randn(final.shape, dtype=torch.float64)
    finite = torch.where(final.isfinite(), final, 0.0)
    loss = (y.double() * segment(of_y, spans, rank)).sum()
    loss = loss + (finite.double() * of_final).sum() * (rank == len(times) - 1)
    grads = torch.autograd.grad(loss, list(given.values()))
    results = {"y": gathered(y.detach(), times), "final_state": final.detach()}
    for (name, leaf), grad in zip(given.items(), grads, strict=True):
        results[name] = gathered(grad, times) if leaf.dim() == 3 else summed(grad)
    return results


def every_call(rank: int) -> None:
    """Every form, within 1e-12 in float64 and with the errors of one process in float32; the same bits in each run."""
    for i, (sizes, options) in enumerate(CASES):
        for dtype in (torch.float64, torch.float32):
            call = draw(time=130, seed=i, dtype=dtype, **sizes)
            whole, rounded = (_whole(call, options, d) for d in (torch.float64, dtype))
            for times in SEGMENTS[dist.get_world_size()]:
                results, again = (_results(call, options, times) for _ in range(2))
                for name, wanted in whole.items():
                    assert torch.equal(results[name].nan_to_num(7.0), again[name].nan_to_num(7.0)), (i, name)
                    got, of_one, wanted = (_read(t, name, call) for t in (results[name], rounded[name], wanted))
                    limit = 1e-12 if dtype == torch.float64 else 1e-6 + 2 * error(of_one, wanted)
                    apart = error(got, wanted)
                    assert apart < limit, (sizes, options, dtype, times, name, apart)


def _read(result: Tensor, name: str, call: dict[str, Tensor]) -> Tensor:
    """The result; of a final state the mean and the log of the weight, because z alone is a rounding error."""
    if name != "final_state":
        return result
    mean, high, low = split_state(result.double(), call["score"].shape[-1])
    return torch.cat([mean, high + low], -1)


def without_gradients(rank: int) -> None:
    """`wkv` under no_grad; the whole is the call of one process. Half precision keeps its dtypes."""
    for dtype in (torch.float64, torch.bfloat16):
        call = draw(time=130, decay="head", bonus=True, dtype=dtype)
        key = call.pop("score")
        y, final = mk.wkv(key, **call)
        for times in SEGMENTS[dist.get_world_size()]:
            spans = list(accumulate(times, initial=0))
            own = {"key": segment(key, spans, rank), "value": segment(call["value"], spans, rank)}
            with torch.no_grad():
                got, last = sequence_parallel(mk.wkv)(**(call | own))
            assert not got.requires_grad
            torch.testing.assert_close(got, segment(y, spans, rank))
            torch.testing.assert_close(last, final)


def exact(rank: int) -> None:
    """NaN, dropped pasts, values far above all others and sums of decays pass through the segments unchanged."""
    count = dist.get_world_size()
    score, value = torch.zeros(1, 10 * count, 3), torch.randn(1, 10 * count, 3)
    dist.broadcast(value, 0)
    decay = torch.zeros_like(score)
    value[:, 1, 0] = torch.nan
    score[:, 2, 1], decay[:, -5, 1] = 200.0, -torch.inf
    score[:, :-1, 2] = -torch.inf
    spans = list(range(0, 10 * count + 1, 10))
    whole, final = mk.softmax_recurrence(score, value, decay=decay)
    own = [segment(t, spans, rank) for t in (score, value, decay)]
    y, last = sequence_parallel(mk.softmax_recurrence)(*own[:2], decay=own[2])
    torch.testing.assert_close(y, segment(whole, spans, rank), equal_nan=True, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(last, final, equal_nan=True)
    assert bool(y[:, :, 0].isnan().all()) == (rank > 0)
    assert torch.equal(last[:, 2], value[:, -1, 2])
    # Masked steps only decay a state. One float of the sum of the decays would be 10 times as far off.
    decay = -10.0 * torch.rand(1, 200, 32, generator=torch.Generator().manual_seed(rank))
    masked, state = torch.full_like(decay, -torch.inf), torch.zeros(1, 96)
    _, last = sequence_parallel(mk.softmax_recurrence)(masked, masked.exp(), state, decay=decay)
    total = summed(decay.double().sum(1))
    apart = last[:, 32:64].double() + last[:, 64:] - total
    assert apart.abs().max() < 1e-8 * total.abs().max()


def refused(rank: int) -> None:
    """Calls that differ are named on every rank, and the next call of all ranks works."""
    other = rank == dist.get_world_size() - 1
    score, value, one = torch.randn(2, 10, 3), torch.randn(2, 10, 6), -torch.ones(3)
    op, of_wkv = sequence_parallel(mk.softmax_recurrence), sequence_parallel(mk.wkv)
    for calls, first, second in (
        ((lambda: op(score, value), lambda: op(score, value, decay=one)), "decay None", "decay float32"),
        ((lambda: op(score, value), lambda: op(score, value[..., :3])), r"float32\[2, T, 6\]", r"float32\[2, T, 3\]"),
        ((lambda: op(score, value), lambda: of_wkv(score, score, one, one)), "softmax_recurrence", "wkv"),
    ):
        with pytest.raises(RuntimeError, match=f"rank 0 .*{first}.*; rank .*{second}"):
            calls[other]()
        op(score, value)
    with pytest.raises(ValueError, match="initial_state: expected"):
        op(score, value, torch.zeros(2, 11))
    with pytest.raises(ValueError if other else RuntimeError, match=r"value: expected|its own error says why"):
        op(score, value[:, : 9 if other else 10])
    op(score, value)
    with pytest.raises(ValueError, match=r"resets: expected None for an RWKV4TimeMix, got a mask"):
        sequence_parallel(mk.RWKV4TimeMix(3))(score, resets=torch.zeros(2, 10, dtype=torch.bool))


#: The two mixings, and networks of them. Of a network's input only tokens are tested, which have no gradient.
RWKV4 = {
    "time mix": lambda: mk.RWKV4TimeMix(4),
    "channel mix": lambda: mk.RWKV4ChannelMix(4),
    "model": lambda: mk.RWKV4(10, 4, layers=2),
    "units": lambda: mk.MRUNetwork(10, 3, width=4, num_blocks=2, units=("rwkv4", "aaren"), tokens=True),
}


def _drawn(name: str) -> torch.nn.Module:
    """A module with drawn parameters; with the initial ones most gradients of RWKV-4 are zero."""
    module = RWKV4[name]().double()
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module


def _squares(output: Tensor, state: tuple[Tensor, ...], share: float) -> Tensor:
    return output.square().sum() + share * sum(t.square().sum() for t in state)


def rwkv4(rank: int) -> None:
    """Modules of RWKV-4, with segments of one step too: outputs, states and all gradients, from both kinds of state."""
    count = dist.get_world_size()
    times = (20, 1, *[9] * (count - 2))[:count]
    span = slice(*list(accumulate(times, initial=0))[rank : rank + 2])
    for name in RWKV4:
        alone, module = _drawn(name), _drawn(name)
        if tokens := hasattr(alone, "head"):
            x = torch.randint(10, (2, sum(times)))
        else:
            x = torch.randn(2, sum(times), 4, dtype=torch.float64)
        given = [torch.randn_like(t) for t in alone(x)[1]]
        for state in (None, given):
            both = []
            for run, part, share in ((alone, x, 1.0), (sequence_parallel(module), x[:, span], rank == count - 1)):
                streams = [] if tokens else [part.clone().requires_grad_()]
                states = [t.clone().requires_grad_() for t in state or ()]
                output, after = run(streams[0] if streams else part, states or None)
                wanted = [*streams, *states, *run.parameters()]
                grads = torch.autograd.grad(_squares(output, after, float(share)), wanted)
                both.append((output, after, grads[: len(streams)], grads[len(streams) :]))
            (whole, last, of_x, others), (output, after, of_segment, of_rank) = both
            for grad in of_rank[: len(given) if state else 0]:
                dist.all_reduce(grad)  # ranks have parts of the gradient of the state
            torch.testing.assert_close(output, whole[:, span], msg=name)
            torch.testing.assert_close(after, last, msg=name)
            torch.testing.assert_close(of_segment, tuple(t[:, span] for t in of_x), msg=name)
            for one, other in zip(of_rank, others, strict=True):
                torch.testing.assert_close(one, other, msg=lambda m, n=name: f"{n}: {m}")
