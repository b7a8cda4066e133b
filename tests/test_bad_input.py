"""Bad input raises before any kernel runs, names the argument, and leaves every input untouched."""

from __future__ import annotations

import math
import re
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mru_kernels as mk
import python_ref
from bench import errors
from mru_kernels import backends, checks
from mru_kernels.ops import CELLS

CELL = CELLS["bmru"]
B, T, D = 2, 5, 3


def good(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", batch: int = B) -> dict[str, Any]:
    """Valid arguments of `mk.bmru`."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    return {
        "candidate": draw(batch, T, D),
        "threshold": draw(batch, T, D),
        "initial_state": draw(batch, D, dtype=torch.float32),
        "epsilon": 0.5,
        "alpha": draw(D),
        "amplitude": draw(batch, T, D),
        "surrogate_scale": 1.0,
        "reverse": False,
        "cu_seqlens": None,
    }


def call(arguments: dict[str, Any], backend: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Call `mk.bmru`, and check that it changes no tensor of its arguments, whether or not it raises."""
    arguments = {"backend": backend} | arguments
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    before = {name: (t.clone(), t._version) for name, t in tensors.items()}
    try:
        return mk.bmru(**arguments)
    finally:
        for name, t in tensors.items():
            value, version = before[name]
            assert t._version == version
            assert t.is_meta or errors.same_values(t, value), f"{name} was changed"


def offsets(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def ones(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


# (argument, bad value, error, pattern of the message after "argument: expected")
BAD = [
    ("candidate", None, TypeError, "tensor.*NoneType"),
    ("candidate", [[[1.0]]], TypeError, "tensor.*list"),
    ("candidate", ones(T, D), ValueError, r"3 dimensions.*\[5, 3\]"),
    ("candidate", ones(B, T, D, 1), ValueError, r"3 dimensions.*\[2, 5, 3, 1\]"),
    ("candidate", ones(), ValueError, r"3 dimensions.*\[\]"),
    ("candidate", ones(B, T, D, dtype=torch.int64), TypeError, "float32.*int64"),
    ("candidate", ones(B, T, D, dtype=torch.bool), TypeError, "float32.*bool"),
    ("candidate", ones(B, T, D, dtype=torch.complex64), TypeError, "float32.*complex64"),
    ("threshold", None, TypeError, "tensor.*NoneType"),
    ("threshold", 0.5, TypeError, "tensor.*float"),
    ("threshold", ones(T, D), ValueError, r"3 dimensions.*\[5, 3\]"),
    ("threshold", ones(), ValueError, r"3 dimensions.*\[\]"),
    ("threshold", ones(B + 1, T, D), ValueError, r"\[2, 5, 3\].*\[3, 5, 3\]"),
    ("threshold", ones(B, T + 1, D), ValueError, r"\[2, 5, 3\].*\[2, 6, 3\]"),
    ("threshold", ones(B, T, D + 1), ValueError, r"\[2, 5, 3\].*\[2, 5, 4\]"),
    ("threshold", ones(1, T, D), ValueError, r"\[2, 5, 3\].*\[1, 5, 3\]"),
    ("threshold", ones(D + 1), ValueError, r"\[3\].*\[4\]"),
    ("threshold", ones(1), ValueError, r"\[3\].*\[1\]"),
    ("threshold", ones(B, T, D, dtype=torch.float64), TypeError, "float32.*float64"),
    ("threshold", ones(B, T, D, dtype=torch.float16), TypeError, "float32.*float16"),
    ("threshold", ones(D, dtype=torch.bfloat16), TypeError, "float32.*bfloat16"),
    ("threshold", ones(D, dtype=torch.int32), TypeError, "float32.*int32"),
    ("threshold", ones(B, T, D, device="meta"), ValueError, "device cpu.*meta"),
    ("threshold", ones(D, device="meta"), ValueError, "device cpu.*meta"),
    ("initial_state", 0.0, TypeError, "tensor.*float"),
    ("initial_state", ones(D), ValueError, r"2 dimensions.*\[3\]"),
    ("initial_state", ones(B, 1, D), ValueError, r"2 dimensions.*\[2, 1, 3\]"),
    ("initial_state", ones(B + 1, D), ValueError, r"\[2, 3\].*\[3, 3\]"),
    ("initial_state", ones(B, D - 1), ValueError, r"\[2, 3\].*\[2, 2\]"),
    ("initial_state", ones(1, D), ValueError, r"\[2, 3\].*\[1, 3\]"),
    ("initial_state", ones(B, D, dtype=torch.float64), TypeError, "float32.*float64"),
    ("initial_state", ones(B, D, dtype=torch.int64), TypeError, "float32.*int64"),
    ("initial_state", ones(B, D, device="meta"), ValueError, "device cpu.*meta"),
    ("alpha", 2.0, TypeError, "tensor.*float"),
    ("alpha", ones(), ValueError, r"1 dimension.*\[\]"),
    ("alpha", ones(1), ValueError, r"\[3\].*\[1\]"),
    ("alpha", ones(B, D), ValueError, r"1 dimension.*\[2, 3\]"),
    ("alpha", ones(D, dtype=torch.int64), TypeError, "float32.*int64"),
    ("alpha", ones(D, device="meta"), ValueError, "device cpu.*meta"),
    ("amplitude", 2.0, TypeError, "tensor.*float"),
    ("amplitude", ones(D), ValueError, r"3 dimensions.*\[3\]"),
    ("amplitude", ones(B, T, 1), ValueError, r"\[2, 5, 3\].*\[2, 5, 1\]"),
    ("amplitude", ones(B, T, D, dtype=torch.float64), TypeError, "float32.*float64"),
    ("amplitude", ones(B, T, D, device="meta"), ValueError, "device cpu.*meta"),
    ("epsilon", None, TypeError, "float.*NoneType"),
    ("epsilon", "0.5", TypeError, "float.*str"),
    ("epsilon", True, TypeError, "float.*bool"),
    ("epsilon", -0.01, ValueError, r"\[0, 1\].*-0.01"),
    ("epsilon", 1.01, ValueError, r"\[0, 1\].*1.01"),
    ("epsilon", 2, ValueError, r"\[0, 1\].*2"),
    ("epsilon", math.nan, ValueError, r"\[0, 1\].*nan"),
    ("epsilon", math.inf, ValueError, r"\[0, 1\].*inf"),
    ("epsilon", torch.tensor(-0.5), ValueError, r"\[0, 1\].*-0.5"),
    ("epsilon", torch.tensor(1.5), ValueError, r"\[0, 1\].*1.5"),
    ("epsilon", torch.tensor(math.nan), ValueError, r"\[0, 1\].*nan"),
    ("epsilon", torch.tensor([0.5]), ValueError, r"0-dim.*\[1\]"),
    ("epsilon", torch.tensor(1), ValueError, "floating.*int64"),
    ("epsilon", torch.tensor(0.5, device="meta"), ValueError, "CPU.*meta"),
    ("epsilon", torch.tensor(0.5, requires_grad=True), ValueError, "schedule.*requires grad"),
    ("reverse", "no", TypeError, "bool.*str"),
    ("reverse", 1, TypeError, "bool.*int"),
    ("reverse", None, TypeError, "bool.*NoneType"),
    ("surrogate_scale", 0.0, ValueError, "positive.*0.0"),
    ("surrogate_scale", -1.0, ValueError, "positive.*-1.0"),
    ("surrogate_scale", math.nan, ValueError, "positive.*nan"),
    ("surrogate_scale", math.inf, ValueError, "positive.*inf"),
    ("surrogate_scale", "1", TypeError, "float.*str"),
    ("surrogate_scale", True, TypeError, "float.*bool"),
    ("surrogate_scale", None, TypeError, "float.*NoneType"),
    ("chunk_size", 0, ValueError, "multiple of 16.*got 0"),
    ("chunk_size", -16, ValueError, "multiple of 16.*-16"),
    ("chunk_size", 24, ValueError, "multiple of 16.*24"),
    ("chunk_size", 64.0, TypeError, "int.*float"),
    ("chunk_size", True, TypeError, "int.*bool"),
    ("cu_seqlens", offsets(0, T), ValueError, "batch 1.*batch 2"),
    ("backend", "fortran", ValueError, "cpu.*fortran"),
    ("backend", 3, TypeError, "got int"),
    ("backend", ["cpu"], TypeError, "got list"),
]
# The same rows, for streams of batch 1 without an initial state.
BAD_OFFSETS = [
    ("cu_seqlens", [0, T], TypeError, "tensor.*list"),
    ("cu_seqlens", offsets(), ValueError, "at least one offset.*none"),
    ("cu_seqlens", offsets(0, T).reshape(1, 2), ValueError, r"1 dimension.*\[1, 2\]"),
    ("cu_seqlens", offsets(0, T, dtype=torch.int16), TypeError, "int32 or int64.*int16"),
    ("cu_seqlens", torch.tensor([0.0, T]), TypeError, "int32 or int64.*float32"),
    ("cu_seqlens", offsets(0), ValueError, rf"0 to the total length {T}, got 0 at index 0, the last$"),
    ("cu_seqlens", offsets(1, T), ValueError, rf"0 to the total length {T}, got 1 at index 0$"),
    ("cu_seqlens", offsets(0, T - 1), ValueError, rf"0 to the total length {T}, got 4 at index 1, the last$"),
    ("cu_seqlens", offsets(0, T + 1), ValueError, rf"0 to the total length {T}, got 6 at index 1, the last$"),
    ("cu_seqlens", offsets(0, 3, 2, T), ValueError, rf"{T}, got 3 and 2 at indices 1 and 2$"),
    ("cu_seqlens", offsets(0, -1, T), ValueError, rf"{T}, got 0 and -1 at indices 0 and 1$"),
    ("cu_seqlens", offsets(0, 2**40, T, dtype=torch.int64), ValueError, rf"0 to the total length {T}"),
    ("cu_seqlens", offsets(0, T).to("meta"), ValueError, "device cpu.*meta"),
]


def ids(rows: list[tuple]) -> list[str]:
    return [f"{row[0]}-{i}" for i, row in enumerate(rows)]


@pytest.mark.parametrize(("argument", "value", "error", "message"), BAD, ids=ids(BAD))
def test_message_names_the_argument(argument, value, error, message):
    with pytest.raises(error, match=f"^{argument}: expected.*{message}"):
        call(good() | {argument: value})


@pytest.mark.parametrize(("argument", "value", "error", "message"), BAD_OFFSETS, ids=ids(BAD_OFFSETS))
def test_message_names_the_offsets(argument, value, error, message):
    with pytest.raises(error, match=f"^{argument}: expected.*{message}"):
        call(good(batch=1) | {"initial_state": None, argument: value})


def test_initial_state_has_one_row_per_packed_sequence():
    with pytest.raises(ValueError, match=r"^initial_state: expected shape \[2, 3\].*got \[1, 3\]"):
        call(good(batch=1) | {"cu_seqlens": offsets(0, 2, T)})


def test_size_beyond_64_bits():
    huge = torch.zeros(1, 1, 1).expand(2**31, 2**30, 1)
    with pytest.raises(ValueError, match=r"^candidate: expected.*64 bits.*\[2147483648, 1073741824, 1\]"):
        mk.bmru(huge, huge)


def test_per_channel_parameters_may_be_float32_or_the_dtype_of_the_streams():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        for other in (torch.float16, torch.bfloat16, torch.float64, torch.float32):
            arguments = good(dtype) | {"initial_state": None, "alpha": ones(D, dtype=other)}
            if other in (dtype, torch.float32):
                call(arguments)
            else:
                with pytest.raises(TypeError, match=r"^alpha: expected"):
                    call(arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_device_without_a_backend_is_refused_with_every_reason():
    with pytest.raises(
        RuntimeError, match=r"^backend: none can run on cuda.*cpu: .*triton: .*torch: runs if it is named"
    ):
        backends.resolve(None, torch.device("cuda"))


def test_backend_that_cannot_run_the_call_gives_its_reason():
    reasons = {name: reason for name, reason in mk.available_backends("cpu").items() if reason is not None}
    for name, reason in reasons.items():
        with pytest.raises(RuntimeError, match=f"^backend: {name!r} cannot run this call: {re.escape(reason)}"):
            call(good(), backend=name)


def test_backend_without_a_chunk_size_gives_its_reason(backend, device):
    least, most = backends.TABLE[backend].module.CHUNK_SIZES
    for size in {16, 2 * most} - {least}:
        with pytest.raises(
            RuntimeError, match=rf"^backend: {backend!r} cannot run this call: .*from {least} to {most}, "
        ):
            call(good(device=device) | {"chunk_size": size}, backend=backend)


def test_second_derivative_raises(backend, device):
    arguments = good(device=device)
    leaves = [arguments[name] for name in ("candidate", "threshold", "initial_state", "alpha", "amplitude")]
    for leaf in leaves:
        leaf.requires_grad_()
    h, final = mk.bmru(**arguments, backend=backend)
    first = torch.autograd.grad(h.square().sum() + final.square().sum(), leaves, create_graph=True)
    for grad in first:
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(grad.sum(), leaves, retain_graph=True)
    # It also raises where only the incoming gradient requires grad.
    weight = torch.ones_like(h, requires_grad=True)
    (grad,) = torch.autograd.grad(h, leaves[:1], grad_outputs=weight, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


STEP = ("candidate", "threshold", "state", "alpha", "amplitude")


def step_arguments() -> dict[str, Any]:
    arguments = good()
    streams = {name: arguments[name][:, 0] for name in ("candidate", "threshold", "amplitude")}
    return streams | {"state": arguments["initial_state"], "alpha": arguments["alpha"], "epsilon": 0.5}


@pytest.mark.parametrize("name", STEP)
def test_step_is_for_inference(name):
    arguments = step_arguments()
    arguments[name] = arguments[name].detach().requires_grad_()
    with pytest.raises(RuntimeError, match=f"{name} requires grad.*bmru with T = 1"):
        mk.bmru_step(**arguments)
    with torch.no_grad():
        h, state = mk.bmru_step(**arguments)
    assert h.shape == state.shape == (B, D)


@pytest.mark.parametrize("name", STEP)
@pytest.mark.parametrize("value", [1.0, ones(B, T, D), ones(B, D, dtype=torch.int64)], ids=["float", "rank", "int64"])
def test_step_names_the_argument(name, value):
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
        mk.bmru_step(**step_arguments() | {name: value})


@pytest.mark.parametrize("name", ["threshold", "state", "amplitude"])
@pytest.mark.parametrize("shape", [(B, D + 1), (B + 1, D), (1, D)], ids=str)
def test_step_names_the_argument_whose_shape_differs_from_the_candidate(name, shape):
    with pytest.raises(ValueError, match=f"^{name}: expected.*shape"):
        mk.bmru_step(**step_arguments() | {name: ones(*shape)})


@pytest.mark.parametrize("threshold", [ones(B, D), ones(D)], ids=["stream", "channel"])
def test_step_does_not_confuse_its_arguments(threshold):
    """The raw op gets its inputs without names, so a wrong rank must not shift them."""
    arguments = step_arguments() | {"threshold": threshold}
    with pytest.raises(ValueError, match=r"^amplitude: expected 2 dimensions"):
        mk.bmru_step(**arguments | {"amplitude": ones(D)})
    with pytest.raises(TypeError, match=r"^threshold: expected.*NoneType"):
        mk.bmru_step(**arguments | {"threshold": None, "amplitude": ones(B, D)})


def test_a_long_list_of_offsets_makes_a_short_message():
    total = 300_000
    cu_seqlens = torch.arange(total + 1)
    cu_seqlens[1000] = 5
    stream = torch.zeros(1, total, 1)
    message = rf"^cu_seqlens: expected offsets .* {total}, got 999 and 5 at indices 999 and 1000$"
    with pytest.raises(ValueError, match=message):
        mk.bmru(stream, stream, cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match=rf"got {total} at index {total}, the last$"):
        mk.bmru(stream[:, 1:], stream[:, 1:], cu_seqlens=torch.arange(total + 1))


# ------------------------------------------------------------------------------------------------ fuzz

SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 5, T, D, B]), max_size=4)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.complex64])


@st.composite
def anything(draw) -> Any:
    """A value that a user might pass for any argument."""
    kind = draw(st.sampled_from(["none", "number", "text", "tensor", "tensor", "tensor", "offsets"]))
    if kind == "none":
        return None
    if kind == "number":
        return draw(st.sampled_from([0, 1, -1, 0.0, 0.5, 1.0, 2.0, -0.5, math.nan, math.inf, 1e-300, 1e300]))
    if kind == "text":
        return draw(st.sampled_from(["", "cpu", "0.5"]))
    if kind == "offsets":
        dtype = draw(st.sampled_from([torch.int32, torch.int64]))
        return torch.tensor(draw(st.lists(st.integers(-2, T + 2), max_size=4)), dtype=dtype)
    value = torch.full(draw(SHAPES), draw(st.sampled_from([0.0, 0.5, -1.0, 3.0])))
    value = value.to(draw(DTYPES))
    return value.t() if value.dim() == 2 and draw(st.booleans()) else value


@given(
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    batch=st.sampled_from([1, B]),
    missing=st.sets(st.sampled_from(["initial_state", "alpha", "amplitude"])),
    changes=st.dictionaries(st.sampled_from(list(good())), anything(), max_size=3),
)
def test_fuzzed_arguments_raise_or_give_the_right_numbers(backend, device, dtype, batch, missing, changes):
    arguments = good(dtype, batch=batch) | dict.fromkeys(missing) | changes
    there = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    there["epsilon"] = arguments["epsilon"]  # epsilon stays on the CPU
    try:
        with patch.object(checks, "_CHECK", True):  # checks offsets on a device too
            h, final = (t.cpu() for t in call(there, backend))
    except (TypeError, ValueError) as error:
        if str(error).split(":")[0] not in arguments:
            raise
        return
    grads = {"grad_h": torch.zeros_like(h), "grad_final": torch.zeros_like(final)}
    terms = python_ref.bmru.adjoint(**arguments, **grads, term=abs)
    results = {"h": h, "final_state": final}
    for (name, result), expected in zip(results.items(), python_ref.bmru(**arguments), strict=True):
        verdict = errors.judge(result, expected, terms[name])
        assert verdict.passed, (name, verdict)
