"""What the bistable cells share: a gate writes a value, or the state is held; and the output is alpha s.

s_t = z_t (v_t + epsilon s_{t-1}) + (1 - z_t) s_{t-1}
h_t = alpha s_t
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .draw import Draw
from .surrogate import select

SCALARS = {"epsilon": 0.0, "surrogate_scale": 1.0}

#: How often steps write: the deviation of the candidate, and the share of steps that tie.
WRITES = {"often": (1.0, 0.05), "seldom": (0.3, 0.001)}

EPSILON = {"epsilon": (0.0, 0.5, 1.0)}
OTHER_FACTORS = {"alpha": (False, True), "surrogate_scale": (1.0, 2.5), "writes": tuple(WRITES)}


def gates(z: Tensor, v: Tensor, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gate and the value that is written; a NaN in any input is written, so that no hold hides it."""
    nan = reduce(torch.logical_or, [x.isnan() for x in inputs if x is not None])
    return z.masked_fill(nan, 1), v.masked_fill(nan, math.nan)


def step(s: Tensor, z: Tensor, v: Tensor, *, epsilon: float, **_: Any) -> Tensor:
    if epsilon == 0:  # nothing is multiplied by 0, and no write undoes a NaN
        return select(z, torch.where(s.isnan(), s, v), s)
    return select(z, v + epsilon * s, s)


def decay(z: Tensor, v: Tensor, *, epsilon: float, **_: Any) -> Tensor:
    return torch.where(z == 1, z.new_tensor(epsilon), z.new_ones(()))


def output(s: Tensor, *, alpha: Tensor | None, **_: Any) -> Tensor:
    return s if alpha is None else alpha * s


def slope(s: Tensor, *, alpha: Tensor, **_: Any) -> Tensor:
    return alpha


def affine(z: Tensor, v: Tensor, *, epsilon: float) -> tuple[Tensor, Tensor]:
    """(a, w) with s_t = a_t s_{t-1} + w_t."""
    return 1 - (1 - epsilon) * z, z * v


def draw_alpha(draw: Draw, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """`alpha [D]` where the case has one."""
    if not options["alpha"]:
        return {}
    return {"alpha": draw.parameter(draw.normal(draw.shape[2:], mean=1.0, deviation=0.5))}


def draw_infinities(draw: Draw, candidate: Tensor) -> Tensor:
    """The candidate `[B, T, D]`, with some infinities where the case has such values."""
    if not draw.nonfinite:
        return candidate
    return torch.where(draw.some(draw.shape, 0.02), draw.signs(draw.shape) * float("inf"), candidate)
