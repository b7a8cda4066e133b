"""The example of a defined unit, made small."""

from __future__ import annotations

import pytest
import torch

from examples import ternary


def test_the_later_symbol_is_the_answer():
    x, symbols = ternary.draw(50, 30, torch.Generator().manual_seed(0))
    marked = x[..., -1].bool()
    assert marked[:, 0].all()
    assert marked.sum(1).eq(2).all()
    later = x[torch.arange(50), 29 - marked.flip(1).int().argmax(1), :-1]
    assert (later.argmax(1) == symbols).float().mean() > 0.8


@pytest.mark.check
def test_a_table_of_both_units(tmp_path):
    options = ["--seeds", "1", "--workers", "1", "--steps", "2", "--lengths", "5", "--sequences", "4"]
    ternary.main([*options, "--out", str(tmp_path)])
    rows = (tmp_path / "ternary.md").read_text().splitlines()
    assert [row.split(" | ")[0] for row in rows[2:4]] == ["| ternary", "| BMRU"]
    assert (tmp_path / "ternary.png").exists()
