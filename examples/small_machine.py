"""Handwritten digits for small machines: accuracy with mismatch and with few bits, for four units.

The images are scikit-learn's, 8 x 8 pixels, one pixel per step, row by row. The recipe is that of the first-quadrant
unit (arXiv 2605.15216), for all units: no norm, ReLU, positions at each layer, the mean over time. Epsilon is held at 1
and then decays to 0 over most of the run. The model used is the best on validation images after epsilon is 0.

A layer is Linear, ReLU, unit, Linear, ReLU. It reads the output of the layer before it, or the pixel, and positions.
Each layer has a head; the scores are the sum of the heads of the means over time. All signals between the parts of the
first-quadrant network are non-negative, as in its circuits.

The first-quadrant network of seed 0 is then written in C, compiled, and run on the test images.

Run from the repository's root: `python -m examples.small_machine`.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mru_kernels as mk
from examples import common, digits

LAYERS = 2
WIDTH = 64
CHANNELS = 64
BATCH = 64
LEARNING_RATE = 6e-3
HOLD, DECAY = 0.05, 0.7  # shares of the steps in which epsilon is 1, and in which it falls from 1 to 0
CHECK_EVERY = 20  # steps between two measurements on validation images
MISMATCH = (0.05, 0.10, 0.15)
BITS = tuple(range(8, 1, -1))
IN_C = "first-quadrant BMRU"

UNITS: dict[str, Callable[[], mk.nn.MRUBase]] = {
    "first-quadrant BMRU": lambda: mk.FirstQuadrantBMRU(WIDTH, CHANNELS),
    "BMRU": lambda: mk.BMRU(WIDTH, CHANNELS),
    "minGRU": lambda: mk.MinGRU(WIDTH, CHANNELS, max_time_scale=float(digits.PIXELS)),
    "LRU": lambda: mk.LRU(WIDTH, CHANNELS, r_min=0.9, r_max=0.999),
}


class Model(nn.Module):
    """Pixels `[B, 64, 1]` to class scores `[B, 10]`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.register_buffer("positions", (1.0 + common.positions(digits.PIXELS, digits.POSITION_FEATURES)) / 2.0)
        features = [(WIDTH if i else 1) + digits.POSITION_FEATURES for i in range(LAYERS)]
        self.inputs = nn.ModuleList(nn.Linear(n, WIDTH) for n in features)
        self.units = nn.ModuleList(UNITS[name]() for _ in features)
        self.outputs = nn.ModuleList(nn.Linear(CHANNELS, WIDTH) for _ in features)
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 10) for _ in features)

    def forward(self, pixels: Tensor) -> Tensor:
        positions = self.positions.expand(len(pixels), -1, -1)
        x, scores = pixels, torch.zeros(())
        for read, unit, write, head in zip(self.inputs, self.units, self.outputs, self.heads, strict=True):
            states, _ = unit(F.relu(read(torch.cat([x, positions], -1))))
            x = F.relu(write(states))
            scores = scores + head(x.mean(1))
        return scores


def data() -> dict[str, tuple[Tensor, Tensor]]:
    """Pixels in [0, 1] `[N, 64, 1]` and classes `[N]`, to train, validate (a fifth of the rest) and test."""
    pixels, classes, test_pixels, test_classes = digits.data("row by row")
    pixels, test_pixels = ((x[..., :1] + 1.0) / 2.0 for x in (pixels, test_pixels))
    count = len(pixels) * 4 // 5
    return {
        "train": (pixels[:count], classes[:count]),
        "validation": (pixels[count:], classes[count:]),
        "test": (test_pixels, test_classes),
    }


@torch.no_grad()
def accuracy(model: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    return (model(part[0]).argmax(-1) == part[1]).float().mean().item()


def trained(name: str, steps: int, parts: dict[str, tuple[Tensor, Tensor]]) -> Model:
    """The model that is best on validation images, of those after epsilon is 0."""
    model = Model(name)
    pixels, classes = parts["train"]
    decay, hold = max(1, int(DECAY * steps)), int(HOLD * steps)
    epsilon = mk.EpsilonSchedule(model, decay, hold_steps=hold) if "BMRU" in name else None
    best: tuple[float, dict[str, Any]] = (-1.0, {})
    step = 0

    def loss() -> Tensor:
        batch = torch.randint(len(classes), (BATCH,))
        return F.cross_entropy(model(pixels[batch]), classes[batch], label_smoothing=0.1)

    def keep_the_best(_: float) -> None:
        nonlocal best, step
        step += 1
        if step >= hold + decay and (step % CHECK_EVERY == 0 or step == steps):
            score = accuracy(model, parts["validation"])
            if score > best[0]:
                best = score, copy.deepcopy(model.state_dict())

    common.train(model, loss, steps=steps, learning_rate=LEARNING_RATE, epsilon=epsilon, after=keep_the_best)
    model.load_state_dict(best[1])
    return model


def run(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    torch.manual_seed(seed)
    parts = data()
    model = trained(name, arguments.steps, parts)
    if name == IN_C and seed == 0:
        arguments.out.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), arguments.out / "small_machine.pt")
    table = mk.robustness(model, lambda m: accuracy(m, parts["test"]), MISMATCH, arguments.trials, seed)
    result = {"exact": table.nominal} | {f"{100 * size:g} %": table.mean(size) for size in MISMATCH}
    return result | {f"{bits} bits": accuracy(mk.quantized(model, bits), parts["test"]) for bits in BITS}


MAIN = """\
#include <stdio.h>
#include <string.h>
#define LAYER0_DECLARATIONS
#include "layer0.c"
#define LAYER1_DECLARATIONS
#include "layer1.c"
#include "heads.h" /* POSITIONS [STEPS][FEATURES], HEADS [LAYERS][CLASSES][WIDTH], BIAS [CLASSES] */

static float sums[LAYERS][WIDTH];

static void add(float *sum, const float *x) {
    for (int d = 0; d < WIDTH; d++) sum[d] += x[d] / STEPS;
}

/* Reads images, one float a pixel, and writes the class of each as an int. */
int main(void) {
    static float image[STEPS], input[WIDTH + FEATURES], output[WIDTH];
    while (fread(image, sizeof image, 1, stdin) == 1) {
        layer0_state first;
        layer1_state second;
        layer0_init(&first);
        layer1_init(&second);
        memset(sums, 0, sizeof sums);
        for (int t = 0; t < STEPS; t++) {
            input[0] = image[t];
            for (int i = 0; i < FEATURES; i++) input[1 + i] = POSITIONS[t][i];
            if (layer0_step(&first, input, output)) return 1;
            add(sums[0], output);
            for (int d = 0; d < WIDTH; d++) input[d] = output[d];
            for (int i = 0; i < FEATURES; i++) input[WIDTH + i] = POSITIONS[t][i];
            if (layer1_step(&second, input, output)) return 1;
            add(sums[1], output);
        }
        int best = 0;
        float most = 0;
        for (int k = 0; k < CLASSES; k++) {
            float score = BIAS[k];
            for (int i = 0; i < LAYERS; i++)
                for (int d = 0; d < WIDTH; d++) score += HEADS[i][k][d] * sums[i][d];
            if (k == 0 || score > most) best = k, most = score;
        }
        fwrite(&best, sizeof best, 1, stdout);
    }
    return 0;
}
"""


def in_c(model: Model, folder: Path, weights: str, images: Tensor) -> tuple[int, int, Tensor]:
    """Write the model as C into `folder`, compile it and run it on images `[N, 64, 1]`.

    Returns:
        Bytes of parameters, bytes of state and buffers, and the classes `[N]`.
    """
    compiler = shutil.which("cc")
    if compiler is None:
        raise FileNotFoundError("cc: expected a C compiler on the PATH, found none")
    folder.mkdir(parents=True, exist_ok=True)
    files, flash, ram = [], 0, 0
    for i in range(LAYERS):
        parts = (model.inputs[i], nn.ReLU(), model.units[i], model.outputs[i], nn.ReLU())
        program = mk.export.c(nn.Sequential(*parts), folder / f"layer{i}.c", weights=weights)
        files.append(program.path.name)
        flash, ram = flash + program.flash, ram + program.ram
    tables = {
        "POSITIONS[STEPS][FEATURES]": model.positions,
        "HEADS[LAYERS][CLASSES][WIDTH]": torch.stack([head.weight for head in model.heads]),
        "BIAS[CLASSES]": torch.stack([head.bias for head in model.heads]).sum(0),
    }
    sizes = {"STEPS": digits.PIXELS, "FEATURES": digits.POSITION_FEATURES, "LAYERS": LAYERS, "CLASSES": 10}
    lines = [f"#define {name} {size}" for name, size in (sizes | {"WIDTH": WIDTH}).items()]
    for name, table in tables.items():
        lines.append(f"static const float {name} = {_initialiser(table.tolist())};")
        flash += 4 * table.numel()
    (folder / "heads.h").write_text("\n".join(lines) + "\n")
    (folder / "main.c").write_text(MAIN)
    subprocess.run([compiler, "-std=c99", "-O2", "-o", "program", "main.c", *files], cwd=folder, check=True)
    pixels = images.numpy().tobytes()
    done = subprocess.run([str(folder.resolve() / "program")], input=pixels, capture_output=True, check=True)
    return flash, ram + 4 * LAYERS * WIDTH, torch.frombuffer(bytearray(done.stdout), dtype=torch.int32)


def _initialiser(values: Any) -> str:
    if isinstance(values, list):
        return "{" + ", ".join(map(_initialiser, values)) + "}"
    return f"{values!r}f"


def about_c(folder: Path) -> str:
    """A table of the first-quadrant network of seed 0 as programs in C."""
    model = Model(IN_C)
    model.load_state_dict(torch.load(folder / "small_machine.pt"))
    images, classes = data()["test"]
    rows = []
    for weights in ("float32", "int8"):
        flash, ram, found = in_c(model, folder / f"small_machine_{weights}", weights, images)
        same = (found == model(images).argmax(-1)).sum().item()
        rows.append([weights, f"{flash:,}", ram, common.spread([(found == classes).float().mean().item()]), same])
    return common.table([f"{IN_C} in C", "bytes of parameters", "of RAM", "percent right", "images as in torch"], rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__, steps=2000)
    parser.add_argument("--units", nargs="+", choices=UNITS, default=list(UNITS), metavar="UNIT")
    parser.add_argument("--trials", type=int, default=10, help="draws for each mismatch")
    arguments = parser.parse_args(argv)
    results = common.run_all(run, arguments.units, arguments)

    columns = list(next(iter(results.values()))[0])
    rows = [
        [name, f"{common.parameters(Model(name)):,}", *(common.spread([r[c] for r in runs]) for c in columns)]
        for name, runs in results.items()
    ]
    text = common.table(["percent right", "parameters", *columns], rows)
    text += f"\n\n{arguments.steps} steps of {BATCH} images, {arguments.seeds} seeds, 360 test images,"
    text += f" {arguments.trials} draws for each mismatch."

    if IN_C in results:
        try:
            text += f"\n\n{about_c(arguments.out)}"
        except FileNotFoundError as error:  # no compiler
            text += f"\n\n{error}"

    def draw(axes: Any) -> None:
        shown = ("exact", "5 %", "15 %", "4 bits", "2 bits")
        common.bars(axes, {c: {n: [r[c] for r in runs] for n, runs in results.items()} for c in shown}, "percent right")
        axes.set_title("8 x 8 digits, one pixel per step, with mismatch or few bits; points: seeds")

    common.finish("small_machine", text, draw, arguments.out)


if __name__ == "__main__":
    main()
