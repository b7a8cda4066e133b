"""Learned delays and memory: which of the two recalls a bit of some steps ago, and a sign of long ago.

Every step shows a random bit, 1 or -1. Now and then, on average every 150 steps, it also shows a sign. Task "recall":
answer with the bit of 40 steps ago. Task "scales": answer with the bits of 24 and 40 steps ago, and with the sign last
shown. Chance is 50 % for each answer. A state of 16 channels holds few bits; a convolution over 64 steps does not see
most signs.

All models are one block of `MRUNetwork`. mGRADE (arXiv 2507.01829) is minGRU after a convolution with learned delays.
"convolution" has a linear map in place of the unit. At the start the delays are 0, 16, 32 and 48, so those of the
answers are as far as possible from all of them: a narrow bump has no gradient towards them. The width sigma begins at
8 steps and falls to 0.7 in the first half of the training, as in DCLS (arXiv 2306.17670). The delays have a higher
learning rate and no weight decay.

Run from the repository's root: `python -m examples.delays`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mru_kernels as mk
from bench import drawing
from examples import common

TAPS = 64
COUNT = 4  # delays of a channel
WIDTH = 16
BATCH = 16
STEPS = 256  # of a sequence in training
INTERVAL = 150  # mean number of steps between signs
SIGMA = 0.7
LEARNING_RATE = 1e-2

TASKS = {"recall": (40,), "scales": (24, 40)}  # the delays of the bits
MEMORY: dict[str, dict[str, Any]] = {"min_gru": {"max_time_scale": 300}}
MODELS: dict[str, dict[str, Any]] = {
    "mGRADE": {"units": MEMORY, "delay": {"taps": TAPS, "count": COUNT}},
    "minGRU": {"units": MEMORY},
    "convolution": {"units": MEMORY, "delay": {"taps": TAPS, "count": COUNT}},  # its unit is replaced
    "BMRU with delays": {"units": "bmru", "delay": {"taps": TAPS, "count": COUNT}},
}


class Memoryless(nn.Linear):
    """A linear map with the interface of a unit."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return super().forward(input), input.new_zeros(1, input.shape[0], self.out_features)


def network(name: str, answers: int) -> mk.MRUNetwork:
    model = mk.MRUNetwork(3, answers, width=WIDTH, num_blocks=1, **MODELS[name])
    if name == "convolution":
        model.blocks[0].units[0] = Memoryless(WIDTH, WIDTH)
    return model


def draw(task: str, sequences: int, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs `[B, T, 3]`: bit, sign, and whether a sign is shown; and answers `[B, T, answers]`, each 1 or -1."""
    shape = (sequences, steps)
    bits, signs = (2.0 * torch.randint(2, shape, generator=generator) - 1.0 for _ in range(2))
    shown = torch.rand(shape, generator=generator) < 1 / INTERVAL
    shown[:, 0] = True
    last = torch.where(shown, torch.arange(steps), 0).cummax(1).values
    answers = [F.pad(bits, (delay, 0))[:, :steps] for delay in TASKS[task]]
    if task == "scales":
        answers.append(signs.gather(1, last))
    return torch.stack([bits, shown * signs, shown.float()], -1), torch.stack(answers, -1)


class Result(NamedTuple):
    """The share of right answers for each of a task, and the learned delays and their weights."""

    right: list[float]
    delays: list[float]
    weights: list[float]


def train(model: mk.MRUNetwork, task: str, generator: torch.Generator, arguments: argparse.Namespace) -> None:
    layers = [module for module in model.modules() if isinstance(module, mk.DelayConv)]
    positions = [layer.position for layer in layers]
    others = [p for p in model.parameters() if not any(p is position for position in positions)]
    groups = [{"params": others}]
    if positions:
        rate = LEARNING_RATE * arguments.position_rate
        groups.append({"params": positions, "lr": rate, "weight_decay": 0.0})
    done = 0

    def set_sigma() -> None:
        share = min(1.0, 2.0 * done / arguments.steps)
        for layer in layers:
            layer.sigma = arguments.sigma * (SIGMA / arguments.sigma) ** share

    def loss() -> Tensor:
        x, answers = draw(task, BATCH, STEPS, generator)
        scores, _ = model(x)
        return F.softplus(-scores * answers)[:, max(TASKS[task]) :].mean()

    def after(_: float) -> None:
        nonlocal done
        done += 1
        set_sigma()
        for layer in layers:
            layer.clamp_positions()

    set_sigma()
    common.train(model, loss, steps=arguments.steps, learning_rate=LEARNING_RATE, after=after, groups=groups)


def run(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Result]:
    results = {}
    for task, delays in TASKS.items():
        torch.manual_seed(seed)
        model = network(name, len(delays) + (task == "scales"))
        train(model, task, torch.Generator().manual_seed(seed), arguments)
        x, answers = draw(task, 64, 1024, torch.Generator().manual_seed(1000 + seed))
        with torch.no_grad():
            right = ((model(x)[0] > 0) == (answers > 0))[:, max(delays) :].float().mean((0, 1)).tolist()
        layer = model.blocks[0].conv
        learned = [] if layer is None else [t.flatten().tolist() for t in (layer.position, layer.weight)]
        results[task] = Result(right, *(learned or ([], [])))
    return results


def _plot(axes: Any, found: dict[str, list[tuple[float, float]]]) -> None:
    """Draw a row for each model: the delays of all channels and seeds, each as high as the size of its weight."""
    largest = max((abs(w) for points in found.values() for _, w in points), default=1.0)
    for row, ((_, points), colour) in enumerate(zip(found.items(), drawing.COLOURS, strict=False)):
        heights = [row + 0.9 * abs(w) / largest for _, w in points]
        axes.plot([p for p, _ in points], heights, "o", markersize=5, alpha=0.6, color=colour, markeredgewidth=0)
    axes.set(xlabel="delay in steps", xlim=(-1, TAPS), ylim=(-0.1, len(found)))
    axes.set_yticks(range(len(found)), list(found))
    axes.set_title("learned delays; height: size of the weight", pad=30)
    starts = [i * TAPS / COUNT for i in range(COUNT)]
    for places, style, name in ((starts, ":", "start"), (TASKS["scales"], "--", "answer")):
        for place in places:
            axes.axvline(place, color=drawing.GREY, linestyle=style)
            axes.annotate(name, (place, 1), (0, 5), xycoords=("data", "axes fraction"), textcoords="offset points",
                          ha="center", color=drawing.GREY)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__, steps=1200)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--sigma", type=float, default=8.0, help="the width of the delays at the start, in steps")
    parser.add_argument(
        "--position-rate", type=float, default=10.0, help="learning rate of the delays over the others'"
    )
    arguments = parser.parse_args(argv)
    results = common.run_all(run, arguments.models, arguments)
    columns = [(task, f"{task}: bit {delay} ago", i) for task in TASKS for i, delay in enumerate(TASKS[task])]
    columns.append(("scales", "scales: last sign", len(TASKS["scales"])))
    rows = [
        [name, *(common.spread([r[task].right[i] for r in runs]) for task, _, i in columns)]
        for name, runs in results.items()
    ]
    text = common.table(["percent right", *(column for _, column, _ in columns)], rows)
    text += (
        f"\n\n{arguments.seeds} seeds, {arguments.steps} steps of {BATCH} x {STEPS}; chance 50 %; sigma from"
        f" {arguments.sigma:g} to {SIGMA}, learning rate {LEARNING_RATE:g}, that of the delays times"
        f" {arguments.position_rate:g}."
    )

    def plot(axes: Any) -> None:
        found = {name: [p for r in runs for p in zip(r["scales"].delays, r["scales"].weights, strict=True)]
                 for name, runs in results.items()}  # fmt: skip
        _plot(axes, {name: points for name, points in found.items() if points})

    common.finish("delays", text, plot, arguments.out)


if __name__ == "__main__":
    main()
