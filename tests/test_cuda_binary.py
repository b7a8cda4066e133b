"""What nvcc makes of the CUDA kernels, for every architecture of the build. Needs nvcc and no GPU.

The extension is built with CUDA against whatever torch there is, and its code read with cuobjdump and nvdisasm.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.check

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "cuda"
OBJECTS = ROOT / "build" / "objects"  # of any build: those of the CPU kernels are there already
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
ELEMENTS = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2, "complex64": 8, "complex128": 16}
SOFTMAX_ELEMENTS = ("float32", "float64", "bfloat16", "float16")

# Threads of a multiprocessor that the registers of a kernel must allow, by the kernel's name. With eight channels and
# three inputs per channel it is 256 at most, as registers for more would spill on sm_100.
WANTED_THREADS = {
    "forward": 256,
    "summarize": 384,
    "expand": 384,
    "summarize_adjoint": 384,
    "backward": 256,
    "carry": 512,
}
LOADS = ("LDG.E.128", "LDGSTS.E.BYPASS.128")  # to registers, to shared memory
REGISTERS = 65536


@dataclass
class Kernel:
    """One kernel's code for one architecture."""

    element: str
    name: str  # as in the sources, without arguments
    architecture: str
    registers: int = 0
    stack: int = 0
    local: int = 0
    shared: int = 0
    instructions: str = ""
    source: str = "scan"  # or "softmax"

    @property
    def function(self) -> str:
        return self.name.partition("<")[0]

    @property
    def moves_words(self) -> bool:
        """Whether the threads of its form move 16 bytes at once."""
        return self.source == "scan" and f", {16 // ELEMENTS[self.element]}, " in self.name

    @property
    def wanted_threads(self) -> int:
        """Threads of a multiprocessor that the registers must allow."""
        form = re.search(r"Form<.*, (\d+), \d+u, (\d+)u>", self.name)
        many = form is not None and int(form[1]) == 8 and int(form[2]).bit_count() > 2  # kSegmentBlocks of segments.cuh
        wanted = WANTED_THREADS.get(self.function, 1024)
        return min(wanted, 256) if many else wanted

    def count(self, opcode: str) -> int:
        return len(re.findall(rf"\b{re.escape(opcode)}\b", self.instructions))


def _tool(name: str) -> str:
    """A tool of the toolkit's: on the PATH, or from its wheel."""
    wheel = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / name
    found = shutil.which(name) or (str(wheel) if wheel.exists() else None)
    if found is None:
        pytest.skip(f"there is no {name} (pip install nvidia-cuda-{name})")
    return found


def _run(*command: str | Path, **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built() -> Path:
    """The extension, built with CUDA."""
    if not os.environ.get("CUDA_HOME") and shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc")
    build = (sys.executable, "setup.py", "-q", "build_ext", "--build-lib", FOLDER, "--build-temp", OBJECTS)
    environment = {**os.environ, "MRU_FORCE_CUDA": "1", "MRU_SANITIZE": "0"}
    environment.pop("TORCH_CUDA_ARCH_LIST", None)
    _run(*build, cwd=ROOT, env=environment)
    (extension,) = (FOLDER / "mru_kernels").glob("_C*.so")
    return extension


def kernels_of(element: str, source: str = "scan") -> list[Kernel]:
    """The kernels in the object of a source for an element type, which `built` makes."""
    cuobjdump, nvdisasm = _tool("cuobjdump"), _tool("nvdisasm")
    cubins = FOLDER / "cubins" / source / element
    shutil.rmtree(cubins, ignore_errors=True)
    cubins.mkdir(parents=True)
    _run(cuobjdump, "-xelf", "all", OBJECTS / f"cuda_{source}_{element}.o", cwd=cubins)
    found = []
    for cubin in sorted(cubins.iterdir()):
        architecture = re.search(r"sm_\d+", cubin.name)[0]
        usage = _run(cuobjdump, "-res-usage", cubin)
        rows = re.findall(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
        sections = re.split(r"^\.text\.(\S+):$", _run(nvdisasm, "-c", cubin), flags=re.MULTILINE)
        code = dict(zip(sections[1::2], sections[2::2], strict=True))
        names = _run("c++filt", input="\n".join(row[0] for row in rows)).splitlines()
        for name, (mangled, *numbers) in zip(names, rows, strict=True):
            short = re.sub(r"^void |mru::(softmax::)?(cuda::)?|\(anonymous namespace\)::|\([^()]*\)$", "", name)
            short = re.sub(r"\(Call.*$|\(.*$", "", short)
            registers, stack, shared, local = map(int, numbers)
            found.append(Kernel(element, short, architecture, registers, stack, local, shared, code[mangled], source))
    return found


@pytest.fixture(scope="module")
def kernels(built) -> list[Kernel]:
    sources = {"scan": ELEMENTS, "softmax": SOFTMAX_ELEMENTS}
    return [k for source, elements in sources.items() for element in elements for k in kernels_of(element, source)]


def test_every_kernel_for_every_architecture(kernels):
    for source, element in dict.fromkeys((k.source, k.element) for k in kernels):
        own = [k for k in kernels if (k.source, k.element) == (source, element)]
        names = {k.name for k in own}
        assert len(names) >= (20 if source == "softmax" else 10 if element.startswith("complex") else 40), names
        for architecture in ARCHITECTURES:
            assert {k.name for k in own if k.architecture == architecture} == names


def summary(kernels: list[Kernel]) -> str:
    """Markdown: the most registers of each kernel over its forms, for each architecture."""
    lines = [f"| CUDA kernel | forms | {' | '.join(ARCHITECTURES)} | local memory |", "|---|---:|---:|---:|---:|---:|"]
    for source, function in dict.fromkeys((k.source, k.function) for k in kernels):
        of_function = [k for k in kernels if (k.source, k.function) == (source, function)]
        most = [max(k.registers for k in of_function if k.architecture == name) for name in ARCHITECTURES]
        cells = [len(of_function) // len(ARCHITECTURES), *most, max(k.stack + k.local for k in of_function)]
        lines.append(f"| {function}{' (softmax)' * (source == 'softmax')} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def test_registers_and_local_memory(kernels):
    """No spills and no local memory; few enough registers for the threads that a multiprocessor is to hold."""
    print(f"\n{summary(kernels)}\n")
    for k in kernels:
        loads = sum(map(k.count, LOADS))
        moves = f"{loads:3} loads of 128 bits, {k.count('STG.E.128'):3} STG.E.128"
        print(f"{k.element:9} {k.architecture:7} {k.registers:4} registers, {moves}  {k.name}")
    for k in kernels:
        assert k.stack == 0, k
        assert k.local == 0, k
        assert not re.search(r"\b(LDL|STL)\b", k.instructions), k.name
        assert k.registers * k.wanted_threads <= REGISTERS, (k.element, k.architecture, k.name, k.registers)


def test_words_of_sixteen_bytes(kernels):
    """Threads of such forms move words, and no access goes through a generic address."""
    checked = 0
    for k in kernels:
        assert not re.search(r"\b(LD|ST)\.E\b", k.instructions), k.name
        if not k.moves_words:
            continue
        checked += 1
        assert any(map(k.count, LOADS)), k.name
        assert k.count("STG.E.128"), k.name
    assert checked >= 60


def test_exponentials_of_the_softmax_recurrence(kernels):
    """One approximate power of 2 a weight, and channels of one head share it."""
    for k in kernels:
        if k.source == "softmax" and k.function == "forward" and k.element != "float64":
            width, bonus, of_head, tile = _form(k.name)
            weights = tile * (2 if bonus else 1) * (1 if of_head else width)
            assert k.count("MUFU.EX2") == weights, (k.name, k.architecture, k.count("MUFU.EX2"))


def _form(name: str) -> tuple[int, bool, bool, int]:
    """Channels of a thread, bonus, whether they are of one head, and the steps of a tile."""
    width, bonus, of_head = re.search(r", (\d+), (\w+), (\w+)>", name).groups()
    return int(width), bonus == "true", of_head == "true", 8 if width == "1" else 4


def test_loads_on_any_torch(built):
    """The same extension loads where torch has no CUDA, and says why its kernels cannot run there."""
    program = (
        "import sys, torch; torch.ops.load_library(sys.argv[1]); "
        "print(torch._C._dispatch_has_kernel_for_dispatch_key('mru::bmru.cuda', 'CUDA'))"
    )
    assert _run(sys.executable, "-c", program, built).strip() == "True"


def test_reason_without_cuda(built):
    if torch.version.cuda is not None:
        pytest.skip("torch is built with CUDA")
    from mru_kernels import backends

    with pytest.raises(RuntimeError, match="cuda"):
        backends.resolve("cuda", torch.device("cpu"))
