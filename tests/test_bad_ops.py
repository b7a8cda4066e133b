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
from bench import inputs
from mru_kernels import backends
from tests import raw

B, T, D = 2, 5, 3
CELL = raw.CELLS["bmru"]


def arguments_of(device: torch.device) -> dict[str, Any]:
    """Arguments of the forward op that are all as they should be."""
    options = {"batch": B, "channels": D, "epsilon": 0.5, "alpha": True, "initial_state": "real"}
    call = inputs.case("bmru", torch.float32, time=150, **options).build().to(device)
    return raw.scan(call, segment=64)


def saved(arguments: dict[str, Any], backend: str) -> dict[str, Any]:
    """Arguments of the backward op, after the forward op."""
    return raw.backward(arguments, raw.run(CELL.forward[backend], arguments))


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


RAW_BAD = [
    ("streams", []),
    ("streams", [ones(B, T, D)]),
    ("streams", [ones(B, T, D), ones(B, T, D + 1)]),
    ("streams", [ones(B, T, D), ones(B, T, D).double()]),
    ("streams", [ones(B, T, D)] * 4),
    ("streams", [ones(T, D)] * 2),
    ("streams", [ones(B, T, D, dtype=torch.int32)] * 2),
    ("channel", [ones(D - 1)]),
    ("channel", [ones(D), ones(D)]),
    ("channel", [ones(D, dtype=torch.int32)]),
    ("alpha", ones(1)),
    ("alpha", ones(D, 1)),
    ("alpha", ones(D, dtype=torch.float16)),
    ("initial_state", ones(B + 1, D)),
    ("initial_state", ones(D)),
    ("cu_seqlens", torch.tensor([0, 150])),  # batch is 2
    ("cu_seqlens", ones(2)),
    ("packed", 4),
    ("packed", 3),
    ("packed", -1),
]


@pytest.mark.parametrize(("name", "value"), RAW_BAD)
def test_raw_op_checks_what_its_kernel_relies_on(backend, device, name, value):
    def move(t: Any) -> Any:
        return t.to(device) if isinstance(t, torch.Tensor) else t

    value = [move(t) for t in value] if isinstance(value, list) else move(value)
    arguments = arguments_of(device) | {name: value}
    if name == "channel":
        arguments["streams"] = arguments["streams"][:1]
    if (name, value) == ("packed", 4):
        arguments["streams"] = arguments["streams"][:1]
    with pytest.raises((RuntimeError, TypeError, ValueError), match=name):
        raw.run(CELL.forward[backend], arguments)


NUMBERS = [("epsilon", 1.5), ("epsilon", math.nan), ("surrogate_scale", 0.0), ("surrogate_scale", math.inf)]
NUMBERS += [("chunk", value) for value in (0, -64, 8, 8192, 2**59, 2**63 - 64)]
NUMBERS += [("segment", value) for value in (65, -64, 2**60 + 64, 2**63 - 64)]
NUMBERS += [("packed", value) for value in (-1, 10**7, 2**63 - 1)]


@pytest.mark.parametrize(("name", "value"), NUMBERS)
def test_raw_op_checks_its_numbers(backend, device, name, value):
    value = torch.tensor(value, dtype=torch.float64) if name == "epsilon" else value
    arguments = arguments_of(device)
    if name == "packed":
        arguments["streams"] = [arguments["streams"][0][..., :0]]  # any number divides 0 channels
        arguments["alpha"] = arguments["initial_state"] = None
    arguments[name] = value
    with pytest.raises((RuntimeError, ValueError), match=name):
        raw.run(CELL.forward[backend], arguments)
    with FakeTensorMode() as mode:
        fakes = pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments)
        if name != "epsilon":  # a fake one has no value
            with pytest.raises((RuntimeError, ValueError), match=name):
                raw.run(CELL.forward[backend], fakes)


def test_the_longest_chunk_and_segment(backend, device):
    """Are taken, and change nothing but how much is saved."""
    _, most = backends.TABLE[backend].module.CHUNK_SIZES
    arguments = arguments_of(device) | {"segment": 2**60, "chunk": most}
    arguments = saved(arguments, backend)
    expected, *_ = raw.run(CELL.forward[backend], arguments | {"segment": 0, "save": True})
    assert torch.equal(arguments["grad_h"], expected)
    grads = raw.run(CELL.backward[backend], arguments)
    assert [g.shape for g in grads] == [(B, 150, D), (B, 150, D), (D,), (B, D)]


SAVED = [
    ("grad_h", (B, 150, D + 1)),
    ("grad_h", (150, D)),
    ("grad_final", (B, D + 1)),
    ("checkpoints", (B, 1, D)),
    ("checkpoints", (B, 2, D + 1)),
    ("events", (B, 9, D)),
]
SAVED_DTYPES = [("grad_h", torch.int64), ("grad_h", torch.complex64), ("checkpoints", torch.float64)]
SAVED_DTYPES += [("events", torch.int64), ("grad_final", torch.bool)]


@pytest.mark.parametrize(("name", "shape"), SAVED)
def test_raw_backward_of_a_cpp_backend_checks_what_it_is_given(name, shape):
    arguments = saved(arguments_of(torch.device("cpu")), "cpu")
    assert len(raw.run(CELL.backward["cpu"], arguments)) == 4
    arguments[name] = torch.zeros(shape, dtype=arguments[name].dtype)
    with pytest.raises(RuntimeError, match=name):
        raw.run(CELL.backward["cpu"], arguments)


@pytest.mark.parametrize(("name", "dtype"), SAVED_DTYPES)
def test_raw_backward_of_a_cpp_backend_checks_dtypes(name, dtype):
    arguments = saved(arguments_of(torch.device("cpu")), "cpu")
    arguments[name] = arguments[name].to(dtype)
    with pytest.raises(RuntimeError, match=name):
        raw.run(CELL.backward["cpu"], arguments)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of resident memory is reset by way of /proc")
def test_many_sequences_without_channels_take_no_memory():
    def resident_kib(which: str) -> int:
        return int(re.search(rf"{which}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])

    none = torch.zeros(2**24, 3, 0)
    arguments = arguments_of(torch.device("cpu")) | {"streams": [none, none], "alpha": None, "initial_state": None}
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_kib("VmRSS")
    raw.run(CELL.backward["cpu"], saved(arguments, "cpu"))
    assert resident_kib("VmHWM") - before < 2**15


# ------------------------------------------------------------------------------------------------ out of memory

BEYOND = (1, 20, 2**45)  # a stream of one element, whose results no machine has the memory for
CPU_WORDS = "DefaultCPUAllocator: can't allocate memory: you tried to allocate [0-9]+ bytes"
CUDA_WORDS = "CUDA out of memory. Tried to allocate 20.00 GiB."


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
def test_out_of_memory_in_the_words_of_torch(monkeypatch, call):
    with pytest.raises(RuntimeError, match=CPU_WORDS):
        call(monkeypatch)


@pytest.mark.parametrize("call", [_forward_beyond_memory, _backward_beyond_memory])
def test_out_of_memory_before_torch_hands_on_its_words(monkeypatch, call):
    """Before torch 2.13 its stable ABI tells only that an allocation failed."""

    def fail(*_):
        raise cause

    cause = RuntimeError("torch: aoti_torch_empty_strided(...) failed")
    monkeypatch.setitem(CELL.backward, "cpu", fail)
    if call is _forward_beyond_memory:
        monkeypatch.setitem(CELL.forward, "cpu", fail)
    with pytest.raises(RuntimeError, match=CPU_WORDS) as caught:
        call(monkeypatch)
    assert caught.value.__cause__ is cause


@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_out_of_memory_on_a_device_has_the_type_of_torch(monkeypatch, pass_):
    """A C++ kernel raises its words as a RuntimeError."""

    def fail(*_):
        raise cause

    cause = RuntimeError(CUDA_WORDS)
    monkeypatch.setitem(getattr(CELL, pass_), "cpu", fail)
    candidate = torch.zeros(1, 2, 3, requires_grad=True)

    def step() -> None:
        h, _ = mk.bmru(candidate, candidate)
        h.sum().backward()

    with pytest.raises(torch.OutOfMemoryError, match=f"^{re.escape(CUDA_WORDS)}$") as caught:
        step()
    assert caught.value.__cause__ is cause


# ------------------------------------------------------------------------------------------------ the extension


def test_the_extension_takes_the_standard_library_from_libstdcxx_alone():
    """A symbol without a version is one that the linker found elsewhere, as in torch's libraries."""
    (library,) = Path(mk.__file__).parent.glob("_C.*")
    listed = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    names = [name for name in listed.stdout.split() if re.match("_Z(N|NK|NKR|TV|TI|TS)?S[ta-z]", name)]
    assert "aoti_torch_empty_strided" in listed.stdout
    assert [name for name in names if "@" not in name] == []  # or no name at all: a compiler may link all of it
