"""The Triton backend without a GPU: its kernels interpreted on the CPU, and compiled for devices that are not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mru_kernels.backends import triton as backend
from tests import triton_offline

pytest.importorskip("triton")
pytestmark = pytest.mark.check

ROOT = Path(__file__).parents[1]

# The most registers of a lane: 65536 of a multiprocessor over 32 lanes and the warps that are to reside on it.
REGISTERS = {"forward": 168, "summarize": 200, "summarize_adjoint": 168, "fold": 168, "carry": 200, "backward": 255}


def test_under_the_interpreter():
    """The suite of every backend, few examples, and what is Triton's own, where TRITON_INTERPRET is set in time."""
    options = ["-q", "-p", "no:cacheprovider", "--backend", "triton", "-p", "tests.interpreter"]
    tests = ["tests/test_op.py", "tests/triton_interpreted.py", "--hypothesis-profile=interpreted"]
    ran = subprocess.run([sys.executable, "-m", "pytest", *options, *tests], cwd=ROOT, capture_output=True, text=True)
    print(ran.stdout)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are not compiled then")
def test_compiled_for_devices():
    """Nothing spilled, no more registers than intended, rows in whole vectors, no barrier."""
    rows = triton_offline.reports()
    print(triton_offline.table(rows))
    failed = {}
    for r in rows:
        v = r.variant
        state = torch.float64 if v.dtype == "fp64" else torch.float32
        read = triton_offline.rows_read(v, backend.tile(v.kernel, v.inputs, state))
        bad = {
            "spilled": r.spilled > 0,
            "registers": r.registers > REGISTERS[v.kernel],
            "barriers": r.barriers > 0,
            "rows not loaded whole": v.aligned and r.wide_loads < read,
            "narrow stores": v.aligned and r.wide_stores != r.stores,
        }
        if any(bad.values()):
            failed[f"{v.name} {v.arch}"] = [name for name, is_bad in bad.items() if is_bad]
    assert not failed
