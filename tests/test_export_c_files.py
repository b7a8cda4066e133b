"""Exported C programs: compilers, stated sizes, and what is refused by name."""

from __future__ import annotations

import re
import subprocess

import pytest
import torch

import mru_kernels as mk
from docs import tables
from examples import c_sizes
from tests.c_programs import COMPILERS, FMA, NETWORKS, Compiled, have, inputs_of, network
from tests.units import make

BUILT = [
    *[(name, "float32", "float32") for name in ("BMRU", "FirstQuadrantBMRU", "AlphaCMRU", "concatenated")],
    ("concatenated", "int8", "float32"),
    ("tokens", "int8", "float32"),
    ("BMRU", "int8", "int8"),
    ("delays", "int8", "int8"),
]


@pytest.mark.check
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize(("name", "weights", "activations"), BUILT)
def test_every_compiler_gives_the_same_bits(tmp_path, name, weights, activations, compiler):
    """Those of gcc without optimisation, for weights and inputs whose sums round."""
    module = network(name) if name in NETWORKS and name != "BMRU" else make(getattr(mk, name), 6, 9, 2)
    program = mk.export.c(module, tmp_path / "net.c", weights=weights, activations=activations)
    inputs, token = inputs_of(module, 1000), name == "tokens"
    options = FMA if compiler == "gcc in its own dialect" else ()
    codes, outputs = Compiled(program, compiler, options, token=token)(inputs)
    expected_codes, expected = Compiled(program, token=token)(inputs)
    assert torch.equal(codes, expected_codes)
    if program.libm_calls and compiler == "32-bit ARM":  # its libm is another one
        torch.testing.assert_close(outputs, expected)
    else:
        assert torch.equal(outputs, expected)


@pytest.mark.parametrize("cls", [mk.BMRU, mk.CMRU, mk.AlphaCMRU, mk.FirstQuadrantBMRU, mk.MinGRU])
def test_a_program_needs_no_library_but_libm(tmp_path, cls):
    """A compiler makes memcpy and memset of loops, also for freestanding programs."""
    program = mk.export.c(cls(3, 8), tmp_path / "unit.c")
    subprocess.run(["gcc", "-ffreestanding", "-O2", "-c", program.path, "-o", tmp_path / "unit.o"], check=True)
    names = subprocess.run(["nm", "-u", tmp_path / "unit.o"], check=True, capture_output=True, text=True).stdout
    needed = set(names.split()) - {"U", "memcpy", "memmove", "memset", "_GLOBAL_OFFSET_TABLE_", "__stack_chk_fail"}
    assert needed == ({"expf"} if cls is mk.MinGRU else set())
    assert (program.libm_calls > 0) == (cls is mk.MinGRU)
    assert "math.h" not in program.path.read_text()


@pytest.mark.parametrize("name", ["concatenated", "BMRU"])
@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_the_sizes_are_those_of_the_program(tmp_path, name, weights):
    module = make(mk.BMRU, 6, 9, 2) if name == "BMRU" else network(name)
    program = mk.export.c(module, tmp_path / "net.c", weights=weights)
    main = tmp_path / "main.c"
    main.write_text(
        '#include <stdio.h>\n#include "net.c"\nint main(void) { printf("%d %d %d", NET_INPUT_SIZE, NET_OUTPUT_SIZE,'
        " (int)sizeof(net_state)); return 0; }\n"
    )
    subprocess.run(["gcc", "-O0", main, "-o", tmp_path / "main", "-lm"], check=True)
    printed = subprocess.run([tmp_path / "main"], check=True, capture_output=True, text=True).stdout
    inputs, outputs, state = map(int, printed.split())
    assert (inputs, outputs) == (6, 5 if name == "concatenated" else 9)
    text = program.path.read_text()
    buffers = sum(4 * int(size) for size in re.findall(r"^    float \w+\[(\d+)\];$", text.split("_step(")[-1], re.M))
    assert program.ram == state + buffers
    tables = re.findall(r"^static const (float|(?:un)?signed char) \w+\[(\d+)\]", text, re.M)
    assert program.flash == sum(int(size) * (4 if kind == "float" else 1) for kind, size in tables)
    symbols = subprocess.run(["nm", "-S", tmp_path / "main"], check=True, capture_output=True, text=True).stdout
    sizes = {line.split()[3]: int(line.split()[1], 16) for line in symbols.splitlines() if len(line.split()) == 4}
    names = re.findall(r"^static const (?:float|(?:un)?signed char) (\w+)\[", text, re.M)
    assert program.flash == sum(sizes[name] for name in names)
    assert f"flash          {program.flash} bytes" in text


@pytest.mark.check
def test_the_table_of_the_page(tmp_path):
    have("arm-none-eabi-gcc")
    version = subprocess.run(["arm-none-eabi-gcc", "-dumpversion"], check=True, capture_output=True, text=True).stdout
    if not version.startswith("12.2"):
        pytest.skip("the table has the sizes of version 12.2")
    torch.manual_seed(0)
    rows = c_sizes.rows(c_sizes.MODULES, tmp_path)
    assert "\n".join(rows) in (tables.ROOT / "docs/small-machines.md").read_text()


def test_the_costs_of_a_layer(tmp_path):
    program = mk.export.c(mk.BMRU(3, 16), tmp_path / "unit.c")
    assert (program.flash, program.ram) == (4 * (2 * 16 * 3 + 2 * 16) + 2, 2)  # and two bytes of initial states
    assert (program.multiply_adds, program.comparisons, program.libm_calls) == (2 * 16 * 3, 3 * 16, 0)


def test_two_programs_link_together(tmp_path):
    first = mk.export.c(mk.BMRU(3, 8), tmp_path / "first.c")
    second = mk.export.c(mk.MinGRU(3, 8), tmp_path / "other.c", name="second")
    main = tmp_path / "main.c"
    main.write_text(
        "#define first_DECLARATIONS\n#define FIRST_DECLARATIONS\n#define SECOND_DECLARATIONS\n"
        '#include "first.c"\n#include "other.c"\n'
        "int main(void) { first_state a; second_state b; float x[3] = {0}, y[8];\n"
        "first_init(&a); second_init(&b); return first_step(&a, x, y) + second_step(&b, x, y); }\n"
    )
    files = [main, first.path, second.path]
    subprocess.run(["gcc", "-std=c99", "-Wall", "-Werror", *files, "-o", tmp_path / "main", "-lm"], check=True)
    subprocess.run([tmp_path / "main"], check=True)


def test_fast_math_is_refused(tmp_path):
    program = mk.export.c(mk.BMRU(3, 8), tmp_path / "unit.c")
    command = ["gcc", "-ffast-math", "-c", program.path, "-o", tmp_path / "unit.o"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode
    assert "-ffast-math" in run.stderr


@pytest.mark.check
def test_no_multiply_add_is_fused(tmp_path):
    have("objdump")
    program = mk.export.c(network("concatenated"), tmp_path / "net.c")
    code = {}
    for compiler in ("gcc", "clang"):
        have(compiler)
        if not FMA:
            pytest.skip("needs x86-64")
        command = [compiler, "-std=gnu99", "-O3", *FMA, "-c", program.path, "-o", tmp_path / "net.o"]
        subprocess.run(command, check=True)
        code[compiler] = subprocess.run(["objdump", "-d", tmp_path / "net.o"], capture_output=True, text=True).stdout
        assert "mulss" in code[compiler]
        assert "vfm" not in code[compiler]


# ------------------------------------------------------------------------------------------ errors


def test_a_file_of_ours_is_replaced_and_no_other(tmp_path):
    path = tmp_path / "unit.c"
    mk.export.c(mk.BMRU(3, 8), path)
    mk.export.c(mk.BMRU(3, 9), str(path))
    assert "UNIT_OUTPUT_SIZE 9" in path.read_text()
    path.write_text("int precious;\n")
    with pytest.raises(
        FileExistsError, match=r"path: expected a new file or one that export.c has written, got .*unit"
    ):
        mk.export.c(mk.BMRU(3, 8), path)
    assert path.read_text() == "int precious;\n"
    with pytest.raises(FileExistsError, match="path"):
        mk.export.c(mk.BMRU(3, 8), tmp_path, name="unit")


class Other(mk.BMRU):
    """A subclass may compute something else."""


def with_nan() -> torch.nn.Module:
    module = mk.MRUNetwork(3, 2, width=4, num_blocks=1)
    module.blocks[0].units[0].alpha_l0.data[1] = torch.nan
    return module


def small(**options) -> mk.MRUNetwork:
    return mk.MRUNetwork(3, 2, **{"width": 4, "num_blocks": 1} | options)


@pytest.mark.parametrize(
    ("module", "options", "error", "message"),
    [
        (3, {}, TypeError, "module: expected a module, got int"),
        (mk.LRU(3, 4), {}, TypeError, "module: expected a module of class BMRU, CMRU, .* or Sequential, got LRU"),
        (Other(3, 4), {}, TypeError, "got Other"),
        (mk.BMRU(3, 4, bidirectional=True), {}, ValueError, "one direction, got a bidirectional BMRU"),
        (mk.BMRU(3, 4, dtype=torch.float64), {}, TypeError, "float32 parameters, got torch.float64 weight_ih_l0"),
        (mk.BMRU(3, 4, device="meta"), {}, ValueError, "got weight_ih_l0 on the meta device"),
        (with_nan(), {}, ValueError, "finite parameters, got blocks.0.units.0.alpha_l0 with nan or inf"),
        (small(pool="mean"), {}, ValueError, 'pool None or "last", got "mean"'),
        (small(units="lru"), {}, TypeError, "units of class BMRU, .*, got LRU"),
        (small(cache={"segment": 4}), {}, TypeError, "units of class BMRU, .*, got MemoryCache"),
        (torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh()), {}, TypeError, "stages of class .*, got Tanh"),
        (torch.nn.Sequential(torch.nn.Linear(3, 4)), {}, ValueError, "Sequential with a recurrent unit"),
        (torch.nn.Sequential(torch.nn.ReLU(), mk.BMRU(3, 4)), {}, ValueError, "begins with a Linear or a unit"),
        (torch.nn.Sequential(torch.nn.Linear(3, 4), mk.BMRU(3, 4)), {}, ValueError, "stage 1 to read 4"),
        (mk.BMRU(3, 4), {"weights": "int4"}, ValueError, "weights: expected one of 'float32', 'int8', got 'int4'"),
        (mk.BMRU(3, 4), {"activations": "int4"}, ValueError, "activations: expected one of"),
        (mk.BMRU(3, 4), {"activations": "int8"}, ValueError, 'activations: expected "float32" with float32 weights'),
        (mk.BMRU(3, 4), {"name": "4bits"}, ValueError, "name: expected an identifier of C, got '4bits'"),
        (mk.BMRU(3, 4), {"name": 4}, TypeError, "name: expected a string, got int"),
        (
            mk.BMRU(133_145, 1), {"weights": "int8", "activations": "int8"}, ValueError,
            "activations: expected float32 for a map of 133145 inputs",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_exported_is_refused_by_name(tmp_path, module, options, error, message):
    with pytest.raises(error, match=message):
        mk.export.c(module, tmp_path / "unit.c", **options)
    assert not (tmp_path / "unit.c").exists()


def test_a_name_from_the_path_must_be_an_identifier(tmp_path):
    with pytest.raises(ValueError, match="name: expected an identifier of C, got 'my-unit' from path; give a name"):
        mk.export.c(mk.BMRU(3, 4), tmp_path / "my-unit.c")
