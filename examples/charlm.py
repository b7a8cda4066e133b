"""A character language model: it trains on a text, then writes one character at a time in constant memory.

The network (`mk.MRUNetwork` on tokens) is a hybrid. Bistable units (arXiv 2601.09495) keep what lasts, and minGRU
(arXiv 2410.01201) follows what changes. `--units` also runs the same network with the time mixing of RWKV-4 (arXiv
2305.13048) or with Aaren (arXiv 2405.13956), whose states are weighted means of the past. The last tenth of the text
is held out. It is tested in one pass, so a prediction can use all characters before it. The table has each model's bits
per character, and the entropy of single characters for comparison.

The text is the reference manual that comes with Python as `pydoc_data.topics` (about 460,000 characters, PSF licence),
or any file:

    python -m examples.charlm --text FILE --prompt "The "
    python -m examples.charlm --units "BMRU + minGRU" RWKV-4 Aaren
"""

from __future__ import annotations

import math
import statistics
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import mru_kernels as mk
from bench import drawing
from examples import common

HYBRID = "BMRU + minGRU"
UNITS: dict[str, dict[str, dict[str, Any]]] = {
    HYBRID: {"bmru": {}, "min_gru": {"max_time_scale": 100.0}},
    "RWKV-4": {"rwkv4": {}},
    "Aaren": {"aaren": {}},
}
WIDTH = 64
BLOCKS = 2
LENGTH = 128
BATCH = 32
LEARNING_RATE = 5e-3
TEST_CHUNK = 1024
CONTEXT = 512  # characters of the default prompt


def manual() -> str:
    from pydoc_data import topics

    return "\n\n".join(text for _, text in sorted(topics.topics.items()))


class Text:
    """A text as tokens, one per character. Characters that occur fewer than 10 times share a token."""

    def __init__(self, text: str) -> None:
        counts: dict[str, int] = {}
        for character in text:
            counts[character] = counts.get(character, 0) + 1
        self.characters = ["\N{REPLACEMENT CHARACTER}", *sorted(c for c, n in counts.items() if n >= 10)]
        self.numbers = {character: i for i, character in enumerate(self.characters)}
        tokens = self.encode(text)
        self.train, self.test = tokens.split([len(tokens) - len(tokens) // 10, len(tokens) // 10])

    def encode(self, text: str) -> Tensor:
        return torch.tensor([self.numbers.get(character, 0) for character in text])

    def entropy(self) -> float:
        """Bits per character of the held-out text by the frequencies of single characters in the training text."""
        counts = torch.bincount(self.train, minlength=len(self.characters)).double() + 1
        return -(counts / counts.sum()).log2()[self.test].mean().item()


def network(characters: int, name: str = HYBRID) -> mk.MRUNetwork:
    return mk.MRUNetwork(
        characters, characters, width=WIDTH, num_blocks=BLOCKS, units=UNITS[name], conv_size=4, dropout=0.1, tokens=True
    )


@torch.no_grad()
def bits_per_character(model: mk.MRUNetwork, tokens: Tensor) -> float:
    """The mean over the whole sequence, which is read in chunks. Only the state is kept between them."""
    feed = mk.stream(model)
    bits = 0.0
    for start in range(0, len(tokens) - 1, TEST_CHUNK):
        inputs = tokens[start : min(start + TEST_CHUNK, len(tokens) - 1)]
        targets = tokens[start + 1 : start + 1 + len(inputs)]
        bits += F.cross_entropy(feed(inputs.unsqueeze(0))[0], targets, reduction="sum").item() / math.log(2)
    return bits / (len(tokens) - 1)


@torch.no_grad()
def generate(
    model: mk.MRUNetwork, prompt: Tensor, count: int, temperature: float, *, compiled: bool = False
) -> tuple[Tensor, float]:
    """Generate `count` tokens after the prompt by `model.step`. Returns them and the tokens per second.

    With `compiled`, torch.compile makes graphs of the step. The time does not include that.
    """
    scores, state = model(prompt.unsqueeze(0))
    scores = scores[:, -1]
    tokens = []
    step = torch.compile(model.step, fullgraph=True) if compiled else model.step
    _, after = step(prompt[-1:], state)
    step(prompt[-1:], after)  # compiles for the last time
    start = time.perf_counter()
    for _ in range(count):
        token = torch.multinomial((scores / temperature).softmax(-1), 1)[:, 0]
        tokens.append(token)
        scores, state = step(token, state)
    seconds = time.perf_counter() - start
    return torch.cat(tokens), count / seconds


def fit(text: Text, name: str, seed: int, arguments: Namespace) -> tuple[mk.MRUNetwork, list[float]]:
    """Train a network. Returns it, and the bits per character at each step of training."""
    torch.manual_seed(seed)
    model = network(len(text.characters), name)
    window = torch.arange(LENGTH + 1)
    losses: list[float] = []

    def loss() -> Tensor:
        starts = torch.randint(len(text.train) - LENGTH, (BATCH, 1))
        batch = text.train[starts + window]
        return F.cross_entropy(model(batch[:, :-1])[0].flatten(0, 1), batch[:, 1:].flatten())

    with tqdm(total=arguments.steps, desc=f"{name}, seed {seed}", unit="step", mininterval=1.0) as bar:

        def after(value: float) -> None:
            losses.append(value / math.log(2))
            bar.update()
            bar.set_postfix(bits=f"{losses[-1]:.2f}", refresh=False)

        epsilon = common.epsilon_schedule(model, arguments.steps) if name == HYBRID else None
        common.train(model, loss, steps=arguments.steps, learning_rate=LEARNING_RATE, epsilon=epsilon, after=after)
    return model, losses


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__, steps=400)
    parser.add_argument("--text", type=Path, help="file in UTF-8 (default: Python's reference manual)")
    parser.add_argument("--prompt", help=f"text to continue (default: the first {CONTEXT} held-out characters)")
    parser.add_argument("--generate", type=int, default=1000, help="characters to generate")
    parser.add_argument("--compile", action="store_true", help="generate by a compiled step")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--units", nargs="+", choices=UNITS, default=[HYBRID], metavar="UNITS")
    arguments = parser.parse_args(argv)
    source = arguments.text.read_text(encoding="utf-8") if arguments.text else manual()
    text = Text(source)
    if len(text.test) < CONTEXT or arguments.prompt == "":
        parser.error(f"expected a text of at least {10 * CONTEXT} characters and a prompt of at least one")
    threads = torch.get_num_threads()
    torch.set_num_threads(min(threads, arguments.workers))

    rows: list[list[object]] = []
    results, curves, written = {}, {}, ""
    for units in arguments.units:
        bits, rates = [], []
        for seed in range(arguments.seeds):
            model, curves[units, seed] = fit(text, units, seed, arguments)
            bits.append(bits_per_character(model, text.test))
            prompt = text.test[:CONTEXT] if arguments.prompt is None else text.encode(arguments.prompt)
            tokens, rate = generate(
                model, prompt, arguments.generate, arguments.temperature, compiled=arguments.compile
            )
            rates.append(rate)
            written = written or "".join(text.characters[i] for i in tokens)
        results[units] = statistics.mean(bits)
        rows.append([units, f"{common.parameters(model):,}", spread(bits, 2), spread(rates, 0)])
    torch.set_num_threads(threads)
    title = f"written by {arguments.units[0]} with seed 0, temperature {arguments.temperature}"
    print(f"\n{title}:\n\n{written}")

    name = arguments.text.name if arguments.text else "pydoc_data.topics"
    rows.append(["single characters", len(text.characters), f"{text.entropy():.2f}", ""])
    table = common.table(["model", "parameters", "bits per character, held out", "characters written per second"], rows)
    table += f"\n\n{name}, {len(source):,} characters; {arguments.steps} steps of {BATCH} x {LENGTH} characters,"
    table += f" {arguments.seeds} seeds."

    def draw(axes: Any) -> None:
        colors = {units: f"C{i}" for i, units in enumerate(results)}
        for (units, seed), losses in curves.items():
            label = None if seed else f"{units}, training"
            axes.plot(losses, linewidth=0.7, color=colors[units], label=label)
        for units, mean in results.items():
            label = f"{units}, held out, after training"
            axes.axhline(mean, color=colors[units], linestyle="--", label=label)
        axes.axhline(text.entropy(), color=drawing.GREY, linestyle=":", label="single characters")
        axes.set(xlabel="step", ylabel="bits per character", ylim=(0, None), title=name)
        axes.legend()

    common.finish("charlm", table, draw, arguments.out)
    (arguments.out / "charlm.txt").write_text(written, encoding="utf-8")


def spread(values: Sequence[float], digits: int) -> str:
    more = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{more}"


if __name__ == "__main__":
    main()
