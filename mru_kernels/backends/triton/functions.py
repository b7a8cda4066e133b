"""Functions of numbers for cells, with the names of csrc/functions.h. A NaN gives NaN.

Triton and its devices have some of them, to a few units in the last place. The others follow from those; libdevice has
all, but Triton's interpreter cannot call it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def square_root(x):
    """Rounded to nearest, as on the CPU."""
    if x.dtype == tl.float64:
        result = tl.sqrt(x)
    else:
        result = tl.sqrt_rn(x)
    return result


@triton.jit
def exponential(x):
    return tl.exp(x)


@triton.jit
def exponential_minus_1(x):
    """By tanh(x / 2) where e^x - 1 would cancel."""
    half = tanh_near_0(0.5 * x)
    return tl.where(tl.abs(x) < 1, 2 * half / (1 - half), tl.exp(x) - 1)


@triton.jit
def logarithm(x):
    return tl.log(x)


@triton.jit
def logarithm_of_1_plus(x):
    """log(u) for u = 1 + x, with a factor for what rounding u has lost."""
    u = 1 + x
    return tl.where((u == 1) | (u == float("inf")), x, tl.log(u) * (x / (u - 1)))


@triton.jit
def sine(x):
    return tl.sin(x)


@triton.jit
def cosine(x):
    return tl.cos(x)


@triton.jit
def tanh_near_0(x):
    """tanh for |x| < 1/2, a quotient of polynomials."""
    q = x * x
    over = ((q + 378.0) * q + 17325.0) * q + 135135.0
    under = ((28.0 * q + 3150.0) * q + 62370.0) * q + 135135.0
    return x * (over / under)


@triton.jit
def tanh(x):
    """A quotient of polynomials where 1 - exp(-2 |x|) would cancel."""
    rest = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - rest) / (1.0 + rest)
    return tl.where(tl.abs(x) < 0.5, tanh_near_0(x), tl.where(x < 0, -large, large))


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def error_function(x):
    return tl.erf(x)


@triton.jit
def maximum(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(x, y):
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def power(x, y):
    """x^y by logarithms in float64, and the sign of x if y is an odd integer."""
    base, exponent = x.to(tl.float64), y.to(tl.float64)
    size = tl.exp(exponent * tl.log(tl.abs(base)))
    whole = tl.floor(exponent) == exponent
    odd = whole & (tl.floor(0.5 * exponent) != 0.5 * exponent)
    negative = (base < 0) | (1.0 / base < 0)  # -0 too
    size = tl.where((base < 0) & (whole == 0), float("nan"), tl.where(negative & odd, -size, size))
    ends = (exponent == 0) | (base == 1) | ((base == -1) & (tl.abs(exponent) == float("inf")))
    return tl.where(ends, 1.0, size).to(x.dtype)
