"""The same job by other means: gates, scan and gradients. Each is checked before it is timed.

A peer takes candidate and threshold `[B, T, D]`, epsilon, and gives h `[B, T, D]`; autograd gives its gradients, with
the surrogate derivatives of `gates`. Packages that scan a given (a, w) are given the same gates in plain torch, and
the layout that they ask for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from python_ref.surrogate import sgn, unit_step


@dataclass(frozen=True)
class Peer:
    """One way to do it, and what limits it.

    Attributes:
        run: candidate, threshold `[B, T, D]`, epsilon -> h `[B, T, D]`.
        epsilon: the only one that it computes; None: any.
        whole: whether its gradient is the whole one.
        needs: packages to import, as far as they are not this one's.
        on_gpu_only: whether its kernels are for GPUs.
        most_steps: a longer T takes too long to time.
    """

    run: Callable[[Tensor, Tensor, float], Tensor]
    epsilon: float | None = None
    whole: bool = True
    needs: tuple[str, ...] = ()
    on_gpu_only: bool = False
    most_steps: int | None = None

    def why_not(self, shape: tuple[int, int, int], epsilon: float, device: torch.device) -> str | None:
        """Why it is left out; None where it can run."""
        missing = [name for name in self.needs if find_spec(name) is None]
        if missing:
            return f"{', '.join(missing)} not installed"
        if self.epsilon not in (None, epsilon):
            return f"epsilon {self.epsilon:g} only"
        if self.on_gpu_only and device.type == "cpu":
            return "runs on GPUs only"
        if self.most_steps is not None and shape[1] > self.most_steps:
            return f"too slow beyond {self.most_steps} steps"
        return None


def gates(candidate: Tensor, threshold: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(a, w) of the affine form s_t = a_t s_{t-1} + w_t, both `[B, T, D]`."""
    z = unit_step(candidate.abs(), threshold.abs(), 1.0)
    return 1 - (1 - epsilon) * z, z * sgn(candidate, 1.0)


def python_loop(candidate: Tensor, threshold: Tensor, epsilon: float) -> Tensor:
    """One step after the other."""
    a, w = gates(candidate, threshold, epsilon)
    s = torch.zeros_like(w[:, 0])
    states = []
    for a_t, w_t in zip(a.unbind(1), w.unbind(1), strict=True):
        s = a_t * s + w_t
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


@cache
def _compiled(f: Callable) -> Callable:
    return torch.compile(f, dynamic=False)


def compiled_log_step(candidate: Tensor, threshold: Tensor, epsilon: float) -> Tensor:
    """`log_step` through torch.compile."""
    return _compiled(log_step)(candidate, threshold, epsilon)


def _compose(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    (a, w), (a_next, w_next) = left, right
    return a * a_next, a_next * w + w_next


def associative_scan(candidate: Tensor, threshold: Tensor, epsilon: float) -> Tensor:
    """The operator of torch, eager: in plain torch operations."""
    from torch._higher_order_ops.associative_scan import associative_scan as scan

    return scan(_compose, gates(candidate, threshold, epsilon), dim=1, combine_mode="generic")[1]


def _pointwise_scan(candidate: Tensor, threshold: Tensor, epsilon: float) -> Tensor:
    from torch._higher_order_ops.associative_scan import associative_scan as scan

    return scan(_compose, gates(candidate, threshold, epsilon), dim=1, combine_mode="pointwise")[1]


def compiled_associative_scan(candidate: Tensor, threshold: Tensor, epsilon: float) -> Tensor:
    """The operator of torch, compiled to one kernel."""
    return _compiled(_pointwise_scan)(candidate, threshold, epsilon)


def _channels_first(scan: Callable, candidate: Tensor, threshold: Tensor, epsilon: float) -> Tensor:
    """By a scan that takes a and w as contiguous `[B, D, T]`; the transpositions belong to the job."""
    a, w = (x.transpose(1, 2).contiguous() for x in gates(candidate, threshold, epsilon))
    return scan(a, w).transpose(1, 2)


def accelerated_scan_triton(candidate: Tensor, threshold: Tensor, epsilon: float) -> Tensor:
    """accelerated_scan's Triton kernels."""
    from accelerated_scan.scalar import scan

    return _channels_first(scan, candidate, threshold, epsilon)


def accelerated_scan_warp(candidate: Tensor, threshold: Tensor, epsilon: float) -> Tensor:
    """accelerated_scan's CUDA kernels, compiled when first imported; T is to be a power of 2."""
    from accelerated_scan.warp import scan

    return _channels_first(scan, candidate, threshold, epsilon)


def fla_hgrn(candidate: Tensor, threshold: Tensor, epsilon: float) -> Tensor:
    """The recurrence of HGRN in fla, which takes log a. With epsilon 0 the logarithm keeps no gradient of the gate."""
    from fla.ops.hgrn import fused_recurrent_hgrn

    a, w = gates(candidate, threshold, epsilon)
    return fused_recurrent_hgrn(w.contiguous(), a.log().contiguous())[0]


#: The quick first: where time is short the last are left out.
PEERS: dict[str, Peer] = {
    "accelerated_scan, Triton": Peer(accelerated_scan_triton, needs=("accelerated_scan", "triton"), on_gpu_only=True),
    "fla HGRN": Peer(fla_hgrn, whole=False, needs=("fla", "triton"), on_gpu_only=True),
    "cumsum": Peer(cumsum, epsilon=1.0),
    "cummax + gather": Peer(cummax, epsilon=0.0, whole=False),
    "associative_scan": Peer(associative_scan),
    "log-step scan": Peer(log_step),
    "python loop": Peer(python_loop, most_steps=4096),
    "accelerated_scan, CUDA": Peer(accelerated_scan_warp, needs=("accelerated_scan", "ninja"), on_gpu_only=True),
    "associative_scan, compiled": Peer(compiled_associative_scan, needs=("triton",), on_gpu_only=True),
    "log-step scan, compiled": Peer(compiled_log_step, needs=("triton",), on_gpu_only=True),
}
