"""Times of cells with their gates in the scan, also those that `define_cell` makes: `python -m bench define`.

A defined BMRU takes turns with the one written by hand. A defined minGRU, and the scans of `MinGRU` and `MinLSTM` on
packed gates, take turns with the same gates in torch before `linear_recurrence`. They must agree before they are timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import mru_kernels as mk
from mru_kernels.cells import min_gates
from mru_kernels.cells.min_gru import min_gru_packed
from mru_kernels.cells.min_lstm import min_lstm_packed

from . import allocator, cli, records, timing
from .mesa import saved

Scan = Callable[..., tuple[Tensor, ...]]


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


def composed(gates: Callable[..., tuple[Tensor, Tensor]], count: int) -> Scan:
    """The scan of `count` packed gates `[B, T, count D]` by `linear_recurrence`."""
    return lambda packed: mk.linear_recurrence(*gates(packed.chunk(count, -1), []))


def pairs() -> dict[str, tuple[Scan, Scan, list[int]]]:
    """For each cell: the fused one, what it is compared with, and the width of each input in channels."""
    return {
        "bmru, by hand": (mk.define_cell("bench_bmru", bmru_gate), mk.bmru, [1, 1]),
        "min_gru, composed": (mk.define_cell("bench_min_gru", min_gru_gate), composed_min_gru, [1, 1]),
        "MinGRU, composed": (min_gru_packed, composed(min_gates.min_gru, 2), [2]),
        "MinLSTM, composed": (min_lstm_packed, composed(min_gates.min_lstm, 3), [3]),
    }


def check(ours: Scan, theirs: Scan, *x: Tensor) -> None:
    """Raise RuntimeError unless two scans agree."""
    for a, b in zip(ours(*x), theirs(*x), strict=True):
        error = (a.float() - b.float()).abs().max().item()
        if not error <= (2e-5 if x[0].dtype == torch.float32 else 4e-2):
            raise RuntimeError(f"the results differ by {error:.1e}")


def subjects(scan: Scan, x: Sequence[Tensor]) -> dict[str, Callable[[], object]]:
    """The forward pass alone, and with the backward pass."""
    leaves = [t.detach().clone().requires_grad_() for t in x]
    with torch.no_grad():
        grad = torch.ones_like(scan(*x)[0])

    def forward() -> object:
        with torch.no_grad():
            return scan(*x)

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
    for name, (ours, theirs, widths) in pairs().items():
        for shape in arguments.shape:
            for dtype in arguments.dtype:
                *rows_of, channels = shape
                generator = torch.Generator().manual_seed(0)
                x = [torch.randn(*rows_of, n * channels, generator=generator).to(cli.DTYPES[dtype]) for n in widths]
                check(ours, theirs, *x)
                calls = {(who, pass_): call for who, scan in (("ours", ours), ("theirs", theirs))
                         for pass_, call in subjects(scan, x).items()}  # fmt: skip
                times = timing.measure(calls, x[0].device)
                figures = []
                for pass_ in ("forward", "both"):
                    of_ours, of_theirs = times["ours", pass_][0], times["theirs", pass_][0]
                    figures += [f"{1e3 * of_ours:.2f}", f"{of_ours / of_theirs:.2f}"]
                kept = [saved(scan, [t.clone().requires_grad_() for t in x]) for scan in (ours, theirs)]
                figures += [f"{kept[0]:.1f}", f"{kept[0] / kept[1]:.2f}" if kept[1] else "-"]
                spread = max(spread for _, spread in times.values())
                rows.append((name, ",".join(map(str, shape)), dtype, *figures, f"{spread:.0%}"))
    print(records.aligned(rows))
    print("\nFigures of the fused cell, and over those of what it is compared with; saved: between the passes, without")
    print("the inputs; spread: the largest of the four times.")
    print(f"{torch.get_num_threads()} threads; allocator: {allocator.describe()}")
    return 0
