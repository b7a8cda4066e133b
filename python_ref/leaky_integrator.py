"""The leaky integrator, whose output is not its state: the example of a cell (docs/adding-a-cell.md).

    s_t = a_t s_{t-1} + x_t
    h_t = tanh(s_t)

with x the input and a the decay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .cell import Cell, Steps, Term
from .draw import Draw


def gates(input, decay, **_) -> tuple[Tensor, Tensor]:
    return decay, input


def step(s: Tensor, a: Tensor, x: Tensor, **_) -> Tensor:
    return a * s + x


def decay(a: Tensor, x: Tensor, **_) -> Tensor:
    return a


def output(s: Tensor, **_) -> Tensor:
    return s.tanh()


def slope(s: Tensor, **_) -> Tensor:
    return 1 - s.tanh().square()


def gradients(steps: Steps, term: Term, **_) -> dict[str, Tensor]:
    return {"input": steps.lambda_, "decay": steps.lambda_ * steps.s_before}


def affine(input, decay, **_) -> tuple[Tensor, Tensor]:
    return decay.expand_as(input), input


def draw_inputs(draw: Draw, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """Most decays are between 0.8 and 1, one in ten is negative, a few are 0 or 1. Outputs saturate seldom."""
    shape = draw.shape
    a_shape = shape[2:] if options["decay"] == "channel" else shape
    a = draw.uniform(a_shape, 0.8, 1.0) * torch.where(draw.some(a_shape, 0.1), -1.0, 1.0)
    a[draw.some(a_shape, 0.02)] = 1.0
    a[draw.some(a_shape, 0.02)] = 0.0
    a = draw.parameter(a) if options["decay"] == "channel" else draw.stream(a)
    return {"input": draw.stream(draw.normal(shape, deviation=0.3)), "decay": a}


CELL = Cell(
    name="leaky_integrator",
    inputs=("input", "decay"),
    gates=gates,
    step=step,
    decay=decay,
    output=output,
    slope=slope,
    gradients=gradients,
    affine=affine,
    draw=draw_inputs,
    factors={"decay": ("stream", "channel")},
)
