"""Noise on the thresholds of units that write or hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .parameters import UnitParameters


class ThresholdNoise:
    """Noise on what a unit compares with thresholds, drawn anew for every step and channel.

    Args:
        deviation: its standard deviation.
    """

    def __init__(self, deviation: float) -> None:
        self._deviation = deviation

    def added(self, unit: UnitParameters, gates: Tensor) -> Tensor:
        """The gates `[*, k D]` of a unit, with noise on those that it compares with thresholds.

        A unit whose thresholds are per-channel parameters gets the noise on its candidate: only the difference counts.
        """
        names = list(unit.gates)
        noisy = names.index("threshold" if "threshold" in names else "candidate")
        parts = list(gates.chunk(len(names), -1))
        parts[noisy] = parts[noisy] + self._deviation * torch.randn_like(parts[noisy])
        return torch.cat(parts, -1)

    def __reduce__(self) -> Any:
        """A copy of a unit has no noise."""
        return type(None), ()
