"""Record, page and plot of `gpu-check`."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .. import drawing, peers, records, work
from .processes import Outcome, missing
from .stages import Check

Record = dict[str, Any]


def read_figures(path: Path) -> dict[str, list]:
    """The results that `time_all` wrote, by kind. A last line that was cut off is ignored."""
    found: dict[str, list] = {kind: [] for kind in ("copy", "figure", "other", "call", "left out", "failed")}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            kind, what = json.loads(line)
        except ValueError:
            continue
        found[kind].append(what)
    return found


def with_ratios(figures: Sequence[Record], backends: Sequence[str]) -> list[Record]:
    """The figures. Those of peers get "slower_than": their time divided by each backend's for the same work."""

    def job(f: Record) -> tuple:
        return tuple(f["shape"]), f["dtype"], f["work"]

    def ratios(f: Record) -> dict[str, float]:
        return {g["subject"]: f["ms"] / g["ms"] for g in figures if g["subject"] in backends and job(g) == job(f)}

    return [f if f["subject"] in backends else f | {"slower_than": ratios(f)} for f in figures]


def markdown(record: Record) -> str:
    """The record as a page in Markdown."""
    parts = [f"# {record['machine']['device']}", records.facts_of(record["machine"])]
    for copy in record["copy"]:
        parts.append(f"Copy of {copy['bytes'] / 2**30:.3g} GiB, read and written: {copy['gb_per_s']:.4g} GB/s.")
    if record["figures"]:
        parts += [
            "Epsilon is 0, and the threshold is a stream. Half of the steps write; with `seldom writes`, one step in "
            "three hundred. GB/s counts the bytes of the floor, and `of copy` compares it with the copy.",
            _figures(record["figures"]),
        ]
    if record.get("other"):
        parts += [
            "Other ops. `lif` and `resonate` have one stream. `wkv` has a score for each channel, `aaren` one for each "
            "head of 64 channels.",
            _figures(record["other"]),
        ]
    for call in record["call"]:
        lines = (f"- {name}: {value:.1f}" for name, value in call["microseconds"].items())
        parts += [f"Microseconds per call, {call['backend']}:", "\n".join(lines)]
    if record["left out"]:
        parts += ["Left out:", "\n".join(f"- {reason}" for reason in record["left out"])]
    stages = [[s["name"], s["status"], s["reason"], f"{s['seconds']:.0f}"] for s in record["stages"]]
    parts.append(records.table(["stage", "status", "reason", "seconds"], stages, 3))
    return "\n\n".join(parts) + "\n"


def _figures(figures: Sequence[Record]) -> str:
    head = ["B, T, D", "dtype", "work", "subject", "slower than", "ms", "spread", "GB/s", "of copy"]
    lines = []
    for f in sorted(figures, key=lambda f: (f["shape"], f["dtype"], work.MAIN.index(f["work"]))):
        ratios = ", ".join(f"{name} {ratio:.3g}x" for name, ratio in f.get("slower_than", {}).items())
        words = (records.name_of(f["shape"]), f["dtype"], f["work"], f["subject"], ratios)
        numbers = (f"{f['ms']:.4g}", f"{f['spread']:.0%}", f"{f['gb_per_s']:.4g}", f"{f['percent_of_copy']:.1f} %")
        lines.append([*words, *numbers])
    return records.table(head, lines, 5)


def summary(record: Record) -> str:
    """A row per shape, and a column per backend and pass with its GB/s in percent of the copy's."""
    backends = [call["backend"] for call in record["call"]]
    columns = [(backend, what) for backend in backends for what in (work.FORWARD, work.BACKWARD)]
    share = {(*f["shape"], f["dtype"], f["subject"], f["work"]): f["percent_of_copy"] for f in record["figures"]}
    lines = [
        [records.name_of(shape[:3]), shape[3], *(f"{share[(*shape, *column)]:.0f} %" for column in columns)]
        for shape in dict.fromkeys((*f["shape"], f["dtype"]) for f in record["figures"])
    ]
    return records.table(["B, T, D", "dtype", *(f"{backend}, {what}" for backend, what in columns)], lines, 2)


def plot(record: Record, path: Path) -> None:
    """Draw the rates of each backend and of torch.add, in percent of a copy's, by shape and pass, with spreads."""
    backends = [call["backend"] for call in record["call"]]
    subjects = [name for name in (work.ADD, *backends) if any(f["subject"] == name for f in record["figures"])]
    shown = [f for f in record["figures"] if f["subject"] in subjects]
    shapes = list(dict.fromkeys((*f["shape"], f["dtype"]) for f in shown))
    colours = dict(zip(subjects, (drawing.GREY, *drawing.COLOURS), strict=False))
    with drawing.canvas(path, 1, 2, (12, 1.8 + 0.9 * len(shapes))) as panels:
        for axes, what in zip(panels, (work.FORWARD, work.BACKWARD), strict=True):
            for f in (f for f in shown if f["work"] == what):
                row, share, colour = (
                    shapes.index((*f["shape"], f["dtype"])),
                    f["percent_of_copy"],
                    colours[f["subject"]],
                )
                place = row + 0.26 * (subjects.index(f["subject"]) - (len(subjects) - 1) / 2)
                axes.errorbar(share, place, xerr=share * f["spread"] / 2, fmt="o", color=colour, capsize=3)
                axes.annotate(f"{f['subject']} {share:.0f}", (share, place), (-9, 0), textcoords="offset points",
                              color=colour, ha="right", va="center")  # fmt: skip
            axes.axvline(100, color=drawing.GREY, linewidth=1)
            axes.set(xlim=(0, 115), ylim=(len(shapes) - 0.5, -0.5), title=f"{what}, percent of a copy's rate")
            axes.set_yticks(range(len(shapes)), [f"{records.name_of(shape[:3])}\n{shape[3]}" for shape in shapes])
            axes.grid(visible=False, axis="y")
        panels[1].tick_params(labelleft=False)


def report(check: Check, outcomes: list[Outcome], results: Path) -> list[Path]:
    """Write record, page and plot, and return their paths."""
    found = read_figures(check.figures)
    outcomes += [Outcome("times", "failed", reason) for reason in found["failed"]]
    machine = records.machine(torch.device(check.device)) | peers.versions(peers.PEERS)
    record = {
        "machine": machine,
        **{kind: found[kind] for kind in ("copy", "other", "call", "left out")},
        "figures": with_ratios(found["figure"], check.backends),
        "stages": [asdict(outcome) for outcome in outcomes],
    }
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{machine['device']}-torch{torch.__version__}")
    paths = [results / f"{name}.json", results / f"{name}.md"]
    records.write_json(paths[0], record)
    paths[1].write_text(markdown(record))
    if missing("matplotlib"):
        print("no plot: matplotlib not installed")
    elif record["copy"]:
        paths.append(results / f"{name}.png")
        plot(record, paths[-1])
    print(f"\n{markdown(record)}\n" + "\n".join(map(str, paths)))
    return paths


def copy_out(paths: Sequence[Path], logs: Path, folder: Path) -> None:
    """Copy results to a folder. Join the parts of the comparison into one file, and all logs into another."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        shutil.copy(path, folder)
    found = [json.loads(path.read_text()) for path in sorted(logs.glob("compare-*.json"))]
    if found:
        rows = [row for part in found for row in part["rows"]]
        records.write_json(folder / "compare.json", {**found[0], "rows": rows})
    parts = (f"=== {log.name}\n{log.read_text(errors='replace')}" for log in sorted(logs.glob("*.log")))
    (folder / "gpu-check.log").write_text("\n".join(parts))
