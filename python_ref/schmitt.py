"""The first-quadrant bistable memory recurrent unit, a Schmitt trigger (arXiv 2605.15216).

    L_t = H(c_t - low)
    U_t = H(c_t - high)
    z_t = 1 - L_t (1 - U_t)
    s_t = z_t (U_t + epsilon s_{t-1}) + (1 - z_t) s_{t-1}
    h_t = alpha s_t

with c the candidate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import write_or_hold
from .cell import Cell, Steps, Term
from .draw import Draw
from .surrogate import slope, unit_step


def gates(candidate, low, high, *, alpha, surrogate_scale, **_) -> tuple[Tensor, Tensor]:
    L = unit_step(candidate, low, surrogate_scale)  # noqa: N806 as in the equations
    U = unit_step(candidate, high, surrogate_scale)  # noqa: N806
    return write_or_hold.gates(1 - L * (1 - U), U, candidate, low, high, alpha)


def gradients(steps: Steps, term: Term, *, candidate, low, high, epsilon, surrogate_scale, **_):
    z, U = steps.gates  # noqa: N806
    L = (candidate >= low).to(z.dtype)  # noqa: N806
    dz = steps.lambda_ * (U + term(epsilon - 1) * steps.s_before)
    dU = (steps.lambda_ * z + L * dz) * slope(candidate - high, surrogate_scale)  # noqa: N806
    dL = term(-(1 - U) * dz) * slope(candidate - low, surrogate_scale)  # noqa: N806
    return {"candidate": dU + dL, "low": term(-dL), "high": term(-dU), "alpha": steps.grad_h * steps.s}


def affine(candidate, low, high, *, epsilon, surrogate_scale, **_) -> tuple[Tensor, Tensor]:
    U = unit_step(candidate, high, surrogate_scale)  # noqa: N806
    z = 1 - unit_step(candidate, low, surrogate_scale) * (1 - U)
    return write_or_hold.affine(z, U, epsilon=epsilon)


def draw_inputs(draw: Draw, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """A quarter of the steps hold: candidates are normal around 1/2, low about 0.15, width about 0.7; some tie. Or
    nearly all hold in most channels: candidates lie close to the middle between low and high.
    """
    shape = draw.shape
    deviation, share = write_or_hold.WRITES[options["writes"]]
    low = draw.uniform(shape[2:], -0.1, 0.4)
    high = low + draw.uniform(shape[2:], 0.5, 0.9)
    crossed = draw.some(shape[2:], 0.1)  # high < low is allowed
    middle = (low + high) / 2
    low, high = draw.parameter(torch.where(crossed, high, low)), draw.parameter(torch.where(crossed, low, high))
    if options["writes"] == "often":
        c = draw.normal(shape, mean=0.5)
    else:
        c = middle + draw.normal(shape, deviation=deviation / 4)
    for edge in (low, high):
        tie = draw.some(shape, share) & ~edge.isnan()
        c = torch.where(tie, edge.double(), c)
    c = write_or_hold.draw_infinities(draw, c)
    return {"candidate": draw.stream(c), "low": low, "high": high} | write_or_hold.draw_alpha(draw, options)


CELL = Cell(
    name="schmitt",
    inputs=("candidate", "low", "high"),
    optional=("alpha",),
    scalars=write_or_hold.SCALARS,
    gates=gates,
    step=write_or_hold.step,
    output=write_or_hold.output,
    slope=write_or_hold.slope,
    decay=write_or_hold.decay,
    gradients=gradients,
    affine=affine,
    draw=draw_inputs,
    factors=write_or_hold.EPSILON | write_or_hold.OTHER_FACTORS,
    unit="FirstQuadrantBMRU",
)
