"""The layers and wrappers under test, apart from the units, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import mru_kernels as mk


def _cache(unit: type, mode: str, **options: Any) -> Callable[..., torch.nn.Module]:
    return lambda **where: mk.MemoryCache(unit(4, 6, **where), segment=4, mode=mode, **options)


def _network(**options: Any) -> Callable[..., torch.nn.Module]:
    return lambda **where: mk.MRUNetwork(4, 3, width=4, num_blocks=1, **options, **where)


#: Each takes `device` and `dtype`, and makes a module that reads `[B, T, 4]`.
LAYERS: dict[str, Callable[..., torch.nn.Module]] = {
    "delays": lambda **where: mk.DelayConv(4, taps=6, count=3, learn_sigma=True, **where),
    "many taps": lambda **where: mk.DelayConv(4, taps=300, count=3, **where),
    "mesa": lambda **where: mk.MesaNet(4, 6, heads=2, chunk_size=4, **where),
    "mesa direct": lambda **where: mk.MesaNet(4, 6, solver="direct", chunk_size=4, **where),
    "gated": _cache(mk.BMRU, "gated"),
    "sparse": _cache(mk.MinGRU, "sparse", top_k=1),
    "residual": _cache(mk.MinLSTM, "residual"),
    "average": _cache(mk.CMRU, "average", restart=True),
    "block": lambda **where: mk.MRUBlock(4, delay={"taps": 3}, cache={"segment": 4}, **where),
    "network": _network(units=("mesa", "min_gru")),
    "blocks of time": lambda **where: mk.blocked(_network()(**where), 4),
    "offloaded": lambda **where: mk.blocked(_network(pool="mean", conv_size=0)(**where), 4, inner=2, offload=True),
    "quantizable": lambda **where: mk.quantizable(mk.BMRU(4, 6, **where)),
}
IN_BLOCKS = ("blocks of time", "offloaded")
all_layers = pytest.mark.parametrize("name", LAYERS)


def layer(name: str, **where: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return LAYERS[name](**where).eval()
