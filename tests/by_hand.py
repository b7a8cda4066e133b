"""Short sequences for values that are worked out by hand."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NAN, INF = math.nan, math.inf


def column(*values: complex) -> Tensor:
    """One channel of one sequence: `[1, T, 1]`."""
    return torch.tensor(values, dtype=_wide(values)).view(1, -1, 1)


def _wide(values: tuple) -> torch.dtype:
    return torch.complex128 if any(isinstance(x, complex) for x in values) else torch.float64


def state(*values: float) -> Tensor:
    """One channel of each of N sequences: `[N, 1]`."""
    return torch.tensor(values, dtype=torch.float64).view(-1, 1)


def assert_values(result: Tensor, *expected: complex) -> None:
    torch.testing.assert_close(
        result.flatten(), torch.tensor(expected, dtype=result.dtype), rtol=0, atol=0, equal_nan=True
    )


# A step writes where |c| >= |b|. These write +, write - at a tie, hold, write + at a tie of zeros, hold, write -, hold.
C = column(3, -2, 1, 0, 0.5, -4, 0)
B = column(1, 2, 2, 0, -1, 1, 3)
