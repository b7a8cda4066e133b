"""Handwritten digits, one pixel per step, in two orders: every unit with about the same number of parameters.

scikit-learn's digits have 8 x 8 pixels, so a sequence has 64 steps. The pixels come row by row, or in one fixed random
order that puts neighbours far apart. Each step also has sines and cosines of its position, as in arXiv 2601.09495. The
gate of a bistable unit sees only its own step, so without positions it cannot know which pixel it sees. Every unit is
in the same residual network (`mk.MRUNetwork`). The number of channels of a unit is chosen so that the number of
parameters is nearest to PARAMETERS. Only the output of the last step is used.

The units: arXiv 2601.09495 (BMRU), 2605.11855 (CMRU, alpha-CMRU), 2605.15216 (first quadrant), 2410.01201 (minGRU,
minLSTM), 2303.06349 (LRU).

Run from the repository's root: `python -m examples.digits`.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

import mru_kernels as mk
from examples import common

PIXELS = 64
POSITION_FEATURES = 16
PARAMETERS = 20_000
WIDTH = 32
BLOCKS = 2
BATCH = 64
LEARNING_RATE = 1e-2

_TIME_SCALE = {"max_time_scale": float(PIXELS)}
UNITS: dict[str, Mapping[str, Mapping[str, Any]]] = {
    "BMRU": {"bmru": {}},
    "BMRU, epsilon 1 to 0": {"bmru": {}},
    "CMRU": {"cmru": {}},
    "alpha-CMRU": {"alpha_cmru": {}},
    "first-quadrant BMRU": {"first_quadrant_bmru": {}},
    "first-quadrant BMRU, epsilon 1 to 0": {"first_quadrant_bmru": {}},
    "minGRU": {"min_gru": _TIME_SCALE},
    "minLSTM": {"min_lstm": _TIME_SCALE},
    "LRU": {"lru": {"r_min": 0.9, "r_max": 0.999}},
    "BMRU + minGRU": {"bmru": {}, "min_gru": _TIME_SCALE},
    "nn.GRU": {"gru": {}},
}
ORDERS = ("row by row", "permuted")


def network(name: str, hidden_size: int, conv_size: int = 0) -> mk.MRUNetwork:
    return mk.MRUNetwork(
        1 + POSITION_FEATURES,
        10,
        width=WIDTH,
        num_blocks=BLOCKS,
        units=UNITS[name],
        hidden_size=hidden_size,
        conv_size=conv_size,
        pool="last",
    )


@functools.cache
def channels(name: str) -> int:
    """Channels of each unit, for the number of parameters nearest to PARAMETERS."""
    return min(range(4, 129, 2), key=lambda size: abs(common.parameters(network(name, size)) - PARAMETERS))


def data(order: str, positions: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs `[N, 64, 17]` and classes `[N]`: four fifths to train, one fifth to test.

    The first feature is the pixel. The other 16 are the position; without `positions` they are zero, so the network
    keeps its number of parameters.
    """
    digits = load_digits()
    pixels = torch.tensor(digits.data / 8.0 - 1.0, dtype=torch.float32).unsqueeze(-1)
    if order == "permuted":
        pixels = pixels[:, torch.randperm(PIXELS, generator=torch.Generator().manual_seed(0))]
    places = common.positions(PIXELS, POSITION_FEATURES) * positions
    pixels = torch.cat([pixels, places.expand(len(pixels), -1, -1)], -1)
    classes = torch.tensor(digits.target)
    train, test = train_test_split(torch.arange(len(classes)), test_size=0.2, random_state=0, stratify=classes)
    return pixels[train], classes[train], pixels[test], classes[test]


def run(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    return {order: accuracy(name, order, seed, arguments) for order in arguments.orders}


def accuracy(name: str, order: str, seed: int, arguments: argparse.Namespace) -> float:
    pixels, classes, test_pixels, test_classes = data(order, arguments.positions)
    hidden_size = channels(name)
    torch.manual_seed(seed)
    model = network(name, hidden_size, arguments.conv_size)
    epsilon = common.epsilon_schedule(model, arguments.steps) if "epsilon" in name else None

    def loss() -> Tensor:
        batch = torch.randint(len(classes), (BATCH,))
        return F.cross_entropy(model(pixels[batch])[0], classes[batch], label_smoothing=0.1)

    rate = arguments.learning_rate or LEARNING_RATE
    common.train(model, loss, steps=arguments.steps, learning_rate=rate, epsilon=epsilon)
    with torch.no_grad():
        return (model(test_pixels)[0].argmax(-1) == test_classes).float().mean().item()


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__, steps=600)
    parser.add_argument("--units", nargs="+", choices=UNITS, default=list(UNITS), metavar="UNIT")
    parser.add_argument("--learning-rate", type=float, help=f"for all units (default: {LEARNING_RATE})")
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=ORDERS, metavar="ORDER", help=f"of {ORDERS}")
    parser.add_argument(
        "--positions", action=argparse.BooleanOptionalAction, default=True, help="give positions as input"
    )
    parser.add_argument("--conv-size", type=int, default=0, help="steps of a convolution in front of the units")
    arguments = parser.parse_args(argv)
    orders = arguments.orders
    results = common.run_all(run, arguments.units, arguments)

    rows = []
    for name, runs in results.items():
        size = channels(name)
        scores = [common.spread([r[order] for r in runs]) for order in orders]
        rows.append([name, f"{common.parameters(network(name, size, arguments.conv_size)):,}", size, *scores])
    text = common.table(["percent right", "parameters", "channels of a unit", *orders], rows)
    text += f"\n\n{arguments.steps} steps of {BATCH} images, {arguments.seeds} seeds, 360 test images"
    text += f", {'with' if arguments.positions else 'without'} positions, conv_size {arguments.conv_size}."

    def draw(axes: Any) -> None:
        common.bars(
            axes, {o: {n: [r[o] for r in runs] for n, runs in results.items()} for o in orders}, "percent right"
        )
        axes.set_title("8 x 8 digits, one pixel per step; points: seeds")

    common.finish("digits", text, draw, arguments.out)


if __name__ == "__main__":
    main()
