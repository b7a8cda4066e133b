"""Learn from a cause 100 to 10,000 steps before its effect, in much shorter chunks of time.

Every step shows one of four symbols. The first step is marked, and its symbol must be named after the last step. Chance
is 25 %. A `BMRU` reads the sequence in chunks, and the optimiser makes one step after the last chunk. With
`gradient="traces"` the gradient is that of the whole sequence, up to rounding. Truncated back-propagation through time
uses the last chunk only. Back-propagation through the whole sequence needs all of it in memory.

Run from the repository's root: `python -m examples.online_gradients`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mru_kernels as mk
from examples import common

SYMBOLS = 4
CHANNELS = 16
BATCH = 16
TEST_SEQUENCES = 256

#: Steps of a chunk for each number of steps of a sequence.
CHUNKS = {100: 10, 1000: 50, 10_000: 100}

#: The same for all methods. At T = 1,000 traces also reached 100 % with 1e-2. No other rate was tried.
LEARNING_RATE = 3e-2

METHODS = {"whole sequence": None, "chunks, traces": "traces", "chunks, truncated": None}


def draw(sequences: int, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs `[B, T, SYMBOLS + 1]`, whose last feature is the mark, and the first symbols `[B]`."""
    symbols = torch.randint(SYMBOLS, (sequences, steps), generator=generator)
    x = F.pad(F.one_hot(symbols, SYMBOLS).float(), (0, 1))
    x[:, 0, SYMBOLS] = 1.0
    return x, symbols[:, 0]


class Model(nn.Module):
    """A unit and a head on its last output: from `x [B, T, SYMBOLS + 1]` to scores `[B, SYMBOLS]`."""

    def __init__(self) -> None:
        super().__init__()
        self.unit = mk.BMRU(SYMBOLS + 1, CHANNELS)
        self.head = nn.Linear(CHANNELS, SYMBOLS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.unit(x)[0][:, -1])

    def in_chunks(self, x: Tensor, steps: int, gradient: str | None) -> Tensor:
        feed = mk.stream(self.unit, gradient)
        *chunks, last = x.split(steps, dim=1)
        with torch.no_grad():  # no loss here; the traces still advance
            for chunk in chunks:
                feed(chunk)
        return self.head(feed(last)[:, -1])


def run(name: str, seed: int, arguments: argparse.Namespace) -> list[float]:
    """The accuracy after training, for each length."""
    return [_train(name, seed, arguments.steps, length) for length in arguments.lengths]


def _train(name: str, seed: int, steps: int, length: int) -> float:
    torch.manual_seed(seed)
    model = Model()
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        x, first = draw(BATCH, length, generator)
        output = model.in_chunks(x, CHUNKS[length], METHODS[name]) if name.startswith("chunks") else model(x)
        return F.cross_entropy(output, first)

    common.train(model, loss, steps=steps, learning_rate=LEARNING_RATE)
    test, first = draw(TEST_SEQUENCES, length, torch.Generator().manual_seed(1000 + seed))
    with torch.no_grad():
        return (model(test).argmax(-1) == first).float().mean().item()


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__, steps=200)
    parser.add_argument("--lengths", nargs="+", type=int, choices=CHUNKS, default=list(CHUNKS), metavar="T")
    arguments = parser.parse_args(argv)
    results = common.run_all(run, METHODS, arguments)

    labels = [f"T = {n:,}, chunks of {CHUNKS[n]}" for n in arguments.lengths]
    groups = {
        label: {name: [accuracies[i] for accuracies in runs] for name, runs in results.items()}
        for i, label in enumerate(labels)
    }
    rows = [[name, *(common.spread(groups[label][name]) for label in labels)] for name in results]
    text = common.table(["percent right", *labels], rows)
    text += f"\n\n{arguments.steps} steps of {BATCH} sequences, {arguments.seeds} seeds; chance is 25 %."
    common.finish("online_gradients", text, lambda axes: common.bars(axes, groups, "percent right"), arguments.out)


if __name__ == "__main__":
    main()
