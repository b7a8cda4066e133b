"""The same job by other means: gates, scan, alpha and gradients, in plain torch. Each is checked before it is timed.

A peer takes candidate and threshold `[B, T, D]`, epsilon, and gives h `[B, T, D]`; autograd gives its gradients, with
the surrogate derivatives of `gates`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from python_ref.surrogate import sgn, unit_step

Peer = Callable[[Tensor, Tensor, float], Tensor]


def gates(candidate: Tensor, threshold: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(a, w) of the affine form s_t = a_t s_{t-1} + w_t, both `[B, T, D]`."""
    z = unit_step(candidate.abs(), threshold.abs(), 1.0)
    return 1 - (1 - epsilon) * z, z * sgn(candidate, 1.0)


def python_loop(candidate: Tensor, threshold: Tensor, epsilon: float) -> Tensor:
    """One step after the other."""
    a, w = gates(candidate, threshold, epsilon)
    s = torch.zeros_like(w[:, 0])
    states = []
    for t in range(w.shape[1]):
        s = a[:, t] * s + w[:, t]
        states.append(s)
    return torch.stack(states, 1)


def log_step(candidate: Tensor, threshold: Tensor, epsilon: float) -> Tensor:
    """Hillis and Steele's scan: log2(T) passes, each composes with the element 2^k steps before."""
    a, s = gates(candidate, threshold, epsilon)
    shift = 1
    while shift < s.shape[1]:
        s = torch.cat([s[:, :shift], s[:, shift:] + a[:, shift:] * s[:, :-shift]], 1)
        a = torch.cat([a[:, :shift], a[:, shift:] * a[:, :-shift]], 1)
        shift *= 2
    return s


def cumsum(candidate: Tensor, threshold: Tensor, epsilon: float) -> Tensor:
    """A sum over time of what is written: epsilon 1 only."""
    _, w = gates(candidate, threshold, epsilon)
    return w.cumsum(1)


def cummax(candidate: Tensor, threshold: Tensor, epsilon: float) -> Tensor:
    """The value at the latest write: epsilon 0 only. Its gradient knows the values written, not the gate."""
    z, w = (candidate.abs() >= threshold.abs()), sgn(candidate, 1.0)
    steps = torch.arange(1, w.shape[1] + 1, device=w.device).view(1, -1, 1)
    latest = torch.where(z, steps, 0).cummax(1).values
    return torch.where(latest > 0, w.gather(1, (latest - 1).clamp_min(0)), 0)


#: name: (peer, the epsilon it is limited to, whether its gradient is the whole one)
PEERS: dict[str, tuple[Peer, float | None, bool]] = {
    "python loop": (python_loop, None, True),
    "log-step scan": (log_step, None, True),
    "cumsum": (cumsum, 1.0, True),
    "cummax + gather": (cummax, 0.0, False),
}
