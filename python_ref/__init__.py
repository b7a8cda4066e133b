"""The reference: each cell's equations, gradients derived by hand and drawn inputs, in plain float64 PyTorch.

A file that defines `CELL` is a cell; nothing else lists the cells. `python_ref.bmru` is the cell of that name: called,
it is the op `mru_kernels.bmru` (see `Cell`).
"""

from importlib import import_module
from pkgutil import iter_modules

from .cell import Cell, itself
from .draw import COMPLEX_DTYPES, DTYPES, Draw

_modules = [import_module(f".{module.name}", __name__) for module in iter_modules(__path__)]

#: Every cell, by its name.
CELLS: dict[str, Cell] = {module.CELL.name: module.CELL for module in _modules if hasattr(module, "CELL")}
globals().update(CELLS)  # in place of the modules of those names

__all__ = ["CELLS", "COMPLEX_DTYPES", "DTYPES", "Cell", "Draw", "itself", *CELLS]
