"""The CPU kernels of instruction sets narrower than that of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mru_kernels.backends import cpu
from tests import conversions

ROOT = Path(__file__).parents[1]
NARROWER = {"baseline": "default", "avx2": "avx2"}  # our name: name in ATEN_CPU_CAPABILITY


def _environment(isa: str) -> dict[str, str]:
    """An environment in which the CPU kernels use this instruction set."""
    sets = [*NARROWER, "avx512"]
    if sets.index(isa) >= sets.index(cpu.isa()):
        pytest.skip(f"this machine runs {cpu.isa()} kernels: {isa} is not narrower")
    return {**os.environ, "ATEN_CPU_CAPABILITY": NARROWER[isa], "PYTHONPATH": str(ROOT)}


def test_half_precision_is_converted_as_ieee_754_says():
    conversions.check_all()


@pytest.mark.check
@pytest.mark.parametrize("isa", NARROWER)
def test_half_precision_is_converted_correctly_with(isa):
    command = [sys.executable, "tests/conversions.py"]
    run = subprocess.run(command, env=_environment(isa), capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.stdout == f"{isa}\n", run.stderr[-4000:]


@pytest.mark.check
@pytest.mark.parametrize("isa", NARROWER)
def test_the_tests_of_the_ops_pass_with(isa):
    environment = _environment(isa)
    report = subprocess.run(
        [sys.executable, "-m", "mru_kernels"], env=environment, capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert f"{isa} in mru_kernels" in report.stdout
    tests = [*("-q", "-p", "no:cacheprovider"), "--hypothesis-profile=brief", "-m", "not slow and not check"]
    tests += [f"tests/test_{name}.py" for name in ("op", "op_layout", "precision", "softmax")]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *tests],
        env=environment, capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:]
    print(run.stdout.splitlines()[-1])
