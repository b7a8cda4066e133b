"""Errors of `mk.mesa` after few steps of conjugate gradients, against the table of docs/mesanet.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mru_kernels as mk

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = Path(__file__).parents[1] / "docs" / "mesanet.md"
STEPS = (5, 10, 15, 30)
TIME, KEY, REGULARIZER = 256, 64, 0.25
LEAST = 1e-12  # smaller errors are rounding
KEYS = {
    "random": lambda k: k,
    "sizes from 1 to 0.1": lambda k: k * torch.logspace(0, -1, KEY, dtype=k.dtype),
    "nearly equal": lambda k: k[:, :1] + 0.1 * k,
}


def inputs(keys: str) -> list[torch.Tensor]:
    """q, k, v, decay, beta and regularizer without decay, in float64."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, TIME, 1, KEY, dtype=torch.float64).unbind(0)
    q, k = (torch.nn.functional.normalize(s, dim=-1) for s in (q, KEYS[keys](k)))
    beta = torch.rand(1, TIME, 1, dtype=torch.float64)
    regularizer = torch.full((1, KEY), REGULARIZER, dtype=torch.float64)
    return [t.requires_grad_() for t in (q, k, v, torch.zeros_like(beta), beta, regularizer)]


def condition(tensors: list[torch.Tensor]) -> float:
    """The largest condition number of a step's system."""
    k, beta = tensors[1].detach()[0, :, 0], tensors[4].detach()[0, :, 0, None, None]
    values = torch.linalg.eigvalsh((beta * k.unsqueeze(2) * k.unsqueeze(1)).cumsum(0)) + REGULARIZER
    return (values[:, -1] / values[:, 0]).max().item()


def error(got: torch.Tensor, right: torch.Tensor) -> float:
    return max(((got.double() - right).norm() / right.norm()).item(), LEAST)


def table() -> dict[str, list[float]]:
    """The numbers of a row of the page's table, by its keys."""
    lines = PAGE.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| keys | condition"))
    rows = [line.strip("| ").split(" | ") for line in lines[start + 2 : start + 2 + len(KEYS)]]
    return {name: [float(cell.strip("< ")) for cell in cells] for name, *cells in rows}


@pytest.mark.parametrize("keys", KEYS)
def test_errors_are_those_of_the_table(keys):
    tensors = inputs(keys)
    exact = mk.mesa(*tensors, solver="direct")[0]
    single = mk.mesa(*(t.float() for t in tensors))[0]
    few = [mk.mesa(*tensors, steps=steps)[0] for steps in STEPS]
    found = [condition(tensors), *(error(output, exact) for output in few), error(single, exact)]
    for got, documented, factor in zip(found, table()[keys], (1.1, 2, 2, 2, 2, 4), strict=True):
        assert documented / factor <= got <= documented * factor, (found, table()[keys])


def test_errors_of_gradients_are_like_those_of_the_output():
    tensors = inputs("random")
    exact, wanted = mk.mesa(*tensors, solver="direct")[0], torch.randn(1, TIME, 1, KEY, dtype=torch.float64)
    right = torch.autograd.grad(exact, tensors, wanted)
    for steps in STEPS:
        output = mk.mesa(*tensors, steps=steps)[0]
        for got, gradient in zip(torch.autograd.grad(output, tensors, wanted), right, strict=True):
            assert error(got, gradient) < 5 * error(output, exact)
