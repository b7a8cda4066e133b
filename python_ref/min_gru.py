"""minGRU (arXiv 2410.01201).

    z_t = sigmoid(u_t)
    s_t = (1 - z_t) s_{t-1} + z_t g(c_t)        g(c) = c + 1/2 for c >= 0, else sigmoid(c)
    h_t = s_t

with c the candidate and u the update. 1 - z_t is sigmoid(-u_t). A NaN in an input makes the state NaN. Infinite inputs
have the limits of these formulas: z is 0 or 1. A product 0 times infinity is NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .cell import Cell, Steps, Term
from .draw import Draw


def sigmoids(x: Tensor) -> tuple[Tensor, Tensor]:
    """The values sigmoid(-x) and sigmoid(x).

    The larger is 1 minus the smaller, because torch's gradient y (1 - y) of a sigmoid y near 1 cancels.
    """
    negative = x < 0
    small = torch.where(negative, x, -x).sigmoid()
    return torch.where(negative, 1 - small, small), torch.where(negative, small, 1 - small)


def positive(c: Tensor) -> Tensor:
    """g(c)."""
    return torch.where(c >= 0, c + 0.5, c.sigmoid())


def positive_slope(c: Tensor) -> Tensor:
    """g'(c)."""
    a, z = sigmoids(c)
    return torch.where(c >= 0, 1.0, a * z)


def gates(candidate, update, **_) -> tuple[Tensor, Tensor, Tensor]:
    return *sigmoids(update), positive(candidate)


def step(s: Tensor, a: Tensor, z: Tensor, g: Tensor, **_) -> Tensor:
    return a * s + z * g


def decay(a: Tensor, z: Tensor, g: Tensor, **_) -> Tensor:
    return a


def gradients(steps: Steps, term: Term, candidate, **_) -> dict[str, Tensor]:
    a, z, g = steps.gates
    return {
        "candidate": steps.lambda_ * z * positive_slope(candidate),
        "update": steps.lambda_ * a * z * (g + term(-steps.s_before)),
    }


def affine(candidate, update, **_) -> tuple[Tensor, Tensor]:
    a, z, g = gates(candidate, update)
    return a, z * g


def draw_candidate(draw: Draw) -> Tensor:
    """Candidates of either sign; a few are 0, and a few so large that g is their value or 0."""
    c = draw.normal(draw.shape, deviation=1.5)
    c[draw.some(draw.shape, 0.02)] = 0.0
    return draw.stream(torch.where(draw.some(draw.shape, 0.02), 40.0 * c, c))


def draw_gate(draw: Draw, mean: float) -> Tensor:
    """Gates around `mean`; a few so large that a sigmoid of float32 is 0 or 1."""
    u = draw.normal(draw.shape, mean=mean, deviation=1.5)
    return draw.stream(torch.where(draw.some(draw.shape, 0.05), 40.0 * u, u))


def draw_inputs(draw: Draw, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """Most decays are between 1/2 and 1."""
    return {"candidate": draw_candidate(draw), "update": draw_gate(draw, -2.0)}


CELL = Cell(
    name="min_gru",
    inputs=("candidate", "update"),
    gates=gates,
    step=step,
    decay=decay,
    gradients=gradients,
    affine=affine,
    draw=draw_inputs,
    unit="MinGRU",
)
