"""Gradients as derived by hand, without autograd, and the sums of absolute terms that measure errors.

Both come from one function per cell. Each addend of a sum passes through `term`: left as it is, the results
are the cell's values and gradients; with `abs`, each is the sum of the absolute values of the terms that it
adds up, the terms of its terms included.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .surrogate import slope

Tensors = list[Tensor]


def itself(x: Any) -> Any:
    """The addend as it is."""
    return x


@torch.no_grad()
def bmru(
    candidate: Tensor,
    threshold: Tensor,
    initial_state: Tensor | None = None,
    *,
    grad_h: Tensor,
    grad_final: Tensor,
    epsilon: float | Tensor = 0.0,
    alpha: Tensor | None = None,
    amplitude: Tensor | None = None,
    surrogate_scale: float = 1.0,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    term: Callable[[Any], Any] = itself,
) -> dict[str, Tensor]:
    """Values and gradients of `python_ref.bmru`, in float64, from its arguments and its results' gradients.

    These are `grad_h`, G = dL/dh `[B, T, D]`, and `grad_final`, F = dL/ds_T `[B, D]` (`[N, D]` with
    `cu_seqlens`). `term` is `itself` or `abs`.

    Returns:
        "h", "final_state", and under the name of each tensor argument given its gradient. Those of a channel
        with a NaN mean nothing.
    """
    epsilon, k = float(epsilon), surrogate_scale
    c, G, F = candidate.double(), grad_h.double(), grad_final.double()  # noqa: N806 as in the equations
    b = threshold.double().expand_as(c)
    m = torch.ones_like(c) if amplitude is None else amplitude.double()
    scale = c.new_ones(c.shape[2]) if alpha is None else alpha.double()
    s_0 = torch.zeros_like(F) if initial_state is None else initial_state.double()

    def one(streams: Tensors, states: Tensors) -> tuple[Tensors, Tensors]:
        c, b, m, G = streams  # noqa: N806
        s_0, F = states  # noqa: N806
        sgn_c = torch.where(c >= 0, c.new_ones(()), -c.new_ones(()))
        z = c.abs() >= b.abs()
        v = term(m * sgn_c)
        s_before, s, state = _states(z, v, term(s_0), epsilon)
        lambda_, pulled = _adjoint_states(z, term(scale * G), term(F), epsilon)

        x = c.abs() - b.abs()
        dz = lambda_ * (v + term(epsilon - 1) * s_before)
        dc = term(dz * slope(x, k) * c.sign()) + term(lambda_ * z * m * 2 * slope(c, k))
        db = term(-dz * slope(x, k) * b.sign())
        dm = term(lambda_ * z * sgn_c)
        return [term(scale * s), dc, db, dm, term(G) * s], [state, pulled]

    streams, states = _over_sequences(one, [c, b, m, G], [s_0, F], reverse, cu_seqlens)
    (h, dc, db, dm, dalpha), (final_state, ds_0) = streams, states
    results = {"h": h, "final_state": final_state, "candidate": dc}
    results["threshold"] = db.sum((0, 1)) if threshold.dim() == 1 else db
    if initial_state is not None:
        results["initial_state"] = ds_0
    if alpha is not None:
        results["alpha"] = dalpha.sum((0, 1))
    if amplitude is not None:
        results["amplitude"] = dm
    return results


@torch.no_grad()
def schmitt(
    candidate: Tensor,
    low: Tensor,
    high: Tensor,
    initial_state: Tensor | None = None,
    *,
    grad_h: Tensor,
    grad_final: Tensor,
    epsilon: float | Tensor = 0.0,
    alpha: Tensor | None = None,
    surrogate_scale: float = 1.0,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    term: Callable[[Any], Any] = itself,
) -> dict[str, Tensor]:
    """Values and gradients of `python_ref.schmitt`; arguments and results as those of `bmru` above."""
    epsilon, k = float(epsilon), surrogate_scale
    c, G, F = candidate.double(), grad_h.double(), grad_final.double()  # noqa: N806 as in the equations
    low, high = low.double(), high.double()
    scale = c.new_ones(c.shape[2]) if alpha is None else alpha.double()
    s_0 = torch.zeros_like(F) if initial_state is None else initial_state.double()

    def one(streams: Tensors, states: Tensors) -> tuple[Tensors, Tensors]:
        c, G = streams  # noqa: N806
        s_0, F = states  # noqa: N806
        L, U = (c >= low).double(), (c >= high).double()  # noqa: N806
        z = L * (1 - U) == 0
        s_before, s, state = _states(z, U, term(s_0), epsilon)
        lambda_, pulled = _adjoint_states(z, term(scale * G), term(F), epsilon)

        dz = lambda_ * (U + term(epsilon - 1) * s_before)  # -dhold
        dU = (lambda_ * z + L * dz) * slope(c - high, k)  # noqa: N806
        dL = term(-(1 - U) * dz) * slope(c - low, k)  # noqa: N806
        return [term(scale * s), dU + dL, term(-dL), term(-dU), term(G) * s], [state, pulled]

    streams, states = _over_sequences(one, [c, G], [s_0, F], reverse, cu_seqlens)
    (h, dc, dlow, dhigh, dalpha), (final_state, ds_0) = streams, states
    results = {"h": h, "final_state": final_state, "candidate": dc}
    results |= {"low": dlow.sum((0, 1)), "high": dhigh.sum((0, 1))}
    if initial_state is not None:
        results["initial_state"] = ds_0
    if alpha is not None:
        results["alpha"] = dalpha.sum((0, 1))
    return results


@torch.no_grad()
def linear_recurrence(
    decay: Tensor,
    update: Tensor,
    initial_state: Tensor | None = None,
    *,
    grad_h: Tensor,
    grad_final: Tensor,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    term: Callable[[Any], Any] = itself,
) -> dict[str, Tensor]:
    """Values and gradients of `python_ref.linear_recurrence`; arguments and results as those of `bmru` above.

    What is complex is so in complex128, with the gradients of torch's convention.
    """
    wide = torch.complex128 if update.is_complex() else torch.float64
    w, G, F = update.to(wide), grad_h.to(wide), grad_final.to(wide)  # noqa: N806 as in the equations
    a = decay.to(wide).expand_as(w)
    s_0 = torch.zeros_like(F) if initial_state is None else initial_state.to(wide)

    def one(streams: Tensors, states: Tensors) -> tuple[Tensors, Tensors]:
        a, w, G = (term(x) for x in streams)  # noqa: N806
        state, pulled = (term(x) for x in states)
        before, after, lambdas = [], [], []
        for a_t, w_t in zip(a.unbind(1), w.unbind(1), strict=True):
            before.append(state)
            state = a_t * state + w_t
            after.append(state)
        for a_t, g_t in zip(reversed(a.unbind(1)), reversed(G.unbind(1)), strict=True):
            lambdas.append(g_t + pulled)
            pulled = a_t.conj() * lambdas[-1]
        lambda_ = _stack(lambdas[::-1], G)
        return [_stack(after, w), lambda_ * _stack(before, w).conj(), lambda_], [state, pulled]

    (s, da, dw), (final_state, ds_0) = _over_sequences(one, [a, w, G], [s_0, F], reverse, cu_seqlens)
    results = {"h": s, "final_state": final_state, "update": dw}
    results["decay"] = da.sum((0, 1)) if decay.dim() == 1 else da
    if initial_state is not None:
        results["initial_state"] = ds_0
    return results


def _states(z: Tensor, v: Tensor, state: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """The states before and after each step of `write_or_hold`, `[B, T, D]`, and the final one."""
    states = []
    for z_t, v_t in zip(z.unbind(1), v.unbind(1), strict=True):
        states.append(state)
        state = torch.where(z_t, v_t if epsilon == 0 else v_t.add(state, alpha=epsilon), state)
    return _stack(states, v), _stack([*states[1:], state][: len(states)], v), state


def _adjoint_states(z: Tensor, g: Tensor, pulled: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Each step's lambda `[B, T, D]`, and what it passes on to the initial state; `pulled` is a_{t+1} lambda_{t+1}."""
    a = torch.where(z, g.new_tensor(epsilon), g.new_ones(()))
    lambdas = []
    for a_t, g_t in zip(reversed(a.unbind(1)), reversed(g.unbind(1)), strict=True):
        lambdas.append(g_t + pulled)
        pulled = a_t * lambdas[-1]
    return _stack(lambdas[::-1], g), pulled


def _stack(rows: Tensors, like: Tensor) -> Tensor:
    return torch.stack(rows, 1) if rows else torch.empty_like(like)


def _over_sequences(
    one: Callable[[Tensors, Tensors], tuple[Tensors, Tensors]],
    streams: Tensors,
    states: Tensors,
    reverse: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensors, Tensors]:
    """`one` takes streams `[B, T, D]` and states `[B, D]` in scan order; this brings any call to that."""
    if cu_seqlens is not None:
        empty = [x[:, :0] for x in streams], [x.new_zeros(1, x.shape[1]) for x in states]
        parts = [one(*empty)]  # so that there is something to join where there is no sequence
        for n, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
            sequence = [x[:, start:stop] for x in streams], [x[n : n + 1] for x in states]
            parts.append(_over_sequences(one, *sequence, reverse, None))
        stream_parts, state_parts = zip(*parts, strict=True)
        return (
            [torch.cat(x, 1) for x in zip(*stream_parts, strict=True)],
            [torch.cat(x, 0)[1:] for x in zip(*state_parts, strict=True)],
        )
    if reverse:
        stream_results, state_results = one([x.flip(1) for x in streams], states)
        return [x.flip(1) for x in stream_results], state_results
    return one(streams, states)
