"""Large calls on the CPU, whose results come by non-temporal stores, equal small calls on their sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mru_kernels as mk
from bench import inputs

pytestmark = pytest.mark.skipif("cpu" not in mk.available_backends("cpu"), reason="the extension is not built")

LARGE = 2**27  # bytes of all streams of a call: `kLargeBytes` of csrc/cpu/plan.h
BATCH = 4
GROUPS = {"wkv": 1, "softmax_recurrence": 64, "softmax_recurrence of 40": 40}  # channels of a head
DTYPES = inputs.DTYPES | inputs.COMPLEX_DTYPES


def _of_a_cell(cell: str, dtype: str, time: int, channels: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    call = inputs.case(cell, DTYPES[dtype], batch=BATCH, time=time, channels=channels).build()
    return call.tensors, call.settings


def _of_softmax(cell: str, dtype: str, time: int, channels: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    heads = channels // GROUPS[cell]
    score, value = (torch.randn(BATCH, time, width).to(DTYPES[dtype]) for width in (heads, channels))
    if cell != "wkv":
        return {"score": score, "value": value}, {}
    return {"key": score, "value": value, "decay": -torch.rand(heads), "bonus": torch.randn(heads)}, {}


def _results(cell: str, tensors: dict[str, Tensor], settings: dict[str, Any], grad: Tensor) -> list[Tensor]:
    """y, the final state and the gradients of the streams."""
    leaves = {name: t.detach().requires_grad_(t.dim() == 3) for name, t in tensors.items()}
    y, state = getattr(mk, cell.split()[0])(**leaves, **settings, backend="cpu")
    return [y, state, *torch.autograd.grad(y, [t for t in leaves.values() if t.requires_grad], grad)]


@pytest.mark.parametrize(
    ("cell", "dtype", "channels", "reverse"),
    [
        ("bmru", "fp32", 512, False),
        ("bmru", "fp32", 501, False),  # rows are not whole lines of the cache: only usual stores
        ("linear_recurrence", "bf16", 512, False),
        ("linear_recurrence", "c64", 256, True),
        ("linear_recurrence", "fp64", 256, False),
        ("lif", "fp16", 1024, False),
        ("lif", "fp32", 16, False),
        ("wkv", "fp32", 512, True),
        ("wkv", "fp32", 501, False),
        ("softmax_recurrence", "fp32", 512, False),
        ("softmax_recurrence of 40", "fp32", 640, False),  # rows are whole lines, those of a head are not
    ],
)
def test_a_large_call_equals_its_parts(cell, dtype, channels, reverse):
    draw = _of_softmax if cell in GROUPS else _of_a_cell
    a_step, _ = draw(cell, dtype, 1, channels)
    of_a_step = sum(t.nbytes for t in a_step.values() if t.dim() == 3) + BATCH * channels * DTYPES[dtype].itemsize
    time = -(-LARGE // of_a_step)
    tensors, settings = draw(cell, dtype, time, channels)
    settings = settings | {"reverse": reverse}
    grad = torch.randn(BATCH, time, channels).to(DTYPES[dtype])
    large = _results(cell, tensors, settings, grad)
    for n in range(BATCH):
        part = {name: t[n : n + 1] if t.dim() == 3 else t for name, t in tensors.items()}
        for ours, wanted in zip(large, _results(cell, part, settings, grad[n : n + 1]), strict=True):
            assert torch.equal(ours[n : n + 1], wanted)
