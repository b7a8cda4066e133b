"""Compare units with and without a cache of past segments in two tasks: recall the first symbol, or the value of a key.

`first` is the task of `examples.copy_first`: a symbol is shown at the first step, under noise, and must be named after
the last step. In `pairs`, a small form of associative recall (MQAR, arXiv 2312.04927), pairs of a key and a value are
shown at random steps under noise. The last step shows one of the keys, and its value must be named.

Each unit is in a network of one block, with and without a `MemoryCache`. Networks train at one length. They are tested
at this length and at longer ones, in chunks.

Run from the repository's root: `python -m examples.recall`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mru_kernels as mk
from examples import common, copy_first

TRAIN_LENGTH = 64
SEGMENT = 16
BATCH = 32
WIDTH = 32
CHUNK = 512  # steps of a chunk in tests
LEARNING_RATE = 5e-3
KEYS = VALUES = 4
PAIRS = 3  # pairs in a sequence
NOISE = 0.3  # standard deviation of the noise in `pairs`

#: The initial time scales of minGRU reach the training length, and those of the LRU 1,000 steps.
UNITS: dict[str, dict[str, dict[str, Any]]] = {
    "BMRU": {"bmru": {}},
    "minGRU": {"min_gru": {"max_time_scale": float(TRAIN_LENGTH)}},
    "LRU": {"lru": {"r_min": 0.9, "r_max": 0.999, "max_phase": 0.1}},
}
CACHES: dict[str, dict[str, Any] | None] = {
    "no cache": None,
    "gated": {"segment": SEGMENT},
    "sparse": {"segment": SEGMENT, "mode": "sparse", "top_k": 1},
    "residual": {"segment": SEGMENT, "mode": "residual"},
    "gated, restart": {"segment": SEGMENT, "restart": True},
}


def first(sequences: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs `[B, T, features]` and the first symbols `[B]`."""
    symbols = copy_first.draw_symbols(sequences, generator)
    return copy_first.show(copy_first.noise(sequences, length, generator), symbols), symbols


def associations(
    sequences: int,
    length: int,
    generator: torch.Generator,
    *,
    keys: int,
    values: int,
    pairs: int,
    questions: int,
    noise: float,
) -> tuple[Tensor, Tensor]:
    """Inputs `[B, T, features]` with `pairs` of a key and a value, and the values `[B, questions]` that are asked for.

    The features are the keys, the values, a mark of pairs and a mark of questions. The last `questions` steps show keys
    of different pairs. `noise` is the standard deviation of the noise on keys and values.
    """
    x = noise * torch.randn(sequences, length, keys + values + 2, generator=generator)
    x[..., keys + values :] = 0.0
    rows = torch.arange(sequences).unsqueeze(1)
    key = torch.rand(sequences, keys, generator=generator).argsort(1)[:, :pairs]
    value = torch.randint(values, (sequences, pairs), generator=generator)
    steps = torch.rand(sequences, length - questions, generator=generator).argsort(1)[:, :pairs]
    for feature in (key, keys + value, torch.full_like(key, keys + values)):
        x[rows, steps, feature] += 1.0
    asked = F.one_hot(key[:, :questions], x.shape[-1]) + F.one_hot(torch.tensor(keys + values + 1), x.shape[-1])
    x[:, length - questions :] += asked
    return x, value[:, :questions]


def pairs(sequences: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs `[B, T, features]` and the value `[B]` of the key that the last step shows."""
    sizes = {"keys": KEYS, "values": VALUES, "pairs": PAIRS, "questions": 1}
    x, values = associations(sequences, length, generator, **sizes, noise=NOISE)
    return x, values.squeeze(1)


TASKS = {"first": (first, copy_first.SYMBOLS + 1, copy_first.SYMBOLS), "pairs": (pairs, KEYS + VALUES + 2, VALUES)}


def network(unit: str, cache: str, task: str) -> mk.MRUNetwork:
    _, features, answers = TASKS[task]
    return mk.MRUNetwork(
        features, answers, width=WIDTH, num_blocks=1, units=UNITS[unit], cache=CACHES[cache], pool="last"
    )


@torch.no_grad()
def test(model: mk.MRUNetwork, task: str, length: int, sequences: int, seed: int) -> float:
    """Accuracy on new sequences, fed in chunks."""
    x, answers = TASKS[task][0](sequences, length, torch.Generator().manual_seed(1000 + seed))
    feed = mk.stream(model)
    for chunk in x.split(CHUNK, 1):
        scores = feed(chunk)
    return (scores.argmax(-1) == answers).float().mean().item()


def run(name: str, seed: int, arguments: argparse.Namespace) -> dict[int, float]:
    task, unit, cache = name.split("; ")
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = network(unit, cache, task)

    def loss() -> Tensor:
        x, answers = TASKS[task][0](BATCH, TRAIN_LENGTH, generator)
        return F.cross_entropy(model(x)[0], answers)

    common.train(model, loss, steps=arguments.steps, learning_rate=LEARNING_RATE)
    return {n: test(model, task, n, arguments.sequences, seed) for n in arguments.lengths}


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__, steps=300)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--units", nargs="+", choices=UNITS, default=list(UNITS))
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=["no cache", "gated"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[TRAIN_LENGTH, 512, 2048], metavar="T")
    parser.add_argument("--sequences", type=int, default=100, help="number of test sequences for each length")
    arguments = parser.parse_args(argv)
    names = [f"{t}; {u}; {c}" for t in arguments.tasks for u in arguments.units for c in arguments.caches]
    results = common.run_all(run, names, arguments)
    rows = [
        [*name.split("; "), *(common.spread([r[n] for r in runs]) for n in arguments.lengths)]
        for name, runs in results.items()
    ]
    text = common.table(["task", "unit", "cache", *(f"T = {n:,}" for n in arguments.lengths)], rows)
    text += (
        f"\n\nPercent right, {arguments.sequences} sequences x {arguments.seeds} seeds, trained at T = {TRAIN_LENGTH}"
    )
    text += f" for {arguments.steps} steps; segments of {SEGMENT} steps. Chance is 25 %."

    def draw(axes: Any) -> None:
        for name, runs in results.items():
            style = "--" if name.endswith("no cache") else "-"
            means = [100 * statistics.mean(r[n] for r in runs) for n in arguments.lengths]
            axes.plot(arguments.lengths, means, style, marker="o", markersize=4, label=name)
        axes.set(xscale="log", ylim=(0, 100), xlabel="steps", ylabel="percent right")
        axes.legend(fontsize=6)

    common.finish("recall", text, draw, arguments.out)


if __name__ == "__main__":
    main()
