"""Spikes in plain torch: the step function H(v - threshold) with one of five surrogate derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import torch_private as private
from ..backends.surrogate import surrogate as arctangent


def _atan(x: Tensor, k: float) -> Tensor:
    bend, tie, gain = arctangent(k, x.dtype)
    return gain / ((x * bend).square() + tie)


def _fast_sigmoid(x: Tensor, k: float) -> Tensor:
    return (1 + normal(k, x.dtype) * x.abs()).square().reciprocal()


def _sigmoid(x: Tensor, k: float) -> Tensor:
    k = normal(k, x.dtype)
    e = (-k * x.abs()).exp()
    return k * (e / (1 + e).square())


def _triangle(x: Tensor, k: float) -> Tensor:
    k = normal(k, x.dtype)
    return k * (1 - k * x.abs()).clamp(min=0)


def _straight_through(x: Tensor, k: float) -> Tensor:
    return torch.ones_like(x)


def normal(k: float, dtype: torch.dtype) -> float:
    """The steepness as a normal number of a dtype, so that its product with infinity is infinite."""
    finfo = torch.finfo(dtype)
    return min(max(k, finfo.tiny), finfo.max)


#: sigma'(x) for a steepness k, by name. The index of a name is its code in the kernels. 0 at infinite x, but 1 for
#: "straight_through".
SURROGATES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "atan": _atan,
    "fast_sigmoid": _fast_sigmoid,
    "sigmoid": _sigmoid,
    "triangle": _triangle,
    "straight_through": _straight_through,
}

#: Surrogates of snnTorch that have no kernel here.
_REFUSED = ("triangular", "SSO", "LSO", "SFS", "spike_rate_escape", "heaviside", "custom_surrogate")


def check_surrogate(surrogate: Any) -> None:
    """Raise an error that names the argument unless it is a name of SURROGATES."""
    if not isinstance(surrogate, str):
        raise TypeError(f"surrogate: expected a name, got {type(surrogate).__name__}")
    if surrogate not in SURROGATES:
        also = ", a surrogate of snnTorch without a kernel here" if surrogate in _REFUSED else ""
        raise ValueError(f"surrogate: expected one of {', '.join(SURROGATES)}, got {surrogate!r}{also}")


def outputs(scan: Callable[[bool], tuple[Tensor, ...]], membrane: bool | str) -> tuple[Any, ...]:
    """The results of a call, as its argument `membrane` asks: of scan(whether h is the membrane)."""
    if not isinstance(membrane, bool) and membrane != "only":
        raise ValueError(f"membrane: expected a bool or 'only', got {membrane!r}")
    results = scan(membrane == "only")
    if membrane is not True:
        return results
    membranes, *_ = scan(True)
    return (results[0], membranes), *results[1:]


def fires(x: Tensor, threshold: Tensor, tie: bool) -> Tensor:
    """Whether x reaches the threshold, or is above it if a tie does not fire. Compared, not subtracted."""
    return x >= threshold if tie else x > threshold


def times_slope(t: Tensor, slope: Tensor) -> Tensor:
    """The product, and 0 where the slope is 0: t may be infinite there."""
    return (t * slope).masked_fill(slope == 0, 0)


class _Spike(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, threshold, tie, derivative, scale):
        return fires(x, threshold, tie).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, threshold, _, ctx.derivative, ctx.scale = inputs
        ctx.save_for_backward(x, threshold)
        ctx.save_for_forward(x, threshold)

    @staticmethod
    def backward(ctx, grad):
        x, threshold = ctx.saved_tensors
        grad = times_slope(grad, ctx.derivative(x - threshold, ctx.scale))
        return grad, -grad, None, None, None


class _SpikeWithTangent(_Spike):
    @staticmethod
    def jvp(ctx, dx, d_threshold, *_):
        with private.enable_forward_gradients(True):
            x, threshold = private.primals(ctx)
            return times_slope(dx - d_threshold, ctx.derivative(x - threshold, ctx.scale))


def spike(x: Tensor, threshold: Tensor, tie: bool, surrogate: str, scale: float) -> Tensor:
    """1 where x fires, else 0, with the derivative of a surrogate: NaN does not fire."""
    # torch.compile refuses a Function that has a jvp.
    function = _Spike if torch.compiler.is_compiling() else _SpikeWithTangent
    return function.apply(x, threshold, tie, SURROGATES[surrogate], scale)


def emitted(x: Tensor, threshold: Tensor, tie: bool, surrogate: str, scale: float) -> Tensor:
    """The spikes of states x: as `spike`, and NaN where x is NaN."""
    return spike(x, threshold, tie, surrogate, scale).masked_fill(x.isnan(), math.nan)
