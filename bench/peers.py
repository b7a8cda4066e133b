"""Other implementations of the same job: gates, scan and gradients. Each is checked before it is timed.

A peer scans a and w, each `[B, T, D]`: s_t = a_t s_{t-1} + w_t. The cell's affine form (`python_ref.Cell.affine`)
computes both in plain torch, with surrogate derivatives. Autograd computes the gradients. Each package gets the layout
that it needs, and the conversion is timed too. mlstm_kernels is not a peer: the mLSTM divides its output by a
normaliser, so it cannot give these results.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .inputs import Call, Case
from .reference import CELLS

Scan = Callable[[Tensor, Tensor], Tensor]

# ---------------------------------------------------------------------------------------------- scans


def python_loop(a: Tensor, w: Tensor) -> Tensor:
    """A loop over the steps."""
    s = torch.zeros_like(w[:, 0])
    states = []
    for a_t, w_t in zip(a.unbind(1), w.unbind(1), strict=True):
        s = a_t * s + w_t
        states.append(s)
    return torch.stack(states, 1)


def log_step(a: Tensor, w: Tensor) -> Tensor:
    """Hillis and Steele's scan in log2(T) passes. Pass k composes each element with the one 2^k steps earlier."""
    s, shift = w, 1
    while shift < s.shape[1]:
        s = torch.cat([s[:, :shift], s[:, shift:] + a[:, shift:] * s[:, :-shift]], 1)
        a = torch.cat([a[:, :shift], a[:, shift:] * a[:, :-shift]], 1)
        shift *= 2
    return s


def cumsum(a: Tensor, w: Tensor) -> Tensor:
    """The sum of w over time. It is the scan if every a is 1."""
    return w.cumsum(1)


def cummax(a: Tensor, w: Tensor) -> Tensor:
    """The value of the latest write. It is the scan if every a is 0 or 1. It has a gradient for w, but not for a."""
    steps = torch.arange(1, w.shape[1] + 1, device=w.device).view(1, -1, 1)
    latest = torch.where(a == 0, steps, 0).cummax(1).values
    return torch.where(latest > 0, w.gather(1, (latest - 1).clamp_min(0)), 0)


def _compose(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    (a, w), (a_next, w_next) = left, right
    return a * a_next, a_next * w + w_next


def associative_scan(a: Tensor, w: Tensor) -> Tensor:
    """The associative_scan of torch, in plain torch operations."""
    from torch._higher_order_ops.associative_scan import associative_scan as scan

    return scan(_compose, (a, w), dim=1, combine_mode="generic")[1]


def pointwise_scan(a: Tensor, w: Tensor) -> Tensor:
    """The associative_scan of torch as one kernel, which needs torch.compile and a GPU."""
    from torch._higher_order_ops.associative_scan import associative_scan as scan

    return scan(_compose, (a, w), dim=1, combine_mode="pointwise")[1]


def _channels_first(scan: Scan, a: Tensor, w: Tensor) -> Tensor:
    """Call a scan that takes contiguous `[B, D, T]`. The transpositions are part of the job."""
    return scan(*(x.transpose(1, 2).contiguous() for x in (a, w))).transpose(1, 2)


def accelerated_scan_triton(a: Tensor, w: Tensor) -> Tensor:
    """accelerated_scan's Triton kernels."""
    from accelerated_scan.scalar import scan

    return _channels_first(scan, a, w)


def accelerated_scan_warp(a: Tensor, w: Tensor) -> Tensor:
    """accelerated_scan's CUDA kernels, compiled at the first import. T must be a power of 2."""
    from accelerated_scan.warp import scan

    return _channels_first(scan, a, w)


def fla_hgrn(a: Tensor, w: Tensor) -> Tensor:
    """The recurrence of HGRN in fla. It takes log a, so there is no gradient where a is 0."""
    from fla.ops.hgrn import fused_recurrent_hgrn

    return fused_recurrent_hgrn(w.contiguous(), a.log().contiguous())[0]


def _jax_associative_scan(a: Any, w: Any) -> Any:
    import jax

    return jax.lax.associative_scan(_compose, (a, w), axis=1)[1]


def _jax_scan(a: Any, w: Any) -> Any:
    import jax

    def step(s: Any, aw: Any) -> tuple[Any, Any]:
        s = aw[0] * s + aw[1]
        return s, s

    time_major = (a.swapaxes(0, 1), w.swapaxes(0, 1))
    return jax.lax.scan(step, jax.numpy.zeros_like(w[:, 0]), time_major)[1].swapaxes(0, 1)


@cache
def _jitted(scan: Callable) -> tuple[Callable, Callable, Callable]:
    """Three jitted functions: the scan, the scan with its pullback from `jax.vjp`, and the call of a pullback."""
    import jax

    jax.config.update("jax_enable_x64", True)  # without it JAX turns float64 into float32
    return jax.jit(scan), jax.jit(lambda a, w: jax.vjp(scan, a, w)), jax.jit(lambda pull, grad: pull(grad))


class _Jax(torch.autograd.Function):
    """A jitted scan in JAX and its gradient by `jax.vjp`. It uses the memory of torch's tensors."""

    @staticmethod
    def forward(ctx, scan: Callable, a: Tensor, w: Tensor) -> Tensor:
        plain, keeping, ctx.gradient = _jitted(scan)
        arrays = _to_jax(a, w)
        if not any(ctx.needs_input_grad):
            return _from_jax(plain(*arrays))
        s, ctx.pull = keeping(*arrays)
        return _from_jax(s)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (array,) = _to_jax(grad.conj())  # JAX's gradients of complex numbers are the conjugates of torch's
        return None, *(_from_jax(x).conj() for x in ctx.gradient(ctx.pull, array))


def _to_jax(*tensors: Tensor) -> list:
    import jax

    return [jax.dlpack.from_dlpack(t.detach().resolve_conj().contiguous()) for t in tensors]


def _from_jax(array: Any) -> Tensor:
    return torch.from_dlpack(array.block_until_ready())


def jax_associative_scan(a: Tensor, w: Tensor) -> Tensor:
    """`jax.lax.associative_scan` under jit. torch computes the gates."""
    return _Jax.apply(_jax_associative_scan, a, w)


def jax_scan(a: Tensor, w: Tensor) -> Tensor:
    """`jax.lax.scan` under jit. torch computes the gates."""
    return _Jax.apply(_jax_scan, a, w)


# ---------------------------------------------------------------------------------------------- peers


@dataclass(frozen=True)
class Peer:
    """One implementation and its limits.

    Attributes:
        scan: a, w `[B, T, D]` -> s `[B, T, D]`.
        compiled: whether torch.compile compiles it, with the gates.
        epsilon: the only epsilon that it computes; None: any.
        decays: "all", "real" or "positive": the values of a that it takes.
        whole: whether it gives the whole gradient.
        needs: packages that it imports and this package does not.
        only_on: the only type of device that it runs on; None: any.
        most_steps: the longest T that is timed; None: any.
    """

    scan: Scan
    compiled: bool = False
    epsilon: float | None = None
    decays: str = "all"
    whole: bool = True
    needs: tuple[str, ...] = ()
    only_on: str | None = None
    most_steps: int | None = None

    def why_not(self, case: Case, device: torch.device) -> str | None:
        """The reason to leave it out; None if it can run."""
        compilers = ("triton",) if self.compiled and device.type == "cuda" else ()
        missing = [name for name in (*self.needs, *compilers) if find_spec(name) is None]
        if self.compiled and device.type == "cpu" and shutil.which("g++") is None:
            missing.append("g++")
        if missing:
            return f"{', '.join(missing)} not installed"
        if self.epsilon not in (None, case.options.get("epsilon")):
            return f"epsilon {self.epsilon:g} only"
        if CELLS[case.cell].affine is None:
            return "no affine form declared"
        if (self.decays != "all" and case.dtype.is_complex) or (self.decays == "positive" and _has_negative(case)):
            return f"{self.decays} decays only"
        if self.only_on not in (None, device.type):
            return f"runs on {self.only_on} only"
        if self.most_steps is not None and case.shape[1] > self.most_steps:
            return f"too slow beyond {self.most_steps} steps"
        return None

    @property
    def slow_at_first(self) -> bool:
        """Whether the first call on a shape compiles. That call is not timed."""
        return self.compiled or bool({"jax", "ninja"} & set(self.needs))


def _has_negative(case: Case) -> bool:
    """Whether some decays are negative, judged by a small case."""
    few = replace(case, options={**case.options, "batch": 2, "time": 64, "channels": 64}).build()
    reference = CELLS[case.cell]
    decays, _ = reference.affine(**dict.fromkeys(reference.optional), **few.tensors, **few.settings)
    return bool((decays < 0).any())


@cache
def _job(peer: Peer, cell: str, **settings: float) -> Callable[..., Tensor]:
    reference = CELLS[cell]

    def job(**tensors: Tensor) -> Tensor:
        given = {**dict.fromkeys(reference.optional), **tensors, **settings}
        return reference.output(peer.scan(*reference.affine(**given)), **given)

    return torch.compile(job, dynamic=False) if peer.compiled else job


def job(peer: Peer, call: Call) -> Callable[..., Tensor]:
    """A function that computes h by the peer. It takes the call's tensors by name."""
    return _job(peer, call.cell, **{name: x for name, x in call.settings.items() if name != "reverse"})


#: The fast ones first: if time runs out, the last are left out.
PEERS: dict[str, Peer] = {
    "accelerated_scan, Triton": Peer(
        accelerated_scan_triton, decays="real", needs=("accelerated_scan", "triton"), only_on="cuda"
    ),
    "fla HGRN": Peer(fla_hgrn, decays="positive", whole=False, needs=("fla", "triton"), only_on="cuda"),
    "cumsum": Peer(cumsum, epsilon=1.0),
    "cummax + gather": Peer(cummax, epsilon=0.0, whole=False),
    "associative_scan": Peer(associative_scan),
    "log-step scan": Peer(log_step),
    "JAX associative_scan": Peer(jax_associative_scan, needs=("jax",), only_on="cpu"),
    "JAX scan": Peer(jax_scan, needs=("jax",), only_on="cpu"),
    "python loop": Peer(python_loop, most_steps=4096),
    "accelerated_scan, CUDA": Peer(
        accelerated_scan_warp, decays="real", needs=("accelerated_scan", "ninja"), only_on="cuda"
    ),
    "associative_scan, compiled": Peer(pointwise_scan, compiled=True, decays="real", only_on="cuda"),
    "log-step scan, compiled": Peer(log_step, compiled=True, decays="real"),
    "python loop, compiled": Peer(python_loop, compiled=True, decays="real", most_steps=128),
}
