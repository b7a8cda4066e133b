"""How the CPU scans few channels, whose segments of time lie side by side, and a few long sequences."""

from __future__ import annotations

from itertools import product

import pytest
import torch

import mru_kernels as mk
from bench import inputs

pytestmark = pytest.mark.skipif("cpu" not in mk.available_backends("cpu"), reason="the extension is not built")

MANY = 16  # channels that fill a vector: their segments are scanned one by one, with the same cut of time
CELLS = ["bmru", "schmitt", "linear_recurrence", "resonate", "min_gru", "min_lstm", "leaky_integrator"]
DTYPES = inputs.DTYPES | inputs.COMPLEX_DTYPES
CASES = [*product(CELLS, ("fp32", "bf16", "fp64")), ("linear_recurrence", "c64")]


def _results(call: inputs.Call, channels: int, contiguous: bool, **options):
    """h, the final state and all gradients of the first channels."""
    tensors = {name: t[..., :channels] for name, t in call.tensors.items()}
    if contiguous:
        tensors = {name: t.contiguous() for name, t in tensors.items()}
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    h, state = getattr(mk, call.cell)(**leaves, **(call.settings | options), backend="cpu")
    grads = torch.autograd.grad(
        (h, state), list(leaves.values()), (call.grad_h[..., :channels], torch.ones_like(state))
    )
    return h, state, *grads


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize(("cell", "dtype"), CASES)
def test_few_channels_have_the_bits_of_many(cell, dtype, channels):
    for options in (
        {"batch": 1, "time": 4300},  # eight segments of 512 steps, and a rest
        {"batch": 2, "time": 2100, "reverse": True},
        {"batch": 1, "time": 5200, "cu_seqlens": torch.tensor([0, 700, 2600, 5200])},
        {"batch": 1, "time": 4100, "chunk_size": 48, "contiguous": False},
    ):
        sizes = {name: options.pop(name) for name in ("batch", "time")}
        contiguous = options.pop("contiguous", True)
        call = inputs.case(cell, DTYPES[dtype], channels=MANY, **sizes).build()
        many = _results(call, MANY, contiguous, **options)
        few = _results(call, channels, contiguous, **options)
        for ours, wanted in zip(few, many, strict=True):
            wanted = wanted[..., :channels]
            if ours.dim() > 1:
                assert torch.equal(ours, wanted)
            else:  # a sum over time, in another order
                torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cell", ["bmru", "schmitt"])
def test_one_long_sequence_has_the_gradients_of_one_among_many(cell, dtype):
    call = inputs.case(cell, dtype, batch=4, time=1500, channels=1024).build()
    leaves = {name: t.detach().requires_grad_() for name, t in call.tensors.items()}
    op = getattr(mk, cell)

    def streams(batch):
        h, _ = op(**{name: t[:batch] if t.dim() == 3 else t for name, t in leaves.items()}, **call.settings)
        wanted = [t for t in leaves.values() if t.dim() == 3]
        return torch.autograd.grad(h, wanted, call.grad_h[:batch])

    for ours, wanted in zip(streams(1), streams(4), strict=True):
        torch.testing.assert_close(ours[:1], wanted[:1], rtol=1e-5, atol=1e-5 * wanted.abs().max().item())
