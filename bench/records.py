"""Figures, descriptions of machines, tables and files, for every command of the bench."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import allocator

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Figure:
    """The time of one subject in one pass on one shape.

    Attributes:
        shape: (B, T, D).
        dtype: of the streams.
        subject: an op, a backend, a module, a peer or torch.add.
        work: the pass, see `bench.work`.
        ms: median.
        spread: the range between the quartiles, divided by the median.
        gb_per_s: the bytes of the floor, divided by the time.
        floor_ratio: the time, divided by that of a streaming pass over the same bytes.
        slower: for a peer: its time, divided by that of the op or the module.
        base_spread: the spread of the figure that the ratios divide by.
        share: for the projections of a module: their time, divided by that of the module.
        peak_mib: peak memory beyond the inputs and the gradient of h.
        percent_of_copy: gb_per_s in percent of that of a copy.
    """

    shape: Shape
    dtype: str
    subject: str
    work: str
    ms: float
    spread: float
    gb_per_s: float | None = None
    floor_ratio: float | None = None
    slower: float | None = None
    base_spread: float | None = None
    share: float | None = None
    peak_mib: float | None = None
    percent_of_copy: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields that have a value."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Figure:
        return cls(**fields | {"shape": tuple(fields["shape"])})


# ------------------------------------------------------------------------------------------ files


def write_json(file: Path, record: Any) -> None:
    """Write a record, and the folders above it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")


# ------------------------------------------------------------------------------------------ tables


def name_of(shape: Sequence[int]) -> str:
    return ", ".join(map(str, shape))


def facts_of(machine: dict[str, Any]) -> str:
    """The result of `machine` in one line."""
    return ", ".join(f"{name} {value}" for name, value in machine.items() if value is not None)


def table(head: Sequence[str], lines: Sequence[Sequence[str]], words: int) -> str:
    """A Markdown table.

    Args:
        head: the names of the columns.
        lines: the rows, one text per column.
        words: the number of leading columns with words. The others have numbers, aligned on the right.
    """
    rule = "|" + "---|" * words + "---:|" * (len(head) - words)
    first, *others = ("| " + " | ".join(line) + " |" for line in (head, *lines))
    return "\n".join((first, rule, *others))


def table_without_empty(head: Sequence[str], lines: Sequence[Sequence[str]], words: int) -> str:
    """`table` without the columns of numbers that are empty."""
    kept = [i for i in range(len(head)) if i < words or any(line[i] for line in lines)]
    return table([head[i] for i in kept], [[line[i] for i in kept] for line in lines], words)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Plain text in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


# ------------------------------------------------------------------------------------------ machines


def machine(device: torch.device) -> dict[str, Any]:
    """The machine that figures are measured on, for a GPU with its driver and clocks from nvidia-smi."""
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }
    if device.type == "cpu":
        from mru_kernels.backends import cpu as backend

        return facts | {"isa": backend.isa(), "allocator": allocator.describe()}
    if device.type == "cuda":
        facts |= {"triton": version_of("triton")} | _gpu(device)
    return facts


def version_of(package: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout; None if the bench runs from an installed package."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    return output_of("git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*") or None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _gpu(device: torch.device) -> dict[str, Any]:
    names = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")
    index = torch.cuda.current_device() if device.index is None else device.index
    values = output_of("nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", f"--id={index}")
    facts: dict[str, Any] = dict(zip(names, map(str.strip, values.split(",")), strict=False)) if values else {}
    facts["multiprocessors"] = torch.cuda.get_device_properties(device).multi_processor_count
    return facts | {"cuda": torch.version.cuda}


def output_of(*command: str) -> str:
    """The output of a command; empty if there is no such program or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
