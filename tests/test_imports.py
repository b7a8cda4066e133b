"""Import directions in fresh processes, and modules that `import mru_kernels` does not import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: The parts of the package in layers. A part imports parts of earlier layers only.
LAYERS = [
    ["torch_private"],
    ["scalars"],
    ["backends"],
    ["checks"],
    ["ops", "mesa_checks", "mesa_fla"],
    ["cells", "delays", "mesa", "softmax"],
    ["nn", "define"],
    ["blocks", "schedule", "streaming", "distributed", "export", "hardware", "writes"],
]
PARTS = [part for layer in LAYERS for part in layer]

#: Modules that `import mru_kernels` does not import.
LEFT_OUT = {"python_ref", "bench", "examples", "tests"}
LEFT_OUT |= {f"mru_kernels.{part}" for part in ("distributed", "export", "hardware", "nn.projections", "writes")}

#: Parts of torch that take long to import. `import mru_kernels` imports none that `import torch` has not imported.
HEAVY = ("_dynamo", "_inductor", "onnx", "distributed", "fx.experimental", "_export", "testing", "utils.cpp_extension")

#: Most MiB that `import mru_kernels` adds to the memory of a process that has imported torch. It adds about 3.
MOST_MEMORY = 20

# What the import of the package adds to that of torch.
ADDED = """
import json, os, sys, torch

def memory():  # MiB
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20

before, modules = memory(), set(sys.modules)
import mru_kernels
print(json.dumps([memory() - before, sorted(set(sys.modules) - modules)]))
"""

# Import the package in a separate process. Then import its parts in order, without mru_kernels/__init__.py, which
# imports most of them. Import the parts of a layer of several parts in separate processes.
IMPORTS = """
import importlib, json, os, sys, types
import torch

def load(name, alone):
    if alone and os.fork():
        return os.wait()
    importlib.import_module(name)
    print(json.dumps([name, sorted(sys.modules)]), flush=True)
    if alone:
        os._exit(0)

layers, path = json.loads(sys.argv[1])
load("mru_kernels", alone=True)
parent = sys.modules["mru_kernels"] = types.ModuleType("mru_kernels")
parent.__path__ = [path]
for layer in layers:
    for part in layer:
        load(f"mru_kernels.{part}", alone=len(layer) > 1)
"""

# A torch without torch.distributed lacks these functions.
WITHOUT_DISTRIBUTED = """
import sys

class Finder:
    def find_spec(self, name, path, target=None):
        if name == "torch.distributed":
            import torch._C
            for missing in ("_c10d_init", "_rpc_init", "_dist_autograd_init"):
                delattr(torch._C, missing)

sys.meta_path.insert(0, Finder())
import torch
assert not torch.distributed.is_available()

import mru_kernels as mk
assert mk.BMRU(2, 3)(torch.ones(1, 4, 2))[0].shape == (1, 4, 3)
assert "distributed" in dir(mk)
assert not hasattr(mk, "other")
try:
    mk.distributed.sequence_parallel(mk.bmru)
except RuntimeError as error:
    print(error)
"""


def run(program: str, *arguments: str) -> str:
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    """The modules that are loaded after the import of the package, and after the import of each part."""
    lines = run(IMPORTS, json.dumps([LAYERS, str(ROOT / "mru_kernels")])).splitlines()
    return {name: set(modules) for name, modules in map(json.loads, lines)}


@pytest.mark.parametrize("part", PARTS)
def test_imports_go_one_way(loaded, part):
    parts = {name.split(".")[1] for name in loaded[f"mru_kernels.{part}"] if name.startswith("mru_kernels.")}
    layer = next(i for i, parts in enumerate(LAYERS) if part in parts)
    assert part in parts
    assert parts - {part} <= {earlier for parts in LAYERS[:layer] for earlier in parts}


def test_every_part_is_in_a_layer():
    names = {path.stem for path in (ROOT / "mru_kernels").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert {name for name in names if not name.startswith("__")} == set(PARTS)


def test_the_package_does_not_import_what_it_does_not_need(loaded):
    assert "mru_kernels.nn" in loaded["mru_kernels"]
    assert not loaded["mru_kernels"] & LEFT_OUT


def test_what_the_import_adds_to_that_of_torch():
    """No other package, no heavy part of torch, and little memory. docs/installing.md has the time."""
    memory, modules = json.loads(run(ADDED))
    packages = {name.split(".")[0] for name in modules}
    assert packages - set(sys.stdlib_module_names) <= {"mru_kernels", "torch"}
    heavy = tuple(f"torch.{part}." for part in HEAVY)
    assert [name for name in modules if f"{name}.".startswith(heavy)] == []
    assert memory < MOST_MEMORY


def test_a_torch_without_distributed():
    assert run(WITHOUT_DISTRIBUTED).startswith("mesh_or_group: expected a torch build with torch.distributed")
