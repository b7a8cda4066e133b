"""The bistable cells in plain torch: a gate writes a value, or the state is held; and the output is alpha s."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from ..backends.surrogate import surrogate

Inputs = Sequence[Tensor | None]


class _UnitStep(torch.autograd.Function):
    """H(x - y), with the surrogate derivative in the backward pass. It compares, so a tie is 1."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, y, scale):
        return (x >= y).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, ctx.scale = inputs
        ctx.save_for_backward(x, y)

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        bend, tie, gain = surrogate(ctx.scale, grad.dtype)
        grad = grad * gain / (((x - y) * bend).square() + tie)
        return grad, -grad, None


class _Select(torch.autograd.Function):
    """`z one + (1 - z) zero` for z in {0, 1}, as a select; its gradients are those of the formula."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z, one, zero):
        return torch.where(z == 1, one, zero)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        z, one, zero = ctx.saved_tensors
        return grad * (one - zero), grad.masked_fill(z == 0, 0), grad.masked_fill(z == 1, 0)


def unit_step(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """1 where x >= y, else 0."""
    return _UnitStep.apply(x, y, scale)


def sign(x: Tensor, scale: float) -> Tensor:
    """1 where x >= 0, else -1."""
    return 2 * unit_step(x, torch.zeros_like(x), scale) - 1


def gates(z: Tensor, v: Tensor, x: Inputs) -> tuple[Tensor, Tensor]:
    """The gate and the value that it writes. A NaN in any input is written, so that no hold hides it."""
    nan = reduce(torch.logical_or, [t.isnan() for t in x if t is not None])
    return z.masked_fill(nan, 1), v.masked_fill(nan, math.nan)


def _kept(s: Tensor, epsilon: float | Tensor) -> Tensor:
    """What a write keeps, epsilon s; nothing is multiplied by an epsilon of 0, but NaN stays."""
    if isinstance(epsilon, Tensor):
        return epsilon * s.masked_fill((s == s) & (epsilon == 0), 0)
    return epsilon * s if epsilon else s.masked_fill(s == s, 0)


def step(gates: Sequence[Tensor], s: Tensor, p: Sequence[float | Tensor]) -> Tensor:
    """The state after a step."""
    z, v = gates
    return _Select.apply(z, v + _kept(s, p[0]), s)


def output(x: Inputs, s: Tensor) -> Tensor:
    alpha = x[-1]
    return s if alpha is None else alpha * s
