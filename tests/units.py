"""The units under test, and how the tests construct them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mru_kernels as mk

SIGNED = [mk.BMRU, mk.CMRU, mk.AlphaCMRU]
CLASSES = [*SIGNED, mk.FirstQuadrantBMRU]
UNITS = [*CLASSES, mk.MinGRU, mk.MinLSTM, mk.LIF, mk.Aaren, mk.LRU]
HALF = UNITS[:-1]  # an LRU does not support half precision
HALF_STATES = [cls for cls in HALF if cls is not mk.Aaren]  # and an Aaren has float32 states
all_classes = pytest.mark.parametrize("cls", CLASSES)
all_units = pytest.mark.parametrize("cls", UNITS)

MIXED = ("bmru", "alpha_cmru", "schmitt", "min_lstm", "lru")


def unit(cls: type, **options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return cls(4, 6, 2, **options)


def network(**options: Any) -> mk.MRUNetwork:
    torch.manual_seed(0)
    return mk.MRUNetwork(4, 3, **{"width": 4, "num_blocks": 2, "units": MIXED, "conv_size": 3} | options)


def make(cls, *sizes, integer=False, seed=0, **options):
    torch.manual_seed(seed)
    module = cls(*sizes, **options)
    if integer:
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if not name.startswith(("alpha", "initial_state")):
                    parameter.copy_(torch.randint(-2, 3, parameter.shape))
    return module


def integers(*shape, dtype=torch.float32):
    return torch.randint(-3, 4, shape).to(dtype)
