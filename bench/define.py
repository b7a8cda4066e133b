"""Times of cells that `define_cell` makes: `python -m bench define`.

A defined BMRU takes turns with the one written by hand. A defined minGRU, whose gates are in the scan, takes turns with
the same gates in torch before `linear_recurrence`. They must agree before they are timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import mru_kernels as mk

from . import allocator, cli, records, timing
from .mesa import saved

Scan = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def bmru_gate(candidate: Tensor, threshold: Tensor) -> mk.Write:
    return mk.Write(mk.heaviside(candidate.abs(), threshold=threshold.abs()), mk.sign(candidate))


def min_gru_gate(candidate: Tensor, update: Tensor) -> mk.Affine:
    z = update.sigmoid()
    return mk.Affine(1 - z, z * torch.where(candidate >= 0, candidate + 0.5, candidate.sigmoid()))


def composed_min_gru(candidate: Tensor, update: Tensor) -> tuple[Tensor, ...]:
    factor, offset = min_gru_gate(candidate, update)
    assert isinstance(factor, Tensor)
    assert isinstance(offset, Tensor)
    return mk.linear_recurrence(factor, offset)


def pairs() -> dict[str, tuple[Scan, Scan]]:
    """For each cell: the defined one, and what it is compared with."""
    return {
        "bmru, by hand": (mk.define_cell("bench_bmru", bmru_gate), mk.bmru),
        "min_gru, composed": (mk.define_cell("bench_min_gru", min_gru_gate), composed_min_gru),
    }


def check(ours: Scan, theirs: Scan, x: Tensor, y: Tensor) -> None:
    """Raise RuntimeError unless two scans agree."""
    for a, b in zip(ours(x, y), theirs(x, y), strict=True):
        error = (a.float() - b.float()).abs().max().item()
        if not error <= (2e-5 if x.dtype == torch.float32 else 4e-2):
            raise RuntimeError(f"the results differ by {error:.1e}")


def subjects(scan: Scan, x: Tensor, y: Tensor) -> dict[str, Callable[[], object]]:
    """The forward pass alone, and with the backward pass."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, y)]
    grad = torch.ones_like(x)

    def forward() -> object:
        with torch.no_grad():
            return scan(x, y)

    return {"forward": forward, "both": lambda: torch.autograd.grad(scan(*leaves)[0], leaves, grad)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=cli.prog("define"), description=__doc__)
    shapes = [(4, 2048, 256), (4, 4096, 512), (1, 1048576, 16), (32, 1024, 64)]
    parser.add_argument("--shape", type=cli.shape, nargs="+", default=shapes, metavar="B,T,D")
    parser.add_argument("--dtype", nargs="+", choices=cli.DTYPES, default=["fp32", "bf16"])
    arguments = parser.parse_args(argv)
    rows = [
        ("cell", "shape", "dtype", "forward, ms", "over it", "both, ms", "over it", "saved, MiB", "over it", "spread")
    ]
    for name, (ours, theirs) in pairs().items():
        for shape in arguments.shape:
            for dtype in arguments.dtype:
                x, y = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(cli.DTYPES[dtype]).unbind()
                check(ours, theirs, x, y)
                calls = {(who, pass_): call for who, scan in (("ours", ours), ("theirs", theirs))
                         for pass_, call in subjects(scan, x, y).items()}  # fmt: skip
                times = timing.measure(calls, x.device)
                figures = []
                for pass_ in ("forward", "both"):
                    of_ours, of_theirs = times["ours", pass_][0], times["theirs", pass_][0]
                    figures += [f"{1e3 * of_ours:.2f}", f"{of_ours / of_theirs:.2f}"]
                kept = [saved(scan, [t.clone().requires_grad_() for t in (x, y)]) for scan in (ours, theirs)]
                figures += [f"{kept[0]:.1f}", f"{kept[0] / kept[1]:.2f}" if kept[1] else "-"]
                spread = max(spread for _, spread in times.values())
                rows.append((name, ",".join(map(str, shape)), dtype, *figures, f"{spread:.0%}"))
    print(records.aligned(rows))
    print(
        "\nFigures of the defined cell, and over those of what it is compared with; saved: between the passes, without"
    )
    print("the inputs; spread: the largest of the four times.")
    print(f"{torch.get_num_threads()} threads; allocator: {allocator.describe()}")
    return 0
