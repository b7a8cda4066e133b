"""The constants of the surrogate derivative of the unit step; csrc/surrogate.h has those of the C++ kernels."""

from __future__ import annotations

import math

import torch


def surrogate(k: float, state: torch.dtype) -> tuple[float, float, float]:
    """(bend, tie, gain) of the surrogate scale k, any finite k > 0, for the dtype of states.

    The surrogate derivative of the unit step, k / (1 + (pi k x)^2), is gain / (tie + (bend x)^2), where tie = gain / k
    and bend = pi sqrt(k gain). `gain` is a power of two: 1 where k and 1 / k are well within the range of the dtype.
    Elsewhere it keeps tie, 1 / tie and bend normal numbers, as devices flush subnormal ones. In float32, k beyond
    [2^-240, 2^180] counts as the nearest in it: its products with gradients are 0 or infinite as those of k are.
    """
    finfo = torch.finfo(state)
    most = math.frexp(finfo.max)[1] - 8  # the exponent of k from which on gain is not 1
    k = min(max(k, 2.0 ** (-2 * most)), 2.0 ** min(3 * most // 2, 1023))
    exponent = math.frexp(k)[1] - 1
    gain = 2.0 ** math.copysign(max(abs(exponent) - most, 0), exponent)
    return max(math.pi * math.sqrt(k) * math.sqrt(gain), finfo.tiny), gain / k, gain
