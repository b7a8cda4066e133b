"""Other implementations of the scan s_t = a_t s_{t-1} + w_t.

They take and return `[B, T, D]`, unless their docstring has another layout.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .work import BOTH, FORWARD, Passes

Scan = Callable[[Tensor, Tensor], Tensor]


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


def mingru_linear_scan(a: Tensor, w: Tensor) -> Tensor:
    """linear_scan of mingru-scans: Hillis and Steele's scan, on a GPU as Triton kernels."""
    from mingru import linear_scan

    return linear_scan(a, w)[1]


def accelerated_scan_triton(a: Tensor, w: Tensor) -> Tensor:
    """accelerated_scan's Triton kernels, on contiguous `[B, D, T]`."""
    from accelerated_scan.scalar import scan

    return scan(a, w)


def accelerated_scan_warp(a: Tensor, w: Tensor) -> Tensor:
    """accelerated_scan's CUDA kernels, on contiguous `[B, D, T]`, compiled at the first import."""
    from accelerated_scan.warp import scan

    return scan(a, w)


def fpscan(a: Tensor, w: Tensor) -> Tensor:
    """The CUDA kernels of fpscan, on contiguous `[B, D, T]`."""
    from fpscan import pscan

    return pscan(a, w)


def philtorch(a: Tensor, w: Tensor) -> Tensor:
    """The time-varying filter of first order of PhilTorch, on `[B D, T]`."""
    from philtorch.lpv import linear_recurrence

    return linear_recurrence(a, w.new_zeros(w.shape[0]), w)


def fla_hgrn(log_a: Tensor, w: Tensor) -> Tensor:
    """The recurrence of HGRN in fla, on contiguous `[B, T, D]`. It takes log a: no gradient where a is 0."""
    from fla.ops.hgrn import fused_recurrent_hgrn

    return fused_recurrent_hgrn(w, log_a)[0]


def in_jax_associative_scan(a: Any, w: Any) -> Any:
    import jax

    return jax.lax.associative_scan(_compose, (a, w), axis=1)[1]


def in_jax_scan(a: Any, w: Any) -> Any:
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
    """A jitted scan in JAX and its gradient by `jax.vjp`. Tensors and arrays share their memory."""

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
    return _Jax.apply(in_jax_associative_scan, a, w)


def jax_scan(a: Tensor, w: Tensor) -> Tensor:
    """`jax.lax.scan` under jit. torch computes the gates."""
    return _Jax.apply(in_jax_scan, a, w)


def jax_passes(scan: Callable, a: Tensor, w: Tensor, grad: Tensor) -> Passes:
    """The passes of a scan in JAX. The arrays are converted once, before the passes."""
    plain, keeping, gradient = _jitted(scan)
    given, (grad_array,) = _to_jax(a, w), _to_jax(grad.conj())

    def both() -> object:
        _, pull = keeping(*given)
        return [x.block_until_ready() for x in gradient(pull, grad_array)]

    return {FORWARD: lambda: plain(*given).block_until_ready(), BOTH: both}
