"""The bistable memory recurrent unit and its cumulative form (arXiv 2601.09495, arXiv 2605.11855).

    z_t = H(|c_t| - |b_t|)
    v_t = m_t sgn(c_t)
    s_t = z_t (v_t + epsilon s_{t-1}) + (1 - z_t) s_{t-1}
    h_t = alpha s_t

with c the candidate, b the threshold and m the amplitude. Epsilon 0 is bistable, 1 cumulative.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import write_or_hold
from .cell import Cell, Steps, Term
from .draw import Draw
from .surrogate import sgn, slope, unit_step


def gates(candidate, threshold, *, amplitude, alpha, surrogate_scale, **_) -> tuple[Tensor, Tensor]:
    z = unit_step(candidate.abs(), threshold.abs(), surrogate_scale)  # a tie writes
    v = sgn(candidate, surrogate_scale)  # 0.0 and -0.0 write +1
    v = v if amplitude is None else amplitude * v
    return write_or_hold.gates(z, v, candidate, threshold, amplitude, alpha)


def gradients(steps: Steps, term: Term, *, candidate, threshold, amplitude, epsilon, surrogate_scale, **_):
    c, b, m, k = candidate, threshold, amplitude, surrogate_scale
    z, v = steps.gates
    x = c.abs() - b.abs()
    dz = steps.lambda_ * (v + term(epsilon - 1) * steps.s_before)
    return {
        "candidate": term(dz * slope(x, k) * c.sign()) + term(steps.lambda_ * z * m * 2 * slope(c, k)),
        "threshold": term(-dz * slope(x, k) * b.sign()),
        "amplitude": term(steps.lambda_ * z * sgn(c, k)),
        "alpha": steps.grad_h * steps.s,
    }


def affine(candidate, threshold, *, epsilon, surrogate_scale, **_) -> tuple[Tensor, Tensor]:
    z = unit_step(candidate.abs(), threshold.abs(), surrogate_scale)
    return write_or_hold.affine(z, sgn(candidate, surrogate_scale), epsilon=epsilon)


def draw_inputs(draw: Draw, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """A third of the steps write: candidates are standard normal, thresholds 0.8 to 1.2 in size; some tie. Or one step
    in three hundred writes.
    """
    shape = draw.shape
    deviation, share = write_or_hold.WRITES[options["writes"]]
    per_channel = options["threshold"] == "channel"
    b_shape = shape[2:] if per_channel else shape
    b = draw.signs(b_shape) * draw.uniform(b_shape, 0.8, 1.2)
    b[draw.some(b_shape, 0.4 * share)] = -0.0
    b = draw.parameter(b) if per_channel else draw.stream(b)
    c = draw.normal(shape, deviation=deviation)
    c[draw.some(shape, 0.02)] = 0.0
    c[draw.some(shape, 0.02)] = -0.0
    tie = draw.some(shape, share)
    c = torch.where(tie & ~b.isnan(), draw.signs(shape) * b, c)
    c = write_or_hold.draw_infinities(draw, c)
    tensors = {"candidate": draw.stream(c), "threshold": b}
    if options["amplitude"]:
        tensors["amplitude"] = draw.stream(draw.normal(shape, mean=1.0, deviation=0.5))
    return tensors | write_or_hold.draw_alpha(draw, options)


CELL = Cell(
    name="bmru",
    inputs=("candidate", "threshold"),
    optional=("amplitude", "alpha"),
    scalars=write_or_hold.SCALARS,
    gates=gates,
    step=write_or_hold.step,
    output=write_or_hold.output,
    slope=write_or_hold.slope,
    decay=write_or_hold.decay,
    gradients=gradients,
    affine=affine,
    draw=draw_inputs,
    factors=write_or_hold.EPSILON
    | {"threshold": ("stream", "channel"), "amplitude": (False, True)}
    | write_or_hold.OTHER_FACTORS,
    unit="BMRU",
)
