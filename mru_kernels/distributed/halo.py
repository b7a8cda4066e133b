"""The steps before a rank's segment that a convolution reads: its halo, which the segments to its left send."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from .. import torch_private as private
from .ranks import CollectiveCall, describe


def halo(call: CollectiveCall, name: str, input: Tensor, past: Tensor, resets: Tensor | None) -> tuple[Tensor, Tensor]:
    """The K steps before this rank's segment, and the last K steps of the whole sequence, `[B, K, D]` each.

    Segments may be shorter than K. Steps of an earlier episode than the last before the result are 0.

    Args:
        name: a description of the call, which must be the same on every rank.
        input: `[B, T_rank, D]`, this rank's segment.
        past: `[B, K, D]`, the steps before the whole sequence.
        resets: `[B, T_rank]`, true where an episode begins, or None.
    """
    if any(map(private.has_tangent, (input, past))):
        raise NotImplementedError("sequence_parallel: there is no forward-mode derivative (jvp, jacfwd, hessian)")
    differentiated = torch.is_grad_enabled() and (input.requires_grad or past.requires_grad)
    what = f"{name}, convolution of {describe(input)} after {past.shape[1]} steps{', with gradients' * differentiated}"
    with call.agreed(what, input.shape[1]) as times:
        return _Halo.apply(call, what, times, resets, input, past)


class _Halo(torch.autograd.Function):
    """`halo`. A segment sends its last K steps. The backward pass sends the gradients of both results."""

    @staticmethod
    def forward(ctx, call: CollectiveCall, what: str, times: list[int], resets: Tensor | None, input, past):
        ranks, (batch, size, _) = call.ranks, past.shape
        counts = [min(time, size) for time in times]  # of the steps that each segment sends
        first = input.shape[1] - counts[ranks.rank]
        kept = torch.ones(input.shape[:2], dtype=torch.bool, device=input.device)
        if resets is not None:
            kept = resets.flip(1).cumsum(1).flip(1) == resets  # no episode begins after the step
        kept = kept[:, first:].unsqueeze(-1)
        goes_on = ~resets.any(1) if resets is not None else past.new_ones(batch, dtype=torch.bool)

        def message() -> Tensor:
            steps = torch.where(kept, input[:, first:], 0.0)
            padded = F.pad(steps, (0, 0, size - steps.shape[1], 1))  # one row more: whether the episode goes on
            padded[:, -1] = goes_on.unsqueeze(1)
            return padded.to(dtype)

        dtype = checks.state_dtype(past.dtype)  # gloo does not send every dtype in half precision
        every = ranks.gather(message, past.new_empty((batch, size + 1, past.shape[2]), dtype=dtype))
        of_ranks = every[:, :, -1:] != 0.0
        lines = _lines(past.to(dtype), every[:, :, :-1], of_ranks, counts)
        ctx.kept, ctx.goes_on, ctx.counts, ctx.first = kept, of_ranks, counts, first
        ctx.ranks, ctx.name, ctx.what = ranks, f"backward pass of {call.name}", what
        return lines[ranks.rank].to(past.dtype), lines[-1].to(past.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor):
        ranks, dtype = ctx.ranks, checks.state_dtype(grads[0].dtype)
        with CollectiveCall(ranks, scans=1, name=ctx.name) as call, call.agreed(ctx.what, 0):
            both = torch.stack(grads).to(dtype)
            every = ranks.gather(lambda: both, both)
        past = torch.zeros_like(every[0, 0], requires_grad=True)
        sent = torch.zeros_like(every[:, 0], requires_grad=True)
        with torch.enable_grad():
            lines = _lines(past, sent, ctx.goes_on, ctx.counts)
        of_past, of_sent = torch.autograd.grad(lines, (past, sent), [*every[:, 0], every[:, 1].sum(0)])
        own = of_sent[ranks.rank, :, of_sent.shape[2] - ctx.counts[ranks.rank] :]
        of_input = F.pad(torch.where(ctx.kept, own, 0.0), (0, 0, ctx.first, 0))
        if ranks.rank > 0:
            of_past = torch.zeros_like(of_past)  # the first rank returns the whole gradient, so the sum is right
        return *[None] * 4, of_input.to(grads[0].dtype), of_past.to(grads[0].dtype)


def _lines(past: Tensor, sent: Tensor, goes_on: Tensor, counts: list[int]) -> list[Tensor]:
    """The K steps before each segment, and after the last one, `[B, K, D]` each.

    Args:
        past: `[B, K, D]`, before the first segment.
        sent: `[ranks, B, K, D]`, the last steps of each segment; only the last `counts` of them exist.
        goes_on: bool `[ranks, B, 1, D]`, whether no episode begins in the segment.
    """
    lines = [past]
    for steps, same, count in zip(sent, goes_on, counts, strict=True):
        before = torch.where(same, lines[-1], 0.0)
        lines.append(torch.cat([before[:, count:], steps[:, steps.shape[1] - count :]], 1))
    return lines
