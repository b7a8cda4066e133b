"""The linear recurrence, real or complex, with the gradients of torch's convention.

    s_t = a_t s_{t-1} + w_t
    h_t = s_t

with a the decay and w the update.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .cell import Cell, Steps, Term
from .draw import COMPLEX_DTYPES, DTYPES, Draw


def gates(decay, update, **_) -> tuple[Tensor, Tensor]:
    return decay, update


def step(s: Tensor, a: Tensor, w: Tensor, **_) -> Tensor:
    return a * s + w


def decay(a: Tensor, w: Tensor, **_) -> Tensor:
    return a


def gradients(steps: Steps, term: Term, **_) -> dict[str, Tensor]:
    return {"decay": steps.lambda_ * steps.s_before.conj(), "update": steps.lambda_}


def affine(decay, update, **_) -> tuple[Tensor, Tensor]:
    return decay.expand_as(update), update


def draw_inputs(draw: Draw, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """Most decays are between 0.8 and 1 in size, one in ten is negative (or turned), a few are 0 or 1."""
    shape = draw.shape
    a_shape = shape[2:] if options["decay"] == "channel" else shape
    a = draw.uniform(a_shape, 0.8, 1.0) * torch.where(draw.some(a_shape, 0.1), -1.0, 1.0)
    a[draw.some(a_shape, 0.02)] = 1.0
    a[draw.some(a_shape, 0.02)] = 0.0
    w = draw.normal(shape)
    if draw.dtype.is_complex:
        a = torch.polar(a.abs(), draw.uniform(a_shape, -3.0, 3.0))
        w = torch.complex(w, draw.normal(shape))
    a = draw.parameter(a) if options["decay"] == "channel" else draw.stream(a)
    return {"update": draw.stream(w), "decay": a}


CELL = Cell(
    name="linear_recurrence",
    inputs=("decay", "update"),
    gates=gates,
    step=step,
    decay=decay,
    gradients=gradients,
    affine=affine,
    draw=draw_inputs,
    factors={"decay": ("stream", "channel")},
    dtypes=DTYPES | COMPLEX_DTYPES,
)
