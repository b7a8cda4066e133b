"""States of the softmax recurrence, `[N, D + 2 H]`: the mean `[D]`, and the log of the weight as two floats `[H]`.

A head's weight is e^(Z + z), where z is what Z is rounded by. An empty state is mean 0, Z = -inf, z = 0. As z is only
a rounding error, the gradient of a final z has no effect, and that of an initial z is the gradient of Z.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import state_dtype


class SegmentMap(NamedTuple):
    """The map of each sequence: what its steps do to a state.

    Attributes:
        state: `[N, D + 2 H]`, the state that they make from an empty one.
        decay: `[N, 2 H]`, the sum of their decays as two numbers, like Z and z.
    """

    state: Tensor
    decay: Tensor


def empty_state(like: Tensor, sequences: int, channels: int, heads: int) -> Tensor:
    """The state `[sequences, channels + 2 heads]` before any step, for streams such as `like`."""
    zeros = like.new_zeros((sequences, channels), dtype=state_dtype(like.dtype))
    return join_state(zeros, zeros.new_full((sequences, heads), -torch.inf), zeros.new_zeros((sequences, heads)))


def split_state(state: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """The mean `[..., D]`, Z and z `[..., H]` of states `[..., D + 2 H]`, as views."""
    mean, high, low = state.split([state.shape[-1] - 2 * heads, heads, heads], -1)
    return mean, high, low


def join_state(mean: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """The state from its parts: the mean, Z and z."""
    return torch.cat([mean, high, low], -1)
