"""Fused parallel scans for memory recurrent units, as torch ops and modules."""

from importlib.metadata import version as _version

from . import distributed
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

available_backends()  # registers the CPU kernels, so that exported programs find them without a call through here
