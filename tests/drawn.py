"""Tensors of given shapes, and results with their gradients, for tests of what surrounds an op."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    wide = torch.complex64 if dtype.is_complex else torch.float32
    return torch.randn(shape, generator=generator, dtype=wide).to(device, dtype)


def as_real(t: Tensor) -> Tensor:
    """A complex tensor as pairs of real numbers, which jacrev needs; a real one as it is."""
    return torch.view_as_real(t) if t.is_complex() else t


def from_real(t: Tensor, is_complex: bool) -> Tensor:
    """The inverse of `as_real`."""
    return torch.view_as_complex(t) if is_complex else t


def results_and_grads(op, *inputs: Tensor, **settings) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    h, final_state = op(*leaves, **settings)
    loss = h.float().square().sum() + final_state.square().sum()
    return [h.detach(), final_state.detach(), *torch.autograd.grad(loss, leaves)]


def assert_equal(one: list[Tensor], other: list[Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def assert_close(one, other) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b)
