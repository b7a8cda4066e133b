"""The softmax recurrence's CUDA kernels without a GPU, under host execution (csrc/simt), x86-64 Linux only.

`pytest tests/test_softmax.py tests/test_softmax_precision.py --backend simt` runs the tests of every backend
on them too.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import simt
import torch

from bench import compare, softmax_cases
from mru_kernels.softmax import run

pytestmark = [
    pytest.mark.check,
    pytest.mark.skipif(not simt.SUPPORTED, reason="the host execution of CUDA sources needs x86-64 Linux"),
]


@pytest.fixture(scope="module")
def checks():
    from simt import softmax, softmax_module

    yield softmax
    softmax_module.control().configure()


def _skip_unless_loaded(element: str) -> None:
    from simt.softmax_module import LOADED

    if element not in LOADED:
        pytest.skip("under the sanitizers float32 and bfloat16 stand for all widths")


def _checks() -> list[str]:
    if not simt.SUPPORTED:
        return []
    from simt import softmax

    return [check.__name__ for check in softmax.CHECKS]


@pytest.mark.parametrize("check", _checks())
@pytest.mark.parametrize("element", ["float32", "float64", "bfloat16", "float16"])
def test_kernels(checks, check, element):
    _skip_unless_loaded(element)
    torch.manual_seed(0)  # the same numbers whichever tests a process has run before
    getattr(checks, check)(getattr(torch, element))


@pytest.mark.parametrize("element", ["float32", "float64", "bfloat16", "float16"])
def test_the_cases_of_the_comparison(checks, element):
    """Those that `make gpu-check` runs on a GPU."""
    _skip_unless_loaded(element)
    checks.control()
    simt.register()
    run._find_kernels.cache_clear()  # it may have been asked before these kernels were loaded
    rows = compare.run(softmax_cases.covering_cases(getattr(torch, element)), "simt")
    assert [row for row in rows if not row.passed] == []


def test_a_launch_that_fails_raises(checks):
    checks.control().configure(budget=0)
    try:
        with pytest.raises(RuntimeError, match="livelock"):
            checks.draw(torch.float32, 2, 3).forward()
    finally:
        checks.control().configure()


@pytest.fixture(scope="module")
def outcomes():
    """Futures of the checks: on the copy without a fault, by None, and with each fault, by name."""
    if simt.SANITIZE:
        pytest.skip("the sanitizers end a run at the first fault")
    from simt import planting
    from simt import softmax_mutants as mutants

    planting.start_server()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            None: pool.submit(mutants.outcome),
            **{fault.name: pool.submit(mutants.outcome, fault) for fault in mutants.FAULTS},
        }


def test_the_copy_without_a_fault_passes(outcomes):
    assert outcomes[None].result() == ""


def _faults() -> list[str]:
    if not simt.SUPPORTED:
        return []
    from simt import softmax_mutants as mutants

    return [fault.name for fault in mutants.FAULTS]


@pytest.mark.parametrize("name", _faults())
def test_every_fault_is_caught(outcomes, name):
    assert outcomes[name].result().startswith(("check_", "crash"))
