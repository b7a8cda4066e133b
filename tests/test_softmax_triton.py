"""Triton's softmax recurrence without a GPU: interpreted on the CPU, and compiled for devices that are not there."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

import mru_kernels as mk
from tests.softmax_calls import draw

ROOT = Path(__file__).parents[1]
#: Of tests/test_softmax.py: what fits the time, and passes through the public functions.
OF_EVERY_BACKEND = ["nothing_but_masks", "wkv_is_the_recurrence", "sums_of_gradients", "no_steps_and_no_sequences"]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="it takes tensors on the CPU then")
def test_tensors_on_the_cpu_are_refused():
    with pytest.raises(RuntimeError, match=r"^backend: 'triton' cannot run this call"):
        mk.softmax_recurrence(**draw(time=4), backend="triton")


@pytest.mark.check
def test_under_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.interpreter"]
    command += ["--backend", "triton", "--hypothesis-profile=interpreted", "--durations=10"]
    command += ["tests/test_softmax.py", "tests/softmax_interpreted.py"]
    command += ["-k", " or ".join(["interpreted", *OF_EVERY_BACKEND])]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(ran.stdout)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]


@pytest.mark.check
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are not compiled then")
def test_compiled_for_devices():
    """Nothing is spilled, and lanes meet only where a chunk's states have been stored or a head's sums cross warps."""
    pytest.importorskip("triton")
    from tests.softmax_offline import examine, variants

    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        reports = list(pool.map(examine, variants()))
    for r in reports:
        print(r.variant.name, r.registers, r.spilled, r.shared, r.barriers, r.instructions)
    assert [r.variant.name for r in reports if r.spilled] == []
    for r in reports:
        if r.variant.group <= 128 and not r.variant.arch.startswith("gfx"):
            assert r.barriers == 2 * (r.variant.kernel == "backward"), r.variant.name
            assert r.shared == 0, r.variant.name
