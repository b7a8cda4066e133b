"""`python -m bench profile` on the CPU."""

from __future__ import annotations

import json

import pytest
import torch

from bench import inputs, profile, work


@pytest.mark.parametrize("cell", inputs.CELLS)
def test_page_and_trace(cell, tmp_path, capsys):
    trace = tmp_path / "trace.json"
    assert profile.main(["--cell", cell, "--shape", "2,64,4", "--trace", str(trace)]) == 0
    page = capsys.readouterr().out
    assert f"| mru::{cell}_backward |" in page
    assert "times the floor" in page
    assert "ncu" not in page  # ncu needs a GPU
    assert json.loads(trace.read_text())["traceEvents"]


def test_bytes_of_a_pass():
    for options, streams in (({}, 2), ({"amplitude": True}, 3), ({"threshold": "channel"}, 1)):
        call = inputs.case("bmru", torch.bfloat16, batch=2, time=5, channels=3, **options).build()
        moved = work.floor_bytes(call)
        forward, backward = streams + 1, 2 * streams + 1
        counts = {work.FORWARD: forward, work.SAVING: forward, work.BACKWARD: backward, work.BOTH: forward + backward}
        assert moved == {name: 2 * 30 * count for name, count in counts.items()}


def test_the_option_for_ncu_needs_a_gpu(capsys):
    with pytest.raises(SystemExit):
        profile.main(["--once", "--shape", "1,4,4"])
    assert "--once: expected a GPU" in capsys.readouterr().err
