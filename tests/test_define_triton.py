"""Defined cells on the Triton backend without a GPU: interpreted, and compiled for devices that are not there."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mru_kernels import backends
from mru_kernels.define import cell as definitions
from mru_kernels.define.triton_page import page
from tests import triton_defined
from tests.triton_variants import ARCHITECTURES, Variant

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
CUDA = torch.device("cuda")


def test_a_defined_cell_takes_the_first_backend_that_has_it(monkeypatch):
    """On CUDA tensors that is Triton, though the table prefers "cuda"."""
    monkeypatch.setattr(backends, "why_not", lambda name, device: None)
    monkeypatch.setattr(backends, "TABLE", {n: row for n, row in backends.TABLE.items() if n != "cpu"})
    resolve = backends._resolve.__wrapped__
    assert resolve(None, CUDA, ()) == "cuda"
    assert resolve(None, CUDA, ("cpu", "triton")) == "triton"
    assert resolve("torch", CUDA, ("cpu", "triton")) == "torch"
    with pytest.raises(RuntimeError, match="'cuda' cannot run this call: the cell has kernels for cpu, triton only"):
        resolve("cuda", CUDA, ("cpu", "triton"))


def test_fake_tensors_on_a_device_take_triton():
    scan = triton_defined.CELLS["min_gru"]
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 7, 3, device="cuda")
        h, state = scan(x, x)
    assert (h.shape, h.device.type) == ((2, 7, 3), "cuda")
    assert state.shape == (2, 3)
    assert (scan.name, "triton") in definitions._loaded


def test_cells_whose_gates_take_registers_get_shorter_tiles():
    gated = {name for name, cell in triton_defined.CELLS.items() if cell._program.gated}
    assert gated == set(triton_defined.CELLS) - {"bistable", "scaled", "latch", "linear"}
    assert "gated=True" in page("of", triton_defined.CELLS["min_gru"]._program)


@pytest.mark.check
def test_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.interpreter"]
    command += ["--backend", "triton", "--durations=10", "tests/define_triton_interpreted.py"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(ran.stdout)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]


def variants() -> list[Variant]:
    """A few of each cell, most for one dtype and device."""
    bistable = Variant("", "bistable", dtype="fp32", streams=("candidate", "threshold"))
    backward = replace(bistable, kernel="backward")
    found = [replace(bistable, kernel=k, arch=arch) for k in ("forward", "backward") for arch in ARCHITECTURES]
    found += [replace(backward, dtype="bf16"), replace(backward, overwrites=True)]
    found += [replace(bistable, kernel=k) for k in ("summarize", "summarize_adjoint")]
    found += [replace(backward, cell="min_gru", streams=("candidate", "update"))]
    found += [replace(backward, cell="resonator", streams=("input", "gain"), kernel=k) for k in ("forward", "backward")]
    return [*found, replace(backward, cell="leaky", streams=("input",))]


@pytest.mark.check
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are not compiled then")
def test_compiled_for_devices():
    """Nothing spills, and definitions of the package's cells have at most a fifth more instructions than those."""
    mine = variants()
    linear = Variant("", "linear", dtype="c64", streams=("update", "decay"))
    mine += [replace(linear, kernel=k) for k in ("forward", "backward", "summarize", "summarize_adjoint")]
    hands = {"bistable": "bmru", "linear": "linear_recurrence"}
    of_scans = ("forward", "backward")
    compared = [v for v in mine if v.cell in hands and v.kernel in of_scans and v.arch == "sm_90"]
    by_hand = [replace(v, cell=hands[v.cell]) for v in compared]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        examined = dict(zip([*mine, *by_hand], pool.map(triton_defined.examine, [*mine, *by_hand]), strict=True))
    assert not [f"{v.name} {v.arch}" for v in mine if examined[v][0].spilled]
    ratios = {
        f"{v.name} {v.arch}": examined[v][1] / examined[hand][1] for v, hand in zip(compared, by_hand, strict=True)
    }
    print(ratios)
    assert not {name: ratio for name, ratio in ratios.items() if ratio > 1.2}
