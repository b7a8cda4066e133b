"""minLSTM with normalised gates (arXiv 2410.01201).

    i_t = sigmoid(u_t)        f_t = sigmoid(v_t)
    s_t = f_t / (f_t + i_t) s_{t-1} + i_t / (f_t + i_t) g(c_t)        g as in min_gru.py
    h_t = s_t

with c the candidate, u the update and v the forget gate. The shares of f and i are the sigmoids of k and -k, where
k = log f - log i, so they are right where f and i underflow. A NaN in an input makes the state NaN. Infinite inputs
have the limits of these formulas; there is none for u = v = -infinity, where the state is NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.functional import logsigmoid

from .cell import Cell, Steps, Term
from .draw import Draw
from .min_gru import decay, draw_candidate, draw_gate, positive, positive_slope, sigmoids, step


def gates(candidate, update, forget, **_) -> tuple[Tensor, Tensor, Tensor]:
    write, keep = sigmoids(logsigmoid(forget) - logsigmoid(update))
    return keep, write, positive(candidate)


def gradients(steps: Steps, term: Term, candidate, update, forget, **_) -> dict[str, Tensor]:
    a, b, g = steps.gates
    of_odds = steps.lambda_ * a * b * (g + term(-steps.s_before))  # dL/d(-k)
    return {
        "candidate": steps.lambda_ * b * positive_slope(candidate),
        "update": of_odds * (-update).sigmoid(),
        "forget": term(-of_odds) * (-forget).sigmoid(),
    }


def affine(candidate, update, forget, **_) -> tuple[Tensor, Tensor]:
    a, b, g = gates(candidate, update, forget)
    return a, b * g


def draw_inputs(draw: Draw, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """Most decays are between 1/2 and 1."""
    return {"candidate": draw_candidate(draw), "update": draw_gate(draw, -1.0), "forget": draw_gate(draw, 1.0)}


CELL = Cell(
    name="min_lstm",
    inputs=("candidate", "update", "forget"),
    gates=gates,
    step=step,
    decay=decay,
    gradients=gradients,
    affine=affine,
    draw=draw_inputs,
    unit="MinLSTM",
)
