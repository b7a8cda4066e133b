"""The surrogate derivative of the unit step, k / (1 + (pi k x)^2); that of the sign is twice that."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def slope(x, bend, tie):
    """The surrogate derivative of the unit step, without its factor `gain`.

    The caller multiplies the gradient by `gain` first: a slope alone may leave the range where the product does not.
    """
    y = x * bend
    return reciprocal(y * y + tie)


@triton.jit
def reciprocal(y):
    """1 / y for y > 0."""
    if y.dtype == tl.float64:
        result = 1.0 / y
    else:
        root = tl.rsqrt(y)  # one instruction, where a division takes several
        result = root * root
    return result
