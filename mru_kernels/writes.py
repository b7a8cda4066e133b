"""How often the channels of bistable and cumulative units write: what shows why a unit learns nothing."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .nn import WriteOrHold
from .nn.wrappers import unwrapped

__all__ = ["LayerWrites", "WriteRates", "write_rates"]


@dataclass(frozen=True)
class LayerWrites:
    """The writes of one layer and direction of a unit, in one call, for each of its D channels.

    Attributes:
        name: path of the unit in the module and suffix of the layer's parameters, such as "blocks.0.units.0 l0".
        rate: share of all steps at which the channel writes, float32 `[D]`.
        first: the first step at which it writes in any sequence, from 0 in scan order, int64 `[D]`; -1 for none.
        longest: the largest number of steps in a row at which it does not write, int64 `[D]`.
        constant: whether its output is one and the same at all steps of all sequences, bool `[D]`.

    Example::

        >>> (layer,) = mk.write_rates(mk.BMRU(3, 8), torch.randn(2, 50, 3)).layers
        >>> layer.name, layer.rate.shape
        ('BMRU l0', torch.Size([8]))
    """

    name: str
    rate: Tensor
    first: Tensor
    longest: Tensor
    constant: Tensor


@dataclass(frozen=True)
class WriteRates:
    """The result of `write_rates`. `str` prints it as a table, with medians over the channels.

    Attributes:
        layers: the layers of all units in the order in which they ran.

    Example::

        >>> print(mk.write_rates(mk.BMRU(1, 64), torch.randn(1, 500, 1)))
        layer    channels  writes  never  always  constant  first write  longest hold
        BMRU l0        64  24.9 %      2       0        21            4            16
    """

    layers: list[LayerWrites]

    def __str__(self) -> str:
        rows = [("layer", "channels", "writes", "never", "always", "constant", "first write", "longest hold")]
        for layer in self.layers:
            wrote = layer.first[layer.first >= 0]
            counts = ((layer.rate == 0.0).sum(), (layer.rate == 1.0).sum(), layer.constant.sum())
            rows.append(
                (
                    layer.name,
                    str(layer.rate.numel()),
                    f"{100 * layer.rate.mean().item():.1f} %",
                    *(str(int(count)) for count in counts),  # type: ignore[arg-type]
                    str(int(wrote.median())) if wrote.numel() else "",
                    str(int(layer.longest.median())),
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
        )

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw write rate and longest hold of every channel, sorted in each layer, into a file.

        Args:
            path: the file; its suffix is its format, such as ".png".

        Raises:
            ImportError: matplotlib is not installed.

        Example::

            >>> import os, tempfile
            >>> rates = mk.write_rates(mk.BMRU(3, 8), torch.randn(2, 50, 3))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     rates.plot(folder + "/rates.png")
            ...     os.listdir(folder)
            ['rates.png']
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot: needs matplotlib; install it with `pip install matplotlib`") from error
        figure = Figure(figsize=(9, 4), layout="constrained")
        rates, holds = figure.subplots(1, 2)
        for layer in self.layers:
            share = [(i + 0.5) / layer.rate.numel() for i in range(layer.rate.numel())]
            rates.plot(share, layer.rate.sort().values.tolist(), marker=".", label=layer.name)
            holds.plot(share, layer.longest.sort().values.tolist(), marker=".")
        rates.set(xlabel="channels, sorted", ylabel="share of steps with a write", ylim=(-0.02, 1.02))
        holds.set(xlabel="channels, sorted", ylabel="longest hold, steps", yscale="symlog")
        rates.legend(fontsize=8)
        figure.savefig(path, dpi=120)


@torch.no_grad()
def write_rates(module: torch.nn.Module, input: Any) -> WriteRates:
    """Measure at which steps the channels of bistable and cumulative units write.

    It calls `module(input)` once, without gradients, and looks at every scan of `BMRU`, `CMRU`, `AlphaCMRU` and
    `FirstQuadrantBMRU` in it. The first-quadrant unit writes 1 or 0 outside of its band.

    A channel that never writes gives its initial state. A channel that always writes has no memory. A channel may write
    and be constant all the same: it writes the value that it has. "Training memory units" in the documentation says
    what to do.

    Args:
        module: a unit, a network of units, or any module that contains them.
        input: what the module takes, such as `[B, T, features]` or a `PackedSequence`.

    Returns:
        A `WriteRates` with one entry for each scan: its `layers` have a value for each channel, `str` prints a table,
        and `plot(path)` draws it.

    Raises:
        TypeError: `module` is not a module.
        ValueError: `module` has no such unit, or its call ran none.

    Example::

        >>> network = mk.MRUNetwork(3, 2, width=8, num_blocks=2)
        >>> rates = mk.write_rates(network, torch.randn(4, 50, 3))
        >>> [layer.name for layer in rates.layers]
        ['blocks.0.units.0 l0', 'blocks.1.units.0 l0']
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    inner = unwrapped(module)
    units = {path: m for path, m in inner.named_modules() if isinstance(m, WriteOrHold)}
    if not units:
        raise ValueError(f"module: expected one with units that write or hold, got {type(inner).__name__}")
    layers: list[LayerWrites] = []
    with _observed(units, layers):
        inner(input)
    if not layers:
        raise ValueError(f"module: expected a call that runs its units, got none in that of {type(inner).__name__}")
    return WriteRates(layers)


@contextmanager
def _observed(units: dict[str, WriteOrHold], layers: list[LayerWrites]) -> Iterator[None]:
    """A context in which every scan of the units adds what it writes to `layers`."""
    before = {unit: vars(unit).get("_scan") for unit in units.values()}
    for path, unit in units.items():
        # A scan gets its gates from inside of the unit's call, which has no hook there.
        vars(unit)["_scan"] = functools.partial(_scan, unit, path or type(unit).__name__, unit._scan, layers)
    try:
        yield
    finally:
        for unit, own in before.items():
            del vars(unit)["_scan"]
            if own is not None:
                vars(unit)["_scan"] = own


def _scan(
    unit: WriteOrHold, name: str, scan: Callable[..., tuple[Tensor, ...]], layers: list[LayerWrites], gates: Tensor,
    initial_state: Tensor | None, **options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    h, *states = scan(gates, initial_state, **options)
    suffixes = [suffix.removeprefix("_") for _, suffix in unit._scans()]
    own = sum(layer.name.startswith(f"{name} ") for layer in layers)
    writes = unit._writes(gates, **{key: options[key] for key in unit.per_channel})
    cuts = options["cu_seqlens"]
    sequences = [(writes, h)]
    if cuts is not None:
        lengths = cuts.diff().tolist()
        sequences = list(zip(writes.split(lengths, 1), h.split(lengths, 1), strict=True))
    label = f"{name} {suffixes[own % len(suffixes)]}"
    layers.append(_measured(label, [pair for pair in sequences if pair[0].numel()], options["reverse"], unit))
    return h, *states


def _measured(name: str, sequences: list[tuple[Tensor, Tensor]], reverse: bool, unit: WriteOrHold) -> LayerWrites:
    """What writes and outputs `[B, T, D]`, of sequences of one length each, come to."""
    count = torch.zeros(unit.hidden_size, device="cpu")
    longest = torch.zeros_like(count, dtype=torch.int64)
    first = torch.full_like(longest, torch.iinfo(torch.int64).max)
    constant = torch.ones_like(count, dtype=torch.bool)
    steps = 0
    for writes, h in sequences:
        writes = (writes.flip(1) if reverse else writes).cpu()
        steps += writes.shape[0] * writes.shape[1]
        count += writes.sum((0, 1))
        step = torch.arange(writes.shape[1], device="cpu").unsqueeze(1)
        last = torch.where(writes, step, -1).cummax(1).values
        longest = longest.maximum((step - last).amax((0, 1)))
        first = first.minimum(torch.where(writes, step, first).amin((0, 1)))
        constant &= (h == sequences[0][1][:1, :1]).all(0).all(0).cpu()
    never = count == 0
    return LayerWrites(name, count / max(steps, 1), first.masked_fill(never, -1), longest, constant)
