"""Unit step, sign and gate: exact forward, arctangent surrogate backward."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def slope(x: Tensor, scale: float) -> Tensor:
    """Surrogate derivative of the unit step, `k / (1 + (pi k x)^2)`; 0 where x is infinite."""
    return scale / (1 + (math.pi * scale * x) ** 2)


class _UnitStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, scale):
        ctx.save_for_backward(x, y)
        ctx.scale = scale
        return (x >= y).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        grad = grad * slope(x - y, ctx.scale)
        return grad, -grad, None


class _Select(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, one, zero):
        is_one = z == 1
        ctx.save_for_backward(is_one, one, zero)
        return torch.where(is_one, one, zero)

    @staticmethod
    def backward(ctx, grad):
        is_one, one, zero = ctx.saved_tensors
        none = grad.new_zeros(())
        return grad * (one - zero), torch.where(is_one, grad, none), torch.where(is_one, none, grad)


def unit_step(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """H(x - y), with H(0) = 1. It compares, it does not subtract: infinity against infinity is a tie."""
    return _UnitStep.apply(*torch.broadcast_tensors(x, y), scale)


def sgn(x: Tensor, scale: float) -> Tensor:
    """+1 for x >= 0, and so for both zeros, else -1."""
    return 2 * unit_step(x, torch.zeros_like(x), scale) - 1


def select(z: Tensor, one: Tensor, zero: Tensor) -> Tensor:
    """`z one + (1 - z) zero` for z in {0, 1}, as a select: the branch not taken is not multiplied by 0.

    The gradients are those of the formula, so dL/dz is defined.
    """
    return _Select.apply(z, one, zero)
