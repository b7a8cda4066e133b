"""Strides, threads and memory do not change a bit of the results."""

from __future__ import annotations

import ctypes
import math
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mru_kernels as mk
from bench import inputs
from bench.verify import threads
from mru_kernels import backends
from mru_kernels.cells.bmru import bmru_packed
from tests.calls import (
    CELLS,
    SEGMENTS,
    assert_same_bits,
    cases,
    op_of,
    run,
    segments,
)

# ------------------------------------------------------------------------------------------------ strides


@st.composite
def odd_views(draw, t: torch.Tensor) -> torch.Tensor:
    """A view over values of `t`, with its shape and dtype and with random strides, as user code may create it."""
    order = draw(st.permutations(range(t.dim())))
    steps = draw(st.tuples(*(st.sampled_from([0, 1, 1, 1, 2, 3]) for _ in order)))
    overlaps = draw(st.sampled_from([False, False, True]))  # the views of unfold overlap too
    strides, extent = [0] * t.dim(), 1
    for dim, step in zip(order, steps, strict=True):
        strides[dim] = step * extent
        if t.shape[dim] == 1 and draw(st.booleans()):
            strides[dim] = draw(st.sampled_from([0, 1, 7, 2**40]))  # no access uses this stride
        elif not overlaps:
            extent *= max(t.shape[dim], 1) * max(step, 1)
    offset = draw(st.integers(0, 3))
    needed = offset + 1 + sum((n - 1) * stride for n, stride in zip(t.shape, strides, strict=True) if n > 0)
    values = t.flatten() if t.numel() else t.new_zeros(1)
    memory = values.repeat(max(-(-needed // values.numel()), 1))
    view = memory.as_strided(t.shape, strides, offset)
    if t.is_complex() and draw(st.booleans()):
        view = view.conj()
    return torch._neg_view(view) if draw(st.integers(0, 3)) == 0 else view


def contiguous(t: torch.Tensor) -> torch.Tensor:
    return t.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)


def assert_dense(result: torch.Tensor, stream: torch.Tensor) -> None:
    """`result` is dense, and time-major where `stream` is time-major, as the docstrings say."""
    stream = stream.resolve_conj().resolve_neg()  # torch resolves both before an op runs, and chooses new strides
    has_units = stream.shape[2] <= 1 or stream.stride(2) == 1
    time_major = has_units and stream.stride(1) > stream.stride(0) > 0
    assert result.stride(2) == 1
    assert (result.transpose(0, 1) if time_major else result).is_contiguous()


@given(st.data())
def test_strides_do_not_change_a_bit(backend, device, largest, data):
    """Results and gradients are dense and have the same bits for any strides of the inputs."""
    steps = data.draw(SEGMENTS)
    call = data.draw(cases(largest, layout="contiguous", nonfinite=False)).build().to(device)
    odd = replace(
        call,
        tensors={name: data.draw(odd_views(t)) for name, t in call.tensors.items()},
        grad_h=data.draw(odd_views(call.grad_h)),
        grad_final=data.draw(odd_views(call.grad_final)),
    )
    plain = replace(
        odd,
        tensors={name: contiguous(t) for name, t in odd.tensors.items()},
        grad_h=contiguous(odd.grad_h),
        grad_final=contiguous(odd.grad_final),
    )
    with segments(backend, steps):
        results = run(odd, op_of(call.cell, backend), device)
        assert_same_bits(results, run(plain, op_of(call.cell, backend), device))
    assert_dense(results["h"], odd.stream)
    for name, t in odd.tensors.items():
        if t.dim() == 3:
            assert_dense(results[name], t)
        else:
            assert results[name].is_contiguous()


@given(st.data())
def test_strides_of_packed_gates_do_not_change_a_bit(backend, device, largest, data):
    steps, gates = data.draw(SEGMENTS), data.draw(st.sampled_from([2, 3]))
    case = data.draw(cases(largest, cell="bmru", layout="contiguous", nonfinite=False))
    values = case.build().to(device).stream.repeat(1, 1, gates)
    odd = data.draw(odd_views(values))
    weight = odd.narrow(2, 0, values.shape[2] // gates)
    results = []
    for view in (odd, contiguous(odd)):
        leaf = view.detach().requires_grad_()
        with segments(backend, steps):
            h, final_state = bmru_packed(leaf, epsilon=0.5, amplitude=gates == 3, backend=backend)
            (grad,) = torch.autograd.grad((h, final_state), leaf, (weight, torch.ones_like(final_state)))
        results.append({"h": h.detach().cpu(), "final_state": final_state.detach().cpu(), "gates": grad.cpu()})
    assert_same_bits(*results)
    assert_dense(results[0]["gates"], odd)
    if odd.stride(2) == 1 or odd.shape[2] <= 1:
        assert_dense(results[0]["h"], weight)


@given(st.data())
def test_strides_do_not_change_a_bit_of_a_step(backend, device, data):
    call = (
        data.draw(cases((1, 40), time=1, batch=data.draw(st.integers(1, 3)), nonfinite=False, resets="none"))
        .build()
        .to(device)
    )
    odd = {name: data.draw(odd_views(t[:, 0] if t.dim() == 3 else t)) for name, t in call.tensors.items()}
    odd["state"] = odd.pop("initial_state", None)
    if odd["state"] is None:
        odd["state"] = data.draw(odd_views(call.grad_final))
    step = getattr(mk, f"{call.cell}_step")
    with patch.object(backends, "_CHOSEN", backend):
        results = step(**odd)
        expected = step(**{name: contiguous(t) for name, t in odd.items()})
    assert all(t.is_contiguous() for t in results)
    assert_same_bits(*({"h": h.cpu(), "state": state.cpu()} for h, state in (results, expected)))


@pytest.mark.parametrize("name", ["candidate", "threshold"])
def test_windows_over_time(backend, device, name):
    """Windows overlap and have one stride for time and channels. `empty_like` of them has no dense channels."""
    windows = torch.randn(2, 100, generator=torch.Generator().manual_seed(0)).unfold(1, 80, 1).to(device)
    assert torch.empty_like(windows).stride(2) != 1
    odd = inputs.call("bmru", {"candidate": contiguous(windows), "threshold": contiguous(windows.flip(1))}, {})
    odd = replace(odd, tensors=odd.tensors | {name: windows})
    plain = replace(odd, tensors={name: contiguous(t) for name, t in odd.tensors.items()})
    results = run(odd, op_of("bmru", backend), device)
    assert_same_bits(results, run(plain, op_of("bmru", backend), device))
    assert_dense(results["h"], odd.stream)
    assert_dense(results[name], windows)


# ------------------------------------------------------------------------------------------------ determinism


def _large(cell: str, largest: tuple[int, int], **options) -> inputs.Call:
    """A call that is large enough for several threads."""
    time, channels = largest
    options = {"time": time, "channels": channels, "batch": 4, "initial_state": "real"} | options
    return inputs.case(cell, torch.float32, **options).build()


VARIANTS = [
    {"epsilon": 0.9, "alpha": True},
    {"epsilon": 0.9, "alpha": True, "amplitude": True},
    {"epsilon": 0.9, "alpha": True, "threshold": "channel", "decay": "channel"},
    {"epsilon": 0.9, "alpha": True, "threshold": "channel", "batch": "packed", "reverse": True},
    {"epsilon": 0.0, "alpha": True},
]


def variants(cell: str) -> list[dict]:
    """`VARIANTS` without the factors that the cell does not have, and without duplicates."""
    factors = inputs.COMMON_FACTORS | inputs.CELLS[cell].factors
    reduced = [{name: value for name, value in options.items() if name in factors} for options in VARIANTS]
    return [options for i, options in enumerate(reduced) if options not in reduced[:i]]


@pytest.mark.parametrize("steps", [0, 64])
@pytest.mark.parametrize(("cell", "options"), [(cell, x) for cell in CELLS for x in variants(cell)], ids=str)
def test_same_bits_from_run_to_run_and_for_any_number_of_threads(backend, device, largest, cell, options, steps):
    call = _large(cell, largest, **options)
    with segments(backend, steps):
        with threads(1):
            alone = run(call, op_of(call.cell, backend), device)
        for count in (1, 2, 2, 3, 5):
            with threads(count):
                assert_same_bits(run(call, op_of(call.cell, backend), device), alone)


# ------------------------------------------------------------------------------------------------ memory


@contextmanager
def poisoned(device: torch.device):
    """Fresh memory contains NaN."""
    if device.type == "cpu":
        perturb = -6  # glibc's M_PERTURB: fresh bytes are the complement of the value's lowest byte
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(perturb, 0x100)
        try:
            yield
        finally:
            mallopt(perturb, 0)
    else:  # torch fills memory that it allocates; freed blocks of the caching allocator contain NaN
        for elements in (2**6, 2**10, 2**14, 2**18, 2**22):
            blocks = [torch.full((elements,), math.nan, device=device) for _ in range(16)]
            del blocks
        torch.use_deterministic_algorithms(True)  # fills uninitialised memory
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


class Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


def test_a_long_chunk_leaves_no_scratch():
    """The scratch memory of a chunk of 4096 steps is 16 MiB a thread. The kernel frees it after the call."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        pytest.skip("memory is counted by glibc")
    mallinfo.restype = Mallinfo

    def allocated() -> int:
        info = mallinfo()
        return info.uordblks + info.hblkhd

    x = torch.randn(1, 20, 1024)
    with threads(1):
        before = allocated()
        for chunk_size in (64, 4096):
            leaf = x.clone().requires_grad_()
            h, _ = mk.bmru(leaf, x, chunk_size=chunk_size, backend="cpu")
            h.sum().backward()
            del h, leaf
        assert allocated() - before < 2**20


@pytest.mark.parametrize("steps", [0, 64])
@pytest.mark.parametrize(("cell", "dtype"), [(cell, name) for cell in CELLS for name in inputs.CELLS[cell].dtypes])
def test_every_element_of_every_result_is_written(backend, device, largest, cell, dtype, steps):
    sizes = {"time": min(largest[0], 200), "channels": 19}
    for seed, options in enumerate([*variants(cell), {"batch": "packed"}, {"time": 0}, {"time": 1, "channels": 1}]):
        options = sizes | {"initial_state": "real"} | options
        call = inputs.case(cell, inputs.CELLS[cell].dtypes[dtype], seed, **options).build()
        with segments(backend, steps):
            clean = run(call, op_of(call.cell, backend), device)
            with poisoned(device):
                assert torch.empty(1000, device=device).isnan().all()
                dirty = run(call, op_of(call.cell, backend), device)
        assert not any(t.isnan().any() for t in clean.values())
        assert_same_bits(dirty, clean)
