"""The example of small machines, made small."""

from __future__ import annotations

import shutil

import pytest
import torch

from examples import small_machine
from tests.test_examples import SMALL, page


def test_the_images_of_the_small_machine_are_apart_and_not_negative():
    parts = small_machine.data()
    assert [len(classes) for _, classes in parts.values()] == [1149, 288, 360]
    images = torch.cat([pixels for pixels, _ in parts.values()]).flatten(1)
    assert images.min() == 0.0
    assert images.max() == 1.0
    assert len(images.unique(dim=0)) == len(images)


def test_the_model_kept_is_one_after_epsilon_is_0(monkeypatch):
    torch.manual_seed(0)
    parts = {name: (pixels[:8], classes[:8]) for name, (pixels, classes) in small_machine.data().items()}
    seen = []

    def score(model, part):
        seen.append(model.units[0].epsilon)
        return 0.0

    monkeypatch.setattr(small_machine, "accuracy", score)
    monkeypatch.setattr(small_machine, "CHECK_EVERY", 1)
    monkeypatch.setattr(small_machine, "BATCH", 2)
    model = small_machine.trained("first-quadrant BMRU", 20, parts)
    assert seen == [0.0] * 6  # after 15 of the 20 steps
    assert [unit.epsilon for unit in model.units] == [0.0, 0.0]


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs cc")
def test_small_machine(tmp_path):
    units = ["first-quadrant BMRU", "LRU"]
    options = ["--steps", "4", "--units", *units, "--trials", "1", "--out", str(tmp_path)]
    small_machine.main([*SMALL, *options])
    header, _, *rows = (lines := page(tmp_path, "small_machine"))[:4]
    columns = ["exact", "5 %", "10 %", "15 %", *(f"{bits} bits" for bits in range(8, 1, -1))]
    assert header.strip("| ").split(" | ")[2:] == columns
    for name, row in zip(units, rows, strict=True):
        assert row.startswith(f"| {name} |")
        assert all(0 <= float(cell) <= 100 for cell in row.strip("| ").split(" | ")[2:])
    _, _, float32, int8 = (line.strip("| ").split(" | ") for line in lines[7:])
    assert (float32[0], float32[-1]) == ("float32", "360")
    assert int8[0] == "int8"
    assert 2 * int(int8[1].replace(",", "")) < int(float32[1].replace(",", ""))


def test_small_machine_without_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setattr(small_machine.shutil, "which", lambda _: None)
    with pytest.raises(FileNotFoundError, match="cc: expected a C compiler"):
        small_machine.in_c(small_machine.Model(small_machine.IN_C), tmp_path, "int8", torch.zeros(1, 64, 1))
