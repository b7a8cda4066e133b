"""`python -m bench mesa` and the example of regression and recall in context."""

from __future__ import annotations

import pytest
import torch

import mru_kernels as mk
from bench import mesa

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_loop_of_the_bench_computes_the_same():
    tensors = [t.double() for t in mesa.inputs(2, 9, 2, 4, torch.device("cpu"))]
    torch.testing.assert_close(mesa.loop(*tensors), mk.mesa(*tensors)[0], rtol=1e-12, atol=1e-12)


def test_mesa_saves_less_than_the_loop():
    leaves = [t.requires_grad_() for t in mesa.inputs(1, 32, 1, 8, torch.device("cpu"))]
    assert 0 < 5 * mesa.saved(mk.mesa, leaves) < mesa.saved(mesa.loop, leaves)


def test_the_table(capsys, monkeypatch):
    monkeypatch.setattr(mesa.timing, "_SECONDS", 0.0)
    monkeypatch.setattr(mesa.timing.measure, "__defaults__", (0.0,))
    assert mesa.main(["--shape", "1,8,1", "--key-size", "3", "--steps", "2"]) == 0
    header, *rows = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert header.split("  ")[0] == "K"
    assert len(rows) == 3
