"""The cells in Triton: what csrc/cells states in C++, for blocks of channels.

A cell is a handful of functions that the kernels are given as constexpr arguments. `x` is the tuple of its inputs at
one step and `s` the state before it, blocks in the state dtype:

    step(x, s, epsilon)                the state after
    push(x, m, epsilon)                a m, where a is the factor of the affine form s' = a s + w
    pull(x, m, epsilon)                conj(a) m
    vjp(x, s, lam, epsilon, scale)     the gradients of x, with lam = dL/ds'
    one(d), times(a, b)                the factor 1 for channels d, and a product of factors, or of one and a state
    encode(x), step_event(code, s, epsilon), pull_event(code, m, epsilon)
                                       the same from a 2-bit event: hold, one of two writes, NaN (where they suffice)

A complex channel is two neighbours of a block, the real and the imaginary part, which one lane holds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Cell(NamedTuple):
    """The functions of a cell; the last three are None where a step does not fit an event."""

    step: Any
    push: Any
    pull: Any
    vjp: Any
    one: Any
    times: Any
    encode: Any = None
    step_event: Any = None
    pull_event: Any = None


# Event codes (csrc/cells/write_or_hold.h).
HOLD = tl.constexpr(0)
FIRST = tl.constexpr(1)
SECOND = tl.constexpr(2)
NAN = tl.constexpr(3)
PI = tl.constexpr(3.14159265358979323846)

# ------------------------------------------------------------------------- the step that the bistable cells share


@triton.jit
def one(d):
    return tl.where(d >= 0, 1.0, 0.0)


@triton.jit
def times_or_zero(a, b):
    """a b, a factor times another or a state; NaN is absorbing, and nothing else is multiplied by 0."""
    return tl.where((a == 0) & (b == b), 0.0, a * b)


@triton.jit
def scaled(s, epsilon):
    """epsilon s; nothing is multiplied by 0."""
    return tl.where(epsilon == 0, 0.0, epsilon * s)


@triton.jit
def write_or_hold(writes, nan, v, s, epsilon):
    """Where the gate writes, v + epsilon s; elsewhere s. NaN is absorbing."""
    written = tl.where(writes & (s == s), v + scaled(s, epsilon), s)
    return tl.where(nan, float("nan"), written)


@triton.jit
def pull_event(code, m, epsilon):
    return tl.where(code != HOLD, scaled(m, epsilon), m)


@triton.jit
def sign0(x):
    """The ordinary sign, with sign0(0) = 0: the derivative of |x|."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0)).to(x.dtype)


@triton.jit
def step_slope(x, scale):
    """Surrogate derivative of the unit step: k / (1 + (pi k x)^2)."""
    y = x * (PI * scale)
    return scale / (1.0 + y * y)


# ------------------------------------------------------------------------- BMRU (csrc/cells/bmru.h)


@triton.jit
def bmru_writes(x):
    """The gate compares, it does not subtract: a tie writes."""
    return tl.abs(x[0]) >= tl.abs(x[1])


@triton.jit
def bmru_nan(x):
    nan = (x[0] != x[0]) | (x[1] != x[1])
    if len(x) == 3:
        nan = nan | (x[2] != x[2])
    return nan


@triton.jit
def bmru_value(x):
    """m sgn(c)."""
    sgn = tl.where(x[0] < 0, -1.0, 1.0).to(x[0].dtype)
    if len(x) == 3:
        sgn = x[2] * sgn
    return sgn


@triton.jit
def bmru_step(x, s, epsilon):
    return write_or_hold(bmru_writes(x), bmru_nan(x), bmru_value(x), s, epsilon)


@triton.jit
def bmru_pull(x, m, epsilon):
    return tl.where(bmru_writes(x), scaled(m, epsilon), m)


@triton.jit
def bmru_vjp(x, s, lam, epsilon, scale):
    dz = lam * (bmru_value(x) + (epsilon - 1.0) * s)
    dgate = dz * step_slope(tl.abs(x[0]) - tl.abs(x[1]), scale)
    dvalue = tl.where(bmru_writes(x), lam, 0.0)
    dc = 2.0 * step_slope(x[0], scale) * dvalue
    if len(x) == 3:
        dc = dc * x[2]
    dc += dgate * sign0(x[0])
    db = -dgate * sign0(x[1])
    if len(x) == 3:
        grads = (dc, db, tl.where(x[0] < 0, -dvalue, dvalue))
    else:
        grads = (dc, db)
    return grads


@triton.jit
def bmru_encode(x):
    code = tl.where(bmru_writes(x), tl.where(x[0] < 0, SECOND, FIRST), HOLD)
    return tl.where(bmru_nan(x), NAN, code)


@triton.jit
def bmru_step_event(code, s, epsilon):
    value = tl.where(code == SECOND, -1.0, 1.0).to(s.dtype)
    return write_or_hold(code != HOLD, code == NAN, value, s, epsilon)


# ------------------------------------------------------------------------- Schmitt trigger (csrc/cells/schmitt.h)


@triton.jit
def schmitt_writes(x):
    return (x[0] < x[1]) | (x[0] >= x[2])


@triton.jit
def schmitt_nan(x):
    return (x[0] != x[0]) | (x[1] != x[1]) | (x[2] != x[2])


@triton.jit
def schmitt_upper(x):
    return tl.where(x[0] >= x[2], 1.0, 0.0).to(x[0].dtype)


@triton.jit
def schmitt_step(x, s, epsilon):
    return write_or_hold(schmitt_writes(x), schmitt_nan(x), schmitt_upper(x), s, epsilon)


@triton.jit
def schmitt_pull(x, m, epsilon):
    return tl.where(schmitt_writes(x), scaled(m, epsilon), m)


@triton.jit
def schmitt_vjp(x, s, lam, epsilon, scale):
    dhold = lam * ((1.0 - epsilon) * s - schmitt_upper(x))
    written = tl.where(schmitt_writes(x), lam, 0.0)
    dupper = tl.where(x[0] >= x[1], written - dhold, written) * step_slope(x[0] - x[2], scale)
    dlower = tl.where(x[0] >= x[2], 0.0, dhold) * step_slope(x[0] - x[1], scale)
    return (dupper + dlower, -dlower, -dupper)


@triton.jit
def schmitt_encode(x):
    code = tl.where(schmitt_writes(x), tl.where(x[0] >= x[2], FIRST, SECOND), HOLD)
    return tl.where(schmitt_nan(x), NAN, code)


@triton.jit
def schmitt_step_event(code, s, epsilon):
    value = tl.where(code == FIRST, 1.0, 0.0).to(s.dtype)
    return write_or_hold(code != HOLD, code == NAN, value, s, epsilon)


# ------------------------------------------------------------------------- linear recurrence (csrc/cells/linear.h)


@triton.jit
def times(a, b):
    return a * b


@triton.jit
def linear_step(x, s, epsilon):
    return x[1] * s + x[0]


@triton.jit
def linear_push(x, m, epsilon):
    return x[1] * m


@triton.jit
def linear_vjp(x, s, lam, epsilon, scale):
    return (lam, lam * s)


# ------------------------------------------------------------------------- the same, complex


@triton.jit
def parts(z):
    return tl.split(tl.reshape(z, (z.shape[0] // 2, 2)))


@triton.jit
def pairs(re, im):
    return tl.reshape(tl.join(re, im), (2 * re.shape[0],))


@triton.jit
def complex_one(d):
    return tl.where(d % 2 == 0, 1.0, 0.0)


@triton.jit
def complex_times(a, b):
    a_re, a_im = parts(a)
    b_re, b_im = parts(b)
    return pairs(a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re)


@triton.jit
def complex_times_conj(a, b):
    """a conj(b). With conj(b) as a block of its own, Triton 3.6's ptxas spills in summarize_adjoint."""
    a_re, a_im = parts(a)
    b_re, b_im = parts(b)
    return pairs(a_re * b_re + a_im * b_im, a_im * b_re - a_re * b_im)


@triton.jit
def complex_step(x, s, epsilon):
    return complex_times(x[1], s) + x[0]


@triton.jit
def complex_push(x, m, epsilon):
    return complex_times(x[1], m)


@triton.jit
def complex_pull(x, m, epsilon):
    return complex_times_conj(m, x[1])


@triton.jit
def complex_vjp(x, s, lam, epsilon, scale):
    return (lam, complex_times_conj(lam, s))


#: For real streams.
CELLS = {
    "bmru": Cell(
        bmru_step, bmru_pull, bmru_pull, bmru_vjp, one, times_or_zero, bmru_encode, bmru_step_event, pull_event
    ),
    "schmitt": Cell(
        schmitt_step, schmitt_pull, schmitt_pull, schmitt_vjp, one, times_or_zero, schmitt_encode, schmitt_step_event,
        pull_event,
    ),
    "linear_recurrence": Cell(linear_step, linear_push, linear_push, linear_vjp, one, times),
}  # fmt: skip
#: For complex streams.
COMPLEX_CELLS = {
    "linear_recurrence": Cell(complex_step, complex_push, complex_pull, complex_vjp, complex_one, complex_times),
}
