"""The package builds from source, and says what a build needs."""

from __future__ import annotations

import importlib.util
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import ninja
import pytest
import setuptools
import tomllib
import torch
from ninja import ninja_syntax

ROOT = Path(__file__).parents[1]


@pytest.fixture
def builder(monkeypatch):
    """The build backend, which is a module in the root of the repository."""
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("build_backend")


@pytest.mark.parametrize(
    ("preparation", "program", "needed"),
    [
        ("sys.modules['setuptools'] = None", "import build_backend", "setuptools, which is not installed"),
        ("import setuptools; setuptools.__version__ = '65.5.0'", "import build_backend", "setuptools 77 or newer, got"),
        ("sys.modules['setuptools'] = None", "runpy.run_path('setup.py')", "setuptools, which is not installed"),
        ("sys.modules['ninja'] = None", "runpy.run_path('setup.py')", "ninja, which is not installed"),
    ],
)
def test_what_is_not_installed_is_named(preparation, program, needed):
    command = [sys.executable, "-c", f"import runpy, sys; {preparation}; {program}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"mru_kernels: the build needs {needed}")
    assert done.stderr.endswith(": pip install 'setuptools>=77' ninja\n")


def test_torch_is_found_where_build_isolation_hides_it(builder, monkeypatch, tmp_path):
    """The isolation of pip leaves the environment that is installed into where it is, and takes it off the path."""
    assert builder.find_torch() == (Path(torch.__file__).parent, torch.__version__, torch.version.cuda)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    for hook in ("get_requires_for_build_", "prepare_metadata_for_build_"):
        for kind in ("wheel", "editable"):
            with pytest.raises(SystemExit, match=r"torch 2\.11 or newer, and this environment has none.*\n.*whl/cpu"):
                getattr(builder, hook + kind)(str(tmp_path))
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise AssertionError('torch is imported')")
    for version in ("2.11.0+cu130", "2.15.0", "3.0.0a0+git1"):
        (tmp_path / "torch/version.py").write_text(f"__version__, cuda = {version!r}, '13.0'")
        assert builder.find_torch() == (tmp_path / "torch", version, "13.0")
    for version in ("2.10.1+cpu", "1.13.1"):
        (tmp_path / "torch/version.py").write_text(f"__version__, cuda = {version!r}, None")
        with pytest.raises(SystemExit, match=f"torch 2\\.11 or newer, got {version}".replace("+", r"\+")):
            builder.find_torch()


def test_a_build_does_not_require_a_download_of_torch(builder):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert {re.match(r"\w+", name)[0] for name in project["build-system"]["requires"]} == {"setuptools", "ninja"}


@pytest.mark.parametrize(
    ("architectures", "expected"),
    [
        (None, ["80 sm_80", "80 sm_90", "80 sm_100", "80 compute_80"]),
        ("9.0", ["90 sm_90"]),
        ("10.0+PTX 9.0", ["90 sm_100", "90 sm_90", "90 compute_90"]),
        ("8.0;9.0a+PTX", ["90a sm_90a", "90a compute_90a", "80 sm_80"]),
    ],
)
def test_all_architectures_share_the_lowest_ptx(monkeypatch, architectures, expected):
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    flags = runpy.run_path(str(ROOT / "setup.py"))["gencode_flags"]
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    if architectures:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", architectures)
    assert [re.fullmatch(r"-gencode=arch=compute_(\w+),code=(\w+)", flag).groups() for flag in flags()] == [
        tuple(pair.split()) for pair in expected
    ]


def test_one_file_includes_torch():
    """It replaces macros of torch's headers. An object without it would bring theirs into the extension."""
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")]
    including = [path.relative_to(ROOT).as_posix() for path in sources if "#include <torch/" in path.read_text()]
    assert including == ["csrc/torch/tensors.h"]


@pytest.mark.check
def test_paths_with_spaces(builder, tmp_path, monkeypatch):
    """An object compiles and links where the folders of the repository and of torch have a space in their names."""
    folder = tmp_path / "with space"
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copy(ROOT / "setup.py", folder)
    (folder / "torch 2").symlink_to(Path(torch.__file__).parent)
    found = builder.Torch(folder / "torch 2", torch.__version__, torch.version.cuda)
    monkeypatch.setattr(builder, "find_torch", lambda: found)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    build = runpy.run_path(str(folder / "setup.py"))["NinjaBuild"](setuptools.Distribution())
    build.with_symbols = True
    objects = tmp_path / "objects here"
    objects.mkdir()
    runpy.run_path(str(folder / "csrc/cells.py"))["write_header"](folder / "csrc", objects)
    with open(objects / "build.ninja", "w") as file:
        build.write_ninja(ninja_syntax.Writer(file), objects, folder / "_C.so", None)
    run = [Path(ninja.BIN_DIR) / "ninja", "-C", objects]
    subprocess.run([*run, "cpu_register.o"], check=True)
    commands = subprocess.run([*run, "-t", "commands"], check=True, capture_output=True, text=True).stdout.splitlines()
    assert {f"-L{folder}/torch 2/lib", f"-Wl,-rpath-link,{folder}/torch 2/lib"} <= set(shlex.split(commands[-1]))
