"""Fused parallel scans for memory recurrent units, as torch ops and modules."""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING as _TYPE_CHECKING

from .backends import available_backends
from .cells.bmru import bmru, bmru_step
from .cells.linear_recurrence import linear_recurrence, linear_recurrence_step
from .cells.schmitt import schmitt, schmitt_step
from .nn import BMRU, CMRU, LRU, AlphaCMRU, FirstQuadrantBMRU, MinGRU, MinLSTM, MRUBlock, MRUNetwork
from .schedule import EpsilonSchedule
from .streaming import stream

__version__ = _version("mru_kernels")
__all__ = [
    "BMRU",
    "CMRU",
    "LRU",
    "AlphaCMRU",
    "EpsilonSchedule",
    "FirstQuadrantBMRU",
    "MRUBlock",
    "MRUNetwork",
    "MinGRU",
    "MinLSTM",
    "available_backends",
    "bmru",
    "bmru_step",
    "distributed",
    "linear_recurrence",
    "linear_recurrence_step",
    "schmitt",
    "schmitt_step",
    "stream",
]

available_backends()  # registers the CPU kernels, which a loaded exported program needs before any call

if _TYPE_CHECKING:
    from . import distributed
else:

    def __getattr__(name):
        """Import `distributed` when it is used: not every torch build has torch.distributed."""
        if name == "distributed":
            return _import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
