"""The resonate-and-fire neuron without a reset, of PRF (arXiv 2410.03530). Its state is complex, its streams are real.

    u_t = a u_{t-1} + delta x_t
    h_t = H(Re u_t - V)

with x the input, a the decay, delta the gain and V the threshold; H(0) is 1 with `tie`. The derivative of H is replaced
by that of `surrogate.heaviside`. h is NaN where Re u_t - V is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cell import Steps, Term
from .surrogate import slope as surrogate_slope


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, tie, scale):
        ctx.save_for_backward(v)
        ctx.scale = scale
        return torch.where(v.isnan(), v, ((v >= 0) if tie else (v > 0)).to(v.dtype))

    @staticmethod
    def backward(ctx, grad):
        (v,) = ctx.saved_tensors
        return grad * surrogate_slope(v, ctx.scale), None, None


def gates(input, decay, gain, **_) -> tuple[Tensor, Tensor]:
    return decay, gain * input


def step(s: Tensor, a: Tensor, w: Tensor, **_) -> Tensor:
    return a * s + w


def decay(a: Tensor, w: Tensor, **_) -> Tensor:
    return a


def output(s: Tensor, threshold, tie, surrogate_scale, **_) -> Tensor:
    return _Spike.apply(s.real - threshold.real, tie, surrogate_scale)


def slope(s: Tensor, threshold, surrogate_scale, **_) -> Tensor:
    return surrogate_slope(s.real - threshold.real, surrogate_scale)


def gradients(steps: Steps, term: Term, input, gain, threshold, surrogate_scale, **_) -> dict[str, Tensor]:
    return {
        "input": term(gain) * steps.lambda_,
        "decay": steps.lambda_ * steps.s_before.conj(),
        "gain": steps.lambda_ * term(input),
        "threshold": -steps.grad_h * slope(steps.s, threshold, surrogate_scale),
    }
