"""What all functions of a kernel share."""

from __future__ import annotations

from typing import Any, NamedTuple


class Context(NamedTuple):
    """A program's view of its call. Pass it on as an argument: Triton makes tensors of constants that are assigned."""

    cell: Any  # its functions, see ..cell.Cell
    form: Any
    block: Any
    scan: Any
    at: Any  # its Place
    p: Any  # the scalars of the cell, in the state dtype
    resets: Any  # Resets, or None without form.resets
