"""`python -m bench delays` on the CPU."""

from __future__ import annotations

import pytest
import torch

from bench import delays

SHAPE = (2, 40, 3)


def test_the_table_has_a_row_for_every_form(capsys, monkeypatch):
    monkeypatch.setattr(delays, "SECONDS", 0.0)
    options = ["--shape", "2,40,3", "--taps", "1", "20", "--count", "1", "2"]
    assert delays.main(options) == 0
    header, *rows = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert header.split()[:2] == ["taps", "form"]
    names = [*delays.DENSE, "sparse, 1 a channel", "sparse, 2 a channel"]
    assert [row[:1] + row[row.index(name) :][: len(name)] for row, name in zip(rows[:5], names, strict=True)] == [
        f"1{name}" for name in names
    ]
    assert [row.split()[0] for row in rows] == ["1"] * 5 + ["20"] * 5
    assert all(float(row.split()[-4]) > 0 < float(row.split()[-2]) for row in rows)


@pytest.mark.parametrize("taps", [1, 20])
def test_the_forms_compute_the_same(taps):
    """Also the gradients."""
    device = torch.device("cpu")
    run, leaves = delays.forms(SHAPE, taps, [2], device).pop("FFT")
    expected = run(*leaves)
    g = torch.randn_like(expected)
    grads = torch.autograd.grad(expected, leaves, g)
    for form, (other, leaves) in delays.forms(SHAPE, taps, [2], device).items():
        output = other(*leaves)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4, msg=form)
        torch.testing.assert_close(torch.autograd.grad(output, leaves, g), grads, rtol=1e-4, atol=1e-4, msg=form)


def test_bad_arguments(capsys):
    with pytest.raises(SystemExit):
        delays.main(["--taps", "0"])
    assert "argument --taps: expected a positive int, got '0'" in capsys.readouterr().err
