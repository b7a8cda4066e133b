"""Builds mru_kernels/_C, the C++ extension, through ninja. The rest of the metadata is in pyproject.toml.

The extension uses torch's stable ABI only: one build loads on torch 2.11 and newer and on every Python from 3.10.
torch.ops.load_library loads it, so it holds no Python. The CPU kernels are always built, the CUDA kernels where nvcc
and a CUDA build of torch are found; a build with CUDA loads on a CPU build of torch as well.

Environment:
    CXX                   the C++ compiler
    CUDA_HOME             where CUDA is; by default where nvcc on the PATH is
    MRU_FORCE_CUDA        1: build the CUDA kernels or fail; 0: do not build them
    TORCH_CUDA_ARCH_LIST  architectures, as for torch's own extensions, by default "8.0;9.0;10.0+PTX"
    MRU_SANITIZE          1: with the address and undefined behaviour sanitizers
"""

import os
import re
import runpy
import shlex
import shutil
import subprocess
from pathlib import Path

from build_backend import find_torch, missing  # before setuptools, whose absence it names

# isort: split
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    import ninja
    from ninja import ninja_syntax
except ModuleNotFoundError as error:
    raise missing(error) from None

ROOT = Path(__file__).parent.resolve()

# The files of csrc/cells are the list of cells.
CELLS_MODULE = runpy.run_path(str(ROOT / "csrc/cells.py"))
CELLS = CELLS_MODULE["names"](ROOT / "csrc")
FLAGS = runpy.run_path(str(ROOT / "csrc/flags.py"))
CXX_FLAGS, LINK_FLAGS, ISA_FLAGS = FLAGS["CXX_FLAGS"], FLAGS["LINK_FLAGS"], FLAGS["ISA_FLAGS"]

SANITIZE = []
if os.environ.get("MRU_SANITIZE") == "1":
    SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
    CXX_FLAGS += ["-O0", "-Dalways_inline=unused", *SANITIZE]  # what is inlined takes minutes to compile
    LINK_FLAGS += SANITIZE
    ISA_FLAGS = {"kBaseline": ["-march=native"]}  # it runs on this machine: one instruction set, the widest
    CXX_FLAGS += ["-DMRU_ONE_ISA"]

# Object name: (source, flags of its own). The slowest come first, so that none is left alone at the end.
CPU_OBJECTS = {
    **{
        f"softmax_cpu_{isa}": ("csrc/softmax/cpu/kernels.cpp", [f"-DMRU_ISA={isa}", *flags])
        for isa, flags in ISA_FLAGS.items()
    },
    **{
        f"cpu_{cell}_{isa}": ("csrc/cpu/kernels/kernels.cpp", [f"-DMRU_CELL={cell}", f"-DMRU_ISA={isa}", *flags])
        for cell in CELLS
        for isa, flags in ISA_FLAGS.items()
    },
    "softmax_cpu": ("csrc/softmax/cpu/register.cpp", []),
    "library": ("csrc/torch/library.cpp", []),
    **{f"cpu_{part}": (f"csrc/cpu/{part}.cpp", []) for part in FLAGS["CPU_PARTS"]},
}

# -fmad=false: as -ffp-contract=off; gradients ask for what they want fused (csrc/lanes.h).
NVCC_FLAGS = ["-std=c++20", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden"]

# Sources that are compiled once per element type, the slowest first too.
CUDA_OBJECTS = {
    f"cuda_{name}_{element}": (source, [f"-DMRU_ELEMENT={element}"])
    for name, source, elements in (
        ("scan", "csrc/cuda/scan.cu", ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")),
        ("softmax", "csrc/softmax/cuda/softmax.cu", ("float16", "bfloat16", "float32", "float64")),
    )
    for element in elements
}


def cuda_home():
    """Where CUDA is; None where there is no nvcc."""
    nvcc = shutil.which("nvcc", path=f"{os.environ['CUDA_HOME']}/bin") if "CUDA_HOME" in os.environ else None
    nvcc = nvcc or shutil.which("nvcc")
    if nvcc is None:
        return None
    output = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.*)$", output.stderr, re.MULTILINE)
    return Path(top[1] if top else Path(nvcc).parents[1]).resolve()


def choose_cuda():
    """(CUDA's home or None, why)."""
    forced = os.environ.get("MRU_FORCE_CUDA")
    if forced not in (None, "0", "1"):
        raise SystemExit(f"MRU_FORCE_CUDA: expected 0 or 1, got {forced!r}")
    if forced == "0":
        return None, "MRU_FORCE_CUDA=0"
    home = cuda_home()
    if home is None:
        if forced == "1":
            raise SystemExit("MRU_FORCE_CUDA=1, but there is no nvcc (set CUDA_HOME or PATH)")
        return None, "there is no nvcc"
    torch = find_torch()
    if torch.cuda is None and forced != "1":
        return None, f"torch {torch.version} is built without CUDA"
    return home, f"nvcc of {home}"


def gencode_flags():
    """Flags for TORCH_CUDA_ARCH_LIST: sm_XY code for each X.Y, PTX too for X.Y+PTX.

    All of it comes from one PTX, that of the lowest architecture: making PTX takes most of nvcc's time. Architectures
    with a suffix, such as 9.0a, have their own.
    """
    own, codes = [], {}
    for entry in os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX").replace(" ", ";").split(";"):
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", entry)
        if match is None:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: expected entries such as 9.0 or 10.0+PTX, got {entry!r}")
        arch = match[1] + match[2]
        if match[3]:
            own.append((arch + match[3], f"sm_{arch}{match[3]}"))
            own += [(arch + match[3], f"compute_{arch}{match[3]}")] * bool(match[4])
        else:
            codes[int(arch)] = bool(match[4])
    lowest = min(codes, default=0)
    pairs = own + [(lowest, f"sm_{arch}") for arch in codes] + [(lowest, f"compute_{lowest}")] * any(codes.values())
    return [f"-gencode=arch=compute_{arch},code={code}" for arch, code in pairs]


def quoted(path):
    """A path, which may hold spaces, as a word of a command in build.ninja."""
    return ninja_syntax.escape(shlex.quote(str(path)))


class NinjaBuild(build_ext):
    """One build.ninja: an object per row of the tables above, and the link."""

    def finalize_options(self):
        self.build_temp = self.build_temp or "build/objects"  # they stay, so that a build makes only what has changed
        super().finalize_options()
        self.with_symbols = bool(self.inplace or self.editable_mode or SANITIZE)  # a wheel is stripped

    def build_extension(self, extension):
        home, why = choose_cuda()
        print(f"mru_kernels: building the CPU kernels ({', '.join(ISA_FLAGS)}); CUDA: {'yes' if home else 'no'}, {why}")
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        CELLS_MODULE["write_header"](ROOT / "csrc", folder)
        CELLS_MODULE["write_schemas"](ROOT / "csrc", folder)
        with open(folder / "build.ninja", "w") as file:
            self.write_ninja(ninja_syntax.Writer(file, width=110), folder, target, home)
        subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", folder], check=True)

    def write_ninja(self, n, folder, target, cuda):
        """Write the rules for a build in `folder`.

        Paths of the sources are relative to `folder`, and `__FILE__` in torch's headers does not say where torch is
        installed, so that every clone makes the same code.
        """
        root = Path(os.path.relpath(ROOT, folder))
        headers, libraries = (find_torch().folder / name for name in ("include", "lib"))
        own_headers = ["-I.", f"-I{quoted(root / 'csrc')}"]  # cells.h is in `folder`
        places = [quoted(f"-fmacro-prefix-map={root}/=./"), quoted(f"-fmacro-prefix-map={headers}/=")]
        link = [f"-L{quoted(libraries)} {quoted(f'-Wl,-rpath-link,{libraries}')}", *LINK_FLAGS]
        if not self.with_symbols:
            link.append("-s")
        n.variable("cxx", os.environ.get("CXX", "g++"))
        n.variable("cxxflags", [*CXX_FLAGS, *own_headers, f"-isystem {quoted(headers)}", *places])
        n.rule("cxx", "$cxx $cxxflags $own -MD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc")
        objects = []
        for name, (source, own) in CPU_OBJECTS.items():
            objects += n.build(f"{name}.o", "cxx", str(root / source), variables={"own": own})
        if cuda:
            for name, folder in (("cuda", "csrc/cuda"), ("cuda_softmax", "csrc/softmax/cuda")):
                objects += n.build(f"{name}_register.o", "cxx", str(root / folder / "register.cpp"))
            n.variable("nvcc", [quoted(cuda / "bin/nvcc"), *NVCC_FLAGS, *own_headers, *gencode_flags()])
            n.rule("nvcc", "$nvcc $own -MD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc")
            for name, (source, own) in CUDA_OBJECTS.items():
                objects += n.build(f"{name}.o", "nvcc", str(root / source), variables={"own": own})
            link += [quoted(next(cuda.glob("lib*/libcudart_static.a"))), "-ldl", "-lrt", "-lpthread"]
        n.rule("link", "$cxx $in $link -o $out")
        n.build(str(target), "link", objects, variables={"link": link})


# The comparison and the bench are installed as parts of the package, which does not import them. So are the sources of
# the kernels, which `define_cell` compiles with a user's cell.
FOLDERS = {"mru_kernels.bench": "bench", "mru_kernels.bench.python_ref": "python_ref", "mru_kernels.csrc": "csrc"}

setup(
    packages=[*find_packages(include=["mru_kernels*"]), *FOLDERS],
    package_dir=FOLDERS,
    ext_modules=[Extension("mru_kernels._C", [source for source, _ in CPU_OBJECTS.values()], py_limited_api=True)],
    cmdclass={"build_ext": NinjaBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
