"""A memory of one's own: a unit with three stable states, defined in a few lines, against BMRU at a task of capacity.

Two marked steps show one of nine symbols each, the first step and a later one. Every step has noise of standard
deviation 0.2. After the last step the model names the later symbol. Both units have two channels. Once a channel of
BMRU is written it is -1 or 1, so two remember four symbols: 44 %. A channel of the ternary unit is -1, 0 or 1, so two
remember all nine.

Run from the repository's root: `python -m examples.ternary`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mru_kernels as mk
from examples import common

SYMBOLS = 9
CHANNELS = 2
FEATURES = 64
NOISE = 0.2
TRAIN_LENGTH = 20
BATCH = 128


def ternary_gate(candidate: Tensor, write: Tensor) -> mk.Write:
    """Where `write` is not negative, write the candidate's third of the line: -1, 0 or 1."""
    above, below = mk.heaviside(candidate - 1, 0.5), mk.heaviside(-candidate - 1, 0.5)
    return mk.Write(mk.heaviside(write, 2.0), above - below)


class Ternary(mk.nn.WriteOrHold):
    """A unit with the states -1, 0 and 1, used like `BMRU`."""

    gates = {"candidate": None, "write": None}

    def _scan(self, gates: Tensor, initial_state: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
        candidate, write = gates.chunk(2, -1)
        return scan()(candidate, write, initial_state=initial_state, epsilon=self.epsilon, **options)


def scan() -> mk.DefinedCell:
    return mk.define_cell("ternary_memory", ternary_gate)


UNITS: dict[str, type[mk.nn.WriteOrHold]] = {"ternary": Ternary, "BMRU": mk.BMRU}
#: Learning rates, and whether epsilon goes from 1 to 0 in the first half of the training. They were picked from some
#: runs with one or two seeds at rates from 3e-3 to 3e-2, and not by a full sweep.
RECIPES = {"ternary": (1e-2, False), "BMRU": (6e-3, True)}


class Model(nn.Module):
    """An encoding of each step, the unit, and a map from its last state to the symbols."""

    def __init__(self, unit: type[mk.nn.MRUBase]) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            nn.Linear(SYMBOLS + 1, FEATURES), nn.GELU(), nn.Linear(FEATURES, FEATURES), nn.GELU()
        )
        self.unit = unit(FEATURES, CHANNELS)
        self.decode = nn.Sequential(nn.Linear(CHANNELS, FEATURES), nn.GELU(), nn.Linear(FEATURES, SYMBOLS))

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.unit(self.encode(x))
        return self.decode(output[:, -1])


def draw(count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs `[B, T, SYMBOLS + 1]` and the later symbols `[B]`."""
    x = NOISE * torch.randn(count, length, SYMBOLS + 1, generator=generator)
    x[..., -1] = 0.0
    rows = torch.arange(count)
    for at in (torch.zeros(count, dtype=torch.int64), torch.randint(1, length, (count,), generator=generator)):
        symbols = torch.randint(SYMBOLS, (count,), generator=generator)
        x[rows, at, symbols] += 1.0
        x[rows, at, -1] = 1.0
    return x, symbols


def run(name: str, seed: int, arguments: argparse.Namespace) -> dict[int, float]:
    """The share of symbols named after each length."""
    torch.manual_seed(seed)
    model = Model(UNITS[name])
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        x, symbols = draw(BATCH, TRAIN_LENGTH, generator)
        return F.cross_entropy(model(x), symbols)

    learning_rate, has_schedule = RECIPES[name]
    epsilon = common.epsilon_schedule(model, arguments.steps) if has_schedule else None
    common.train(model, loss, steps=arguments.steps, learning_rate=learning_rate, epsilon=epsilon)
    model.eval()
    found = {}
    with torch.no_grad():
        for length in arguments.lengths:
            x, symbols = draw(arguments.sequences, length, generator)
            found[length] = (model(x).argmax(-1) == symbols).double().mean().item()
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__ or "", steps=2500)
    parser.add_argument("--units", nargs="+", choices=UNITS, default=list(UNITS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[20, 1000, 10_000], metavar="T", help="in tests")
    parser.add_argument("--sequences", type=int, default=500, help="number of test sequences of each length")
    arguments = parser.parse_args(argv)
    results = common.run_all(run, arguments.units, arguments)
    rows = [[name, *(common.spread([r[n] for r in runs]) for n in arguments.lengths)] for name, runs in results.items()]
    text = common.table(["unit", *(f"T = {n:,}" for n in arguments.lengths)], rows)
    text += (
        f"\n\nPercent of {SYMBOLS} symbols named by units of {CHANNELS} channels, {arguments.sequences} sequences x"
        f" {arguments.seeds} seeds, trained at T = {TRAIN_LENGTH} for {arguments.steps} steps of {BATCH} sequences."
    )

    def plot(axes: Any) -> None:
        for name, runs in results.items():
            means = [100 * statistics.mean(r[n] for r in runs) for n in arguments.lengths]
            axes.plot(arguments.lengths, means, marker="o", markersize=4, label=name)
        axes.axhline(100 * 2**CHANNELS / SYMBOLS, color="grey", linewidth=0.8, linestyle=":")
        axes.set(xscale="log", ylim=(0, 105), xlabel="steps", ylabel="percent of symbols named")
        axes.legend(fontsize=8)

    common.finish("ternary", text, plot, arguments.out)


if __name__ == "__main__":
    main()
