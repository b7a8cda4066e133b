"""Fused parallel scans for memory recurrent units, as torch ops and modules.

Example::

    >>> unit = mk.BMRU(3, 8)  # import mru_kernels as mk
    >>> output, h_n = unit(torch.randn(2, 10, 3))
    >>> output.shape
    torch.Size([2, 10, 8])
"""

import importlib as _importlib
import typing as _typing
from importlib.metadata import version as _version

from .backends import available_backends
from .blocks import blocked
from .cells.bmru import bmru, bmru_step
from .cells.leaky_integrator import leaky_integrator, leaky_integrator_step
from .cells.lif import lif, lif_step
from .cells.linear_recurrence import linear_recurrence, linear_recurrence_step
from .cells.min_gru import min_gru, min_gru_step
from .cells.min_lstm import min_lstm, min_lstm_step
from .cells.resonate import resonate, resonate_step
from .cells.schmitt import schmitt, schmitt_step
from .define import Affine, DefinedCell, Write, define_cell, heaviside, sign
from .delays import delay_conv
from .mesa import mesa, mesa_step
from .nn import (
    BMRU,
    CMRU,
    LIF,
    LRU,
    PRF,
    RWKV4,
    Aaren,
    AlphaCMRU,
    DelayConv,
    FirstQuadrantBMRU,
    MemoryCache,
    MesaNet,
    MinGRU,
    MinLSTM,
    MRUBlock,
    MRUNetwork,
    RWKV4ChannelMix,
    RWKV4TimeMix,
)
from .nn.rwkv_states import wkv_state_from_sums, wkv_sums_from_state
from .schedule import EpsilonSchedule
from .softmax import softmax_recurrence, softmax_recurrence_step, wkv, wkv_step
from .streaming import stream
from .synaptic import synaptic, synaptic_step

__version__ = _version("mru_kernels")
__all__ = [
    "BMRU",
    "CMRU",
    "LIF",
    "LRU",
    "PRF",
    "RWKV4",
    "Aaren",
    "Affine",
    "AlphaCMRU",
    "DefinedCell",
    "DelayConv",
    "EpsilonSchedule",
    "FirstQuadrantBMRU",
    "MRUBlock",
    "MRUNetwork",
    "MemoryCache",
    "MesaNet",
    "MinGRU",
    "MinLSTM",
    "RWKV4ChannelMix",
    "RWKV4TimeMix",
    "Write",
    "available_backends",
    "blocked",
    "bmru",
    "bmru_step",
    "define_cell",
    "delay_conv",
    "distributed",
    "export",
    "heaviside",
    "leaky_integrator",
    "leaky_integrator_step",
    "lif",
    "lif_step",
    "linear_recurrence",
    "linear_recurrence_step",
    "mesa",
    "mesa_step",
    "min_gru",
    "min_gru_step",
    "min_lstm",
    "min_lstm_step",
    "mismatch",
    "quantizable",
    "quantized",
    "resonate",
    "resonate_step",
    "robustness",
    "schmitt",
    "schmitt_step",
    "sign",
    "snn",
    "softmax_recurrence",
    "softmax_recurrence_step",
    "stream",
    "synaptic",
    "synaptic_step",
    "wkv",
    "wkv_state_from_sums",
    "wkv_step",
    "wkv_sums_from_state",
    "write_rates",
]

if _typing.TYPE_CHECKING:
    from . import distributed, export, snn
    from .hardware import mismatch, quantized, robustness
    from .nn.projections import quantizable
    from .writes import write_rates
else:
    _LATER = {  # by name, the module that has it
        "mismatch": "hardware",
        "quantizable": "nn.projections",
        "quantized": "hardware",
        "robustness": "hardware",
        "write_rates": "writes",
    }

    def __getattr__(name):
        """Import what few programs use when they use it; not every torch build has torch.distributed."""
        if name in ("distributed", "export", "snn"):
            return _importlib.import_module(f"{__name__}.{name}")
        if name in _LATER:
            return getattr(_importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
