"""Noise on the thresholds of units that write or hold, drawn anew for every step and channel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .parameters import UnitParameters

deviations: dict[UnitParameters, float] = {}
"""The standard deviation of the noise of each unit that has noise now."""


def added(unit: UnitParameters, gates: Tensor) -> Tensor:
    """The gates `[*, k D]` of a unit, with noise on those that it compares with thresholds.

    A unit whose thresholds are per-channel parameters gets the noise on its candidate: only the difference counts.
    """
    deviation = deviations.get(unit)
    if not deviation:
        return gates
    names = list(unit.gates)
    noisy = names.index("threshold" if "threshold" in names else "candidate")
    parts = list(gates.chunk(len(names), -1))
    parts[noisy] = parts[noisy] + deviation * torch.randn_like(parts[noisy])
    return torch.cat(parts, -1)
