"""Train a small classifier on handwritten digits, compare its kernels with the reference, and time them.

Run from the repository's root: `make demo`, or `python -m examples.demo`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import mru_kernels as mk
from bench import compare, inputs
from examples import common

STEPS = 64  # an image has 8 x 8 pixels, and a step reads one
POSITION_FEATURES = 16
CHANNELS = 64
EPOCHS = 30
BATCH = 64


class Block(nn.Module):
    """A pre-norm residual block around a unit, `[B, T, C]` to `[B, T, C]`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.unit = mk.BMRU(channels, channels)
        self.mix = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GLU())

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.unit(self.norm(x))
        return x + self.mix(h)


class Classifier(nn.Module):
    """Two blocks that read pixels `[B, 64]` one at a time and give class scores `[B, 10]`."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("position", common.positions(STEPS, POSITION_FEATURES))
        self.embed = nn.Linear(1 + POSITION_FEATURES, CHANNELS)
        self.blocks = nn.Sequential(Block(CHANNELS), Block(CHANNELS))
        self.head = nn.Sequential(nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, 10))

    def forward(self, pixels: Tensor) -> Tensor:
        position = self.position.expand(pixels.shape[0], -1, -1)
        x = self.embed(torch.cat([pixels.unsqueeze(-1), position], dim=-1))
        return self.head(self.blocks(x).mean(dim=1))


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels in [0, 1] and classes: four fifths to train, one fifth to test."""
    data = load_digits()
    pixels = torch.tensor(data.data / 16.0, dtype=torch.float32)
    classes = torch.tensor(data.target)
    train, test = train_test_split(torch.arange(len(classes)), test_size=0.2, random_state=0, stratify=classes)
    return pixels[train], classes[train], pixels[test], classes[test]


def train(model: Classifier, pixels: Tensor, classes: Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    steps = EPOCHS * math.ceil(len(classes) / BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with tqdm(total=steps, desc="training", unit="step", mininterval=1.0) as bar:
        for _ in range(EPOCHS):
            for batch in torch.randperm(len(classes)).split(BATCH):
                loss = F.cross_entropy(model(pixels[batch]), classes[batch], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


@torch.no_grad()
def accuracy(model: Classifier, pixels: Tensor, classes: Tensor) -> float:
    return (model(pixels).argmax(-1) == classes).float().mean().item()


@torch.no_grad()
def activations(model: Classifier, pixels: Tensor) -> list[inputs.Call]:
    """The inputs of each block's scan for these images, as calls of `bmru` in every dtype."""
    calls = []

    def record(unit: mk.BMRU, arguments: tuple[Tensor]) -> None:
        gates = F.linear(arguments[0], unit.weight_ih_l0, unit.bias_ih_l0)
        candidate, threshold = gates.chunk(2, dim=-1)
        initial_state = unit.initial_state_l0.expand(len(gates), -1)
        tensors = {"candidate": candidate, "threshold": threshold, "initial_state": initial_state}
        tensors["alpha"] = unit.alpha_l0
        for dtype in inputs.DTYPES.values():
            cast = {name: t.to(dtype) for name, t in tensors.items()}
            label = f"block {len(calls) // len(inputs.DTYPES) + 1}"
            calls.append(inputs.call("bmru", cast, {"epsilon": unit.epsilon}, label=label))

    hooks = [block.unit.register_forward_pre_hook(record) for block in model.blocks]
    model(pixels)
    for hook in hooks:
        hook.remove()
    return calls


def milliseconds(passes: dict[str, Callable[[], object]], repeats: int = 15) -> dict[str, float]:
    """The median time of each pass. The passes take turns, so a disturbance affects all of them."""
    times: dict[str, list[float]] = {name: [] for name in passes}
    for repeat in range(repeats + 2):
        for name, run in passes.items():
            start = time.perf_counter()
            run()
            if repeat >= 2:  # after a warm-up
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def throughput(batch: int = 4, steps: int = 2048, channels: int = 256) -> str:
    """A table of times, with that of `torch.add`, which reads two streams and writes one."""
    module = mk.BMRU(channels, channels)
    x, candidate, threshold = torch.randn(3, batch, steps, channels).unbind()
    gradient = torch.randn_like(x)

    def forward() -> None:
        with torch.no_grad():
            module(x)

    def forward_backward() -> None:
        module.zero_grad()
        x.grad = None
        module(x.requires_grad_())[0].backward(gradient)

    baseline = "torch.add"
    passes: dict[str, tuple[int, Callable[[], object]]] = {  # the fewest streams that it can read and write
        baseline: (3, lambda: torch.add(candidate, threshold)),
        "bmru forward": (3, lambda: mk.bmru(candidate, threshold)),
        "BMRU forward": (6, forward),  # x; two gates, out and in; h
        # Also two gates, the gradients of h and of the gates; then the latter, twice, x and its gradient.
        "BMRU forward and backward": (17, forward_backward),
    }
    times = milliseconds({name: run for name, (_, run) in passes.items()})
    lines = [f"{'':26}{'ms':>8}{'steps/s':>10}{'GB/s':>7}{'time / torch.add of as many bytes':>35}"]
    for name, (streams, _) in passes.items():
        seconds = times[name] / 1e3
        rate, bandwidth = batch * steps / seconds, streams * x.nbytes / seconds / 1e9
        ratio = times[name] / times[baseline] * 3 / streams
        lines.append(f"{name:26}{times[name]:8.2f}{rate:10.2e}{bandwidth:7.1f}{ratio:35.1f}")
    return "\n".join(lines)


def main() -> None:
    torch.manual_seed(0)
    pixels, classes, test_pixels, test_classes = digits()
    model = Classifier()

    print(f"1. Training on {len(classes)} handwritten digits, one pixel per step")
    start = time.perf_counter()
    train(model, pixels, classes)
    seconds = time.perf_counter() - start
    model.eval()
    score = accuracy(model, test_pixels, test_classes)
    print(f"test accuracy {100 * score:.1f} % on {len(test_classes)} images (95 % is expected)")
    print(f"trained in {seconds:.0f} s\n")

    print("2. The activations of this model: error against the float64 reference, and its limit")
    calls = activations(model, test_pixels[:32])
    rows = [row for name in compare.backends_with_kernels("cpu") for row in compare.run(calls, name)]
    print(compare.table(rows))
    failed = sum(not row.passed for row in rows)
    print(f"{len(rows)} calls, {failed} failed\n")

    print(f"3. Throughput, float32, B=4 T=2048 D=256, {torch.get_num_threads()} threads")
    print(throughput())
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
