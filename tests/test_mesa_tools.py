"""`python -m bench mesa` and the example of regression and recall in context."""

from __future__ import annotations

import pytest
import torch

import mru_kernels as mk
from bench import mesa
from examples import in_context

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


def test_fla_is_compared_before_it_is_used(monkeypatch):
    tensors = mesa.inputs(1, 9, 1, 4, torch.device("cpu"))
    monkeypatch.setattr(mesa, "fla", lambda *t, steps: mk.mesa(*t)[0] * 1.01)
    assert mesa.check_fla(tensors, 30) == pytest.approx(0.01, rel=1e-3)
    monkeypatch.setattr(mesa, "fla", lambda *t, steps: mk.mesa(*t)[0] * 1.1)
    with pytest.raises(RuntimeError, match=r"^fla: expected a relative error below 3 %"):
        mesa.check_fla(tensors, 30)


def test_the_tasks_have_their_answers():
    x, answers = in_context.regression(50, torch.Generator().manual_seed(0))
    slopes = torch.linalg.lstsq(x[:, :-1, : in_context.SIZE], x[:, :-1, in_context.SIZE : -1]).solution
    torch.testing.assert_close((x[:, -1:, : in_context.SIZE] @ slopes).flatten(), answers, rtol=1e-3, atol=1e-3)
    x, answers = in_context.recall(50, torch.Generator().manual_seed(0))
    same = x[:, :-1, : in_context.KEYS] @ x[:, -1, : in_context.KEYS].unsqueeze(-1)
    assert same.sum(1).eq(1).all()
    assert ((same * x[:, :-1, in_context.KEYS : -1]).sum(1).argmax(-1) == answers).all()


def test_the_example(tmp_path):
    options = ["--steps", "2", "--seeds", "2", "--workers", "1", "--sequences", "8", "--out", str(tmp_path)]
    in_context.main(options)
    (page,) = tmp_path.glob("in_context*.md")
    rows = [line for line in page.read_text().splitlines() if line.startswith("| re")]
    assert len(rows) == len(in_context.TASKS) * len(in_context.UNITS)
