"""Tables and plots from records of `python -m bench speed --json FILE`: `python -m bench report FILE [FILE]`.

One record gives a summary with a row per shape and dtype, and with --plot a plot of a sweep. Two records are compared
figure by figure. A change counts if it exceeds the sum of both spreads. "?" marks a ratio or a change that depends on a
figure whose spread is over `work.NOISY`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import cli, drawing
from .records import facts_of, name_of, table, table_without_empty
from .reference import CELLS
from .work import ADD, BACKWARD, BOTH, DEFAULT_ALLOCATOR, FORWARD, GRU, NOISE, NOISY, PROJECTIONS

Record = dict[str, Any]
Key = tuple[str, str]  # subject and work


def load(file: Path) -> Record:
    """Read a record.

    Raises:
        ValueError: the file has no record of this version.
    """
    try:
        record = json.loads(file.read_text())
        figures = record["figures"]
        if {"machine", "microseconds"} <= record.keys() and all({"subject", "work"} <= f.keys() for f in figures):
            return record
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError):
        pass
    raise ValueError(f"{file}: expected a record of this version's `python -m bench speed --json`")


def _rows(record: Record) -> dict[tuple[str, str], dict[Key, Record]]:
    """Figures by subject and work, for each shape and dtype."""
    rows: dict[tuple[str, str], dict[Key, Record]] = {}
    for figure in record["figures"]:
        rows.setdefault((name_of(figure["shape"]), figure["dtype"]), {})[figure["subject"], figure["work"]] = figure
    return rows


def summary(record: Record) -> str:
    """A row per shape and dtype: times of the op, also as multiples of the floor, its peers and the module.

    The values of peers and of the module are for forward + backward. A time has its spread in brackets.
    """
    columns = _columns(record)
    lines = []
    for key, figures in _rows(record).items():
        line = [*key]
        for subject, name, form, base in columns.values():
            figure = figures.get(subject, {})
            value = figure.get(name)
            spreads = [f.get("spread", 0.0) for f in (figure, figures.get(base, {}))]
            noise = f" ({spreads[0]:.0%})" if name == "ms" else "?" * (max(spreads) > NOISY)
            line.append("" if value is None else form.format(value) + noise)
        lines.append(line)
    head = ["B, T, D", "dtype", *columns]
    text = table_without_empty(head, lines, 2)
    calls = "; ".join(f"{name} {value:.3g}" for name, value in record["microseconds"].items())
    parts = [text, NOISE, *_floors(record), *([f"Microseconds of a call: {calls}."] if calls else [])]
    return "\n\n".join(parts)


def _columns(record: Record) -> dict[str, tuple[Key, str, str, Key | None]]:
    """Columns by heading: a figure's key, the name and format of its value, the key of the figure it is relative to."""
    cell = record["machine"]["cell"]
    module = CELLS[cell].unit
    peers = [f["subject"] for f in record["figures"] if f["work"] == BOTH and f.get("slower") is not None]
    columns: dict[str, tuple[Key, str, str, Key | None]] = {}
    for work in (FORWARD, BACKWARD, BOTH):
        columns[f"{work}, ms"] = ((cell, work), "ms", "{:.3g}", None)
        columns[f"{work}, default allocator, ms"] = ((cell + DEFAULT_ALLOCATOR, work), "ms", "{:.3g}", None)
        columns[f"{work} of floor"] = ((cell, work), "floor_ratio", "{:.2f}", (ADD, FORWARD))
    columns["peak, MiB"] = ((cell, BOTH), "peak_mib", "{:.1f}", None)
    ratios = [((name, BOTH), "slower", "{:.3g}x", (cell, BOTH)) for name in peers if name != GRU]
    columns |= {f"faster than {ratio[0][0]}": ratio for ratio in ratios}
    columns[f"{module}, ms"] = ((module, BOTH), "ms", "{:.3g}", None)
    columns[f"{module}, its projections"] = ((f"{module}{PROJECTIONS}", BOTH), "share", "{:.0%}", (module, BOTH))
    columns[f"{module} faster than {GRU}"] = ((GRU, BOTH), "slower", "{:.3g}x", (module, BOTH))
    return columns


def _floors(record: Record) -> list[str]:
    """The rates of torch.add that set the floor, and what a ratio under 1 means; nothing if there are no figures."""
    rates: dict[str, list[float]] = {}
    for f in record["figures"]:
        if (f["subject"], f["work"]) == (ADD, FORWARD):
            rates.setdefault(f["dtype"], []).append(f["gb_per_s"])
    ranges = "; ".join(f"{dtype} {min(values):.1f} to {max(values):.1f}" for dtype, values in rates.items())
    meaning = f"A ratio under 1 means that the op moves bytes faster than {ADD}."
    return [f"GB/s of {ADD}, from which the floor is scaled: {ranges}. {meaning}"] if rates else []


def comparison(before: Record, after: Record) -> tuple[str, bool]:
    """A Markdown table of the figures that are in both records, and whether any became slower."""
    lines, slower = [], False
    old = _rows(before)
    for key, figures in _rows(after).items():
        for subject, new in figures.items():
            was = old.get(key, {}).get(subject)
            if was is None:
                continue
            ratio, band = new["ms"] / was["ms"], new["spread"] + was["spread"]
            change = "slower" if ratio > 1 + band else "faster" if ratio < 1 / (1 + band) else ""
            if max(new["spread"], was["spread"]) > NOISY:
                change = "?"
            slower |= change == "slower"
            times = (f"{was['ms']:.3g}", f"{new['ms']:.3g}", f"{ratio:.2f}", f"{band:.0%}")
            lines.append([*key, *subject, *times, change])
    head = ["B, T, D", "dtype", "subject", "work", "ms before", "ms", "ratio", "noise", "change"]
    return table(head, lines, 4), slower


_STYLES = {FORWARD: "--", BACKWARD: ":", BOTH: "-"}


def plot(record: Record, file: Path) -> None:
    """Draw a sweep, a panel for each dtype: the times of the op and its peers over the floor, with their spreads.

    Raises:
        ValueError: not exactly one of B, T and D varies.
    """
    sizes = list(zip(*(f["shape"] for f in record["figures"]), strict=True))
    varying = [i for i, values in enumerate(sizes) if len(set(values)) > 1]
    if len(varying) != 1:
        raise ValueError(f"--plot: expected a sweep of one of B, T and D, got {len(varying)} that vary")
    (axis,) = varying
    dtypes = list(dict.fromkeys(f["dtype"] for f in record["figures"]))
    fixed = ", ".join(f"{name} = {values[0]}" for name, values in zip("BTD", sizes, strict=True) if name != "BTD"[axis])
    with drawing.canvas(file, len(dtypes), 1, (10, 5.5 * len(dtypes))) as panels:
        for axes, dtype in zip(panels, dtypes, strict=True):
            curves = _curves(record, dtype, axis)
            subjects = list(dict.fromkeys(subject for subject, _ in curves))
            colours = dict(zip(subjects, drawing.COLOURS * len(subjects), strict=False))
            axes.axhline(1, color=drawing.GREY, linewidth=1)
            axes.set(xscale="log", yscale="log", xlabel="BTD"[axis], title=f"time / floor, {dtype}, {fixed}")
            ends = []
            for (subject, work), points in curves.items():
                x, y, spread = map(list, zip(*sorted(points), strict=True))
                low, high = ([v * (1 + sign * s / 2) for v, s in zip(y, spread, strict=True)] for sign in (-1, 1))
                axes.plot(x, y, color=colours[subject], linestyle=_STYLES[work], marker="o", markersize=4)
                axes.fill_between(x, [max(v, 0.05 * w) for v, w in zip(low, y, strict=True)], high, alpha=0.2,
                                  color=colours[subject], linewidth=0)  # fmt: skip
                ends.append((f"{subject}, {work}", x[-1], y[-1], colours[subject]))
            drawing.name_ends(axes, ends)


def _curves(record: Record, dtype: str, axis: int) -> dict[Key, list[tuple[int, float, float]]]:
    """For the op and each peer, by work: points (size, time over the floor, spread)."""
    cell = record["machine"]["cell"]
    curves: dict[Key, list[tuple[int, float, float]]] = {}
    for figures_of in _rows(record).values():
        for (subject, work), f in figures_of.items():
            ours = figures_of.get((cell, work), {})
            peer = f.get("slower") is not None and subject != GRU
            if f["dtype"] == dtype and work in _STYLES and "floor_ratio" in ours and (peer or subject == cell):
                point = f["shape"][axis], ours["floor_ratio"] * f["ms"] / ours["ms"], f["spread"]
                curves.setdefault((subject, work), []).append(point)
    return curves


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=cli.prog("report"), description=__doc__.split("\n")[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="one record, or two to compare")
    parser.add_argument("--plot", type=Path, metavar="IMAGE", help="where to draw a sweep; .png or .svg")
    arguments = parser.parse_args(argv)
    files = arguments.files
    if len(files) > 2 or (arguments.plot and len(files) > 1):
        parser.error(f"FILE: expected one{' or two' if not arguments.plot else ''}, got {len(files)}")
    try:
        records = [load(file) for file in files]
        if arguments.plot:
            plot(records[0], arguments.plot)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for record in records:
        print(f"{facts_of(record['machine'])}\n")
    if len(records) == 1:
        print(summary(records[0]))
        return 0
    text, slower = comparison(*records)
    print(text)
    return 1 if slower else 0
