"""The reference: the folder `python_ref` of the checkout, or the copy that a wheel installs inside this package."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

_is_installed = find_spec(f"{__package__}.python_ref") is not None
python_ref = import_module(f"{__package__}.python_ref" if _is_installed else "python_ref")
CELLS = python_ref.CELLS
