"""Times of calls with resets against the same call without: `python -m bench resets`.

The subjects take turns in one process: no mask, a mask without resets, and masks with more and more of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

import mru_kernels as mk

from . import allocator, cli, inputs, records, timing

#: Share of steps at which an episode begins; None for a call without a mask.
SHARES = (None, 0.0, 0.01, 0.1, 1.0)


def subjects(call: inputs.Call, backend: str | None) -> dict[tuple[str, float | None], Callable[[], object]]:
    """The forward pass and the backward pass for each share of resets."""
    op = partial(getattr(mk, call.cell), **call.settings, backend=backend)
    leaves = {name: t.requires_grad_() for name, t in call.tensors.items()}
    device, shape = call.stream.device, call.stream.shape[:2]
    found: dict[tuple[str, float | None], Callable[[], object]] = {}
    for share in SHARES:
        mask = None if share is None else (torch.rand(shape, generator=torch.Generator().manual_seed(0)) < share)
        forward = partial(op, **leaves, resets=None if mask is None else mask.to(device))
        found["forward", share] = forward
        found["backward", share] = partial(_backward, forward(), list(leaves.values()), call)
    return found


def _backward(results: tuple[Tensor, ...], leaves: list[Tensor], call: inputs.Call) -> None:
    torch.autograd.grad(results, leaves, (call.grad_h, call.grad_final), retain_graph=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=cli.prog("resets"), description=__doc__)
    parser.add_argument("--cell", nargs="+", choices=inputs.CELLS, default=["bmru", "linear_recurrence"])
    parser.add_argument("--shape", type=cli.shape, default=(16, 1024, 512), metavar="B,T,D")
    parser.add_argument("--dtype", nargs="+", choices=cli.DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--device", default="cpu", type=cli.device)
    parser.add_argument("--backend", help="default: what backend=None chooses")
    arguments = parser.parse_args(argv)
    batch, time, channels = arguments.shape
    header = ["cell", "dtype", "pass", "without, ms", "spread"]
    rows = [(*header, *(f"{share:.0%}" for share in SHARES if share is not None))]
    for cell in arguments.cell:
        for dtype in arguments.dtype:
            case = inputs.case(cell, cli.DTYPES[dtype], batch=batch, time=time, channels=channels)
            call = case.build().to(arguments.device)
            times = timing.measure(subjects(call, arguments.backend), call.stream.device)
            for pass_ in ("forward", "backward"):
                alone, spread = times[pass_, None]
                ratios = (times[pass_, share][0] / alone for share in SHARES if share is not None)
                ratios_ = [f"{ratio:.2f}" for ratio in ratios]
                rows.append((cell, dtype, pass_, f"{1e3 * alone:.2f}", f"{spread:.0%}", *ratios_))
    print(records.aligned(rows))
    print(f"\n{batch},{time},{channels}; time over that without a mask, by the share of steps with a reset.")
    print(f"{torch.get_num_threads()} threads; allocator: {allocator.describe()}")
    return 0
