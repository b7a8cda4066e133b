"""The gates of minGRU and minLSTM in plain torch (arXiv 2410.01201): the decay and the update of each step.

The gradients are written out, so that torch differentiates them at any level of `torch.func`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def min_gru(x: Sequence[Tensor], p: Sequence[float | Tensor]) -> tuple[Tensor, Tensor]:
    """Decay and update from the candidate and the update gate."""
    candidate, update = x
    decay, write = _sigmoids(update)
    return decay, write * _positive(candidate)


def min_gru_vjp(x: Sequence[Tensor], of_decay: Tensor, of_update: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `x` from those of decay and update."""
    candidate, update = x
    decay, write = _sigmoids(update)
    of_odds = decay * write * (of_update * _positive(candidate) - of_decay)
    return of_update * write * _positive_slope(candidate), of_odds


def min_lstm(x: Sequence[Tensor], p: Sequence[float | Tensor]) -> tuple[Tensor, Tensor]:
    """Decay and update from the candidate, the update gate and the forget gate."""
    decay, write = _shares(x)
    return decay, write * _positive(x[0])


def min_lstm_vjp(x: Sequence[Tensor], of_decay: Tensor, of_update: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `x` from those of decay and update."""
    candidate, update, forget = x
    decay, write = _shares(x)
    of_odds = decay * write * (of_update * _positive(candidate) - of_decay)
    of_candidate = of_update * write * _positive_slope(candidate)
    return of_candidate, of_odds * (-update).sigmoid(), -of_odds * (-forget).sigmoid()


def _shares(x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The shares f / (f + i) and i / (f + i), by the log-odds: they are right where both gates underflow."""
    _, update, forget = x
    write, decay = _sigmoids(F.logsigmoid(forget) - F.logsigmoid(update))
    return decay, write


def _sigmoids(x: Tensor) -> tuple[Tensor, Tensor]:
    """The values sigmoid(-x) and sigmoid(x).

    The larger is 1 minus the smaller, because torch's gradient y (1 - y) of a sigmoid y near 1 cancels.
    """
    negative = x < 0
    small = torch.where(negative, x, -x).sigmoid()
    return torch.where(negative, 1 - small, small), torch.where(negative, small, 1 - small)


def _positive(candidate: Tensor) -> Tensor:
    """The value g(c) = c + 1/2 for c >= 0, else sigmoid(c)."""
    return torch.where(candidate >= 0, candidate + 0.5, candidate.sigmoid())


def _positive_slope(candidate: Tensor) -> Tensor:
    value = candidate.sigmoid()
    return torch.where(candidate >= 0, 1.0, value * (1 - value))
