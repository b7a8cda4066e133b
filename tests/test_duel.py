"""`tools/duel.py` times two builds side by side."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.check
def test_a_build_against_itself():
    command = [sys.executable, "tools/duel.py", ".", ".", "--cell", "lif", "--dtype", "fp32", "--shape", "1,64,8"]
    command += ["--turns", "2", "--seconds", "0.01", "--streams"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    header, *rows, _, note = done.stdout.splitlines()
    assert header.split("  ")[-1].strip() == "range"
    assert [" ".join(row.split()[4:6]) for row in rows] == ["lif, forward", "lif, backward"]
    assert note.startswith("2 turns of 0.01 s; allocator: ")
