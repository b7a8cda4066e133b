"""`mesa` by the kernels of flash-linear-attention: `fla.ops.mesa_net.chunk_mesa_net` of fla-core.

Its results are compared with those of `mesa` before its first use. It has not yet been run on a GPU.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import checks

DEVICES = ("cuda",)
DTYPES = (torch.bfloat16, torch.float16)
MOST_KEY = 128
ONLY = {"solver": "cg", "tolerance": 0, "chunk_size": 64}
LIMIT = 0.03  # of the relative errors in `compare`; fla's own tests allow up to 1.5 % in float16

RESULTS = ("output", "kk", "kv")
INPUTS = ("q", "k", "v", "decay", "beta", "regularizer", "kk", "kv")


def cannot(reason: str) -> RuntimeError:
    return RuntimeError(f"backend: 'fla' cannot run this call: {reason}")


def check(q: Tensor, v: Tensor, tolerance: float, solver: str, chunk_size: int, offset: Tensor | None) -> None:
    """Raise RuntimeError unless fla takes such a call."""
    if q.device.type not in DEVICES:
        raise cannot(f"it takes CUDA tensors, got a q on {q.device}")
    if q.dtype not in DTYPES:
        raise cannot(f"it takes bfloat16 or float16 streams, got {q.dtype}")
    if q.shape[3] != v.shape[3] or q.shape[3] > MOST_KEY:
        raise cannot(f"it takes equal key and value sizes up to {MOST_KEY}, got {q.shape[3]} and {v.shape[3]}")
    given = {"solver": solver, "tolerance": tolerance, "chunk_size": chunk_size}
    for name, only in ONLY.items():
        if given[name] != only:
            raise cannot(f"it takes {name}={only!r}, got {given[name]!r}")
    if offset is not None and bool((offset.diff() == 0).any()):
        raise cannot("it takes packed sequences of one step or more, got an empty one")


def kernels() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    try:
        return importlib.import_module("fla.ops.mesa_net").chunk_mesa_net
    except ImportError as error:
        raise cannot(f"it needs fla-core (flash-linear-attention), got {type(error).__name__}: {error}") from error


def run(
    ours: Callable[..., Any], tensors: tuple[Tensor, ...], steps: int, offset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, kk and kv for `tensors`, named in INPUTS. The first call of a kind is compared with `ours`, `mesa`."""
    # fla's function breaks a compiled graph. Here, the decorator would import torch._dynamo with this package.
    return torch.compiler.disable(_run)(ours, tensors, steps, offset)


def _run(
    ours: Callable[..., Any], tensors: tuple[Tensor, ...], steps: int, offset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    q = tensors[0]
    compare(ours, q.device, q.dtype, q.shape[3], offset is not None)
    return call(tensors, steps, offset)


def call(tensors: tuple[Tensor, ...], steps: int, offset: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, *rest = tensors
    decay, beta, regularizer, kk, kv = (s.float() for s in rest)
    return kernels()(
        q=q,
        k=k,
        v=v,
        g=decay,
        beta=beta,
        lamb=regularizer,
        h_kk_init=kk,
        h_kv_init=kv,
        output_final_state=True,
        max_CG_iteration=steps,
        cu_seqlens=None if offset is None else offset.to(torch.int64),
    )


@functools.cache
def compare(ours: Callable[..., Any], device: torch.device, dtype: torch.dtype, key: int, packed: bool) -> None:
    """Raise RuntimeError where results or gradients differ from those of `ours` on a small random input."""
    with torch.inference_mode(False), torch.enable_grad(), checks.without_autocast(device):
        leaves = [t.to(device).requires_grad_() for t in _inputs(dtype, key, packed)]
        wide = [t.detach().double().requires_grad_() for t in leaves]
        offset = torch.tensor([0, 70, 100], device=device) if packed else None
        output, states, _ = ours(*wide[:6], tuple(wide[6:]), cu_seqlens=offset)
        right, got = [output, *states], list(call(tuple(leaves), 30, offset))
        wanted = [torch.linspace(-1, 1, t.numel(), device=device).view_as(t).to(t.dtype) for t in got]
        right += torch.autograd.grad(right, wide, [w.double() for w in wanted])
        got += torch.autograd.grad(got, leaves, wanted)
    names = (*RESULTS, *(f"the gradient of {name}" for name in INPUTS))
    for name, one, other in zip(names, got, right, strict=True):
        error = ((one.double() - other).norm() / other.norm()).item()
        if not error < LIMIT:
            raise cannot(f"expected {name} within {LIMIT:.0%} of the form in torch, got {error:.1%}")


def _inputs(dtype: torch.dtype, key: int, packed: bool) -> list[Tensor]:
    """Tensors of two sequences and two heads, named in INPUTS, with more steps than a chunk has."""
    draw = torch.Generator("cpu").manual_seed(0)
    shape = (1, 100, 2) if packed else (2, 70, 2)
    how: dict[str, Any] = {"generator": draw, "device": "cpu"}
    q, k, v = torch.randn(3, *shape, key, **how).unbind(0)
    decay, beta = torch.rand(2, *shape, **how).unbind(0)
    root, kv = torch.randn(2, 2, 2, key, key, **how).unbind(0)
    q, k = (torch.nn.functional.normalize(s, dim=-1) for s in (q, k))
    regularizer = 0.5 + torch.rand(2, key, **how)
    kk = root @ root.mT / key
    return [*(s.to(dtype) for s in (q, k, v)), -0.1 * decay, beta, regularizer, kk, kv / key**0.5]
