"""torch.export and AOTInductor: one program serves every batch and length, in Python and in C++ without Python."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves
from units import integers, make

import mru_kernels as mk
from examples.cpp.package import package

ROOT = Path(__file__).parents[1]

#: Modules by name. Each has another way to its kernels: one op, two directions, complex states, packed gates in blocks.
MODULES = {
    "unit": lambda: make(mk.BMRU, 4, 6, integer=True),
    "directions": lambda: mk.MinGRU(4, 6, 2, bidirectional=True),
    "complex": lambda: mk.LRU(4, 6),
    "network": lambda: mk.MRUNetwork(4, 3, width=8, num_blocks=2, units=("bmru", "min_gru"), conv_size=3, mlp_size=8),
}
OTHERS = {
    "CMRU": lambda: make(mk.CMRU, 4, 6, integer=True),
    "AlphaCMRU": lambda: make(mk.AlphaCMRU, 4, 6, integer=True),
    "FirstQuadrantBMRU": lambda: make(mk.FirstQuadrantBMRU, 4, 6, integer=True),
    "MinLSTM": lambda: mk.MinLSTM(4, 6),
    "MRUBlock": lambda: mk.MRUBlock(4, conv_size=3),
}
# Each backend cuts time by rules of its own: below and above some batch size, below and above some length.
SMALL_AND_LARGE = [(batch, time) for batch in (2, 20) for time in (9, 2000)]


def dimensions() -> dict[int, torch.export.Dim]:
    return {0: torch.export.Dim("batch", min=1, max=1024), 1: torch.export.Dim("time", min=1, max=2**20)}


def assert_serves(program, module: torch.nn.Module, batch: int, time: int) -> None:
    assert_same(program, module, integers(batch, time, 4))


def assert_same(program, module: torch.nn.Module, *inputs: torch.Tensor) -> None:
    with torch.no_grad():
        results, expected = tree_leaves(program(*inputs)), tree_leaves(module(*inputs))
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("by", ["name", "auto"])
def test_an_exported_unit_serves_every_size(by):
    module = MODULES["unit"]()
    dims = dimensions() if by == "name" else {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    program = torch.export.export(module, (integers(2, 9, 4),), dynamic_shapes=(dims,)).module()
    for batch, time in [(1, 1), *SMALL_AND_LARGE]:
        assert_serves(program, module, batch, time)


@pytest.mark.check
@pytest.mark.parametrize(
    ("name", "batch", "time"),
    [(name, *sizes) for name in MODULES for sizes in SMALL_AND_LARGE] + [(name, 2, 9) for name in OTHERS],
)
def test_an_exported_module_serves_every_size(name, batch, time):
    """Whatever the sizes of the example that it was exported with."""
    module = (MODULES | OTHERS)[name]().eval()
    exported = torch.export.export(module, (integers(batch, time, 4),), dynamic_shapes=(dimensions(),))
    lengths = {(value.lower, value.upper) for value in exported.range_constraints.values()}
    assert lengths == {(1, 1024), (1, 2**20)}
    program = exported.module()
    for other in [(1, 1), *SMALL_AND_LARGE]:
        assert_serves(program, module, *other)


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("mode", ["gated", "residual"])
def test_an_exported_cache_serves_every_batch_and_its_number_of_segments(mode, restart):
    module = mk.MemoryCache(make(mk.BMRU, 4, 6, integer=True), segment=4, mode=mode, restart=restart)
    dims = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    program = torch.export.export(module, (integers(2, 10, 4),), dynamic_shapes=(dims,)).module()
    for batch, time in ((2, 10), (1, 10), (5, 11)):
        assert_serves(program, module, batch, time)
    for time in (7, 20):
        with pytest.raises(AssertionError, match="Guard failed"):
            program(integers(2, time, 4))


STATES = {
    "unit": lambda: make(mk.BMRU, 4, 6, 2, integer=True),
    "directions": lambda: make(mk.AlphaCMRU, 4, 6, bidirectional=True, integer=True),
    "complex": lambda: mk.LRU(4, 6, 2),
}


@pytest.mark.parametrize("name", STATES)
def test_an_exported_unit_takes_states(name):
    module = STATES[name]()

    def inputs(batch, time):
        return integers(batch, time, 4), integers(2, batch, 6, dtype=module(integers(1, 1, 4))[1].dtype)

    dims = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    program = torch.export.export(module, inputs(2, 9), dynamic_shapes=(dims, {1: torch.export.Dim.AUTO})).module()
    for batch, time in ((1, 1), (2, 9), (20, 2000)):
        assert_same(program, module, *inputs(batch, time))


@pytest.mark.parametrize("cls", [mk.BMRU, mk.AlphaCMRU, mk.MinGRU, mk.LRU])
def test_a_unit_exported_under_autocast(cls):
    """The program converts as the module does; states are float32 or complex64."""
    module = make(cls, 4, 6)
    dims = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    with torch.autocast("cpu", torch.bfloat16):
        program = torch.export.export(module, (integers(2, 9, 4),), dynamic_shapes=(dims,)).module()
        assert program(integers(2, 9, 4))[0].dtype == torch.bfloat16
        for batch, time in ((1, 1), (20, 300)):
            assert_serves(program, module, batch, time)


def test_compiled_with_marked_dimensions():
    """`mark_dynamic` raises if the compiler had to narrow the range that it was given."""
    torch._dynamo.reset()
    compiled = torch.compile(mk.bmru, fullgraph=True, backend="aot_eager")
    for batch, time in SMALL_AND_LARGE:
        streams = [torch.randn(batch, time, 3, requires_grad=True) for _ in range(2)]
        for t in streams:
            torch._dynamo.mark_dynamic(t, 0, min=2, max=64)
            torch._dynamo.mark_dynamic(t, 1, min=2, max=4096)
        (h, _), (expected, _) = compiled(*streams), mk.bmru(*streams)
        assert torch.equal(h, expected)
        grads, expected_grads = (torch.autograd.grad(t.sum(), streams) for t in (h, expected))
        assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))


# ------------------------------------------------------------------------------------------------ AOTInductor

_LOAD = """
import sys, torch
extension, package, sizes = sys.argv[1:4]
torch.ops.load_library(extension)
program = torch._inductor.aoti_load_package(package)
for x, expected in torch.load(sizes):
    for a, b in zip(torch.utils._pytree.tree_leaves(program(x)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
assert "mru_kernels" not in sys.modules
"""


def extension() -> str:
    return str(next((ROOT / "mru_kernels").glob("_C*.so")))


@pytest.mark.check
@pytest.mark.parametrize("name", ["unit", "network"])
def test_aotinductor_package_in_a_process_without_the_package(name, tmp_path):
    module = MODULES[name]().eval()
    exported = torch.export.export(module, (integers(2, 9, 4),), dynamic_shapes=(dimensions(),))
    path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "module.pt2"))
    with torch.no_grad():
        pairs = [(x, tree_leaves(module(x))) for x in (integers(*sizes, 4) for sizes in [(1, 1), *SMALL_AND_LARGE])]
    torch.save(pairs, tmp_path / "sizes.pt")
    command = [sys.executable, "-c", _LOAD, extension(), path, str(tmp_path / "sizes.pt")]
    subprocess.run(command, check=True, cwd=tmp_path)


class _Step(torch.nn.Module):
    """A unit with the states of a network: a tuple. Its numbers are integers, so that every product is exact."""

    input_size = 2

    def __init__(self) -> None:
        super().__init__()
        self.unit = make(mk.BMRU, 2, 6, 2, integer=True)

    def step(self, sample, state=None):
        output, after = self.unit.step(sample, state[0] if state else None)
        return output, (after,)


@pytest.mark.check
def test_the_example_in_cpp(tmp_path):
    """100,000 samples in a process without Python give what `step` gives."""
    assert sum(len((ROOT / "examples/cpp" / name).read_text().splitlines()) for name in _CPP) < 60
    module, samples = _Step(), integers(100_000, 2)
    package(module, tmp_path)
    lines = [" ".join(map(str, sample)) for sample in samples.tolist()]
    (tmp_path / "samples.txt").write_text("\n".join([*lines, ""]))
    build = tmp_path / "build"
    torch_folder = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    subprocess.run(["cmake", "-S", ROOT / "examples/cpp", "-B", build, torch_folder], check=True)
    subprocess.run(["cmake", "--build", build], check=True)
    command = [build / "stream_samples", extension(), tmp_path, tmp_path / "samples.txt"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    results = torch.tensor([list(map(float, line.split())) for line in printed])
    state = None
    for count, (sample, result) in enumerate(zip(samples, results, strict=True)):
        output, state = module.step(sample.unsqueeze(0), state)
        assert torch.equal(output[0], result), count


_CPP = ("CMakeLists.txt", "stream_samples.cpp")
