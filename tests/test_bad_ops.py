"""Bad arguments of the private ops, and calls for which there is no memory, raise before or instead of a result."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import mru_kernels as mk
from mru_kernels import backends, ops
from tests import raw

B, T, D = 2, 5, 3
CELL = ops.CELLS["bmru"]


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


STREAMS = ("candidate", "threshold")


def good_call(device: torch.device, **changes: Any) -> dict[str, Any]:
    """Valid arguments of the forward op, which saves checkpoints and write codes."""
    arrays = {name: torch.randn(B, 150, D, device=device) for name in STREAMS} | {"alpha": ones(D).to(device)}
    state = torch.randn(B, D, device=device)
    named = raw.arguments(CELL, arrays | changes.pop("arrays", {}), initial_state=state, segment=64, epsilon=0.5)
    return named | changes


def forward(named: dict[str, Any], backend: str = "cpu") -> list[torch.Tensor]:
    return CELL.forward[backend](*raw.of(raw.FORWARD, named))


def backward(named: dict[str, Any], backend: str = "cpu") -> list[torch.Tensor]:
    return CELL.backward[backend](*raw.of(raw.BACKWARD, named))


def with_results(named: dict[str, Any], backend: str = "cpu") -> dict[str, Any]:
    """Valid arguments of the backward op, from the results of the forward op."""
    h, final, checkpoints, codes = forward(named, backend)
    saved = {"checkpoints": checkpoints, "codes": codes, "grad_checkpoints": None, "wanted": ops.ALL_WANTED}
    return named | {"grad_h": h, "grad_final": final, **saved}


RAW_BAD_ARRAYS = [
    {"threshold": ones(B, T, D + 1)},
    {"threshold": ones(B, T, D).double()},
    {"candidate": ones(T, D), "threshold": ones(T, D)},
    {"candidate": ones(B, T, D, dtype=torch.int32), "threshold": ones(B, T, D, dtype=torch.int32)},
    {"threshold": ones(D - 1)},
    {"threshold": ones(D, dtype=torch.int32)},
    {"amplitude": ones(D)},
    {"alpha": ones(1)},
    {"alpha": ones(D, 1)},
    {"alpha": ones(D, dtype=torch.float16)},
]
EPSILON = torch.tensor(0.5, dtype=torch.float64)
RAW_BAD = [
    ("inputs", []),
    ("inputs", [ones(B, 150, D), EPSILON]),
    ("inputs", [ones(B, 150, D)] * 5),
    ("inputs", [ones(B, 150, D), ones(B, 150, D), ones(D), ones()]),
    ("given", 0),
    ("given", 1),
    ("given", -1),
    ("given", 2**40),
    ("numbers", []),
    ("numbers", [1.0, 1.0]),
    ("initial_state", ones(B + 1, D)),
    ("initial_state", ones(D)),
    ("cu_seqlens", torch.tensor([0, 150], dtype=torch.int32)),  # batch is 2
    ("cu_seqlens", ones(2)),
    ("resets", ones(B, 150)),
    ("resets", ones(B, 149, dtype=torch.bool)),
    ("resets", ones(150, dtype=torch.bool)),
    ("reset_state", ones(B, D)),  # without resets
    ("packed", 1),
    ("packed", 2),
    ("packed", 3),
    ("packed", 7),
    ("packed", -1),
]


@pytest.mark.parametrize("arrays", RAW_BAD_ARRAYS)
def test_raw_op_checks_its_arrays(backend, device, arrays):
    arrays = {name: t.to(device) for name, t in arrays.items()}
    with pytest.raises((RuntimeError, TypeError, ValueError), match="inputs"):
        forward(good_call(device, arrays=arrays), backend)


@pytest.mark.parametrize(("name", "value"), RAW_BAD)
def test_raw_op_checks_what_its_kernel_relies_on(backend, device, name, value):
    def move(t: Any) -> Any:
        return t.to(device) if isinstance(t, torch.Tensor) and t is not EPSILON else t

    value = [move(t) for t in value] if isinstance(value, list) else move(value)
    with pytest.raises((RuntimeError, TypeError, ValueError), match="inputs|given|packed|numbers|" + name):
        forward(good_call(device, **{name: value}), backend)


NUMBERS = [("epsilon", 1.5), ("epsilon", math.nan), ("surrogate_scale", 0.0), ("surrogate_scale", math.inf)]
NUMBERS += [("chunk", value) for value in (0, -64, 8, 8192, 2**59, 2**63 - 64)]
NUMBERS += [("segment", value) for value in (-2, -64, 2**60 + 64, 2**63 - 64)]


@pytest.mark.parametrize(("name", "value"), NUMBERS)
def test_raw_op_checks_its_numbers(backend, device, name, value):
    named = good_call(device)
    if name == "epsilon":
        named["inputs"][-1] = torch.tensor(value, dtype=torch.float64)
    elif name == "surrogate_scale":
        named["numbers"] = [value]
    else:
        named[name] = value
    with pytest.raises((RuntimeError, ValueError), match=name):
        forward(named, backend)
    with FakeTensorMode() as mode:
        fakes = pytree.tree_map_only(torch.Tensor, mode.from_tensor, named)
        if name != "epsilon":  # a fake tensor has no value to check
            with pytest.raises((RuntimeError, ValueError), match=name):
                forward(fakes, backend)


def test_the_longest_chunk_and_segment(backend, device):
    """The largest chunk and segment sizes are valid and do not change the results."""
    _, most = backends.TABLE[backend].module.CHUNK_SIZES
    named = good_call(device, segment=2**60, chunk=most)
    expected, *_ = forward(named | {"segment": 0}, backend)
    named = with_results(named, backend)
    assert torch.equal(named["grad_h"], expected)
    assert [g.shape for g in backward(named, backend)] == [(B, 150, D), (B, 150, D), (D,), (B, D)]


SAVED = [
    ("grad_h", (B, 150, D + 1)),
    ("grad_h", (150, D)),
    ("grad_final", (B, D + 1)),
    ("checkpoints", (2 * B - 1, D)),
    ("checkpoints", (B, 2, D)),
    ("checkpoints", (2 * B, D + 1)),
    ("codes", (10 * B - 1, D)),
    ("grad_checkpoints", (2 * B - 1, D)),
]
SAVED_DTYPES = [("grad_h", torch.int64), ("grad_h", torch.complex64), ("checkpoints", torch.float64)]
SAVED_DTYPES += [("codes", torch.int64), ("grad_final", torch.bool)]


def test_raw_backward_without_the_gradient_of_the_final_state(backend, device):
    named = with_results(good_call(device), backend)
    zeros = named | {"grad_final": torch.zeros_like(named["grad_final"])}
    absent = named | {"grad_final": None}
    assert all(map(torch.equal, backward(absent, backend), backward(zeros, backend)))


@pytest.mark.parametrize(("name", "shape"), SAVED)
def test_raw_backward_of_a_cpp_backend_checks_what_it_is_given(name, shape):
    named = with_results(good_call(torch.device("cpu")))
    assert len(backward(named)) == 4
    dtype = torch.float32 if named[name] is None else named[name].dtype
    named[name] = torch.zeros(shape, dtype=dtype)
    with pytest.raises(RuntimeError, match=name):
        backward(named)


@pytest.mark.parametrize(("name", "dtype"), SAVED_DTYPES)
def test_raw_backward_of_a_cpp_backend_checks_dtypes(name, dtype):
    named = with_results(good_call(torch.device("cpu")))
    named[name] = named[name].to(dtype)
    with pytest.raises(RuntimeError, match=name):
        backward(named)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of resident memory is reset by way of /proc")
def test_many_sequences_without_channels_need_no_memory():
    def resident_kib(which: str) -> int:
        return int(re.search(rf"{which}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])

    none = torch.zeros(2**24, 3, 0)
    named = raw.arguments(CELL, dict.fromkeys(STREAMS, none), segment=64)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_kib("VmRSS")
    backward(with_results(named))
    assert resident_kib("VmHWM") - before < 2**15


# ------------------------------------------------------------------------------------------------ out of memory

BEYOND = (1, 20, 2**45)  # [B, T, D] of an expanded element; no machine has memory for its results
CPU_MESSAGE = "DefaultCPUAllocator: can't allocate memory: you tried to allocate [0-9]+ bytes"
CUDA_MESSAGE = "CUDA out of memory. Tried to allocate 20.00 GiB."


def _forward_beyond_memory(_monkeypatch):
    one = torch.zeros(()).expand(BEYOND)
    with torch.no_grad():
        mk.bmru(one, one)


def _backward_beyond_memory(monkeypatch):
    leaf = torch.zeros((), requires_grad=True)
    one = leaf.expand(BEYOND)
    shapes = [(BEYOND, torch.float32), ((1, BEYOND[2]), torch.float32)]
    shapes += [((1, 0, BEYOND[2]), dtype) for dtype in (torch.float32, torch.int32)]
    results = [torch.zeros((), dtype=dtype).expand(shape) for shape, dtype in shapes]
    monkeypatch.setitem(CELL.forward, "cpu", lambda *_: results)
    outputs = mk.bmru(one, one)
    torch.autograd.grad(outputs, leaf, [torch.zeros(()).expand(t.shape) for t in outputs])


def _module_beyond_memory(monkeypatch):
    unit, one = mk.BMRU(4, 6), torch.zeros(())
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *_: one.expand(1, 2**45, 12))
    with torch.no_grad():
        unit(one.expand(1, 2**45, 4))


@pytest.mark.parametrize("call", [_forward_beyond_memory, _backward_beyond_memory, _module_beyond_memory])
def test_out_of_memory_has_the_message_of_torch(monkeypatch, call):
    with pytest.raises(RuntimeError, match=CPU_MESSAGE):
        call(monkeypatch)


@pytest.mark.parametrize("call", [_forward_beyond_memory, _backward_beyond_memory])
def test_out_of_memory_where_torch_hides_its_message(monkeypatch, call):
    """Before torch 2.13, its stable ABI reports that an allocation failed, without the message."""

    def fail(*_):
        raise cause

    cause = RuntimeError("torch: aoti_torch_empty_strided(...) failed")
    monkeypatch.setitem(CELL.backward, "cpu", fail)
    if call is _forward_beyond_memory:
        monkeypatch.setitem(CELL.forward, "cpu", fail)
    with pytest.raises(RuntimeError, match=CPU_MESSAGE) as caught:
        call(monkeypatch)
    assert caught.value.__cause__ is cause


@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_out_of_memory_on_a_device_has_the_type_of_torch(monkeypatch, pass_):
    """A C++ kernel raises the message as a RuntimeError; the package raises torch.OutOfMemoryError from it."""

    def fail(*_):
        raise cause

    cause = RuntimeError(CUDA_MESSAGE)
    monkeypatch.setitem(getattr(CELL, pass_), "cpu", fail)
    candidate = torch.zeros(1, 2, 3, requires_grad=True)

    def step() -> None:
        h, _ = mk.bmru(candidate, candidate)
        h.sum().backward()

    with pytest.raises(torch.OutOfMemoryError, match=f"^{re.escape(CUDA_MESSAGE)}$") as caught:
        step()
    assert caught.value.__cause__ is cause


# ------------------------------------------------------------------------------------------------ the extension


def test_the_extension_links_the_standard_library_from_libstdcxx_only():
    """A symbol without a version comes from another library, for example one of torch's."""
    (library,) = Path(mk.__file__).parent.glob("_C.*")
    listed = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    names = [name for name in listed.stdout.split() if re.match("_Z(N|NK|NKR|TV|TI|TS)?S[ta-z]", name)]
    assert "aoti_torch_empty_strided" in listed.stdout
    assert [name for name in names if "@" not in name] == []  # or no name at all: a compiler may link all of it
