"""Compiles the CPU kernels of a defined cell from the package's own sources, and loads its Triton module, in a cache.

The key of a library is the content of all that it is made from: sources, flags, compiler, torch and instruction set.
A library is built in a folder of its own and then renamed, so processes that build the same one do not meet.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import runpy
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from ..backends import cpu

_ISA = {"baseline": "kBaseline", "avx2": "kAvx2", "avx512": "kAvx512"}


def library(name: str, header: str) -> Path:
    """The library with the CPU kernels of the cell that `header` states; built if the cache has none.

    Raises:
        RuntimeError: there is no C++ compiler, or it fails.
    """
    folder = _cached(f"{name}-{_key(header)}", lambda made: _build(made, name, header))
    return folder / "cell.so"


def module(name: str, text: str) -> ModuleType:
    """The module `text` with the Triton functions of a cell, as a file of the cache: Triton reads their source."""
    import triton  # may be missing

    folder = _cached(f"{name}-{_hash(text, triton.__version__)}", lambda made: _write(made / "cell.py", text))
    spec = importlib.util.spec_from_file_location(f"mru_kernels_cell_{name}", folder / "cell.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def csrc() -> Path:
    """The package's C++ sources: in the package if it is installed, else in the repository."""
    installed = Path(__file__).parents[1] / "csrc"
    return installed if installed.exists() else Path(__file__).parents[2] / "csrc"


def cache_folder() -> Path:
    """Where libraries are kept: in $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mru_kernels"


def _write(path: Path, text: str) -> None:
    path.write_text(text)


def _build(folder: Path, name: str, header: str) -> None:
    sources, flags = csrc(), _flags()
    runs_here = ["-DMRU_ONE_ISA", *flags["ISA_FLAGS"][_ISA[cpu.isa()]]]
    (folder / "cells").mkdir()
    (folder / "cells" / f"{name}.h").write_text(header)
    (folder / "cells.h").write_text(f'#pragma once\n#include "cells/{name}.h"\n#define MRU_EACH_CELL(X) X({name})\n')
    own = [f"-I{folder}", f"-I{sources}"]
    for_all = _cached(f"driver-{_key('')}", _build_driver)
    _compile([
        (sources / "cpu/kernels/kernels.cpp", folder / "kernels.o",
         [*own, *runs_here, f"-DMRU_CELL={name}", "-DMRU_ISA=kBaseline"]),
        (sources / "cpu/register.cpp", folder / "register.o", [*own, "-DMRU_ONE_ISA", "-O1"]),
    ])  # fmt: skip
    objects = [folder / "kernels.o", folder / "register.o", *sorted(for_all.glob("*.o"))]
    link = [f"-L{_torch() / 'lib'}", f"-Wl,-rpath-link,{_torch() / 'lib'}", *flags["LINK_FLAGS"], "-s"]
    _run([*_compiler(), *map(str, objects), *link, "-o", str(folder / "cell.so")])
    for leftover in objects[:2]:
        leftover.unlink()


def _build_driver(folder: Path) -> None:
    """Compile what all cells share."""
    sources = csrc()
    parts = [part for part in _flags()["CPU_PARTS"] if part != "register"]
    own = [f"-I{sources}", "-DMRU_ONE_ISA"]
    _compile([(sources / f"cpu/{part}.cpp", folder / f"{part}.o", own) for part in parts])


def _cached(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, made by `build(folder)` if it is missing."""
    kept = cache_folder()
    if (kept / name).is_dir():
        return kept / name
    try:
        kept.mkdir(parents=True, exist_ok=True, mode=0o700)
        made = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=kept))
    except OSError as error:
        return _for_this_process(name, build, error)
    try:
        build(made)
        made.rename(kept / name)
    except OSError:
        if not (kept / name).is_dir():  # another process may have been faster
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return kept / name


_made_here: dict[str, Path] = {}


def _for_this_process(name: str, build: Callable[[Path], None], error: OSError) -> Path:
    """`_cached` where the cache cannot be written: in a temporary folder."""
    if name not in _made_here:
        reason = f"cannot write the cache {cache_folder()} ({error})"
        warnings.warn(f"define_cell: {reason}; this process builds its own kernels", stacklevel=2)
        made = Path(tempfile.mkdtemp(prefix="mru_kernels-"))
        build(made)
        _made_here[name] = made
    return _made_here[name]


def _key(header: str) -> str:
    """A hash of what a library is made from, `header` included."""
    sources = sorted(p for p in csrc().rglob("*") if p.suffix in (".h", ".cpp", ".py"))
    contents = [path.name.encode() + path.read_bytes() for path in sources]
    return _hash(*contents, header, _version_of_compiler(), torch.__version__, cpu.isa())


def _hash(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update((part.encode() if isinstance(part, str) else part) + b"\0")
    return digest.hexdigest()[:20]


def _flags() -> dict:
    return runpy.run_path(str(csrc() / "flags.py"))


def _torch() -> Path:
    return Path(torch.__file__).parent


@cache
def _compiler() -> list[str]:
    command = shlex.split(os.environ.get("CXX", "g++"))
    if shutil.which(command[0]) is None:
        raise RuntimeError(
            f"define_cell: there is no C++ compiler {command[0]!r}, which CPU kernels need; install g++ 12 or newer, or"
            ' set CXX, or call with backend="torch", which needs none and is slow'
        )
    return command


@cache
def _version_of_compiler() -> str:
    return subprocess.run([*_compiler(), "--version"], capture_output=True, text=True, check=False).stdout


def _compile(jobs: Sequence[tuple[Path, Path, Sequence[str]]]) -> None:
    """Compile each (source, object, own flags), at the same time."""
    common = [*_compiler(), *_flags()["CXX_FLAGS"], f"-isystem{_torch() / 'include'}"]
    with ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as pool:
        commands = [[*common, *own, "-c", str(source), "-o", str(target)] for source, target, own in jobs]
        list(pool.map(_run, commands))


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"define_cell: {command[0]} failed:\n{done.stderr[-2000:]}")
