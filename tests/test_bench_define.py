"""`python -m bench define` on the CPU."""

from __future__ import annotations

import pytest
import torch

from bench import compare, define


@pytest.mark.check
def test_the_table_has_a_ratio_for_every_cell(capsys):
    assert define.main(["--shape", "2,40,3", "--dtype", "fp32", "bf16"]) == 0
    _, *rows = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert [row.split()[0] for row in rows[::2]] == ["bmru,", "min_gru,", "MinGRU,", "MinLSTM,"]
    assert all(float(row.split()[i]) > 0 for row in rows for i in (-7, -6, -5, -4))


@pytest.mark.check
def test_a_cell_of_a_module_is_compared(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    lines = [
        "import mru_kernels as mk",
        "cell = mk.define_cell('from_a_module', lambda x: mk.Affine(0.5, x))",
        "other = 3",
    ]
    (tmp_path / "a_cell_module.py").write_text("\n".join(lines))
    assert compare.main(["--cell", "a_cell_module:cell"]) == 0
    assert "from_a_module: kernels against the definition in float64" in capsys.readouterr().out
    for wrong, message in [
        ("a_cell_module:other", "a int"),
        ("a_cell_module:none", "no attribute"),
        ("none:x", "No module"),
    ]:
        with pytest.raises(SystemExit):
            compare.main(["--cell", wrong])
        assert message in capsys.readouterr().err


def test_scans_that_differ_are_not_timed():
    x = torch.ones(1, 4, 2)
    with pytest.raises(RuntimeError, match=r"the results differ by 1\.0e"):
        define.check(lambda a, b: (a,), lambda a, b: (a + 1,), x, x)
