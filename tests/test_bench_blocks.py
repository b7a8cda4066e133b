"""The table of `python -m bench blocks`, of a measurement that is given."""

from __future__ import annotations

import pytest
import torch

from bench import allocator, blocks

pytestmark = pytest.mark.usefixtures("one_thread")

_FIXED = 300 * 2**20


@pytest.fixture
def measured(monkeypatch):
    """A process that needs 2^16 bytes and a millisecond a step."""
    for name, value in allocator.RETURNED.items():
        monkeypatch.setenv(name, value)  # else the command starts again with these settings
    monkeypatch.setattr(blocks, "measure", lambda policy, steps: (_FIXED + 2**16 * (steps - 1), steps / 1000))
    monkeypatch.setattr(blocks, "sizes", lambda: (4096, 2**16))


def test_the_table_has_a_row_for_every_policy_and_length(measured, tmp_path, capsys):
    file = tmp_path / "blocks.png"
    assert blocks.main(["--lengths", "2048", "1024", "--policies", "whole", "double", "--plot", str(file)]) == 0
    assert torch.get_num_threads() == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[1:]] == [
        ["whole", "1,024", "64.0", "63.9", "363.9", "1.0", ""],
        ["whole", "2,048", "128.0", "127.9", "427.9", "2.0", "120,000"],
        ["blocks of 4096 in blocks of 128", "1,024", "8.1", "63.9", "363.9", "1.0", ""],
        ["blocks of 4096 in blocks of 128", "2,048", "8.1", "127.9", "427.9", "2.0", "120,000"],
    ]
    assert file.stat().st_size > 0


def test_the_longest_is_cut_to_two_digits():
    steps = blocks.longest([(1024, 2**26), (2048, 2**27)], _FIXED)
    assert steps == 120_000
    assert _FIXED + steps * 2**16 <= blocks._LIMIT < _FIXED + (steps + 10_000) * 2**16


def test_bad_arguments(capsys):
    for argv, reason in (
        (["--lengths", "16"], "at least two"),
        (["--lengths", "0", "16"], "argument --lengths: expected a positive int, got '0'"),
        (["--steps", "-1"], "argument --steps: expected a positive int, got '-1'"),
        (["--steps", "16", "--inner", "128"], "--inner: expected fewer than 8 times --steps, got 128"),
        (["--policies", "triple"], "invalid choice"),
    ):
        with pytest.raises(SystemExit):
            blocks.main(argv)
        assert reason in capsys.readouterr().err
