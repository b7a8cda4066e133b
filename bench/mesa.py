"""Time and memory of `mk.mesa` against a loop over steps, on request with `backend="fla"`: `python -m bench mesa`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import mru_kernels as mk

from . import allocator, cli, records, timing


def inputs(batch: int, time: int, heads: int, key: int, device: torch.device) -> tuple[Tensor, ...]:
    """float32 q, k, v, decay, beta and regularizer."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, batch, time, heads, key, device=device).unbind(0)
    q, k = (torch.nn.functional.normalize(s, dim=-1) for s in (q, k))
    decay = -0.01 * torch.rand(batch, time, heads, device=device)
    beta = torch.rand(batch, time, heads, device=device)
    return q, k, v, decay, beta, torch.ones(heads, key, device=device)


def loop(*tensors: Tensor) -> Tensor:
    """One state and one direct solve for each step, in plain torch."""
    q, k, v, decay, beta, regularizer = tensors
    kk = kv = torch.zeros((), device=q.device)
    outputs = []
    for t in range(q.shape[1]):
        gamma, written = decay[:, t].exp()[..., None, None], (beta[:, t, :, None] * k[:, t]).unsqueeze(-1)
        kk = gamma * kk + written * k[:, t].unsqueeze(-2)
        kv = gamma * kv + written * v[:, t].unsqueeze(-2)
        x = torch.linalg.solve(kk + torch.diag_embed(regularizer), q[:, t].unsqueeze(-1))
        outputs.append((kv.mT @ x).squeeze(-1))
    return torch.stack(outputs, 1)


def half(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Leaves with q, k and v in bfloat16."""
    return [t.detach().to(torch.bfloat16 if i < 3 else t.dtype).requires_grad_() for i, t in enumerate(tensors)]


def both_passes(run: Callable[..., Any], leaves: Sequence[Tensor]) -> None:
    output = run(*leaves)
    output = output[0] if isinstance(output, tuple) else output
    torch.autograd.grad(output.float().sum(), leaves)


def saved(run: Callable[..., Any], leaves: Sequence[Tensor]) -> float:
    """MiB that autograd saves between the passes, without the inputs."""
    known = {t.untyped_storage().data_ptr() for t in leaves}
    sizes: dict[int, int] = {}
    keep = []  # so that no memory is used twice

    def pack(t: Tensor) -> Tensor:
        keep.append(t)
        if t.untyped_storage().data_ptr() not in known:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = run(*leaves)
    del output
    return sum(sizes.values()) / 2**20


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=cli.prog("mesa"), description=__doc__)
    parser.add_argument("--shape", type=cli.shape, default=(2, 512, 2), metavar="B,T,H")
    parser.add_argument("--key-size", type=cli.positive, nargs="+", default=[32, 64])
    parser.add_argument("--steps", type=cli.positive, default=30)
    parser.add_argument("--device", default="cpu", type=cli.device)
    parser.add_argument("--fla", action="store_true", help='also backend="fla", which needs a GPU')
    arguments = parser.parse_args(argv)
    rows = [("K", "call", "forward, ms", "with backward, ms", "spread", "saved, MiB")]
    for key in arguments.key_size:
        leaves = [t.requires_grad_() for t in inputs(*arguments.shape, key, arguments.device)]
        calls: dict[str, tuple[Callable[..., Any], Sequence[Tensor]]] = {
            f"cg, {arguments.steps} steps": (partial(mk.mesa, steps=arguments.steps), leaves),
            "direct": (partial(mk.mesa, solver="direct"), leaves),
            "loop": (loop, leaves),
        }
        if arguments.fla:
            calls["fla, bfloat16"] = partial(mk.mesa, steps=arguments.steps, backend="fla"), half(leaves)
        subjects: dict[tuple[str, str], Callable[[], object]] = {}
        for name, (run, given) in calls.items():
            subjects[name, "forward"] = partial(run, *(t.detach() for t in given))
            subjects[name, "both"] = partial(both_passes, run, given)
        times = timing.measure(subjects, arguments.device)
        for name, (run, given) in calls.items():
            forward, (both, spread) = times[name, "forward"][0], times[name, "both"]
            row = (f"{1e3 * forward:.1f}", f"{1e3 * both:.1f}", f"{spread:.0%}", f"{saved(run, given):.1f}")
            rows.append((str(key), name, *row))
    print(records.aligned(rows))
    batch, time, heads = arguments.shape
    print(f"\nB = {batch}, T = {time}, H = {heads}, float32; saved: between the passes, without the inputs.")
    print(f"{torch.get_num_threads()} threads; allocator: {allocator.describe()}")
    return 0
