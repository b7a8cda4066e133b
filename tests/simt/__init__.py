"""The CUDA kernels under host execution (csrc/simt) as a backend of the package, for tests. x86-64 Linux only.

The backend `simt` runs on CPU tensors. g++ builds it on demand, in build/simt.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import platform
import runpy
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType

import ninja
import pybind11
from ninja import ninja_syntax
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]
ELEMENTS = ("float32", "float64", "bfloat16", "float16", "complex64", "complex128")
SUPPORTED = platform.machine() in ("x86_64", "AMD64") and sys.platform == "linux"
SANITIZE = os.environ.get("MRU_SANITIZE") == "1"
#: The element types of the module that tests load. Sanitized code takes minutes to compile, so then one of each width.
LOADED = ("float32", "bfloat16", "complex64") if SANITIZE else ELEMENTS

FOLDER = ROOT / "build" / ("simt-sanitize" if SANITIZE else "simt")

# Checks of null pointers and of sizes show what the address sanitizer shows, and csrc/simt itself checks how accesses
# to global memory are aligned: the three would take half of the compiler's time.
_SANITIZE = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize=null,object-size,alignment"]
_SANITIZE += ["-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
COMPILER = [
    *(os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-Wall", "-Wno-unknown-pragmas"),
    *(_SANITIZE if SANITIZE else []),
]
#: Of the kernels, which then compile and run in the least time: what is inlined takes longer to compile.
KERNEL_FLAGS = f"-w -Dalways_inline=unused {'-O0' if SANITIZE else '-O1'}"


def build(
    folder: Path,
    csrc: Path = ROOT / "csrc",
    elements: tuple[str, ...] = LOADED,
    name: str = "mru_simt",
    kernels: str = "cuda/scan.cu",
    binding: str = "simt/module.cpp",
) -> Path:
    """Compile `csrc` into a Python module under `folder`.

    Args:
        folder: of the objects and the module; ninja makes only what is out of date.
        csrc: the sources, or a changed copy of them.
        elements: the element types of the kernels.
        name: the module's name.
        kernels, binding: the sources, in `csrc`: the CUDA kernels, compiled for each element type, and the module.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    headers = [*cpp_extension.include_paths(), sysconfig.get_path("include"), pybind11.get_include()]
    includes = " ".join(f"-isystem {path}" for path in headers)
    own_headers = f"-I. -I{csrc}"  # cells.h is in ninja's folder
    libraries = " ".join(f"-L{path}" for path in cpp_extension.library_paths())
    missing = " ".join(f"X(cell,{element})" for element in ELEMENTS if element not in elements)
    without = f"'-DMRU_MISSING(X,cell)={missing}'" if missing else ""
    runpy.run_path(str(csrc / "cells.py"))["write_header"](csrc, folder)
    with open(folder / "build.ninja", "w") as file:
        n = ninja_syntax.Writer(file, width=110)
        n.variable("cxx", COMPILER)
        n.rule("cxx", "$cxx $own -MMD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc")
        n.rule("link", f"$cxx $in {libraries} -shared -ltorch -ltorch_cpu -lc10 -o $out")
        objects = []
        for element in elements:
            own = f"-x c++ {own_headers} -I {csrc / 'simt'} -DMRU_ELEMENT={element} {KERNEL_FLAGS}"
            objects += n.build(f"{element}.o", "cxx", str(csrc / kernels), variables={"own": own})
        own = f"-DTORCH_TARGET_VERSION=0x020b000000000000 -DMRU_MODULE={name} {own_headers} {without} {includes}"
        objects += n.build("module.o", "cxx", str(csrc / binding), variables={"own": own})
        n.build(str(target), "link", objects)
    done = subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", folder], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the host execution does not compile:\n{done.stdout}{done.stderr}")
    return target


def load_module(path: Path) -> ModuleType:
    """Import a built module, which registers `mru::*.simt`."""
    spec = importlib.util.spec_from_file_location(path.name.partition(".")[0], path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def control() -> ModuleType:
    """The loaded module, which sets the scheduler and counts the traffic.

    MRU_SIMT_MODULE names a module that is built already. Without it, the sources are built, by one process at a time:
    pytest's other workers wait, and find everything up to date.
    """
    named = os.environ.get("MRU_SIMT_MODULE")
    if named:
        return load_module(Path(named))
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return load_module(build(FOLDER))


@cache
def register() -> None:
    """Add the backend `simt` to the package's table."""
    from mru_kernels import backends, ops

    from . import softmax_module

    ops.add_backend(backends.Backend("simt", ("cpu",), "needs CPU tensors", "simt.backend"))
    softmax_module.define_ops()
