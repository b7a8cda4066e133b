"""The package builds from source."""

from __future__ import annotations

import runpy
import shlex
import shutil
import subprocess
from pathlib import Path

import ninja
import pytest
import setuptools
from ninja import ninja_syntax
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[1]


@pytest.mark.check
def test_paths_with_spaces(tmp_path, monkeypatch):
    """An object compiles and links where the folders of the repository and of torch have a space in their names."""
    folder = tmp_path / "with space"
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copy(ROOT / "setup.py", folder)
    for name, paths in (("include", cpp_extension.include_paths()), ("lib", cpp_extension.library_paths())):
        links = [folder / f"{name} {i}" for i in range(len(paths))]
        for link, path in zip(links, paths, strict=True):
            link.symlink_to(path)
        function = {"include": "include_paths", "lib": "library_paths"}[name]
        monkeypatch.setattr(cpp_extension, function, lambda links=links: list(map(str, links)))
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    build = runpy.run_path(str(folder / "setup.py"))["NinjaBuild"](setuptools.Distribution())
    runpy.run_path(str(folder / "csrc/cells.py"))["write_header"](folder / "csrc", folder)
    with open(folder / "build.ninja", "w") as file:
        build.write_ninja(ninja_syntax.Writer(file), folder / "_C.so", None)
    run = [Path(ninja.BIN_DIR) / "ninja", "-C", folder]
    subprocess.run([*run, "cpu_register.o"], check=True)
    commands = subprocess.run([*run, "-t", "commands"], check=True, capture_output=True, text=True).stdout.splitlines()
    assert {f"-L{folder}/lib 0", f"-Wl,-rpath-link,{folder}/lib 0"} <= set(shlex.split(commands[-1]))
