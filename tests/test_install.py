"""The installed package contains the bench and the reference, for users without a checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mru_kernels

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The package as in a wheel, with the extension of this checkout."""
    folder = tmp_path_factory.mktemp("installed")
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (extension,) = Path(mru_kernels.__file__).parent.glob("_C.*")
    shutil.copy(extension, folder / "mru_kernels")
    return folder


def run(installed: Path, cwd: Path, *arguments: str) -> str:
    """Output of Python with the installed package alone on the path."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, check=True, capture_output=True, text=True
    )
    return done.stdout


@pytest.mark.check
def test_comparison_and_times_from_an_empty_folder(installed, tmp_path):
    bench = ("-m", "mru_kernels.bench")
    page = run(installed, tmp_path, *bench, "compare", "--dtype", "c64", "--brief", "--part", "1/8")
    assert " 0 failed" in page
    page = run(installed, tmp_path, *bench, "speed", "--shape", "1,64,4", "--dtype", "fp32", "--json", "record.json")
    assert "allocator pinned" in page
    assert "bmru, default allocator" in page
    assert "commit" not in page
    assert "| 1, 64, 4 |" in run(installed, tmp_path, *bench, "report", "record.json")


@pytest.mark.check
def test_contents_of_the_installed_package(installed, tmp_path):
    """The bench is installed, commands that need the repository are not, and the package does not import the bench."""
    code = "import mru_kernels, sys; print(mru_kernels.__file__, *sys.modules, sep='\\n')"
    file, *modules = run(installed, tmp_path, "-c", code).splitlines()
    assert Path(file).is_relative_to(installed)
    assert "mru_kernels.ops" in modules
    assert [name for name in modules if name.startswith("mru_kernels.bench")] == []
    # Without the finder of an editable install, which finds what this folder does not have.
    alone = "import runpy, sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in str(f).lower()]; "
    usage = subprocess.run(
        [sys.executable, "-c", alone + "runpy.run_module('mru_kernels.bench', run_name='__main__')"], cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)}, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert usage.returncode == 2
    assert "compare" in usage.stdout
    assert "gpu-check" not in usage.stdout
