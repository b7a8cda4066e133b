"""Compare MesaNet with BMRU and minGRU in two tasks that are learned within a sequence: regression and recall.

In `regression` every sequence has its own linear map. A step shows a random input and the noisy answer to the previous
one, and the current input must be answered. The error is that of the answers without noise, divided by their variance:
100 % is the error of answering 0. Ridge regression over all examples before a step is the best linear predictor.

`recall` is a small form of multi-query associative recall (MQAR, arXiv 2312.04927), with the sequences of
`examples.recall`: pairs of a key and a value are shown at random steps under noise. The last step shows one of the
keys, and its value must be named.

Run from the repository's root: `python -m examples.in_context`.
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
from examples import common, recall

BATCH = 32
WIDTH = 32
#: Of all units. With seed 0, 5e-3 was worse for MesaNet in recall and for BMRU + minGRU in regression, and as good for
#: BMRU + minGRU in recall. No other rate was tried.
LEARNING_RATE = 1e-2

#: The initial time scales of minGRU reach the length of training.
MIN_GRU = {"max_time_scale": 64.0}
MESA = {"heads": 2, "tolerance": 1e-4}
UNITS: dict[str, dict[str, dict[str, Any]]] = {
    "MesaNet": {"mesa": MESA},
    "BMRU + minGRU": {"bmru": {}, "min_gru": MIN_GRU},
    "BMRU + minGRU + MesaNet": {"bmru": {}, "min_gru": MIN_GRU, "mesa": MESA},
}

TASKS = ("regression", "recall")
INPUTS = 4  # numbers of an input of a regression
EXAMPLES = (4, 8, 16, 32, 64)  # before the tested answer
TRAIN_EXAMPLES = 32
NOISE = 0.1  # standard deviation of the noise of an answer
KEYS = VALUES = 16
PAIRS = (4, 8)  # in a tested sequence; training has the most
LENGTH = 32  # steps of a sequence of recall


def regression(sequences: int, examples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs `[B, T, INPUTS + 1]` and the answers without noise `[B, T]`, of variance 1, with T = examples + 1."""
    x = torch.randn(sequences, examples + 1, INPUTS, generator=generator)
    weight = torch.randn(sequences, INPUTS, 1, generator=generator) / INPUTS**0.5
    answers = (x @ weight).squeeze(-1)
    seen = answers + NOISE * torch.randn(answers.shape, generator=generator)
    return torch.cat([x, F.pad(seen[:, :-1], (1, 0)).unsqueeze(-1)], -1), answers


def ridge(x: Tensor) -> Tensor:
    """The best linear predictions `[B, T]` for the inputs of `regression`: the mean of the posterior of the weights."""
    q, k, v = x[..., :INPUTS], F.pad(x[:, :-1, :INPUTS], (0, 0, 1, 0)), x[..., INPUTS:]
    q, k, v = (s.double().unsqueeze(2) for s in (q, k, v))
    ones = torch.ones_like(q[..., 0])
    prior = torch.full((1, INPUTS), INPUTS * NOISE**2, dtype=torch.float64)
    return mk.mesa(q, k, v, 0 * ones, ones, prior, solver="direct")[0].squeeze(-1).squeeze(-1)


def questions(sequences: int, pairs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs `[B, LENGTH, features]` and the values `[B, pairs]` of the keys that the last steps show."""
    sizes = {"keys": KEYS, "values": VALUES, "pairs": pairs, "questions": pairs}
    return recall.associations(sequences, LENGTH, generator, **sizes, noise=0.0)


def network(unit: str, task: str) -> mk.MRUNetwork:
    sizes = (INPUTS + 1, 1) if task == "regression" else (KEYS + VALUES + 2, VALUES)
    return mk.MRUNetwork(*sizes, width=WIDTH, num_blocks=2, units=UNITS[unit], conv_size=4)


def errors(predicted: Tensor, answers: Tensor) -> list[float]:
    """The mean squared error after each number of examples."""
    squares = (predicted - answers).square().mean(0)
    return [squares[n].item() for n in EXAMPLES]


@torch.no_grad()
def test(model: mk.MRUNetwork | None, task: str, sequences: int, seed: int) -> list[float]:
    """Errors after each number of examples, or accuracies for each number of pairs, on new sequences.

    None stands for ridge regression.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    if task == "regression":
        x, answers = regression(sequences, max(EXAMPLES), generator)
        return errors(ridge(x) if model is None else model(x)[0].squeeze(-1), answers)
    right = []
    for pairs in PAIRS:
        x, values = questions(sequences, pairs, generator)
        right.append((model(x)[0][:, -pairs:].argmax(-1) == values).float().mean().item())
    return right


def run(name: str, seed: int, arguments: argparse.Namespace) -> tuple[str, list[float]]:
    """The number of parameters and the results of `test`."""
    task, unit = name.split("; ")
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = network(unit, task)

    def loss() -> Tensor:
        if task == "regression":
            x, answers = regression(BATCH, TRAIN_EXAMPLES, generator)
            return (model(x)[0].squeeze(-1) - answers).square().mean()
        x, values = questions(BATCH, max(PAIRS), generator)
        return F.cross_entropy(model(x)[0][:, -max(PAIRS) :].transpose(1, 2), values)

    common.train(model, loss, steps=arguments.steps, learning_rate=LEARNING_RATE)
    return f"{common.parameters(model):,}", test(model, task, arguments.sequences, seed)


Results = dict[str, list[tuple[str, list[float]]]]


def tables(results: Results, arguments: argparse.Namespace) -> str:
    parts = []
    for task in arguments.tasks:
        counts, thing = (EXAMPLES, "examples") if task == "regression" else (PAIRS, "pairs")
        rows = []
        for name, runs in results.items():
            if name.startswith(task):
                cells = (common.spread(column) for column in zip(*(numbers for _, numbers in runs), strict=True))
                rows.append([name.removeprefix(f"{task}; "), runs[0][0], *cells])
        parts.append(common.table([task, "parameters", *(f"{n} {thing}" for n in counts)], rows))
    settings = f"{arguments.sequences} sequences x {arguments.seeds} seeds, {arguments.steps} steps of training"
    parts.append(
        f"Regression: error in percent of the variance. Recall: percent right; chance is {100 / VALUES:.0f} %.\n"
        f"{settings} with {TRAIN_EXAMPLES} examples and {max(PAIRS)} pairs."
    )
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__, steps=800)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--units", nargs="+", choices=UNITS, default=list(UNITS))
    parser.add_argument("--sequences", type=int, default=500, help="number of test sequences")
    arguments = parser.parse_args(argv)
    results: Results = common.run_all(run, [f"{t}; {u}" for t in arguments.tasks for u in arguments.units], arguments)
    if "regression" in arguments.tasks:
        best = [test(None, "regression", arguments.sequences, seed) for seed in range(arguments.seeds)]
        results["regression; ridge regression"] = [("", numbers) for numbers in best]

    def draw(axes: Any) -> None:
        for name, runs in results.items():
            task, unit = name.split("; ")
            if task == "regression":
                means = [statistics.mean(column) for column in zip(*(numbers for _, numbers in runs), strict=True)]
                axes.plot(EXAMPLES, means, marker="o", label=unit)
                axes.legend()
        axes.set(xscale="log", yscale="log", xlabel="examples", ylabel="error of regression / variance")

    common.finish("in_context", tables(results, arguments), draw, arguments.out)


if __name__ == "__main__":
    main()
