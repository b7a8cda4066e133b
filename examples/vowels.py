"""Recognise speakers from sequences of different lengths, given as `PackedSequence`, as with `torch.nn.GRU`.

The data are Japanese Vowels (Kudo, Toyama, Shimbo 1999; UCI Machine Learning Repository, doi 10.24432/C5NS47, CC BY
4.0). Nine men say two vowels. An utterance has 7 to 29 frames of 12 coefficients. There are 270 utterances to train and
370 to test. The wheels of aeon and sktime contain the data in two files, and nothing else of them is used:

    python -m pip install --no-deps aeon==1.6.0
    python -m examples.vowels

Each unit has one layer of two directions. The mean of its outputs over the steps of each sequence goes into a linear
head. The units: arXiv 2601.09495 (BMRU), 2605.11855 (CMRU, alpha-CMRU), 2605.15216 (first quadrant), 2410.01201
(minGRU, minLSTM), 2405.13956 (Aaren), 2303.06349 (LRU).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

import mru_kernels as mk
from examples import common

FEATURES = 12
SPEAKERS = 9
CHANNELS = 32
BATCH = 32
LEARNING_RATE = 1e-2

UNITS: dict[str, Callable[..., nn.Module]] = {
    "BMRU": mk.BMRU,
    "CMRU": mk.CMRU,
    "alpha-CMRU": mk.AlphaCMRU,
    "first-quadrant BMRU": mk.FirstQuadrantBMRU,
    "minGRU": mk.MinGRU,
    "minLSTM": mk.MinLSTM,
    "Aaren": mk.Aaren,
    "LRU": mk.LRU,
    "nn.GRU": nn.GRU,
}

Set = tuple[list[Tensor], Tensor]


class Model(nn.Module):
    """Maps sequences of any lengths to scores `[B, SPEAKERS]`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.encoder = nn.Linear(FEATURES, CHANNELS)
        self.unit = UNITS[name](CHANNELS, CHANNELS, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * CHANNELS, SPEAKERS)

    def forward(self, sequences: list[Tensor]) -> Tensor:
        packed = pack_sequence(sequences, enforce_sorted=False)
        output, _ = self.unit(packed._replace(data=self.encoder(packed.data)))
        return self.head(mean(output))


def mean(packed: PackedSequence) -> Tensor:
    """The mean over the steps of each sequence `[B, C]`. Padding is zero, so it adds nothing."""
    padded, lengths = pad_packed_sequence(packed, batch_first=True)
    return padded.sum(1) / lengths.unsqueeze(1)


def folder() -> Path | None:
    """The folder of the data in an installed package; None if there is none."""
    for package in ("aeon", "sktime"):
        spec = find_spec(package)  # without running the package
        for place in spec.submodule_search_locations or () if spec else ():
            found = Path(place, "datasets", "data", "JapaneseVowels")
            if found.is_dir():
                return found
    return None


def read(file: Path) -> Set:
    """Sequences `[T, FEATURES]` and speakers from a ".ts" file, in which colons separate channels and class."""
    sequences, speakers = [], []
    _, _, lines = file.read_text().partition("@data\n")
    for line in lines.split():
        *series, speaker = line.split(":")
        sequences.append(torch.tensor([[float(value) for value in channel.split(",")] for channel in series]).T)
        speakers.append(int(speaker) - 1)
    return sequences, torch.tensor(speakers)


def load(data: Path) -> tuple[Set, Set]:
    """The sets to train and to test, normalised by the mean and standard deviation of the training set."""
    train, test = (read(data / f"JapaneseVowels_{name}.ts") for name in ("TRAIN", "TEST"))
    frames = torch.cat(train[0])
    center, scale = frames.mean(0), frames.std(0)
    return tuple(([(s - center) / scale for s in sequences], speakers) for sequences, speakers in (train, test))


def run(name: str, seed: int, arguments: argparse.Namespace) -> tuple[float, int]:
    (sequences, speakers), (test_sequences, test_speakers) = load(arguments.data)
    torch.manual_seed(seed)
    model = Model(name)

    def loss() -> Tensor:
        batch = torch.randint(len(sequences), (BATCH,))
        return F.cross_entropy(model([sequences[i] for i in batch]), speakers[batch], label_smoothing=0.1)

    rate = arguments.learning_rate or LEARNING_RATE
    common.train(model, loss, steps=arguments.steps, learning_rate=rate)
    with torch.no_grad():
        right = (model(test_sequences).argmax(-1) == test_speakers).float().mean().item()
    return right, common.parameters(model)


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__, steps=500)
    parser.add_argument("--units", nargs="+", choices=UNITS, default=list(UNITS), metavar="UNIT")
    parser.add_argument("--learning-rate", type=float, help=f"for all units (default: {LEARNING_RATE})")
    parser.add_argument("--data", type=Path, default=folder(), help="folder of JapaneseVowels_TRAIN.ts and _TEST.ts")
    arguments = parser.parse_args(argv)
    if arguments.data is None:
        parser.error("no data: python -m pip install --no-deps aeon==1.6.0")
    (sequences, _), (test_sequences, _) = load(arguments.data)
    lengths = [len(s) for s in sequences + test_sequences]
    results = common.run_all(run, arguments.units, arguments)

    rows = [[name, f"{runs[0][1]:,}", common.spread([r[0] for r in runs])] for name, runs in results.items()]
    text = common.table(["unit", "parameters", "percent right"], rows)
    text += f"\n\n{len(sequences)} utterances to train, {len(test_sequences)} to test, {min(lengths)} to {max(lengths)}"
    text += f" frames; {arguments.steps} steps of {BATCH} utterances, {arguments.seeds} seeds."

    def draw(axes: Any) -> None:
        common.bars(axes, {"": {name: [r[0] for r in runs] for name, runs in results.items()}}, "percent right")
        axes.set_title("Japanese Vowels, nine speakers; points: seeds")

    common.finish("vowels", text, draw, arguments.out)


if __name__ == "__main__":
    main()
