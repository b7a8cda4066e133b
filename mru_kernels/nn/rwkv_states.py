"""Conversion of the state of RWKV-4's time mixing from and to the sums that public code keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..softmax import join_state, split_state

NO_WEIGHT = -1e38  # the log scale of an empty state in the public code


def wkv_state_from_sums(aa: Tensor, bb: Tensor, pp: Tensor) -> Tensor:
    """The state of `mru_kernels.wkv` from the sums that public RWKV-4 code keeps.

    With the log scale pp, exp(pp) aa is the weighted sum of the values and exp(pp) bb that of the weights. Hugging
    Face's kernels keep them in one tensor `[B, C, 3]`: call with `*state.unbind(-1)`.

    Args:
        aa, bb, pp: `[B, C]`, float32 or float64. An empty state has bb = 0.

    Returns:
        `[B, 3 C]`: the weighted mean, and the log of the total weight as a sum of two numbers.

    Raises:
        TypeError, ValueError: a tensor is not as described; the message names it.

    Example::

        >>> state = mk.wkv_state_from_sums(*torch.rand(3, 2, 8))
        >>> state.shape
        torch.Size([2, 24])
    """
    checks.tensor("aa", aa, 2, "[batch, channels]")
    for name, t in (("aa", aa), ("bb", bb), ("pp", pp)):
        checks.tensor(name, t, 2, "[batch, channels]")
        if t.dtype not in (torch.float32, torch.float64) or t.dtype != aa.dtype:
            raise TypeError(f"{name}: expected float32 or float64 as aa, got {t.dtype}")
        if t.shape != aa.shape:
            raise ValueError(f"{name}: expected aa's shape {list(aa.shape)}, got {list(t.shape)}")
        if t.device != aa.device:
            raise ValueError(f"{name}: expected aa's device {aa.device}, got {t.device}")
    empty = bb == 0
    more = bb.log()
    total = pp + more
    added = total - pp
    rest = torch.where(empty, 0.0, (pp - (total - added)) + (more - added))  # what `total` rounds away
    mean = torch.where(empty, 0.0, aa / torch.where(empty, 1.0, bb))
    return join_state(mean, torch.where(empty, -torch.inf, total), rest)


def wkv_sums_from_state(state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sums aa, bb and pp `[B, C]` that public RWKV-4 code keeps, from the state `[B, 3 C]` of `mru_kernels.wkv`.

    bb is 1 up to rounding. An empty state has aa = bb = 0 and pp = -1e38. `torch.stack(sums, -1)` is the tensor
    `[B, C, 3]` of Hugging Face's kernels.

    Raises:
        TypeError, ValueError: `state` is not as described.

    Example::

        >>> mixing = mk.RWKV4TimeMix(8)
        >>> _, (last, state) = mixing(torch.randn(2, 10, 8))
        >>> aa, bb, pp = mk.wkv_sums_from_state(state)
        >>> aa.shape
        torch.Size([2, 8])
    """
    checks.tensor("state", state, 2, "[batch, 3 channels]")
    if state.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"state: expected float32 or float64, got {state.dtype}")
    if state.shape[1] % 3:
        raise ValueError(f"state: expected [batch, 3 channels], got shape {list(state.shape)}")
    mean, total, rest = split_state(state, state.shape[1] // 3)
    empty = total == -torch.inf
    bb = torch.where(empty, 0.0, rest.exp())
    return mean * bb, bb, torch.where(empty, NO_WEIGHT, total)
