"""`python -m bench define` on the CPU."""

from __future__ import annotations

import pytest
import torch

from bench import define


@pytest.mark.check
def test_the_table_has_a_ratio_for_every_cell(capsys):
    assert define.main(["--shape", "2,40,3", "--dtype", "fp32", "bf16"]) == 0
    _, *rows = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert [row.split()[0] for row in rows] == ["bmru,"] * 2 + ["min_gru,"] * 2
    assert all(float(row.split()[i]) > 0 for row in rows for i in (-5, -4, -3, -2))


def test_scans_that_differ_are_not_timed():
    x = torch.ones(1, 4, 2)
    with pytest.raises(RuntimeError, match=r"the results differ by 1\.0e"):
        define.check(lambda a, b: (a,), lambda a, b: (a + 1,), x, x)
