"""Builds mru_kernels/_C, the C++ extension, through ninja. The rest of the metadata is in pyproject.toml.

The extension uses torch's stable ABI only: one build loads on torch 2.11 and newer and on every Python from 3.10.
torch.ops.load_library loads it, so it holds no Python.

Environment: CXX names the compiler; MRU_SANITIZE=1 builds with the address and undefined behaviour sanitizers.
"""

import os
import platform
import subprocess
from pathlib import Path

import ninja
from ninja import ninja_syntax
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from torch.utils import cpp_extension

ROOT = Path(__file__).parent.resolve()

CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-g1",
    "-ffp-contract=off",  # the same bits on every instruction set
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # torch 2.11
]
LINK_FLAGS = ["-shared", "-ltorch", "-ltorch_cpu", "-lc10"]
if os.environ.get("MRU_SANITIZE") == "1":
    SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
    CXX_FLAGS += ["-O1", *SANITIZE]
    LINK_FLAGS += SANITIZE

# csrc/cpu/kernels.cpp is compiled once per instruction set; csrc/cpu/driver.cpp chooses at run time.
ISA_FLAGS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mfma",
        "-mf16c",
        "-Wno-uninitialized",
    ]

# Object name: (source, flags of its own).
OBJECTS = {
    "cpu_driver": ("csrc/cpu/driver.cpp", []),
    "cpu_register": ("csrc/cpu/register.cpp", []),
    **{f"cpu_kernels_{isa}": ("csrc/cpu/kernels.cpp", [f"-DMRU_ISA={isa}", *ISA_FLAGS[isa]]) for isa in ISA_FLAGS},
}


class NinjaBuild(build_ext):
    """One build.ninja: an object per row of OBJECTS, and the link."""

    def build_extension(self, extension):
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(folder / "build.ninja", "w") as file:
            self.write_ninja(ninja_syntax.Writer(file, width=110), target)
        subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", folder], check=True)

    def write_ninja(self, n, target):
        includes = [f"-isystem {path}" for path in cpp_extension.include_paths()]
        libraries = [f"-L{path} -Wl,-rpath-link,{path}" for path in cpp_extension.library_paths()]
        n.variable("cxx", os.environ.get("CXX", "g++"))
        n.variable("cxxflags", [*CXX_FLAGS, *includes])
        n.rule("cxx", "$cxx $cxxflags $own -MMD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc")
        n.rule("link", f"$cxx $in {' '.join(libraries)} {' '.join(LINK_FLAGS)} -o $out")
        objects = []
        for name, (source, own) in OBJECTS.items():
            objects += n.build(f"{name}.o", "cxx", str(ROOT / source), variables={"own": own})
        n.build(str(target), "link", objects)


setup(
    ext_modules=[Extension("mru_kernels._C", [source for source, _ in OBJECTS.values()], py_limited_api=True)],
    cmdclass={"build_ext": NinjaBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
