"""`python -m bench calls` on the CPU."""

from __future__ import annotations

import torch

from bench import calls


def test_every_call_has_a_time_for_each_number_of_threads(capsys):
    assert calls.main(["--threads", "1", "2", "--calls", "1"]) == 0
    header, *rows = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert header.split() == ["us", "1", "thread", "2", "threads"]
    assert len(rows) == len(calls.of_op() | calls.of_step())
    assert all(float(x) > 0 for row in rows for x in row.split()[-2:])


def test_the_parts_compute_what_the_calls_compute():
    op, step = calls.of_op(), calls.of_step()
    assert torch.equal(op["bmru, forward"]()[0], op["its op"]()[0])
    assert torch.equal(step["BMRU.step"]()[0], step["its op, step"]()[0])
