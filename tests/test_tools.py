"""The scripts in `tools` that compare two builds."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.check
def test_a_build_is_timed_against_itself():
    command = [sys.executable, "tools/duel.py", ".", ".", "--dtype", "fp32", "--shape", "1,64,8"]
    command += ["--cell", "lif", "wkv"]
    command += ["--turns", "2", "--seconds", "0.01", "--streams"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    header, *rows, _, note = done.stdout.splitlines()
    assert header.split("  ")[-1].strip() == "range"
    expected = [f"{cell}, {name}" for cell in ("lif", "wkv") for name in ("forward", "backward")]
    assert [" ".join(row.split()[4:6]) for row in rows] == expected
    assert note.startswith("2 turns of 0.01 s; allocator: ")


PROFILE = """\
desc: Trigger: --dump-before=srand48*

events: Ir
fl=kernels.cpp
ob=/folder/mru_kernels/_C.abi3.so
fn=forward
24 100
25 10
cob=/lib/libc.so.6
cfn=memcpy
calls=2 0
26 5000
27 1

ob=/lib/libc.so.6
fn=memcpy
0 5000

ob=/packages/torch/_C.cpython-311-x86_64-linux-gnu.so
fn=call
3 70

totals: 5181
"""


def test_instructions_of_the_extension_are_counted_and_not_those_of_what_it_calls(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    from instructions import executed

    profile = tmp_path / "profile.2"
    profile.write_text(PROFILE)
    assert executed(profile) == 111
