"""That the tests of this suite notice faults in the CPU kernels: see cpu_mutants.py."""

from __future__ import annotations

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from mru_kernels.backends import cpu
from tests import cpu_mutants, planted

pytestmark = [
    pytest.mark.check,
    pytest.mark.skipif(
        platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux",
        reason="the flags of the planted copy are those of x86-64 Linux",
    ),
    pytest.mark.skipif(os.environ.get("MRU_SANITIZE") == "1", reason="faults run without the sanitizers"),
]

#: The instruction sets that this machine runs.
HERE = list(cpu_mutants.ISAS)[: list(cpu_mutants.ISAS).index(cpu.isa()) + 1]


@pytest.fixture(scope="module")
def outcomes():
    """Futures of test runs: without a fault, by instruction set, and with each fault that runs here, by name."""
    cpu_mutants.build(HERE)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            **{isa: pool.submit(cpu_mutants.outcome_without_fault, isa) for isa in HERE},
            **{m.name: pool.submit(cpu_mutants.outcome, m) for m in cpu_mutants.FAULTS if m.isa in HERE},
        }


def _outcome_here(outcomes, key, isa):
    if isa not in HERE:
        pytest.skip(f"this machine runs {cpu.isa()} kernels at most")
    return outcomes[key].result()


@pytest.mark.parametrize("isa", cpu_mutants.ISAS)
def test_the_copy_passes_without_a_fault(outcomes, isa):
    done = _outcome_here(outcomes, isa, isa)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("fault", cpu_mutants.FAULTS, ids=lambda m: m.name)
def test_every_fault_is_caught(outcomes, fault):
    done = _outcome_here(outcomes, fault.name, fault.isa)
    crashed = done.returncode < 0 and -done.returncode not in planted.KILLED
    assert done.returncode == 1 or crashed, done.stdout[-4000:]
