"""The tasks of `examples.delays`, and the example made small."""

from __future__ import annotations

import pytest
import torch

from examples import delays
from tests.test_examples import SMALL, page


@pytest.mark.parametrize("task", delays.TASKS)
def test_answers_are_the_bits_of_the_delays_and_the_last_sign(task):
    x, answers = delays.draw(task, 5, 400, torch.Generator().manual_seed(0))
    assert x[..., :2].abs().le(1).all()
    assert x[:, 0, 2].eq(1).all()
    assert x[x[..., 2] == 0][:, 1].eq(0).all()
    for i, delay in enumerate(delays.TASKS[task]):
        assert torch.equal(answers[:, delay:, i], x[:, :-delay, 0])
    if task == "scales":
        for row in range(5):
            sign = 0.0
            for t in range(400):
                sign = x[row, t, 1].item() or sign
                assert answers[row, t, 2] == sign


def test_the_convolution_alone_has_no_memory():
    torch.manual_seed(0)
    model = delays.network("convolution", 3)
    x = torch.randn(1, 200, 3)
    other = x.clone()
    other[:, 0] += 1.0
    with torch.no_grad():
        differs = (model(x)[0] - model(other)[0]).abs().amax(2)[0]
    assert differs[0] > 1e-3
    assert differs[delays.TAPS :].max() < 1e-5


def test_delays(tmp_path):
    delays.main([*SMALL, "--steps", "2", "--out", str(tmp_path)])
    header, _, *rows = page(tmp_path, "delays")[: 2 + len(delays.MODELS)]
    columns = ["recall: bit 40 ago", "scales: bit 24 ago", "scales: bit 40 ago", "scales: last sign"]
    assert header.strip("| ").split(" | ") == ["percent right", *columns]
    for name, row in zip(delays.MODELS, rows, strict=True):
        first, *cells = row.strip("| ").split(" | ")
        assert first == name
        assert all(0 <= float(cell) <= 100 for cell in cells)
