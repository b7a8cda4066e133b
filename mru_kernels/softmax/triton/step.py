"""One step of the softmax recurrence, maps of segments, and the adjoint: csrc/softmax/step.h on blocks of Triton.

    mean [channels]            weighted mean of the values so far
    q, m, c [heads]            their total weight is exp(m + c) q
    Z, z [heads]               log of the total weight in two floats, at borders

Blocks are in the state dtype. If a head has several channels, `channels` is [heads, group], and a block of a head's
numbers is spread over its channels. The order of operations is part of the definition: no sum of two large numbers is
rounded before their difference is taken. Devices compute exp(x) as 2^(x log2 e); no argument is positive. The forward
pass is compiled without fused multiply-adds but for the one that is written.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...backends.triton.functions import logarithm_of_1_plus

#: How the decay comes.
NONE, PER_HEAD, STREAM = (tl.constexpr(i) for i in range(3))
INFINITY = tl.constexpr(float("inf"))


class Form(NamedTuple):
    """What a call gives. A kernel is compiled for each form."""

    decay: Any  # NONE, PER_HEAD or STREAM
    bonus: Any  # whether there is one
    grouped: Any  # whether a head has several channels
    gradients: Any  # whether `backward` writes gradients, or else the map of a segment
    nvidia: Any  # whether its approximations may be used


class State(NamedTuple):
    """The state inside a chunk."""

    mean: Any
    q: Any
    m: Any
    c: Any


class Border(NamedTuple):
    """The state at a border between chunks, as it lies in memory."""

    mean: Any
    Z: Any
    z: Any


class Share(NamedTuple):
    """How a value joins the past, a number of each head. The larger of both weights is exactly 1."""

    newer: Any  # whether the value's weight is the larger one
    e: Any  # the smaller weight
    total: Any  # the weight of both
    r: Any  # 1 / total; 0 if there is no weight
    part: Any  # what the smaller one is of the whole; negative if that is the past


@triton.jit
def spread(x, form):
    """Numbers of heads as numbers of their channels."""
    return x[:, None] if form.grouped else x


@triton.jit
def total(x, form):
    """The sum over the channels of each head."""
    return tl.sum(x, 1) if form.grouped else x


@triton.jit
def exponential(x, NVIDIA: tl.constexpr):
    """e^x for x <= 0. A result below the least normal number may be 0."""
    if NVIDIA and x.dtype == tl.float32:
        x = x * 1.4426950408889634
        result = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        result = tl.exp(x)
    return result


@triton.jit
def reciprocal(x, NVIDIA: tl.constexpr):
    """1 / x, but 0 of 0. A NaN stays one."""
    if NVIDIA and x.dtype == tl.float32:
        result = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        result = 1 / x
    return tl.where(x == 0, 0.0, result)


@triton.jit
def add(high, low, x):
    """The number high + low, plus x, as two floats."""
    t = x + low
    total = high + t
    return total, tl.where(tl.abs(total) == INFINITY, 0.0, t - (total - high))


@triton.jit
def share_of(gap, q, form):
    """How a value joins a past of the weight q, if the log of its weight is larger by `gap`."""
    newer = gap > 0
    e = exponential(-tl.abs(gap), form.nvidia)
    smaller = e * tl.where(newer, -q, 1.0)
    total = tl.abs(smaller) + tl.where(newer, 1.0, q)
    r = reciprocal(total, form.nvidia)
    return Share(newer, e, total, r, smaller * r)


@triton.jit
def mix(newer, part, past, value, form):
    """The mean of both, from the one with the larger weight: a part of 0 copies it."""
    return tl.fma(spread(part, form), value - past, tl.where(spread(newer, form), value, past))


@triton.jit
def open_border(border):
    return State(border.mean, tl.where(border.Z == -INFINITY, 0.0, 1.0).to(border.Z.dtype), border.Z, border.z)


@triton.jit
def close(state):
    w = state.c + tl.log(state.q)
    Z = state.m + w
    z = w - (Z - state.m)
    return Border(state.mean, Z, tl.where(tl.abs(z) < INFINITY, z, 0.0))


@triton.jit
def distance(s, m, c):
    """s - m - c for a score s; one of -inf is that far from anything, from -inf too."""
    least: tl.constexpr = -1.7976931348623157e308 if m.dtype == tl.float64 else -3.4028234663852886e38
    return (s - tl.maximum(m, least, propagate_nan=tl.PropagateNan.ALL)) - c


@triton.jit
def update(s, v, decay, state, form):
    """The state after a step, and the share of its value in it."""
    d = state.m
    low = state.c
    if form.decay != NONE:
        d, low = add(state.m, state.c, decay)
    share = share_of(distance(s, d, low), state.q, form)
    mean = mix(share.newer, share.part, state.mean, v, form)
    m = tl.where(share.newer, s, d)
    return State(mean, share.total, m, tl.where(share.newer, 0.0, low)), share


@triton.jit
def step(s, v, decay, bonus, state, form):
    """The state after a step, the share of its value in it and that in y, and y.

    With a bonus y reads the state before, else the state after.
    """
    after, share = update(s, v, decay, state, form)
    read = share
    y = after.mean
    if form.bonus:
        read = share_of(distance(s, state.m, state.c) + bonus, state.q, form)
        y = mix(read.newer, read.part, state.mean, v, form)
    return after, share, read, y


@triton.jit
def then(first, decay, second, form):
    """The state after a segment that makes `second` from an empty state, and whose decays sum to `decay`."""
    d, low = add(first.Z, first.z, decay)
    gap = distance(second.Z, d, low) + second.z
    newer = gap > 0
    e = exponential(-tl.abs(gap), form.nvidia)
    part = e / (1 + e)
    mean = mix(newer, tl.where(newer, -part, part), first.mean, second.mean, form)
    Z, z = add(tl.where(newer, second.Z, d), tl.where(newer, second.z, low), logarithm_of_1_plus(e))
    return Border(mean, Z, z)


# ------------------------------------------------------------------------- the adjoint


class Adjoint(NamedTuple):
    """In a chunk's scale, dL/d(numerator) and dL/d(denominator): both [channels], as `mu` sums over a head's."""

    lam: Any
    mu: Any


class Gradients(NamedTuple):
    """Of a step's inputs. Those of `score`, `decay` and `bonus` [channels] sum over a head's channels."""

    score: Any
    value: Any
    decay: Any
    bonus: Any


@triton.jit
def enter_adjoint(grad_mean, grad_Z, state, form):
    """The adjoint at a chunk's end from the gradients of the state there. `grad_Z` [channels] sums over a head's."""
    r = spread(reciprocal(state.q, form.nvidia), form)
    return Adjoint(grad_mean * r, (grad_Z - grad_mean * state.mean) * r)


@triton.jit
def leave_adjoint(adjoint, state, form):
    """The gradients of the state at a chunk's start."""
    q = spread(state.q, form)
    return adjoint.lam * q, (adjoint.lam * state.mean + adjoint.mu) * q


@triton.jit
def past_factor(share):
    """What the update multiplies the weight of the past with."""
    return tl.where(share.newer, share.e, 1.0)


@triton.jit
def step_adjoint(g, v, before, share, read, y, adjoint, form):
    """The adjoint before a step, and the gradients of its inputs. `before` is the state before the step."""
    A = spread(past_factor(share), form)
    B = spread(tl.where(share.newer, 1.0, share.e), form)
    gr = g * spread(read.r, form)
    gy = gr * y
    lam = adjoint.lam
    mu = adjoint.mu
    if not form.bonus:
        lam = lam + gr
        mu = mu - gy
    score = B * (lam * v + mu)
    value = B * lam
    decay = A * spread(before.q, form) * (lam * before.mean + mu)
    own = score
    lam = lam * A
    mu = mu * A
    if form.bonus:
        a = spread(past_factor(read), form)
        b = spread(tl.where(read.newer, 1.0, read.e), form)
        own = b * (gr * v - gy)
        score = score + own
        value = value + b * gr
        lam = lam + a * gr
        mu = mu - a * gy
    return Adjoint(lam, mu), Gradients(score, value, decay, own)
