"""How many steps lie between two checkpoints where `chunk_size` is the default."""

from __future__ import annotations

import pytest
import torch

import mru_kernels as mk
from bench import inputs
from mru_kernels import backends, ops
from mru_kernels.softmax import layout


@pytest.mark.parametrize(
    ("name", "cell", "dtype", "width", "packed", "steps"),
    [
        ("cpu", "bmru", torch.float32, 1023, 0, 64),
        ("cpu", "bmru", torch.float32, 1024, 0, 32),
        ("cpu", "bmru", torch.float16, 1024, 0, 32),
        ("cpu", "bmru", torch.float64, 512, 0, 32),
        ("cpu", "bmru", torch.float32, 2 * 1023, 0b11, 64),  # two gates side by side
        ("cpu", "bmru", torch.float32, 2 * 1024, 0b11, 32),
        ("cpu", "linear_recurrence", torch.complex64, 512, 0, 32),
        ("cpu", "resonate", torch.bfloat16, 512, 0, 32),  # its states are complex
        ("cuda", "bmru", torch.float32, 4096, 0, 64),
        ("triton", "bmru", torch.float32, 4096, 0, 64),
    ],
)
def test_wide_rows_of_states_have_more_checkpoints(name, cell, dtype, width, packed, steps):
    first = torch.empty(1, 1, width, dtype=dtype)
    row, declared = backends.TABLE[name], ops.CELLS[cell]
    assert ops.chunk_of(row, declared, backends.CHUNK, first, packed) == steps
    assert ops.chunk_of(row, declared, 128, first, packed) == 128


@pytest.mark.parametrize(
    ("name", "dtype", "heads", "channels", "steps"),
    [
        ("cpu", torch.float32, 341, 341, 64),
        ("cpu", torch.bfloat16, 342, 342, 32),  # a head has two more numbers than its channel
        ("cpu", torch.float32, 1023, 1023, 32),
        ("cpu", torch.float32, 1024, 1024, 16),
        ("cpu", torch.float64, 512, 512, 16),
        ("cpu", torch.float32, 16, 1024, 32),
        ("cuda", torch.float32, 4096, 4096, 64),
        ("torch", torch.float32, 4096, 4096, 64),
    ],
)
def test_wide_states_of_the_softmax_recurrence_have_more_borders(name, dtype, heads, channels, steps):
    score, value = torch.empty(1, 1, heads, dtype=dtype), torch.empty(1, 1, channels, dtype=dtype)
    row = backends.TABLE[name]
    for tensors in ((score, value, 0), (torch.cat([score, value], -1), None, heads)):
        assert layout.chunk_of(row, backends.CHUNK, *tensors) == steps
        assert layout.chunk_of(row, 128, *tensors) == 128


def test_gradients_do_not_change_a_bit_of_the_softmax_recurrence():
    score, value = torch.randn(2, 100, 1024), torch.randn(2, 100, 1024)
    results = mk.softmax_recurrence(score, value)
    with_gradients = mk.softmax_recurrence(score.requires_grad_(), value)
    assert all(map(torch.equal, results, with_gradients))
    assert all(map(torch.equal, results, mk.softmax_recurrence(score.detach(), value, chunk_size=16)))


@pytest.mark.parametrize(("dtype", "channels", "default"), [(torch.bfloat16, 1023, 64), (torch.float32, 1024, 32)])
def test_checkpoints_do_not_change_a_bit(dtype, channels, default):
    call = inputs.case("bmru", dtype, batch=2, time=200, channels=channels).build()
    leaves = {name: t.clone().requires_grad_() for name, t in call.tensors.items()}
    results = {}
    for chunk_size, steps in ((backends.CHUNK, default), (128, 128), (None, None)):
        h, _ = mk.bmru(**leaves, chunk_size=chunk_size)
        saved = {tuple(t.shape) for t in h.grad_fn.saved_tensors if t is not None}
        assert steps is None or (2 * (199 // steps), channels) in saved
        results[chunk_size] = [h, *torch.autograd.grad(h, list(leaves.values()), call.grad_h)]
    for others in (results[128], results[None]):
        assert all(map(torch.equal, results[backends.CHUNK], others))
    boundaries = mk.bmru(**leaves, return_boundaries=True)[2]
    assert boundaries.shape == (2, 199 // backends.CHUNK, channels)
