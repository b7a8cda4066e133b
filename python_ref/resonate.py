"""The resonate-and-fire neuron without a reset, of PRF (arXiv 2410.03530). Its state is complex, its streams are real.

    u_t = a u_{t-1} + delta x_t
    h_t = H(Re u_t - V), or Re u_t

with x the input, a the decay, delta the gain and V the threshold; H(0) is 1 with `tie`. H has a surrogate derivative.
It is NaN where the state is, and the state where V is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .cell import Cell, Steps, Term
from .draw import Draw
from .lif import Spike, slope_of_spike


def gates(input, decay, gain, threshold, **_) -> tuple[Tensor, Tensor]:
    return torch.where(threshold.isnan(), threshold, decay), gain * input  # a NaN threshold is one of the state


def step(u: Tensor, a: Tensor, w: Tensor, **_: Any) -> Tensor:
    return a * u + w


def decay(a: Tensor, w: Tensor, **_: Any) -> Tensor:
    return a


def output(s: Tensor, *, threshold, tie, membrane, surrogate, surrogate_scale, **_: Any) -> Tensor:
    if membrane:
        return s.real
    V = threshold.real  # noqa: N806 as in the equations
    S = Spike.apply(s.real, V.expand_as(s), tie, surrogate, surrogate_scale)  # noqa: N806
    return S.masked_fill(s.real.isnan(), math.nan)


def slope(s: Tensor, *, threshold, membrane, surrogate, surrogate_scale, **_: Any) -> Tensor:
    if membrane:
        return torch.ones_like(s.real)
    return slope_of_spike(s.real - threshold.real, surrogate, surrogate_scale)


def gradients(steps: Steps, term: Term, **x: Any) -> dict[str, Tensor]:
    of_threshold = term(-slope(steps.exact[1], **x)) if not x["membrane"] else torch.zeros_like(steps.grad_h)
    return {
        "input": term(x["gain"]) * steps.lambda_,
        "decay": steps.lambda_ * steps.s_before.conj(),
        "gain": steps.lambda_ * term(x["input"]),
        "threshold": steps.grad_h * of_threshold,
    }


def draw_inputs(draw: Draw, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """Most decays are between 0.8 and 0.98 in size, with any phase; a few are 0 or 1.

    A state that turns for a thousand steps would gather more rounding than the limits allow.
    """
    channels = draw.shape[2:]
    size = draw.uniform(channels, 0.8, 0.98)
    size[draw.some(channels, 0.02)] = 0.0
    a = torch.polar(size, draw.uniform(channels, -3.0, 3.0))
    a[draw.some(channels, 0.02)] = 1.0
    return {
        "input": draw.stream(draw.normal(draw.shape)),
        "decay": draw.complex_parameter(a),
        "gain": draw.parameter(draw.normal(channels)),
        "threshold": draw.parameter(draw.normal(channels)),
    }


def settle(call: Mapping[str, Any]) -> dict[str, Tensor]:
    """Moves each threshold to where no membrane is near it, so that backends that round differently fire alike."""
    membranes, *_ = CELL(**{**call, "membrane": "only"})
    threshold = call["threshold"].clone()
    for d, u in enumerate(membranes.detach().flatten(0, 1).unbind(1)):
        u = u[u.isfinite()].sort().values
        if len(u) < 2 or threshold[d].isnan():
            continue
        near = int(torch.searchsorted(u, threshold[d].double()))
        close = u[max(min(near, len(u) - 2) - 8, 0) :][:16]
        between = ((close[:-1] + close[1:]) / 2).to(threshold.dtype)
        distance = (between.double().unsqueeze(1) - u).abs().min(1).values
        threshold[d] = between[distance.argmax()]
    return {"threshold": threshold}


CELL = Cell(
    name="resonate",
    inputs=("input", "decay", "gain", "threshold"),
    scalars={"tie": True, "surrogate": "atan", "surrogate_scale": 1.0, "membrane": False},
    gates=gates,
    step=step,
    decay=decay,
    output=output,
    slope=slope,
    gradients=gradients,
    draw=draw_inputs,
    factors={"tie": (True, False), "surrogate": ("atan", "sigmoid", "triangle"), "surrogate_scale": (1.0, 2.5)},
    complex_state=True,
    settle=settle,
)
