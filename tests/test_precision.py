"""Numbers at the limits of their dtypes: slopes of any scale, sums of many equal terms, partial vectors."""

from __future__ import annotations

import ctypes
import math
import mmap
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

import mru_kernels as mk
import python_ref
from bench import errors, inputs
from bench.verify import threads
from mru_kernels import backends
from tests.calls import op_of, run, segments

CELLS = list(inputs.CELLS)


def _gradients(op, tensors: dict[str, Tensor], grad_h: Tensor, device: torch.device, **settings) -> dict[str, Tensor]:
    leaves = {name: t.to(device).requires_grad_() for name, t in tensors.items()}
    h, _ = op(**leaves, **settings)
    grads = torch.autograd.grad(h, list(leaves.values()), grad_h.to(device))
    return {name: t.cpu() for name, t in zip(leaves, grads, strict=True)}


# ------------------------------------------------------------------------------------------ slopes

SCALES = [1e-300, 1e-60, 1e-45, 1e-40, 1e-38, 1e-30, 1.0, 1e30, 3e37, 4e37, 9e37, 3e38, 1e39, 1e45, 1e300]
EXACT_GAIN = {torch.float32: 2.0**124, torch.float64: 2.0**1020}  # largest scale at which no slope is lost (lanes.h)


def _near_ties(cell: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Streams [2, 24, 19] with ties, near ties and zeros."""
    candidate = torch.randn(2, 24, 19).to(dtype)
    candidate[0, 3], candidate[1, 2] = 0, 2.0**-20
    state = errors.state_dtype(dtype)
    if cell == "schmitt":
        tensors = {"candidate": candidate, "low": torch.full((19,), -0.5), "high": torch.full((19,), 0.5)}
        candidate[:, ::4], candidate[:, 1::4] = -0.5, 0.5
        return {name: t.to(dtype if t is candidate else state) for name, t in tensors.items()}
    ties = torch.rand(candidate.shape) < 0.3
    threshold = torch.where(ties, candidate.abs(), torch.randn(candidate.shape).to(dtype))
    threshold[0, 5] = candidate[0, 5] * (1 + 2 * torch.finfo(dtype).eps)
    return {"candidate": candidate, "threshold": threshold}


@pytest.mark.parametrize("epsilon", [0.0, 0.5])
@pytest.mark.parametrize("cell", ["bmru", "schmitt"])
@pytest.mark.parametrize("dtype", inputs.DTYPES.values(), ids=str)
def test_any_scale_gives_the_slopes_of_the_reference(backend, device, cell, dtype, epsilon):
    """Gradients equal the rounded reference: they are infinite above the range of the dtype and 0 below it."""
    torch.manual_seed(0)
    tensors = _near_ties(cell, dtype)
    state = errors.state_dtype(dtype)
    grad_h = torch.randn(2, 24, 19).to(dtype)
    grad_h[:, 10:] = 0
    none = torch.zeros(2, 19, dtype=torch.float64)
    for scale in SCALES:
        settings = {"epsilon": epsilon, "surrogate_scale": scale}
        got = _gradients(op_of(cell, backend), tensors, grad_h, device, **settings)
        expected, terms = (
            python_ref.CELLS[cell].adjoint(**tensors, **settings, grad_h=grad_h, grad_final=none, term=term)
            for term in (python_ref.itself, abs)
        )
        gain = min(max(1.0, scale / EXACT_GAIN[state]), 2.0**62)
        for name, result in got.items():
            lost = 100 * gain * torch.finfo(state).smallest_normal + torch.finfo(result.dtype).smallest_normal
            lost += 1e-150 if scale > 1e150 else 0  # the square in the reference overflows
            error = (result.double() - expected[name]).abs()
            right = error <= 4 * errors.LIMITS[result.dtype] * terms[name] + lost
            right |= result == expected[name].to(state).to(result.dtype)  # infinities
            if result.dim() == 1:
                right |= terms[name] > torch.finfo(state).max  # a partial sum may be infinite
            assert right.all(), (scale, name, result[~right][:4], expected[name][~right][:4])


# ------------------------------------------------------------------------------------------ sums

SUMS = {
    "bmru": {"threshold": 0.75, "alpha": 0.7},
    "schmitt": {"low": 0.3, "high": 0.75, "alpha": 0.7},
    "linear_recurrence": {"decay": 0.7},
}


def _equal_terms(cell: str, batch: int, time: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """A call whose steps, or pairs of steps, are all equal: every sum has many equal terms."""
    channels = torch.arange(1, 6) / 5  # near to and far from powers of two
    state = errors.state_dtype(dtype)
    if dtype.is_complex:
        channels = channels * (1 + 0.3j)
    stream = "update" if cell == "linear_recurrence" else "candidate"
    tensors = {stream: (channels + 0.1).to(dtype).repeat(batch, time, 1)}
    if cell == "schmitt":
        tensors[stream][:, 1::2] = 0  # a low step after a high state gives `low` a gradient
    tensors |= {name: (value * channels / 1.2).to(state) for name, value in SUMS[cell].items()}
    return tensors, (channels / 3).to(dtype).expand(batch, time, 5)


def _check_sums(backend, device, cell: str, batch: int, time: int, dtype: torch.dtype, **settings) -> None:
    tensors, grad_h = _equal_terms(cell, batch, time, dtype)
    wide = {name: errors.wide(t) for name, t in tensors.items()}
    got = _gradients(op_of(cell, backend), tensors, grad_h, device, **settings)
    expected = _gradients(op_of(cell, "cpu"), wide, errors.wide(grad_h), torch.device("cpu"))
    for name in SUMS[cell]:
        error = (errors.wide(got[name]) - expected[name]).abs() / expected[name].abs()
        assert (error <= 1e-6).all(), (name, settings, error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("cell", SUMS)
def test_sums_of_many_equal_terms(backend, device, largest, cell, dtype):
    """Sums over time and batch keep half the limit of their dtype. A plain sum exceeds it from 100 terms on."""
    if dtype not in inputs.CELLS[cell].dtypes.values():
        pytest.skip("the cell has no complex streams")
    check = partial(_check_sums, backend, device, cell, dtype=dtype)
    if largest[0] < 300:
        check(batch=3, time=1100)
        return
    least, most = backends.TABLE[backend].module.CHUNK_SIZES
    for chunk_size in (16, 48, 64, 1024, 4096):
        if least <= chunk_size <= most:
            check(batch=1, time=20000, chunk_size=chunk_size)
    check(batch=20000, time=3)
    with segments(backend, 64):
        check(batch=1, time=40000)


@pytest.mark.parametrize("cell", SUMS)
def test_sums_over_a_million_steps(backend, device, largest, cell):
    if largest[0] < 300:
        pytest.skip("too long for an interpreted backend")
    _check_sums(backend, device, cell, 1, 1_000_000, torch.float32)


# ------------------------------------------------------------------------------------------ long segments


@pytest.mark.parametrize("cell", ["bmru", "schmitt"])
def test_a_state_held_over_long_segments_equals_the_whole(backend, device, largest, cell):
    """One write reaches the end of its segment many steps later, and its gradient comes from many steps later."""
    if largest[0] < 300:
        pytest.skip("too long for an interpreted backend")
    time, segment = 2**16, 2**15
    tensors = {"candidate": torch.full((1, time, 3), 0.5)}
    tensors["candidate"][0, 5, 1] = 2.0
    tensors |= {"low": torch.zeros(3), "high": torch.ones(3)} if cell == "schmitt" else {"threshold": torch.ones(3)}
    tensors["initial_state"] = torch.tensor([[3.0, 4.0, 5.0]])
    grad_h = torch.zeros(1, time, 3)
    grad_h[0, -7:] = 1.0
    call = replace(inputs.call(cell, tensors, {"epsilon": 0.0}), grad_h=grad_h)
    op = op_of(cell, backend)
    with segments(backend, 0), threads(1):
        whole = run(call, op, device)
    assert (whole["final_state"] == torch.tensor([[3.0, 1.0, 5.0]])).all()
    for count in (1, 2):
        with segments(backend, segment), threads(count):
            cut = run(call, op, device)
        for name, expected in whole.items():
            tolerance = 0 if name in ("h", "final_state", "initial_state") else errors.LIMITS[torch.float32]
            torch.testing.assert_close(cut[name], expected, rtol=tolerance, atol=0.1 * tolerance)


# ------------------------------------------------------------------------------------------ partial vectors


@pytest.mark.parametrize(("cell", "dtype"), [(cell, name) for cell in CELLS for name in inputs.CELLS[cell].dtypes])
def test_any_number_of_channels_gives_the_same_values(backend, device, largest, cell, dtype):
    """The first channels of a call do not depend on the number of channels."""
    most = 70 if largest[0] >= 300 else 9
    options = {"initial_state": "real"} | dict.fromkeys(inputs.CELLS[cell].optional, True)
    call = inputs.case(cell, inputs.CELLS[cell].dtypes[dtype], 3, time=5, batch=2, channels=most, **options).build()
    every = run(call, op_of(cell, backend), device)
    for channels in range(1, most):
        few = replace(
            call,
            tensors={name: t[..., :channels].contiguous() for name, t in call.tensors.items()},
            grad_h=call.grad_h[..., :channels].contiguous(),
            grad_final=call.grad_final[..., :channels].contiguous(),
        )
        for name, result in run(few, op_of(cell, backend), device).items():
            assert torch.equal(result, every[name][..., :channels]), (channels, name)


@contextmanager
def _before_a_border(elements: int, dtype: torch.dtype):
    """A tensor whose last element lies directly before a page that may not be read."""
    page = mmap.PAGESIZE
    size = -(-elements * dtype.itemsize // page) * page
    room = mmap.mmap(-1, size + page)
    border = ctypes.addressof(ctypes.c_char.from_buffer(room)) + size
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    assert protect(border, page, 0) == 0  # PROT_NONE
    try:
        yield torch.frombuffer(room, dtype=dtype, count=elements, offset=size - elements * dtype.itemsize)
    finally:
        protect(border, page, mmap.PROT_READ | mmap.PROT_WRITE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64], ids=str)
def test_nothing_behind_the_last_channel_is_read(dtype):
    """CPU kernels do not read beyond streams, states and per-channel inputs. Such a read would end the process."""
    state = errors.state_dtype(dtype)
    for channels in range(1, 40):
        with (
            _before_a_border(6 * channels, dtype) as stream,
            _before_a_border(channels, state) as vector,
        ):
            stream.fill_(1), vector.fill_(1)
            x, per_channel = stream.view(1, 6, channels), vector
            if dtype.is_complex:
                h, _ = mk.linear_recurrence(per_channel, x, per_channel.view(1, -1), backend="cpu")
            else:
                h, _ = mk.bmru(x, per_channel, per_channel.view(1, -1), alpha=per_channel, backend="cpu")
            assert math.isfinite(h.abs().sum().item())
            leaves = [x.detach().requires_grad_(), per_channel.detach().requires_grad_()]
            h, _ = mk.linear_recurrence(leaves[1], leaves[0], backend="cpu")
            torch.autograd.grad(h, leaves, x)
            x = leaves = h = None
