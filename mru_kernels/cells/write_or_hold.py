"""The cells `bmru` and `schmitt` in plain torch: a step writes a value or holds the state; the output is alpha s."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .. import torch_private as private
from ..backends.surrogate import surrogate

Inputs = Sequence[Tensor | None]


class _UnitStep(torch.autograd.Function):
    """The unit step H(x - y), 1 for a tie, with the surrogate derivative in gradients and tangents."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, y, scale):
        return (x >= y).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, ctx.scale = inputs
        ctx.save_for_backward(x, y)
        ctx.save_for_forward(x, y)

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        grad = _times_slope(grad, x, y, ctx.scale)
        return grad, -grad, None


class _UnitStepWithTangent(_UnitStep):
    @staticmethod
    def jvp(ctx, dx, dy, _):
        with private.enable_forward_gradients(True):
            x, y = private.primals(ctx)
            return _times_slope(dx - dy, x, y, ctx.scale)


def _times_slope(t: Tensor, x: Tensor, y: Tensor, scale: float) -> Tensor:
    bend, tie, gain = surrogate(scale, t.dtype)
    return t * gain / (((x - y) * bend).square() + tie)


class Select(torch.autograd.Function):
    """`z one + (1 - z) zero` for z in {0, 1}, computed by a select, with the derivatives of the formula."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z, one, zero):
        return torch.where(z == 1, one, zero)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        z, one, zero = ctx.saved_tensors
        return grad * (one - zero), grad.masked_fill(z == 0, 0), grad.masked_fill(z == 1, 0)


class _SelectWithTangent(Select):
    @staticmethod
    def jvp(ctx, dz, d_one, d_zero):
        with private.enable_forward_gradients(True):
            z, one, zero = private.primals(ctx)
            return dz * (one - zero) + torch.where(z == 1, d_one, d_zero)


def _function(compiled: Any, eager: Any) -> Any:
    """One of two Functions: torch.compile refuses those that have a jvp."""
    return compiled if torch.compiler.is_compiling() else eager


def select(z: Tensor, one: Tensor, zero: Tensor) -> Tensor:
    """`one` where z is 1, `zero` where it is 0, with the derivatives of `z one + (1 - z) zero`."""
    return _function(Select, _SelectWithTangent).apply(z, one, zero)


def unit_step(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """1 where x >= y, else 0. `scale` is that of the surrogate derivative."""
    return _function(_UnitStep, _UnitStepWithTangent).apply(x, y, scale)


def sign(x: Tensor, scale: float) -> Tensor:
    """1 where x >= 0, else -1. `scale` is that of the surrogate derivative."""
    return 2 * unit_step(x, torch.zeros_like(x), scale) - 1


def gates(z: Tensor, v: Tensor, x: Inputs) -> tuple[Tensor, Tensor]:
    """The gate z and the value v that it writes, both `[B, T, D]`. A NaN in any input of x writes NaN."""
    nan = reduce(torch.logical_or, [t.isnan() for t in x if t is not None])
    return z.masked_fill(nan, 1), v.masked_fill(nan, math.nan)


def _kept(s: Tensor, epsilon: float | Tensor) -> Tensor:
    """What a write keeps, epsilon s. An epsilon of 0 gives 0 also for an infinite s; NaN stays NaN."""
    if isinstance(epsilon, Tensor):
        return epsilon * s.masked_fill((s == s) & (epsilon == 0), 0)
    return epsilon * s if epsilon else s.masked_fill(s == s, 0)


def step(gates: Sequence[Tensor], s: Tensor, p: Sequence[float | Tensor]) -> Tensor:
    """The state after a step, `[B, D]`, from its gate and value, the state before, and the scalars."""
    z, v = gates
    return select(z, v + _kept(s, p[0]), s)


def output(x: Inputs, s: Tensor, p: Sequence[float | Tensor]) -> Tensor:
    """The output alpha s, `[B, T, D]`; alpha is the last input of both cells."""
    alpha = x[-1]
    return s if alpha is None else alpha * s
