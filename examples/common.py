"""Shared by the examples: command line, runs of units and seeds, training, epsilon schedule, tables and plots."""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import mru_kernels as mk
from bench import drawing


def parser(doc: str, *, steps: int) -> argparse.ArgumentParser:
    """A parser of the options that all examples have. `doc` is the docstring of the module."""
    result = argparse.ArgumentParser(description=doc.split("\n")[0])
    result.add_argument("--steps", type=int, default=steps, help="steps of training")
    result.add_argument("--seeds", type=int, default=3, help="how many seeds: 0, 1, ...")
    result.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    result.add_argument("--out", type=Path, default=Path("build/examples"), help="folder of table and plot")
    return result


def run_all(run: Callable[..., Any], names: Iterable[str], arguments: argparse.Namespace) -> dict[str, list[Any]]:
    """Call `run(name, seed, arguments)` for every name and seed, by the workers. Returns a list over seeds per name."""
    calls = [(name, seed) for seed in range(arguments.seeds) for name in names]
    results: dict[tuple[str, int], Any] = {}
    with tqdm(total=len(calls), desc="runs", unit="run", smoothing=0) as bar:

        def done(name: str, seed: int, result: Any) -> None:
            results[name, seed] = result
            bar.set_postfix_str(f"{name}, seed {seed}", refresh=False)
            bar.update()

        if arguments.workers == 1:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            for name, seed in calls:
                done(name, seed, run(name, seed, arguments))
            torch.set_num_threads(threads)
        else:
            context = multiprocessing.get_context("spawn")  # a forked process would lack torch's threads
            with ProcessPoolExecutor(arguments.workers, context, torch.set_num_threads, (1,)) as pool:
                futures = {pool.submit(run, name, seed, arguments): (name, seed) for name, seed in calls}
                for future in as_completed(futures):
                    done(*futures[future], future.result())
    return {name: [results[name, seed] for seed in range(arguments.seeds)] for name in names}


def train(
    model: nn.Module,
    loss: Callable[[], Tensor],
    *,
    steps: int,
    learning_rate: float,
    epsilon: mk.EpsilonSchedule | None = None,
    after: Callable[[float], None] | None = None,
    groups: list[dict[str, Any]] | None = None,
) -> None:
    """Train with AdamW and clipped gradients. The learning rate warms up, then falls as a cosine.

    `after(loss)` is called after each step. `groups` are groups of parameters that have options of their own.
    """
    model.train()
    optimizer = torch.optim.AdamW(groups or model.parameters(), lr=learning_rate, weight_decay=0.01)
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps + 1, pct_start=0.1)
    for _ in range(steps):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if epsilon:
            epsilon.step()
        if after:
            after(value.item())
    model.eval()


def positions(steps: int, features: int) -> Tensor:
    """Sines and cosines of each step's position, `[steps, features]`. They make 1/2, 1, 2, ... turns over all steps."""
    angles = torch.arange(steps).unsqueeze(1) * math.pi / steps * 2.0 ** torch.arange(features // 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def epsilon_schedule(model: nn.Module, steps: int) -> mk.EpsilonSchedule:
    """Lower epsilon from 1 to 0 in the first half of the steps. The second half trains the unit as it is used."""
    return mk.EpsilonSchedule(model, max(1, steps // 2))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def spread(values: Sequence[float], scale: float = 100.0) -> str:
    """The mean and, for several values, the standard deviation, times `scale` (100: in percent)."""
    values = [scale * value for value in values]
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table. All columns except the first have numbers."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def finish(name: str, text: str, draw: Callable[[Any], None], folder: Path) -> None:
    """Print the table and write it and the plot, which `draw(axes)` draws, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(text + "\n")
    with drawing.canvas(folder / f"{name}.png") as (axes,):
        draw(axes)
    print(f"\n{text}\n\nwritten: {folder / name}.md, {folder / name}.png")


def bars(axes: Any, groups: dict[str, dict[str, list[float]]], label: str) -> None:
    """Bars of the mean for each group (colour) and name, in percent, with a point for each seed."""
    width = 0.8 / len(groups)
    for i, (group, results) in enumerate(groups.items()):
        places = [j + (i - (len(groups) - 1) / 2) * width for j in range(len(results))]
        axes.bar(places, [100 * statistics.mean(v) for v in results.values()], width, label=group, alpha=0.6)
        for place, values in zip(places, results.values(), strict=True):
            axes.plot([place] * len(values), [100 * v for v in values], ".", color=drawing.GREY, markersize=4)
    names = list(next(iter(groups.values())))
    axes.set_xticks(range(len(names)), names, rotation=25, ha="right")
    axes.set(ylabel=label, ylim=(0, 100))
    if len(groups) > 1:
        axes.legend(loc="lower right")
