"""Parsers of command-line values. argparse reports their errors under the option's name.

A function imports `mru_kernels` only if it needs it: see `bench.gpu.stages.record_version`.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, ArgumentTypeError
from importlib import import_module
from typing import TYPE_CHECKING

import torch

from . import inputs

if TYPE_CHECKING:
    from mru_kernels import DefinedCell, backends

_MOST_ELEMENTS = 2**40  # more than fit the memory of any machine
DTYPES = inputs.DTYPES | inputs.COMPLEX_DTYPES


def prog(name: str) -> str:
    """The command line that starts a command of the bench."""
    return f"python -m {__package__} {name}"


def shape(text: str) -> tuple[int, int, int]:
    """Parse "B,T,D" into three sizes."""
    sizes = text.split(",")
    if len(sizes) != 3 or not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
        raise ArgumentTypeError(f"expected three positive sizes B,T,D such as 4,4096,512, got {text!r}")
    batch, steps, channels = map(int, sizes)
    if batch * steps * channels > _MOST_ELEMENTS:
        raise ArgumentTypeError(f"expected at most 2^40 elements, got {text!r}")
    return batch, steps, channels


def positive(text: str) -> int:
    if not text.strip().isdecimal() or int(text) == 0:
        raise ArgumentTypeError(f"expected a positive int, got {text!r}")
    return int(text)


def device(text: str) -> torch.device:
    try:
        found = torch.device(text)
    except RuntimeError:
        found = None
    if found is None or found.type == "meta":
        raise ArgumentTypeError(f"expected a device such as cpu or cuda:0, got {text!r}")
    return found


def defined_cell(text: str) -> DefinedCell:
    """Parse "MODULE:NAME", which `define_cell` made."""
    module, _, name = text.partition(":")
    sys.path.insert(0, "")  # the folder of the command, as for `python -m`
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ArgumentTypeError(f"expected MODULE:NAME of a cell, got {text!r}: {error}") from None
    if not isinstance(found, import_module("mru_kernels").DefinedCell):
        raise ArgumentTypeError(f"expected a cell that define_cell made, got {text!r}, a {type(found).__name__}")
    return found


def part(text: str) -> tuple[int, int]:
    """Parse "I/N", where 1 <= I <= N."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise ArgumentTypeError(f"expected I/N with 1 <= I <= N, got {text!r}")
    return int(index), int(count)


def epsilon(text: str) -> float:
    from mru_kernels.scalars import EPSILON

    try:
        return EPSILON.number(float(text))
    except ValueError:
        raise ArgumentTypeError(f"expected a number in [0, 1], got {text!r}") from None


def chunk_size(text: str) -> int | None:
    from mru_kernels import checks

    try:
        return checks.chunk_size(None if text == "None" else int(text))
    except ValueError:
        raise ArgumentTypeError(f'expected a positive multiple of 16 or "None", got {text!r}') from None


def check_dtypes(parser: ArgumentParser, cell: str, names: list[str]) -> None:
    """End the command unless the cell takes each dtype."""
    dtypes = inputs.CELLS[cell].dtypes
    for name in names:
        if name not in dtypes:
            parser.error(f"--dtype: expected one of {', '.join(dtypes)} for {cell}, got {name}")


def resolve(parser: ArgumentParser, name: str | None, device: torch.device) -> backends.Backend:
    """The backend that `--backend` names, or the default for None. Ends the command if it cannot run on `--device`."""
    from mru_kernels import backends

    try:
        return backends.resolve(name, device)
    except (RuntimeError, ValueError) as error:
        parser.error(f"--{error}")
