"""Handwritten digits as spikes: rate code, latency code, and row by row, with about the same number of parameters.

scikit-learn's digits have 8 x 8 pixels with 17 levels. In the rate code every pixel spikes at each of 32 steps with a
probability that is its level. In the latency code every pixel but the dark ones spikes once, the brighter the earlier.
Row by row, a step is a row of 8 pixels as they are. A network is two layers of a unit and a linear map of the mean of
their outputs over time. With traces, each chunk of 4 steps has a loss of its own, and no gradient passes between
chunks: `mk.stream(unit, gradient="traces")` adds that of the steps before.

The rate is the mean output of the second layer: the share of neurons that spike in a step. For a BMRU it is the share
of its channels that write in a step.

Run from the repository's root: `python -m examples.spiking`. All units, codes and seeds take about 3 CPU minutes.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import mru_kernels as mk
from examples import common

STEPS = 32  # of the codes
CHUNK = 4
PARAMETERS = 10_000
BATCH = 64
LEARNING_RATE = 1e-2

UNITS: dict[str, Callable[..., nn.Module]] = {
    "LIF": mk.LIF,
    "LIF, reset to zero": functools.partial(mk.LIF, reset="zero"),
    "LIF, traces": mk.LIF,
    "BMRU": mk.BMRU,
}
if hasattr(mk, "PRF"):  # by its defaults, which are for thousands of steps, no neuron fires within 32
    UNITS["PRF"] = functools.partial(mk.PRF, dt_min=0.05, dt_max=0.5, threshold=0.1)


def rate(levels: Tensor) -> Tensor:
    """Spikes `[B, STEPS, 64]` of levels `[B, 64]` in [0, 1]."""
    return torch.bernoulli(levels.unsqueeze(1).expand(-1, STEPS, -1))


def latency(levels: Tensor) -> Tensor:
    """Spikes `[B, STEPS, 64]` of levels `[B, 64]` in [0, 1]."""
    time = ((1.0 - levels) * STEPS).round().unsqueeze(1)  # of level 0: after the last step
    return (torch.arange(STEPS).view(1, -1, 1) == time).float()


def rows(levels: Tensor) -> Tensor:
    """Rows `[B, 8, 8]` of levels `[B, 64]`."""
    return levels.view(-1, 8, 8)


CODES = {"rate": rate, "latency": latency, "rows": rows}
FEATURES = {"rate": 64, "latency": 64, "rows": 8}


class Network(nn.Module):
    """Two layers of a unit, and a linear map of their mean output."""

    def __init__(self, name: str, features: int, hidden_size: int):
        super().__init__()
        self.unit = UNITS[name](features, hidden_size, 2)
        self.head = nn.Linear(hidden_size, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.unit(x)[0].mean(1))

    def loss(self, x: Tensor, classes: Tensor) -> Tensor:
        return F.cross_entropy(self(x), classes)

    def loss_of_chunks(self, x: Tensor, classes: Tensor) -> Tensor:
        """The mean loss of chunks, each with its own output. Its gradient is the sum of those of the chunks."""
        feed = mk.stream(self.unit, gradient="traces")
        losses = [F.cross_entropy(self.head(feed(chunk).mean(1)), classes) for chunk in x.split(CHUNK, 1)]
        return torch.stack(losses).mean()


@functools.cache
def channels(name: str, features: int) -> int:
    """Channels of a layer, for the number of parameters nearest to PARAMETERS."""
    return min(range(8, 200, 2), key=lambda size: abs(common.parameters(Network(name, features, size)) - PARAMETERS))


def sizes(name: str, features: int) -> tuple[int, int]:
    """Channels of a layer, and parameters of the network."""
    size = channels(name, features)
    return size, common.parameters(Network(name, features, size))


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Levels `[N, 64]` in [0, 1] and classes `[N]`: four fifths to train, one fifth to test."""
    digits = load_digits()
    levels, classes = torch.tensor(digits.data / 16.0, dtype=torch.float32), torch.tensor(digits.target)
    train, test = train_test_split(torch.arange(len(classes)), test_size=0.2, random_state=0, stratify=classes)
    return levels[train], classes[train], levels[test], classes[test]


def run(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, tuple[float, float]]:
    return {code: result(name, code, seed, arguments.steps) for code in arguments.codes}


def result(name: str, code: str, seed: int, steps: int) -> tuple[float, float]:
    """The accuracy on test images, and the rate."""
    levels, classes, test_levels, test_classes = data()
    features = FEATURES[code]
    torch.manual_seed(seed)
    model = Network(name, features, channels(name, features))
    loss_of = model.loss_of_chunks if "traces" in name else model.loss

    def loss() -> Tensor:
        batch = torch.randint(len(classes), (BATCH,))
        return loss_of(CODES[code](levels[batch]), classes[batch])

    common.train(model, loss, steps=steps, learning_rate=LEARNING_RATE)
    with torch.no_grad():
        x = CODES[code](test_levels)
        accuracy = (model(x).argmax(-1) == test_classes).float().mean().item()
        if isinstance(model.unit, mk.BMRU):
            return accuracy, mk.write_rates(model.unit, x).layers[1].rate.mean().item()
        return accuracy, model.unit(x)[0].mean().item()


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__, steps=300)
    parser.add_argument("--units", nargs="+", choices=UNITS, default=list(UNITS), metavar="UNIT")
    parser.add_argument("--codes", nargs="+", choices=CODES, default=list(CODES), metavar="CODE", help=f"of {[*CODES]}")
    arguments = parser.parse_args(argv)
    results = common.run_all(run, arguments.units, arguments)

    lines = []
    for name, runs in results.items():
        networks = {FEATURES[code]: sizes(name, FEATURES[code]) for code in arguments.codes}
        cells = [" / ".join(common.spread([r[code][i] for r in runs]) for i in (0, 1)) for code in arguments.codes]
        lines.append([name, *(", ".join(map(str, size)) for size in zip(*networks.values(), strict=True)), *cells])
    text = common.table(["percent right / rate in percent", "channels", "parameters", *arguments.codes], lines)
    text += f"\n\n{arguments.steps} steps of {BATCH} images, {arguments.seeds} seeds, 360 test images;"
    text += f" channels and parameters for {' and '.join(map(str, networks))} inputs."

    def draw(axes: Any) -> None:
        scores = {c: {n: [r[c][0] for r in runs] for n, runs in results.items()} for c in arguments.codes}
        common.bars(axes, scores, "percent right")
        axes.set_title("8 x 8 digits as spikes; points: seeds")

    common.finish("spiking", text, draw, arguments.out)


if __name__ == "__main__":
    main()
