"""The leaky integrate-and-fire neuron, with five resets, five surrogate derivatives and two tie rules.

    U_t = next(U_{t-1}, S_{t-1}, I_t)
    S_t = H(U_t - theta)

with I the input, U the membrane before its own reset, which is the state, and S the spike, which is h.

    reset             next(U, S, I)
    none              beta U + I
    subtract          beta U + I - theta S
    subtract_decayed  beta (U - theta S) + I
    zero              S ? I : beta U + I
    zero_input        S ? 0 : beta U + I        but a NaN of I stays

Each operation rounds to the state dtype in the order above, because the last bit of U may decide a spike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .cell import Cell, Steps, Term, itself
from .draw import Draw
from .surrogate import select

RESETS = ("subtract", "none", "subtract_decayed", "zero", "zero_input")

#: sigma'(x) of a surrogate with the steepness k.
SLOPES = {
    "atan": lambda x, k: k / (1 + (math.pi * k * x).square()),
    "fast_sigmoid": lambda x, k: 1 / (1 + k * x.abs()).square(),
    "sigmoid": lambda x, k: k * (-k * x.abs()).exp() / (1 + (-k * x.abs()).exp()).square(),
    "triangle": lambda x, k: (k - k * k * x.abs()).clamp(min=0),
    "straight_through": lambda x, k: torch.ones_like(x),
}


def slope_of_spike(v: Tensor, surrogate: str, surrogate_scale: float) -> Tensor:
    """sigma'(v), 0 where v is infinite; that of straight_through is 1 everywhere."""
    return SLOPES[surrogate](v, surrogate_scale)


class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, U, theta, tie, surrogate, scale):  # noqa: N803 as in the equations
        ctx.save_for_backward(U, theta)
        ctx.surrogate, ctx.scale = surrogate, scale
        return fires(U, theta, tie).to(U.dtype)

    @staticmethod
    def backward(ctx, grad):
        U, theta = ctx.saved_tensors  # noqa: N806
        grad = _times_slope(grad, slope_of_spike(U - theta, ctx.surrogate, ctx.scale))
        return grad, -grad, None, None, None


def fires(U: Tensor, theta: Tensor, tie: bool) -> Tensor:  # noqa: N803
    """Whether U fires. It compares, it does not subtract: infinity against infinity is a tie."""
    return U.ge(theta) if tie else U.gt(theta)


def gates(input, beta, threshold, **_) -> tuple[Tensor, Tensor, Tensor]:
    # A NaN of either is one of the membrane, which no reset hides.
    return input, torch.where(threshold.isnan(), threshold, beta), torch.where(beta.isnan(), beta, threshold)


def step(
    U: Tensor, input: Tensor, beta: Tensor, threshold: Tensor, *,  # noqa: N803
    rounded: Term, reset: str, tie: bool, surrogate: str, surrogate_scale: float, detach_reset: bool, **_: Any,
) -> Tensor:  # fmt: skip
    S = Spike.apply(U, threshold, tie, surrogate, surrogate_scale)  # noqa: N806
    S = S.detach() if detach_reset else S  # noqa: N806
    zero = torch.zeros_like(U)
    fall = select(S, threshold, zero)  # theta S
    if reset == "subtract_decayed":
        return rounded(rounded(beta * rounded(U - fall)) + input)
    if reset in ("zero", "zero_input"):  # an infinite membrane that is reset has no part in gradients
        U = torch.where(U.isinf() & fires(U, threshold, tie), 0, U)  # noqa: N806
    kept = rounded(beta * U)
    if reset == "zero":
        return rounded(select(S, zero, kept) + input)
    moved = rounded(kept + input)
    if reset == "subtract":
        return rounded(moved - fall)
    return select(S, zero.masked_fill(input.isnan(), math.nan), moved) if reset == "zero_input" else moved


def step_of_terms(U: Tensor, sums: Tensor, gates, terms, *, reset: str, tie: bool, **_: Any) -> Tensor:  # noqa: N803
    S = fires(U, gates[2], tie)  # noqa: N806
    input, beta, threshold = terms
    fall = torch.where(S, threshold, 0)
    if reset == "subtract_decayed":
        return beta * (sums + fall) + input
    moved = beta * sums + input
    if reset == "subtract":
        return moved + fall
    return moved if reset == "none" else torch.where(S, input if reset == "zero" else 0, moved)


#: Of the addends of J. A whole sum is over 1 for most steps, and a product of many such terms grows without bound.
CANCELLED = 1 / 8


def decay(*_, steps: Steps, term: Term, **x: Any) -> Tensor:
    """J_t, as one term: the sum of the terms of a product of many grows without bound where the product does not.

    Where its addends cancel, CANCELLED of their sum is that term, because their rounding does not cancel.
    """
    U, beta, theta = steps.exact[0], x["beta"], x["threshold"]  # noqa: N806
    S, d = fires(U, theta, x["tie"]), _slope_of_reset(U, **x)  # noqa: N806
    of_zero = {"zero": beta * U, "zero_input": beta * U + x["input"]}
    if x["reset"] in of_zero:
        kept, fallen = torch.where(S, 0, beta), _times_slope(of_zero[x["reset"]], d)
    else:
        fallen = {"none": 0 * d, "subtract": theta * d, "subtract_decayed": beta * theta * d}[x["reset"]]
        kept = beta
    if term is itself:
        return kept - fallen
    return torch.maximum(term(kept - fallen), CANCELLED * (term(kept) + term(fallen)))


def _slope_of_reset(U: Tensor, *, threshold, surrogate, surrogate_scale, detach_reset, **_: Any) -> Tensor:  # noqa: N803
    """d, the derivative of S by U as far as the reset passes it on."""
    return torch.zeros_like(U) if detach_reset else slope_of_spike(U - threshold, surrogate, surrogate_scale)


def _times_slope(x: Tensor, slope: Tensor) -> Tensor:
    """The product, and 0 where the slope is 0: where U is infinite, x may be."""
    return torch.where(slope == 0, 0, x * slope)


def gradients(steps: Steps, term: Term, **x: Any) -> dict[str, Tensor]:
    reset, theta, lambda_ = x["reset"], x["threshold"], steps.lambda_
    input, beta, _ = steps.gates
    before, after = steps.exact
    S, d = fires(before, theta, x["tie"]), _slope_of_reset(before, **x)  # noqa: N806
    U, zero = steps.s_before, torch.zeros_like(before)  # noqa: N806
    q = zero if x["membrane"] else steps.grad_h * slope_of_spike(after - theta, x["surrogate"], x["surrogate_scale"])
    fall = torch.where(S, term(-theta), 0)
    of_fall = term(-S.to(U.dtype)) + term(theta * d)  # the derivative of -theta S by theta
    of_input, of_beta, of_theta = {
        "none": lambda: (lambda_, U, zero),
        "subtract": lambda: (lambda_, U, of_fall),
        "subtract_decayed": lambda: (lambda_, U + fall, beta * of_fall),
        "zero": lambda: (lambda_, torch.where(S, 0, U), _times_slope(beta * U, d)),
        "zero_input": lambda: (torch.where(S, 0, lambda_), torch.where(S, 0, U), _times_slope(beta * U + input, d)),
    }[reset]()
    return {"input": of_input, "beta": lambda_ * of_beta, "threshold": term(-q) + lambda_ * of_theta}


def output(s: Tensor, *, threshold, tie, membrane, surrogate, surrogate_scale, **_: Any) -> Tensor:
    if membrane:
        return s
    S = Spike.apply(s, threshold.expand_as(s), tie, surrogate, surrogate_scale)  # noqa: N806
    return S.masked_fill(s.isnan(), math.nan)


def slope(s: Tensor, *, threshold, membrane, surrogate, surrogate_scale, **_: Any) -> Tensor:
    return torch.ones_like(s) if membrane else slope_of_spike(s - threshold, surrogate, surrogate_scale)


def draw_inputs(draw: Draw, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """Most decays are between 0.6 and 1, one in ten is negative, some are 0 or 1. One step in ten or so spikes. Inputs
    equal to the threshold make ties where a decay is 0 or the membrane was reset to zero.

    After a reset to zero an infinite input is gone, from gradients too if they pass by the reset or need no input.
    """
    shape, channels = draw.shape, draw.shape[2:]
    beta = draw.uniform(channels, 0.6, 1.0) * torch.where(draw.some(channels, 0.1), -1.0, 1.0)
    beta[draw.some(channels, 0.05)] = 1.0
    beta[draw.some(channels, 0.1)] = 0.0
    theta = (16 * draw.uniform(channels, 0.5, 1.5)).round() / 16  # exact in every dtype
    x = draw.normal(shape, mean=0.2, deviation=0.4)
    x = torch.where(draw.some(shape, 0.05), theta, x)
    follows = options["reset"] == "zero" and options["surrogate"] != "straight_through"  # whose slope is never 0
    if draw.nonfinite and options["reset"] in ("zero", "zero_input") and (options["detach_reset"] or follows):
        x[draw.some(shape, 0.01)] = math.inf
    return {"input": draw.stream(x), "beta": draw.parameter(beta), "threshold": draw.parameter(theta)}


CELL = Cell(
    name="lif",
    inputs=("input", "beta", "threshold"),
    scalars={
        "reset": "subtract", "tie": False, "surrogate": "atan", "surrogate_scale": 1.0, "detach_reset": True,
        "membrane": False,
    },
    gates=gates,
    step=step,
    step_of_terms=step_of_terms,
    decay=decay,
    output=output,
    slope=slope,
    gradients=gradients,
    draw=draw_inputs,
    factors={
        "reset": RESETS, "tie": (False, True), "surrogate": tuple(SLOPES), "surrogate_scale": (1.0, 2.5),
        "detach_reset": (True, False), "membrane": (False, "only"),
    },
    rounds=True,
)  # fmt: skip
