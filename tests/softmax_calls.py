"""Drawn calls of the softmax recurrence and their reference, for its tests on every backend."""

from __future__ import annotations

from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

import mru_kernels as mk
from mru_kernels.softmax import run

STATE_Z = 300.0  # log weights of drawn states are within this


def draw(
    batch=2, time=150, heads=3, group=1, *, decay=None, bonus=False, state=False, scale=1.0, shift=0.0, masked=0.0,
    slowest=-1e-3, fastest=-5.0, dtype=torch.float64, seed=0, sequences=None,
) -> dict[str, Tensor]:  # fmt: skip
    """The tensors of a call by the name of their argument, without those that are absent.

    Args:
        decay: None, "head" for `[H]` or "stream".
        scale, shift: the scores are `shift + scale N(0, 1)`.
        masked: the share of scores that are -inf.
        slowest, fastest: the range of decays, drawn by the logarithm.
        sequences: the number of states; None for `batch`.
    """
    torch.manual_seed(seed)
    wide = {"dtype": torch.float64}
    score = shift + scale * torch.randn(batch, time, heads, **wide)
    score[torch.rand(score.shape) < masked] = -torch.inf
    call = {"score": score.to(dtype), "value": torch.randn(batch, time, heads * group, **wide).to(dtype)}
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    if decay is not None:
        u = torch.rand((heads,) if decay == "head" else (batch, time, heads), **wide)
        drawn = -torch.exp(u * torch.tensor(fastest / slowest, **wide).log() + torch.tensor(-slowest, **wide).log())
        call["decay"] = drawn.to(state_dtype if decay == "head" else dtype)
    if bonus:
        call["bonus"] = torch.randn(heads, **wide).to(state_dtype)
    if state:
        count = batch if sequences is None else sequences
        parts = [torch.randn(count, heads * group), STATE_Z * torch.randn(count, heads), torch.zeros(count, heads)]
        call["initial_state"] = torch.cat(parts, -1).to(state_dtype)
        call["initial_state"][-1:, heads * group : heads * group + 1] = -torch.inf  # one head of one state is empty
        call["initial_state"][-1:, :group] = 0.0
    return call


@contextmanager
def segments(length: int):
    """Calls within scan segments of `length` steps in parallel; 0: whole sequences; -1: the backend chooses."""
    with patch.object(run, "SEGMENT", length):
        yield


def gradients(call, results, seed=1) -> dict[str, Tensor]:
    """The gradients of every tensor of the call, for drawn gradients of the results.

    The results are y and a final state. Infinite elements of the state get no gradient.
    """
    torch.manual_seed(seed)
    y, final = results
    of_y, of_final = (torch.randn(t.shape, dtype=torch.float64) for t in (y, final))
    finite = torch.where(final.isfinite(), final, 0.0)
    loss = (y.double() * of_y).sum() + (finite.double() * of_final).sum()
    return dict(zip(call, torch.autograd.grad(loss, list(call.values())), strict=True))


def leaves(call, dtype=None) -> dict[str, Tensor]:
    """The tensors of a call as leaves of a graph."""
    return {name: t.detach().to(dtype or t.dtype).requires_grad_() for name, t in call.items()}


def scan(call, backend, **options) -> tuple[Tensor, Tensor]:
    return mk.softmax_recurrence(**call, backend=backend, **options)


def error(result: Tensor, wanted: Tensor) -> float:
    """The greatest difference as a share of the root mean square. Elements that are not finite have to be the same."""
    finite = wanted.isfinite()
    assert torch.equal(result.isfinite(), finite)
    assert torch.equal(result[~finite].double().nan_to_num(7.0), wanted[~finite].double().nan_to_num(7.0))
    apart = (result.double() - wanted.double())[finite]
    if apart.numel() == 0:
        return 0.0
    return (apart.abs().max() / wanted.double()[finite].square().mean().sqrt().clamp(min=1e-30)).item()
