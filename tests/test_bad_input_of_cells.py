"""Bad input of the other cells than BMRU, whose errors are in test_bad_input.py."""

from __future__ import annotations

import pytest
import torch

import mru_kernels as mk
from tests.test_bad_input import B, D, T, ids, ones

# ------------------------------------------------------------------------------------------------ the Schmitt trigger

TRIGGER_BAD = [
    ("candidate", None, TypeError, "tensor.*NoneType"),
    ("candidate", ones(D), ValueError, r"3 dimensions.*\[3\]"),
    ("candidate", ones(B, T, D, dtype=torch.int64), TypeError, "float32.*int64"),
    ("low", None, TypeError, r"\[channels\].*NoneType"),
    ("low", 0.5, TypeError, r"\[channels\].*float"),
    ("low", ones(B, T, D), ValueError, r"1 dimensions.*\[2, 5, 3\]"),
    ("low", ones(D + 1), ValueError, r"\[3\].*\[4\]"),
    ("high", ones(D, dtype=torch.float16), TypeError, "float32.*float16"),
    ("high", ones(D, device="meta"), ValueError, "device cpu.*meta"),
    ("alpha", ones(D - 1), ValueError, r"\[3\].*\[2\]"),
    ("initial_state", ones(B + 1, D), ValueError, r"\[2, 3\].*\[3, 3\]"),
    ("epsilon", 2.0, ValueError, r"\[0, 1\].*2.0"),
]


@pytest.mark.parametrize(("argument", "value", "error", "message"), TRIGGER_BAD, ids=ids(TRIGGER_BAD))
def test_message_names_the_argument_of_a_schmitt_trigger(argument, value, error, message):
    arguments = {"candidate": ones(B, T, D), "low": ones(D), "high": 2 * ones(D), "alpha": ones(D)}
    with pytest.raises(error, match=f"^{argument}: expected .*{message}"):
        mk.schmitt(**arguments | {argument: value})


@pytest.mark.parametrize("argument", ["candidate", "low", "high", "state"])
@pytest.mark.parametrize("value", [None, ones(B, T, D), ones(B, D + 1)], ids=["none", "rank", "shape"])
def test_step_of_a_schmitt_trigger_names_the_argument(argument, value):
    arguments = {"candidate": ones(B, D), "low": ones(D), "high": 2 * ones(D), "state": ones(B, D)}
    mk.schmitt_step(**arguments)
    named = "(candidate|low|state)" if argument == "candidate" else argument  # nothing else fits a longer row
    with pytest.raises((TypeError, ValueError), match=f"^{named}: expected"):
        mk.schmitt_step(**arguments | {argument: value})


# ------------------------------------------------------------------------------------------------ the linear recurrence

LINEAR_BAD = [
    ("update", None, TypeError, "tensor.*NoneType"),
    ("update", ones(D), ValueError, r"3 dimensions.*\[3\]"),
    ("update", ones(B, T, D, dtype=torch.int64), TypeError, "float32.*complex128.*int64"),
    ("decay", None, TypeError, "tensor.*NoneType"),
    ("decay", 0.5, TypeError, "tensor.*float"),
    ("decay", ones(D + 1), ValueError, r"\[3\].*\[4\]"),
    ("decay", ones(B, T, D + 1), ValueError, r"\[2, 5, 3\].*\[2, 5, 4\]"),
    ("decay", ones(B, T, D, dtype=torch.complex64), TypeError, "float32.*complex64"),
    ("decay", ones(D, dtype=torch.complex64), TypeError, "float32.*complex64"),
    ("initial_state", ones(B + 1, D), ValueError, r"\[2, 3\].*\[3, 3\]"),
    ("initial_state", ones(B, D, dtype=torch.complex64), TypeError, "float32.*complex64"),
    ("cu_seqlens", torch.tensor([0, T]), ValueError, "batch 1.*batch 2"),
    ("backend", "abacus", ValueError, "cpu.*abacus"),
]


@pytest.mark.parametrize(("argument", "value", "error", "message"), LINEAR_BAD, ids=ids(LINEAR_BAD))
def test_message_names_the_argument_of_a_linear_recurrence(argument, value, error, message):
    arguments = {"update": ones(B, T, D), "decay": ones(B, T, D), "initial_state": ones(B, D)}
    mk.linear_recurrence(**arguments)
    with pytest.raises(error, match=f"^{argument}: expected .*{message}"):
        mk.linear_recurrence(**arguments | {argument: value})


@pytest.mark.parametrize("name", ["decay", "initial_state"])
def test_a_complex_linear_recurrence_refuses_real_inputs(name):
    arguments = {"update": ones(B, T, D), "decay": ones(D), "initial_state": ones(B, D)}
    arguments = {key: value.to(torch.complex64) for key, value in arguments.items()}
    mk.linear_recurrence(**arguments)
    with pytest.raises(TypeError, match=f"^{name}: expected .*complex64.*float32"):
        mk.linear_recurrence(**arguments | {name: arguments[name].real.contiguous()})


@pytest.mark.parametrize("argument", ["decay", "update", "state"])
@pytest.mark.parametrize("value", [None, ones(B, T, D), ones(B, D + 1)], ids=["none", "rank", "shape"])
def test_step_of_a_linear_recurrence_names_the_argument(argument, value):
    arguments = {"update": ones(B, D), "decay": ones(B, D), "state": ones(B, D)}
    mk.linear_recurrence_step(**arguments)
    named = "(update|decay|state)" if argument == "update" else argument
    with pytest.raises((TypeError, ValueError), match=f"^{named}: expected"):
        mk.linear_recurrence_step(**arguments | {argument: value})
