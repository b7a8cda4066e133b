"""`python -m bench spiking` on the CPU."""

from __future__ import annotations

import pytest
import torch

from bench import spiking

CPU = torch.device("cpu")


def test_the_table_has_a_row_for_every_neuron_and_shape(capsys, monkeypatch):
    monkeypatch.setattr(spiking, "SECONDS", 0.0)
    assert spiking.main(["--shape", "2,20,3", "1,9,4"]) == 0
    table, rest = capsys.readouterr().out.split("\n\n")
    _, *rows = table.splitlines()
    names = [spiking.FLOOR, *spiking.subjects(CPU)]
    assert [row.split("  ")[0] for row in rows] == ["2, 20, 3"] * len(names) + ["1, 9, 4"] * len(names)
    assert all(name in row for name, row in zip(names * 2, rows, strict=True))
    assert all(float(row.split()[-3]) >= 0 for row in rows)
    assert "spikes of all equal to those of mk.lif" in rest


def test_a_subject_with_other_spikes_is_not_timed():
    other = {"other": spiking.Subject(lambda x: spiking.ours(x, 0.5))}
    with pytest.raises(ValueError, match=r"^other: expected the spikes of mk.lif, got \d+ different ones of 400"):
        spiking.check(other, torch.randn(20, 4, 5))


def test_a_subject_with_another_gradient_is_not_timed():
    other = {"other": spiking.Subject(lambda x: spiking.ours(x, surrogate="sigmoid"))}
    with pytest.raises(AssertionError, match=r"^other: "):
        spiking.check(other, torch.randn(20, 4, 5))
