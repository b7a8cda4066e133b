"""Modules, losses and gradients for the tests of `mk.stream(module, gradient="traces")`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import mru_kernels as mk

CUTS = {"one step": [1] * 24, "equal": [8] * 3, "unequal": [5, 0, 12, 7], "whole": [24]}
KINDS: dict[str, tuple[type, dict]] = {
    "BMRU": (mk.BMRU, {}),
    "BMRU, epsilon 0.5": (mk.BMRU, {"epsilon": 0.5, "bias": False}),
    "CMRU": (mk.CMRU, {"learn_initial_state": False}),
    "AlphaCMRU": (mk.AlphaCMRU, {"batch_first": False}),
    "FirstQuadrantBMRU": (mk.FirstQuadrantBMRU, {}),
    "FirstQuadrantBMRU, epsilon 0.5": (mk.FirstQuadrantBMRU, {"epsilon": 0.5, "bias": False}),
    "MinGRU": (mk.MinGRU, {"bias": False}),
    "MinLSTM": (mk.MinLSTM, {"chunk_size": None}),
    "LIF": (mk.LIF, {"threshold": 0.5}),
    "LIF, zero, not detached": (mk.LIF, {"threshold": 0.5, "reset": "zero", "detach_reset": False}),
    "LRU": (mk.LRU, {}),
}
Gradients = dict[str, Tensor]


def drawn(cls: type, *sizes: int, **options) -> torch.nn.Module:
    """A float64 module with random parameters, initial states included."""
    torch.manual_seed(0)
    module = cls(*sizes, **{"dtype": torch.float64} | options)
    for name, parameter in module.named_parameters():
        if "initial_state" in name:
            torch.nn.init.normal_(parameter)
    return module


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(module: torch.nn.Module) -> Gradients:
    """The gradients since the last call."""
    found = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    return found


def whole(module: torch.nn.Module, x: Tensor) -> Gradients:
    output, _ = module(x)
    loss(output).backward()
    return gradients(module)


def loss(output: Tensor, start: int = 0, time: int = 1) -> Tensor:
    """A loss that differs from step to step; the output starts at step `start`."""
    steps = torch.arange(start, start + output.shape[time], dtype=torch.float64).reshape(
        -1, *[1] * (output.dim() - 1 - time)
    )
    channels = torch.arange(output.shape[-1], dtype=torch.float64)
    return (output * torch.sin(1.0 + 0.7 * steps + 1.3 * channels)).sum() + 0.1 * output.square().sum()


def streamed(
    feed: mk.streaming.Stream, x: Tensor, cuts: Sequence[int], resets: dict[int, Tensor] | None = None, time: int = 1
) -> None:
    """A backward pass after every chunk. `resets` by the step at which a chunk begins."""
    start = 0
    for chunk in x.split(list(cuts), time):
        loss(feed(chunk, (resets or {}).get(start)), start, time).backward()
        start += chunk.shape[time]


def close(got: Gradients, expected: Gradients, names: Callable[[str], bool] = lambda name: True) -> None:
    for name in filter(names, expected):
        error = (got[name] - expected[name]).norm() / expected[name].norm().clamp(min=1e-30)
        assert error < 1e-12, f"{name}: {error}"


def differ(got: Gradients, expected: Gradients, name: str) -> bool:
    return bool((got[name] - expected[name]).norm() > 1e-3 * expected[name].norm())
