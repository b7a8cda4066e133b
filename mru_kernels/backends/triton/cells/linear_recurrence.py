"""Linear recurrence, real or complex (csrc/cells/linear_recurrence.h): s' = a s + w, h = s'."""

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401  (Triton's interpreter looks for it)

from ..cell import Implementation, cell
from ..kernels.affine import COMPLEX
from ..parts import complex_times, complex_times_conj


@triton.jit
def step(x, s, p):
    update, decay = x
    return decay * s + update


@triton.jit
def pull(x, m, p):
    _, decay = x
    return decay * m


@triton.jit
def vjp(x, s, after, g, m, p):
    lam = g + m
    return pull(x, lam, p), (lam, lam * s)


@triton.jit
def complex_step(x, s, p):
    update, decay = x
    return complex_times(decay, s) + update


@triton.jit
def complex_push(x, m, p):
    _, decay = x
    return complex_times(decay, m)


@triton.jit
def complex_pull(x, m, p):
    _, decay = x
    return complex_times_conj(m, decay)


@triton.jit
def complex_vjp(x, s, after, g, m, p):
    lam = g + m
    return complex_pull(x, lam, p), (lam, complex_times_conj(lam, s))


CELL = Implementation(
    cell(step, pull, vjp),
    complex=cell(complex_step, complex_pull, complex_vjp, push=complex_push, rules=COMPLEX),
)
