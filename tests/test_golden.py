"""Results keep their bits: tests/golden.py against tests/golden.json."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import simt

from tests import golden, test_isa


def test_the_file_names_every_case_in_order():
    assert list(golden.load()) == list(golden.CASES)


def test_on_the_cpu():
    assert not golden.differing("cpu")


def test_a_changed_bit_is_reported_by_case_and_result(monkeypatch):
    name, run = next(iter(golden.CASES.items()))
    results = run("cpu")
    monkeypatch.setitem(golden.CASES, name, lambda backend: results)
    monkeypatch.setattr(golden, "cases_of", lambda backend: [name])
    assert golden.differing("cpu") == []
    results["threshold"].view(-1)[7] += 1e-6
    assert golden.differing("cpu") == [f"{name}: threshold"]


def assert_same(backend: str, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "tests.golden", "--backend", backend]
    done = subprocess.run(command, env=environment, cwd=golden.FILE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.check
@pytest.mark.parametrize("isa", test_isa.NARROWER)
def test_with_a_narrower_instruction_set(isa):
    assert_same("cpu", test_isa._environment(isa))


@pytest.mark.check
@pytest.mark.skipif(not simt.SUPPORTED, reason="the host execution of CUDA sources needs x86-64 Linux")
@pytest.mark.skipif(simt.SANITIZE, reason="under the sanitizers not every dtype is built")
def test_cuda_executed_on_the_host():
    assert_same("simt", dict(os.environ))


@pytest.mark.check
def test_triton_interpreted():
    pytest.importorskip("triton")
    assert_same("triton", {**os.environ, "TRITON_INTERPRET": "1"})
