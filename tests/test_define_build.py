"""The cache of compiled cells: two processes, a folder that cannot be written, no compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import sys, time, warnings, torch, mru_kernels as mk
cell = mk.define_cell("cached", lambda x, a: mk.Affine(a.sigmoid(), x))
x = torch.ones(2, 1, 2, 3)
start = time.perf_counter()
h, _ = cell(*x)
assert torch.allclose(h[0, 1], 1 + torch.ones(3).sigmoid())
print(time.perf_counter() - start)
"""


def run(cache: Path, **environment: str) -> subprocess.Popen:
    variables = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.Popen(command, env=variables, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.check
def test_two_processes_build_the_same_cell_at_once_and_a_third_loads_it(tmp_path):
    for process in [run(tmp_path), run(tmp_path)]:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    kept = sorted(path.name.split("-")[0] for path in (tmp_path / "mru_kernels").iterdir())
    assert kept == ["cached", "driver"]
    third = run(tmp_path, CXX="there_is_no_such_compiler")
    _, errors = third.communicate()
    assert third.returncode != 0  # the compiler's version is part of what a library is known by
    assert "there is no C++ compiler 'there_is_no_such_compiler'" in errors
    _, errors = run(tmp_path).communicate()
    assert not errors
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "mru_kernels").iterdir()) == kept


@pytest.mark.check
def test_a_cache_that_cannot_be_written_is_replaced_with_a_warning(tmp_path):
    (tmp_path / "mru_kernels").write_text("a file where the folder should be")
    process = run(tmp_path)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "define_cell: cannot write the cache" in errors


def test_without_a_compiler_plain_torch_runs(tmp_path, monkeypatch):
    import torch

    import mru_kernels as mk
    from mru_kernels.define import build

    monkeypatch.setenv("CXX", "there_is_no_such_compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for cached in (build._compiler, build._version_of_compiler):
        cached.cache_clear()
    cell = mk.define_cell("not_compiled", lambda x: mk.Affine(0.5, x))
    x = torch.ones(1, 3, 2)
    with pytest.raises(RuntimeError, match="there is no C\\+\\+ compiler 'there_is_no_such_compiler'"):
        cell(x)
    assert cell(x, backend="torch")[0][0, :, 0].tolist() == [1.0, 1.5, 1.75]
    monkeypatch.setenv("CXX", "false")
    build._compiler.cache_clear()
    with pytest.raises(RuntimeError, match="define_cell: false failed"):
        cell(x)
    for cached in (build._compiler, build._version_of_compiler):
        cached.cache_clear()
