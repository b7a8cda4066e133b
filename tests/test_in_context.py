"""The tasks of `examples.in_context`, its baseline, and the example made small."""

from __future__ import annotations

import torch

from examples import in_context
from tests.test_examples import SMALL, page


def test_ridge_regression_is_the_best_linear_predictor():
    x, answers = in_context.regression(3, 12, torch.Generator().manual_seed(0))
    assert x.shape == (3, 13, in_context.INPUTS + 1)
    predicted = in_context.ridge(x)
    for n in (0, 1, 5, 12):
        inputs, seen = x[:, :n, :-1].double(), x[:, 1 : n + 1, -1:].double()
        prior = in_context.INPUTS * in_context.NOISE**2 * torch.eye(in_context.INPUTS, dtype=torch.float64)
        weight = torch.linalg.solve(inputs.mT @ inputs + prior, inputs.mT @ seen)
        expected = (x[:, n : n + 1, :-1].double() @ weight).flatten()
        torch.testing.assert_close(predicted[:, n], expected, rtol=1e-9, atol=1e-9)
    x, answers = in_context.regression(4000, 12, torch.Generator().manual_seed(0))
    assert abs(answers.var().item() - 1) < 0.1
    errors = (in_context.ridge(x) - answers).square().mean(0)
    assert 0.8 < errors[0] < 1.2
    assert errors[12] < 0.02


def test_questions_ask_for_values_that_were_shown():
    keys, pairs = in_context.KEYS, 5
    x, values = in_context.questions(40, pairs, torch.Generator().manual_seed(0))
    assert values.shape == (40, pairs)
    shown, asked = x[..., -2] == 1.0, x[..., -1] == 1.0
    assert shown.sum(1).eq(pairs).all()
    assert asked[:, -pairs:].all()
    assert not asked[:, :-pairs].any()
    for row, marked, wanted in zip(x, shown, values, strict=True):
        known = {step[:keys].argmax().item(): step[keys:-2].argmax().item() for step in row[marked]}
        assert len(known) == pairs
        assert [known[step[:keys].argmax().item()] for step in row[-pairs:]] == wanted.tolist()


def test_in_context(tmp_path):
    in_context.main([*SMALL, "--steps", "1", "--sequences", "4", "--out", str(tmp_path)])
    lines = page(tmp_path, "in_context")
    tables = "\n".join(lines).split("\n\n")
    for task, best, text in (("regression", ["ridge regression"], tables[0]), ("recall", [], tables[1])):
        header, _, *rows = text.splitlines()
        assert header.startswith(f"| {task} | parameters |")
        assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in (*in_context.UNITS, *best)]
        assert all(float(cell) >= 0 for row in rows for cell in row.strip("| ").split(" | ")[2:])
