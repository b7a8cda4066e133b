"""The CPU's scans of a few channels, whose segments are interleaved, and of a few sequences equal scans of many."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

import mru_kernels as mk
from bench import errors, inputs

pytestmark = pytest.mark.skipif("cpu" not in mk.available_backends("cpu"), reason="the extension is not built")

MANY = 16  # channels that fill a vector: their segments are scanned one by one, with the same cut of time
CELLS = ["bmru", "schmitt", "linear_recurrence", "resonate", "min_gru", "min_lstm", "leaky_integrator"]
DTYPES = inputs.DTYPES | inputs.COMPLEX_DTYPES
CASES = [*product(CELLS, ("fp32", "bf16", "fp64")), ("linear_recurrence", "c64")]
#: Arguments of the drawn call, and those of the op.
FORMS = [
    ({"batch": 1, "time": 2300}, {}),  # four segments of 512 steps, and a rest
    ({"batch": 2, "time": 1024, "initial_state": "real"}, {"reverse": True}),  # a run has both sequences
    ({"batch": 1, "time": 3300}, {"cu_seqlens": torch.tensor([0, 600, 1700, 3300])}),
    ({"batch": 1, "time": 2560}, {"cu_seqlens": torch.tensor([0, 1024, 2560]), "reverse": True}),
    ({"batch": 1, "time": 2100}, {"chunk_size": 48}),
]


def _results(call: inputs.Call, channels: int, options: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """h, the final state and all gradients of the first channels."""
    tensors = {name: t[..., :channels] for name, t in call.tensors.items()}
    if "chunk_size" not in options:  # else the steps of a stream are not contiguous
        tensors = {name: t.contiguous() for name, t in tensors.items()}
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    h, state = getattr(mk, call.cell)(**leaves, **(call.settings | options), backend="cpu")
    of_results = (call.grad_h[..., :channels], torch.ones_like(state))
    return h, state, *torch.autograd.grad((h, state), list(leaves.values()), of_results)


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize(("cell", "dtype"), CASES)
def test_few_channels_have_the_bits_of_many(cell, dtype, channels):
    held = [{}, {"epsilon": 0.5}] if cell in ("bmru", "schmitt") else [{}]
    for (drawn, options), scalars in product(FORMS, held):
        call = inputs.case(cell, DTYPES[dtype], channels=MANY, **drawn, **scalars).build()
        many, few = _results(call, MANY, options), _results(call, channels, options)
        limit = errors.LIMITS[errors.state_dtype(DTYPES[dtype])]
        for ours, wanted in zip(few, many, strict=True):
            wanted = wanted[..., :channels]
            if ours.dim() > 1:
                assert torch.equal(ours, wanted)
            else:  # a sum over time, in another order
                torch.testing.assert_close(ours, wanted, rtol=limit, atol=limit * wanted.abs().max().item())


@pytest.mark.parametrize(("dtype", "seldom"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)])
def test_a_long_sequence_has_the_gradients_of_one_among_many(dtype, seldom):
    call = inputs.case("bmru", dtype, batch=4, time=4104, channels=1024, initial_state="real").build()
    leaves = {name: t.detach().clone() for name, t in call.tensors.items()}
    if seldom:  # most channels hold their state longer than a segment
        leaves["threshold"] += 3.5
    leaves = {name: t.requires_grad_() for name, t in leaves.items()}
    of_state = torch.randn(leaves["initial_state"].shape)

    def gradients(batch, **options):
        given = {name: t[:batch] for name, t in leaves.items()}
        results = mk.bmru(**given, **call.settings, **options)[:2]
        found = torch.autograd.grad(results, list(leaves.values()), (call.grad_h[:batch], of_state[:batch]))
        return [t[:1] for t in found]

    one, four = gradients(1), gradients(4)
    for ours, wanted in zip(one, four, strict=True):
        if seldom:  # a held state's gradients are added in another order
            limit = 4 * errors.LIMITS[dtype]
            torch.testing.assert_close(ours, wanted, rtol=limit, atol=limit * wanted.abs().max().item())
        else:
            assert torch.equal(ours, wanted)
    assert all(map(torch.equal, one, gradients(1, return_boundaries=True)))  # 64 steps between checkpoints, not 32
