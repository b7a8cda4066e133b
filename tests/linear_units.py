"""Linear units in float64 with random initial states, and comparisons."""

import pytest
import torch

from mru_kernels.nn import LRU, MinGRU, MinLSTM

CLASSES = [MinGRU, MinLSTM, LRU]
all_classes = pytest.mark.parametrize("cls", CLASSES)
gated = pytest.mark.parametrize("cls", [MinGRU, MinLSTM])


def make(cls, *sizes, seed=0, dtype=torch.float64, **options):
    """A float64 module with random initial states."""
    torch.manual_seed(seed)
    module = cls(*sizes, dtype=dtype, **options)
    for name, parameter in module.named_parameters():
        if name.startswith("initial_state"):
            torch.nn.init.normal_(parameter)
    return module


def random(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


def states(cls, *shape):
    return random(*shape, dtype=torch.complex128 if cls is LRU else torch.float64)


def close(got, expected, tolerance=1e-12):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
