"""Recall the first symbol of a sequence, by one bistable unit and by `mk.MRUNetwork`, at several learning rates.

Every step shows one of eight symbols. The first step is marked, and after the last step the model names its symbol.
Chance is 12.5 %. The write rate is the share of steps at which a channel of a unit writes, before and after training. A
channel that writes at every step has no memory. A channel that never writes gives its initial state.

Run from the repository's root: `python -m examples.first_steps`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mru_kernels as mk
from examples import common

SYMBOLS = 8
BATCH = 32
TEST_SEQUENCES = 512


class Bare(nn.Module):
    """A unit that reads the symbols directly, and a head on its last output."""

    def __init__(self, surrogate_scale: float) -> None:
        super().__init__()
        self.unit = mk.BMRU(SYMBOLS + 1, 32, surrogate_scale=surrogate_scale)
        self.head = nn.Linear(32, SYMBOLS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        output, state = self.unit(x)
        return self.head(output[:, -1]), state


def network(surrogate_scale: float, num_blocks: int = 2) -> nn.Module:
    units = {"bmru": {"surrogate_scale": surrogate_scale}}
    return mk.MRUNetwork(SYMBOLS + 1, SYMBOLS, width=32, num_blocks=num_blocks, units=units, pool="last")


MODELS: dict[str, Callable[[float], nn.Module]] = {
    "BMRU": Bare,
    "BMRU, epsilon 1 to 0": Bare,
    "MRUNetwork": network,
    "MRUNetwork, epsilon 1 to 0": network,
    "MRUNetwork, one block": lambda scale: network(scale, num_blocks=1),
}


def draw(sequences: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs `[B, T, SYMBOLS + 1]`, whose last feature is the mark, and the first symbols `[B]`."""
    symbols = torch.randint(SYMBOLS, (sequences, length), generator=generator)
    x = F.pad(F.one_hot(symbols, SYMBOLS).float(), (0, 1))
    x[:, 0, SYMBOLS] = 1.0
    return x, symbols[:, 0]


def write_rate(model: nn.Module, x: Tensor) -> float:
    """The mean write rate over all channels of all units."""
    return torch.cat([layer.rate for layer in mk.write_rates(model, x).layers]).mean().item()


def run(name: str, seed: int, arguments: argparse.Namespace) -> list[tuple[float, float, float, float]]:
    """Accuracy, write rates before and after training, and seconds of training, for each learning rate."""
    return [train(name, seed, arguments, rate) for rate in arguments.learning_rates]


def train(name: str, seed: int, arguments: argparse.Namespace, learning_rate: float) -> tuple[float, ...]:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = MODELS[name](arguments.surrogate_scale)
    test, first = draw(TEST_SEQUENCES, arguments.length, torch.Generator().manual_seed(1000 + seed))
    before = write_rate(model, test)

    def loss() -> Tensor:
        x, symbols = draw(BATCH, arguments.length, generator)
        return F.cross_entropy(model(x)[0], symbols)

    start = time.perf_counter()
    schedule = common.epsilon_schedule(model, arguments.steps) if "epsilon" in name else None
    common.train(model, loss, steps=arguments.steps, learning_rate=learning_rate, epsilon=schedule)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        right = (model(test)[0].argmax(-1) == first).float().mean().item()
    return right, before, write_rate(model, test), seconds


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__, steps=200)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[1e-3, 3e-3, 1e-2], metavar="RATE")
    parser.add_argument("--surrogate-scale", type=float, default=1.0)
    parser.add_argument("--length", type=int, default=200, help="steps of a sequence")
    arguments = parser.parse_args(argv)
    results = common.run_all(run, arguments.models, arguments)

    rows, groups = [], {}
    for i, rate in enumerate(arguments.learning_rates):
        groups[f"learning rate {rate:g}"] = {name: [r[i][0] for r in runs] for name, runs in results.items()}
        for name, runs in results.items():
            right, before, after, seconds = ([r[i][k] for r in runs] for k in range(4))
            scores = [common.spread(values) for values in (right, before, after)]
            rows.append([name, f"{rate:g}", *scores, common.spread(seconds, 1.0)])
    header = ["model", "learning rate", "percent right", "write rate before, %", "after, %", "seconds"]
    text = common.table(header, rows)
    text += f"\n\nT = {arguments.length}, {arguments.steps} steps of {BATCH} sequences, {arguments.seeds} seeds,"
    text += f" surrogate scale {arguments.surrogate_scale:g}."
    common.finish("first_steps", text, lambda axes: common.bars(axes, groups, "percent right"), arguments.out)


if __name__ == "__main__":
    main()
