"""That the tests of this suite notice faults in the CPU kernels: see cpu_mutants.py."""

from __future__ import annotations

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from mru_kernels.backends import cpu
from tests import cpu_mutants

pytestmark = [
    pytest.mark.check,
    pytest.mark.skipif(
        platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux",
        reason="the flags of the planted copies are those of x86-64 Linux",
    ),
    pytest.mark.skipif(os.environ.get("MRU_SANITIZE") == "1", reason="mutants run without the sanitizers"),
]


def _runs_here(mutant: cpu_mutants.Mutant) -> bool:
    wanted = {cpu_mutants.AVX512: ("avx512",), cpu_mutants.AVX2: ("avx512", "avx2")}
    return cpu.isa() in wanted.get(mutant.isa, (cpu.isa(),))


@pytest.fixture(scope="module")
def outcomes():
    """Of the sources as they are and of every mutant that this machine runs; as they come."""
    cpu_mutants.unchanged()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        mutants = [None, *filter(_runs_here, cpu_mutants.MUTANTS)]
        yield {m.name if m else None: pool.submit(cpu_mutants.outcome, m) for m in mutants}


def test_the_sources_as_they_are_pass(outcomes):
    done = outcomes[None].result()
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("mutant", cpu_mutants.MUTANTS, ids=lambda m: m.name)
def test_every_mutant_is_caught(outcomes, mutant):
    if mutant.name not in outcomes:
        pytest.skip(f"this machine runs {cpu.isa()} kernels at most")
    done = outcomes[mutant.name].result()
    assert done.returncode == 1 or done.returncode < 0, done.stdout[-4000:]  # a failed test, or a crash
