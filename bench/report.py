"""Pages from records of `python -m bench speed --json FILE`: `python -m bench report FILE [FILE]`.

One record: a summary, a row a shape and dtype; with --plot also a plot of a sweep. Two: the second run beside the
first, figure by figure; a change counts where it is more than the spreads of both runs together.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]

_BOTH = "forward + backward"


def load(file: Path) -> Record:
    """A record.

    Raises:
        ValueError: the file is not one.
    """
    try:
        record = json.loads(file.read_text())
        if {"machine", "figures", "microseconds"} <= record.keys():
            return record
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):
        pass
    raise ValueError(f"{file}: expected a record of `python -m bench speed --json`")


def _rows(record: Record) -> dict[tuple[str, str], dict[str, Record]]:
    """Figures by subject, for each shape and dtype."""
    rows: dict[tuple[str, str], dict[str, Record]] = {}
    for figure in record["figures"]:
        shape = ", ".join(map(str, figure["shape"]))
        rows.setdefault((shape, figure["dtype"]), {})[figure["subject"]] = figure
    return rows


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], words: int) -> str:
    """Markdown; the first `words` columns are text, the others numbers."""
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def machine(record: Record) -> str:
    return ", ".join(f"{name} {value}" for name, value in record["machine"].items())


def summary(record: Record) -> str:
    """One row a shape and dtype: times, in floors of their bytes, and how much faster the op is than its peers."""
    rows = _rows(record)
    peers = list(dict.fromkeys(f["subject"].split(": ")[0] for f in record["figures"] if f["subject"].endswith(_BOTH)))
    peers = [name for name in peers if name not in (f"bmru {_BOTH}", f"BMRU {_BOTH}")]
    head = ["B, T, D", "dtype", "forward, ms", "of floor", f"{_BOTH}, ms", "of floor"]
    head += [f"faster than {name}" for name in peers]
    lines = []
    for (shape, dtype), figures in rows.items():
        line = [shape, dtype]
        for subject in ("bmru forward", f"bmru {_BOTH}"):
            line += [f"{figures[subject]['ms']:.3g}", f"{figures[subject]['floor_ratio']:.2f}"]
        for name in peers:
            peer = figures.get(f"{name}: {_BOTH}")
            line.append("" if peer is None else f"{peer['speedup']:.3g}x")
        lines.append(line)
    calls = "; ".join(f"{name} {value:.0f}" for name, value in record["microseconds"].items())
    return f"{_table(head, lines, 2)}\n\nMicroseconds of a call: {calls}."


def comparison(before: Record, after: Record) -> tuple[str, bool]:
    """Markdown of what both records hold, and whether anything became slower."""
    lines, slower = [], False
    old = _rows(before)
    for key, figures in _rows(after).items():
        for subject, new in figures.items():
            was = old.get(key, {}).get(subject)
            if was is None:
                continue
            ratio, band = new["ms"] / was["ms"], new["spread"] + was["spread"]
            change = "slower" if ratio > 1 + band else "faster" if ratio < 1 / (1 + band) else ""
            slower |= change == "slower"
            lines.append([*key, subject, f"{was['ms']:.3g}", f"{new['ms']:.3g}", f"{ratio:.2f}", f"{band:.0%}", change])
    return _table(["B, T, D", "dtype", "subject", "ms before", "ms", "ratio", "noise", "change"], lines, 3), slower


def plot(record: Record, file: Path) -> None:
    """Draw a sweep: time, percent of the floor, and speed-up over each peer, a row of panels a dtype.

    Raises:
        ValueError: not just one of B, T and D varies.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = list(zip(*(f["shape"] for f in record["figures"]), strict=True))
    varying = [i for i, values in enumerate(sizes) if len(set(values)) > 1]
    if len(varying) != 1:
        raise ValueError(f"--plot: expected a sweep of one of B, T and D, got {len(varying)} that vary")
    (axis,) = varying
    dtypes = list(dict.fromkeys(f["dtype"] for f in record["figures"]))
    panels = {"time, ms": "ms", "percent of the floor": "floor_ratio", "times faster than": "speedup"}
    figure, axes = pyplot.subplots(len(dtypes), 3, figsize=(15, 4.2 * len(dtypes)), squeeze=False, sharex=True)
    for row, dtype in zip(axes, dtypes, strict=True):
        for panel, (title, value) in zip(row, panels.items(), strict=True):
            curves: dict[str, list[tuple[int, float]]] = {}
            for f in record["figures"]:
                y = f[value]
                shown = f["dtype"] == dtype and y is not None and not f["subject"].startswith("BMRU")
                if not shown or (value == "floor_ratio" and f["subject"].startswith("torch.")):
                    continue
                curves.setdefault(f["subject"], []).append((f["shape"][axis], 100 / y if value == "floor_ratio" else y))
            for subject, points in curves.items():
                style = {"linestyle": "-" if subject.endswith(_BOTH) else "--", "marker": "o", "markersize": 3}
                panel.plot(*zip(*sorted(points), strict=True), label=subject, **style)
            panel.set(xscale="log", yscale="linear" if value == "floor_ratio" else "log", title=f"{title} ({dtype})")
            panel.set_xlabel("BTD"[axis])
            panel.grid(alpha=0.3, which="both")
            panel.legend(fontsize=7)
    fixed = ", ".join(f"{name} = {values[0]}" for name, values in zip("BTD", sizes, strict=True) if name != "BTD"[axis])
    figure.suptitle(f"{fixed}; {machine(record)}", fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench report", description=__doc__.split("\n")[0])
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
        print(f"{machine(record)}\n")
    if len(records) == 1:
        print(summary(records[0]))
        return 0
    text, slower = comparison(*records)
    print(text)
    return 1 if slower else 0
