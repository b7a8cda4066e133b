"""What users without a checkout get: an sdist that builds, wheels with the same bytes, the bench and the reference."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

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
    assert "MALLOC_TOP_PAD_=0" in page
    assert "bmru, default allocator" in page
    assert "commit" not in page
    assert "| 1, 64, 4 |" in run(installed, tmp_path, *bench, "report", "record.json")


@pytest.mark.check
def test_a_cell_is_defined_where_only_the_package_is_installed(installed, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cell.py").write_text(
        "import torch, mru_kernels as mk\n"
        "scan = mk.define_cell('installed', lambda x, a: mk.Affine(a, x))\n"
        "print(scan(torch.ones(1, 3, 1), torch.ones(1))[1].item())\n"
    )
    assert run(installed, tmp_path, "cell.py").split() == ["3.0"]


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


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    build = ("setup.py", "-q", "egg_info", "--egg-base", folder, "sdist", "--dist-dir", folder)
    subprocess.run([sys.executable, *build], cwd=ROOT, check=True, capture_output=True)
    (file,) = folder.glob("*.tar.gz")
    return file


def build_wheel(sdist: Path, folder: Path, anew: str | None = None) -> Path:
    """The wheel that pip makes from the sdist, unpacked in `folder`.

    To compile everything takes minutes, so the objects of this checkout are copied there. ninja compiles an object
    again if its command, its source or a header is missing or differs. Object `anew` is compiled in any case.
    """
    options = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.4 on
    with tarfile.open(sdist) as file:
        file.extractall(folder, **options)  # with the times of the files, which ninja compares
    (source,) = folder.iterdir()
    if (ROOT / "build/objects").exists():
        shutil.copytree(ROOT / "build/objects", source / "build/objects")
    if anew:
        (source / "build/objects" / anew).unlink(missing_ok=True)
    command = ("-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", folder, source)
    environment = os.environ | {"SOURCE_DATE_EPOCH": "1700000000", "MRU_FORCE_CUDA": "0"}
    environment = {name: value for name, value in environment.items() if name not in ("PYTHONPATH", "MRU_SANITIZE")}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    return build_wheel(sdist, tmp_path_factory.mktemp("first"))


@pytest.mark.check
def test_the_sdist_contains_every_source(sdist):
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    wanted = subprocess.run(
        ["git", "ls-files", "csrc", "mru_kernels"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    wanted = {*wanted.stdout.split(), "setup.py", "build_backend.py", "pyproject.toml", "LICENSE", "README.md"}
    assert wanted - names == set()
    assert {"csrc/cells.py", "csrc/cells/bmru.h", "csrc/cuda/scan.cu", "bench/speed.py", "python_ref/scan.py"} <= names
    assert [name for name in names if name.startswith(("tests/", "build/")) or "__pycache__" in name] == []


@pytest.mark.check
def test_a_wheel_of_the_sdist_runs(wheel, tmp_path):
    """It is stripped, serves every Python from 3.10 on, and contains no path of the machine that built it."""
    assert "-cp310-abi3-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path)
    code = "import torch, mru_kernels as mk; print(mk.__file__, *mk.BMRU(2, 3)(torch.ones(1, 4, 2))[0].shape)"
    path, *shape = run(tmp_path, tmp_path, "-c", code).split()
    assert Path(path).is_relative_to(tmp_path)
    assert shape == ["1", "4", "3"]
    (extension,) = tmp_path.glob("mru_kernels/_C*.so")
    content = extension.read_bytes()
    assert b".debug_info" not in content
    assert b".debug_info" in next(Path(mru_kernels.__file__).parent.glob("_C*.so")).read_bytes()
    for place in (ROOT, wheel.parent, Path(torch.__file__).parent):
        assert bytes(place) not in content


@pytest.mark.check
def test_wheels_have_the_same_bytes(sdist, wheel, tmp_path):
    """They are built in two folders. One object, which contains file names from torch, is compiled in each of them."""
    again = build_wheel(sdist, tmp_path / "another place", anew="cpu_register.o")
    assert again.read_bytes() == wheel.read_bytes()
