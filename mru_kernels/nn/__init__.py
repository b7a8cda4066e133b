"""Memory recurrent units, linear recurrent units and residual networks of them, as modules.

The units have the interface of `torch.nn.GRU`. `MRUBase` implements what they have in common; a unit defines its gates,
its per-channel inputs and its scan.
"""

from .aaren import Aaren
from .base import UNITS, MRUBase
from .block import MRUBlock
from .delays import DelayConv
from .linear import LRU, MinGRU, MinLSTM
from .memory_cache import MemoryCache
from .mesa import MesaNet
from .network import MRUNetwork
from .resonate import PRF
from .rwkv import RWKV4ChannelMix, RWKV4TimeMix
from .rwkv_network import RWKV4
from .spiking import LIF
from .write_or_hold import BMRU, CMRU, AlphaCMRU, FirstQuadrantBMRU, WriteOrHold

__all__ = [
    "BMRU",
    "CMRU",
    "LIF",
    "LRU",
    "PRF",
    "RWKV4",
    "UNITS",
    "Aaren",
    "AlphaCMRU",
    "DelayConv",
    "FirstQuadrantBMRU",
    "MRUBase",
    "MRUBlock",
    "MRUNetwork",
    "MemoryCache",
    "MesaNet",
    "MinGRU",
    "MinLSTM",
    "RWKV4ChannelMix",
    "RWKV4TimeMix",
    "WriteOrHold",
]
