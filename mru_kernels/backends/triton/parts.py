"""Blocks whose neighbours belong together: the two parts of a complex channel, or two values of 16 bits."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def parts(z):
    """The even and the odd entries."""
    return tl.split(tl.reshape(z, (z.shape[0] // 2, 2)))


@triton.jit
def pairs(even, odd):
    """The block with these even and odd entries."""
    return tl.reshape(tl.join(even, odd), (2 * even.shape[0],))


@triton.jit
def complex_times(a, b):
    a_re, a_im = parts(a)
    b_re, b_im = parts(b)
    return pairs(a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re)


@triton.jit
def complex_times_conj(a, b):
    """a conj(b), rounded alike in every kernel. With conj(b) as a block of its own, Triton 3.6's ptxas spills in
    summarize_adjoint.
    """
    a_re, a_im = parts(a)
    b_re, b_im = parts(b)
    return pairs(tl.fma(a_re, b_re, a_im * b_im), tl.fma(a_im, b_re, -(a_re * b_im)))
