"""Compare MesaNet with BMRU + minGRU where the answer is in the sequence: regression and recall in context.

In `regression` every sequence has its own linear map from 4 numbers to 1. Its steps show 12 inputs with their values,
and the last step shows an input alone, whose value is asked for. In `recall`, a small form of associative recall (MQAR,
arXiv 2312.04927), the steps show 6 of 12 keys with values, and the last step shows one of these keys.

Run from the repository's root: `python -m examples.in_context`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mru_kernels as mk
from examples import common

SIZE, EXAMPLES = 4, 12  # numbers of an input, and examples before the question, in `regression`
KEYS, VALUES, PAIRS = 12, 4, 6
BATCH, WIDTH, LEARNING_RATE = 64, 32, 5e-3

UNITS: dict[str, dict[str, dict[str, Any]]] = {
    "MesaNet": {"mesa": {"heads": 2, "steps": 10, "conv_size": 0}},
    "BMRU + minGRU": {"bmru": {}, "min_gru": {}},
}


def regression(sequences: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs `[B, 13, 6]`, with an input, its value and a mark of the question, and the value asked for `[B]`."""
    x = torch.randn(sequences, EXAMPLES + 1, SIZE, generator=generator)
    slopes = torch.randn(sequences, SIZE, 1, generator=generator) / SIZE**0.5
    shown, mark = x @ slopes, torch.zeros(sequences, EXAMPLES + 1, 1)
    answers = shown[:, -1, 0].clone()
    shown[:, -1], mark[:, -1] = 0.0, 1.0
    return torch.cat([x, shown, mark], -1), answers


def recall(sequences: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs `[B, 7, 17]`, with a key, its value and a mark of the question, and the value asked for `[B]`."""
    keys = torch.rand(sequences, KEYS, generator=generator).argsort(1)[:, :PAIRS]
    values = torch.randint(VALUES, (sequences, PAIRS), generator=generator)
    asked = torch.randint(PAIRS, (sequences, 1), generator=generator)
    x = torch.zeros(sequences, PAIRS + 1, KEYS + VALUES + 1)
    x[:, :PAIRS, :KEYS] = F.one_hot(keys, KEYS).float()
    x[:, :PAIRS, KEYS:-1] = F.one_hot(values, VALUES).float()
    x[:, -1, :KEYS] = F.one_hot(keys.gather(1, asked).squeeze(1), KEYS).float()
    x[:, -1, -1] = 1.0
    return x, values.gather(1, asked).squeeze(1)


#: The function that draws sequences, the number of features and that of outputs.
TASKS = {"regression": (regression, SIZE + 2, 1), "recall": (recall, KEYS + VALUES + 1, VALUES)}


def network(unit: str, task: str) -> mk.MRUNetwork:
    _, features, outputs = TASKS[task]
    return mk.MRUNetwork(features, outputs, width=WIDTH, num_blocks=2, units=UNITS[unit], pool="last")


def loss(task: str, output: Tensor, answers: Tensor) -> Tensor:
    return F.mse_loss(output.squeeze(-1), answers) if task == "regression" else F.cross_entropy(output, answers)


@torch.no_grad()
def error(model: mk.MRUNetwork, task: str, sequences: int, seed: int) -> float:
    """The squared error over the variance of the values, or the share of wrong answers, on new sequences."""
    x, answers = TASKS[task][0](sequences, torch.Generator().manual_seed(1000 + seed))
    output = model(x)[0]
    if task == "regression":
        return (loss(task, output, answers) / answers.var()).item()
    return (output.argmax(-1) != answers).float().mean().item()


def run(name: str, seed: int, arguments: argparse.Namespace) -> float:
    task, unit = name.split("; ")
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = network(unit, task)

    def batch_loss() -> Tensor:
        x, answers = TASKS[task][0](BATCH, generator)
        return loss(task, model(x)[0], answers)

    common.train(model, batch_loss, steps=arguments.steps, learning_rate=LEARNING_RATE)
    return error(model, task, arguments.sequences, seed)


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__, steps=300)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--units", nargs="+", choices=UNITS, default=list(UNITS))
    parser.add_argument("--sequences", type=int, default=1000, help="number of test sequences")
    arguments = parser.parse_args(argv)
    names = [f"{task}; {unit}" for task in arguments.tasks for unit in arguments.units]
    results = common.run_all(run, names, arguments)
    rows = [[*name.split("; "), common.spread(runs)] for name, runs in results.items()]
    text = common.table(["task", "unit", "error, %"], rows)
    text += f"\n\n{arguments.sequences} sequences x {arguments.seeds} seeds, trained for {arguments.steps} steps."
    text += " Regression: squared error over the variance. Recall: wrong answers; 75 % is chance."

    def draw(axes: Any) -> None:
        axes.bar(names, [100 * sum(runs) / len(runs) for runs in results.values()])
        axes.set(ylabel="error, %")
        axes.tick_params(axis="x", labelsize=6)

    common.finish("in_context", text, draw, arguments.out)


if __name__ == "__main__":
    main()
