"""Step functions with surrogate derivatives, for gates and for plain torch code."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Derivative = Callable[[Tensor, float], Tensor]


def _arctangent(x: Tensor, scale: float) -> Tensor:
    return scale / (1 + (math.pi * scale * x).square())


def _fast_sigmoid(x: Tensor, scale: float) -> Tensor:
    return scale / (1 + scale * x.abs()).square()


def _sigmoid(x: Tensor, scale: float) -> Tensor:
    y = torch.sigmoid(scale * x)
    return scale * (y * (1 - y))


def _triangle(x: Tensor, scale: float) -> Tensor:
    return scale * torch.relu(1 - scale * x.abs())


def _straight_through(x: Tensor, scale: float) -> Tensor:
    return torch.full_like(x, scale)


#: The derivative of each surrogate at x, for a scale k.
SURROGATES: dict[str, Derivative] = {
    "arctangent": _arctangent,
    "fast_sigmoid": _fast_sigmoid,
    "sigmoid": _sigmoid,
    "triangle": _triangle,
    "straight_through": _straight_through,
}


class _Heaviside(torch.autograd.Function):
    """H(x - threshold) with a surrogate derivative. It compares and does not subtract."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, threshold, scale, derivative):
        return (x >= threshold).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, threshold, ctx.scale, ctx.derivative = inputs
        ctx.save_for_backward(x, threshold)

    @staticmethod
    def backward(ctx, grad):
        x, threshold = ctx.saved_tensors
        grad = grad * ctx.derivative(x - threshold, ctx.scale)
        return grad, -grad, None, None


def heaviside(
    x: Tensor,
    scale: float = 1.0,
    *,
    threshold: Tensor | None = None,
    surrogate: str | Callable[[Tensor], Tensor] = "arctangent",
) -> Tensor:
    """The unit step H(x - threshold), 1 for a tie, with a surrogate derivative.

    Args:
        x: of any shape and floating dtype.
        scale: k > 0 of the derivative.
        threshold: in the shape and dtype of x; zeros if None. It has the negative gradient of x.
        surrogate: the derivative at y = x - threshold: "arctangent", k / (1 + (pi k y)^2); "fast_sigmoid",
            k / (1 + k |y|)^2; "sigmoid", that of the logistic function of k y; "triangle", k max(0, 1 - k |y|);
            "straight_through", k; or a function of y, which is not scaled.

    Returns:
        Zeros and ones in the shape and dtype of x.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Example::

        >>> x = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
        >>> y = mk.heaviside(x, surrogate="triangle")
        >>> y.sum().backward()
        >>> y.tolist(), x.grad.tolist()
        ([0.0, 1.0, 1.0], [0.0, 1.0, 0.0])
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating dtype, got {x.dtype}")
    if threshold is None:
        threshold = torch.zeros_like(x)
    elif not isinstance(threshold, Tensor):
        raise TypeError(f"threshold: expected a tensor or None, got {type(threshold).__name__}")
    elif threshold.shape != x.shape or threshold.dtype != x.dtype:
        expected, got = (f"{t.dtype} {list(t.shape)}" for t in (x, threshold))
        raise ValueError(f"threshold: expected the dtype and shape of x, {expected}, got {got}")
    return _Heaviside.apply(x, threshold, _scale(scale), _derivative(surrogate))


def sign(x: Tensor, scale: float = 1.0, *, surrogate: str | Callable[[Tensor], Tensor] = "arctangent") -> Tensor:
    """The sign of x, 1 for x = 0, with twice the surrogate derivative of `heaviside`.

    Args:
        x, scale, surrogate: as for `heaviside`.

    Returns:
        -1 or 1, in the shape and dtype of x.

    Raises:
        TypeError, ValueError: as `heaviside`.

    Example::

        >>> mk.sign(torch.tensor([-3.0, 0.0, 2.0])).tolist()
        [-1.0, 1.0, 1.0]
    """
    return 2 * heaviside(x, scale, surrogate=surrogate) - 1


def _scale(scale: float) -> float:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: expected a float, got {type(scale).__name__}")
    if not 0.0 < scale <= sys.float_info.max:
        raise ValueError(f"scale: expected a positive finite number, got {scale}")
    return float(scale)


def _derivative(surrogate: Any) -> Derivative:
    if callable(surrogate):
        return lambda x, scale: surrogate(x)
    if not isinstance(surrogate, str):
        raise TypeError(f"surrogate: expected a name or a function, got {type(surrogate).__name__}")
    if surrogate not in SURROGATES:
        raise ValueError(f"surrogate: expected a function or one of {', '.join(SURROGATES)}, got {surrogate!r}")
    return SURROGATES[surrogate]
