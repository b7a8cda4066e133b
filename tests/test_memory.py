"""`python -m bench memory`: a training step saves its inputs and one checkpoint per chunk."""

from __future__ import annotations

import json
import sys

import pytest

from bench import memory

pytestmark = [
    pytest.mark.check,
    pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc"),
]

MIB = 2**20


@pytest.mark.parametrize(
    ("cell", "shape"), [("bmru", "2,4096,1024"), ("bmru", "1,262144,16"), ("linear_recurrence", "2,4096,1024")]
)
def test_memory_is_as_expected(cell, shape):
    """Resident memory is as predicted: whole sequences, segments with write codes, a cell without write codes."""
    default = memory.in_own_process(["--cell", cell, "--shape", shape])
    for row in default:
        assert abs(row.kept_measured - row.kept) <= MIB, row
        # The peak also holds the scratch of the backward pass: a chunk of rows for each thread.
        assert -MIB <= row.peak_measured - row.peak <= 12 * MIB, row
    fine, usual, *_, none = default
    assert fine.kept > usual.kept > none.kept == 0


def test_the_table(tmp_path, capsys):
    file = tmp_path / "memory.json"
    assert memory.main(["--shape", "1,100,8", "--chunk-size", "16", "None", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["memory"]
    assert [(row["chunk_size"], row["kept"]) for row in rows] == [(16, 6 * 8 * 4), (None, 0)]
    assert "| None | 0.0 |" in capsys.readouterr().out
