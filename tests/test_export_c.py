"""Exported C programs: the bits of `step`, stated errors, stated sizes, and errors by name."""

from __future__ import annotations

import re
import subprocess
from functools import partial

import pytest
import torch
from torch.nn.utils import parametrize

import mru_kernels as mk
from tests.c_programs import COMPILERS, FMA, Compiled, compiled, have, steps
from tests.drawn import draw
from tests.units import integers, make

BISTABLE = [mk.BMRU, mk.CMRU, mk.AlphaCMRU, mk.FirstQuadrantBMRU]
ALL = [*BISTABLE, mk.MinGRU]
COUNT = 100_000


def on_grid(*shape: int, largest: int = 16) -> torch.Tensor:
    """Multiples of 1/8: sums of a few of their products have no rounding errors, and many gates tie."""
    return torch.randint(-largest, largest + 1, shape) / 8.0


def grid_module(cls, num_layers: int = 1, epsilon: float | None = None, **options) -> torch.nn.Module:
    module = make(cls, 4, 11, num_layers, **options)
    if epsilon is not None:
        module.epsilon = epsilon
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not name.startswith("initial_state"):
                parameter.copy_(on_grid(*parameter.shape, largest=8))
    return module


def int8_module(cls, **options) -> torch.nn.Module:
    """Weights that are int8 times 2^-7 in every row, so that int8 weights have no rounding errors."""
    module = make(cls, 4, 11, **options)
    with torch.no_grad():
        module.weight_ih_l0.copy_(torch.randint(-127, 128, module.weight_ih_l0.shape))
        module.weight_ih_l0[:, 0] = 127.0
        module.weight_ih_l0 /= 128.0
        module.bias_ih_l0.copy_(on_grid(*module.bias_ih_l0.shape))
    return module


def assert_bits(program: Compiled, module: torch.nn.Module, inputs: torch.Tensor) -> None:
    codes, outputs = program(inputs)
    assert not codes.any()
    assert torch.equal(outputs, steps(module, inputs))


# ------------------------------------------------------------------------------------------ the bits of step


@pytest.mark.parametrize("epsilon", [None, 0.0, 0.5])
@pytest.mark.parametrize("cls", BISTABLE)
def test_steps_have_the_bits_of_the_module(tmp_path, cls, epsilon):
    module = grid_module(cls, 1 if epsilon else 2, epsilon)
    assert_bits(compiled(module, tmp_path), module, on_grid(500, 4))


@pytest.mark.parametrize("cls", [mk.BMRU, mk.FirstQuadrantBMRU])
@pytest.mark.parametrize("options", [{"learn_initial_state": False}, {"bias": False}, {"trained": True}])
def test_a_state_keeps_any_initial_value_until_the_first_write(tmp_path, cls, options):
    module = grid_module(cls, **{name: value for name, value in options.items() if name != "trained"})
    if "trained" in options:
        with torch.no_grad():
            module.initial_state_l0.copy_(torch.linspace(-1.0, 1.0, 11))
    inputs = 0.02 * on_grid(500, 4) * torch.arange(500).unsqueeze(1)
    inputs[:100] = 0.0
    assert_bits(compiled(module, tmp_path), module, inputs)


@pytest.mark.parametrize("cls", [mk.BMRU, mk.FirstQuadrantBMRU])
def test_ties(tmp_path, cls):
    """The gates compare: |c| = |b| writes, c = high writes, c = low holds, and a zero of either sign writes +1."""
    module = cls(2, 1)
    with torch.no_grad():
        if cls is mk.BMRU:
            module.weight_ih_l0.copy_(torch.eye(2))
            module.bias_ih_l0.zero_()
        else:
            module.weight_ih_l0.copy_(torch.tensor([[1.0, 0.0]]))
            module.bias_ih_l0.zero_()
            module.low_l0.fill_(0.5)
            module.width_l0.fill_(-0.5)
    values = [-1.0, -0.5, -0.0, 0.0, 0.5, 1.0]
    pairs = torch.cartesian_prod(*[torch.tensor(values)] * 4).view(-1, 2)
    assert_bits(compiled(module, tmp_path), module, pairs)


@pytest.mark.parametrize("activations", ["float32", "int8"])
@pytest.mark.parametrize("cls", BISTABLE)
def test_int8_weights_on_their_grid_have_the_bits_of_the_module(tmp_path, cls, activations):
    module = int8_module(cls)
    inputs = torch.randint(-127, 128, (500, 4)) / 128.0
    inputs[:, 1] = 127 / 128
    assert_bits(compiled(module, tmp_path, weights="int8", activations=activations), module, inputs)


@pytest.mark.check
@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.parametrize("cls", BISTABLE)
def test_many_steps_have_the_bits_of_the_module(tmp_path, cls, weights):
    if weights == "int8":
        module = int8_module(cls)
    else:
        module = grid_module(cls, 2 if cls in (mk.BMRU, mk.FirstQuadrantBMRU) else 1)
    assert_bits(compiled(module, tmp_path, weights=weights), module, on_grid(COUNT, 4))


# ------------------------------------------------------------------------------------------ stated errors


def gates_and_bounds(module, x, weights: str, activations: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The gates of every step in float64, and the bound that docs/small-machines.md states for their errors."""
    w, b, x = module.weight_ih_l0.double(), module.bias_ih_l0.double(), x.double()
    gates, sums = x @ w.T + b, x.abs() @ w.abs().T + b.abs()
    bounds = (w.shape[1] + 4) * 2.0**-24 * sums
    scale = w.abs().amax(1) / 127
    if weights == "int8":
        bounds += x.abs().sum(1, keepdim=True) * scale / 2
    if activations == "int8":
        step = x.abs().amax(1, keepdim=True) / 127
        bounds += step / 2 * (w.abs() + scale.unsqueeze(1) / 2).sum(1)
    return list(gates.detach().chunk(2, 1)), list(bounds.detach().chunk(2, 1))


@pytest.mark.parametrize(
    ("weights", "activations", "decided"),
    [("float32", "float32", 1.0), ("int8", "float32", 0.97), ("int8", "int8", 0.95)],
)
def test_a_step_differs_only_where_a_gate_is_within_its_error_of_a_tie(tmp_path, weights, activations, decided):
    module = make(mk.BMRU, 5, 40)
    x = draw(2000, 5)
    _, out = compiled(module, tmp_path, weights=weights, activations=activations)(x)
    (candidate, threshold), (error, threshold_error) = gates_and_bounds(module, x, weights, activations)
    margin = candidate.abs() - threshold.abs()
    writes, holds = margin > error + threshold_error, -margin > error + threshold_error
    writes &= candidate.abs() > error
    before = torch.cat([module.initial_state_l0.detach().unsqueeze(0), out[:-1]])
    assert torch.equal(out[writes], candidate.sign().float()[writes])
    assert torch.equal(out[holds], before[holds])
    assert writes.sum() > 1000
    assert (writes | holds).double().mean() >= decided - 1e-4


NETWORKS = {
    "BMRU": partial(mk.MRUNetwork, 6, 5, width=8, num_blocks=2),
    "tokens": partial(mk.MRUNetwork, 6, 5, width=8, num_blocks=1, tokens=True, pool="last"),
    "concatenated": partial(
        mk.MRUNetwork, 6, 5, width=8, num_blocks=2, units=("bmru", "min_gru", "schmitt"), conv_size=3,
        combine="concatenate",
    ),
    "sum": partial(mk.MRUNetwork, 6, 5, width=8, num_blocks=1, units=("cmru", "alpha_cmru"), hidden_size=7, mlp_size=5),
    "delays": partial(mk.MRUNetwork, 6, 5, width=8, num_blocks=1, delay={"taps": 5, "count": 2}, dropout=0.5),
    "one tap": partial(mk.MRUNetwork, 6, 5, width=8, num_blocks=1, units="min_gru", conv_size=1),
    "MinGRU": partial(mk.MinGRU, 6, 9, 2, max_time_scale=20.0),
}  # fmt: skip


def network(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]().eval()


def inputs_of(module: torch.nn.Module, count: int) -> torch.Tensor:
    return torch.randint(6, (count,)) if getattr(module, "tokens", False) else draw(count, 6)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_agree_within_rounding(tmp_path, name):
    module = network(name)
    inputs = inputs_of(module, 30)
    codes, outputs = compiled(module.train(), tmp_path)(inputs)  # dropout is left out
    assert not codes.any()
    torch.testing.assert_close(outputs, steps(module.eval(), inputs))


class RoundRows(torch.nn.Module):
    """The weights that int8 stands for."""

    def forward(self, weight):
        scale = weight.abs().amax(1, keepdim=True) / 127
        return (weight / scale).round() * scale


def with_rounded_rows(module: torch.nn.Module) -> torch.nn.Module:
    for child in list(module.modules()):
        if isinstance(child, (torch.nn.Linear, torch.nn.Embedding)):
            parametrize.register_parametrization(child, "weight", RoundRows())
        elif isinstance(child, mk.nn.MRUBase):
            for name in [name for name in child._parameters if name.startswith("weight_ih")]:
                parametrize.register_parametrization(child, name, RoundRows())
    return module


@pytest.mark.parametrize("name", ["concatenated", "tokens", "MinGRU"])
def test_int8_weights_are_those_of_rounded_rows(tmp_path, name):
    module = network(name)
    inputs = inputs_of(module, 30)
    _, outputs = compiled(module, tmp_path, weights="int8")(inputs)
    torch.testing.assert_close(outputs, steps(with_rounded_rows(network(name)), inputs))
    assert not torch.allclose(outputs, steps(module, inputs), atol=1e-5)


def test_a_parametrized_module_is_exported_as_it_computes(tmp_path):
    module = with_rounded_rows(grid_module(mk.BMRU))
    assert_bits(compiled(module, tmp_path), module, torch.randint(-1, 2, (200, 4)).float())


def test_a_sequential_passes_on_the_output_of_its_units(tmp_path):
    first, unit, last = torch.nn.Linear(4, 3), grid_module(mk.FirstQuadrantBMRU), torch.nn.Linear(11, 2, bias=False)
    with torch.no_grad():
        for parameter in [*first.parameters(), *last.parameters()]:
            parameter.copy_(on_grid(*parameter.shape))
    unit = mk.FirstQuadrantBMRU(3, 11, 2)
    module = torch.nn.Sequential(first, torch.nn.ReLU(), unit, last)
    x = on_grid(300, 4)
    _, outputs = compiled(module, tmp_path)(x)
    torch.testing.assert_close(outputs, last(steps(unit, first(x).relu())))


# ------------------------------------------------------------------------------------------ bad inputs of a step


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("cls", [mk.BMRU, mk.CMRU])
def test_a_step_with_a_value_that_is_not_finite_changes_nothing(tmp_path, cls, bad):
    module = grid_module(cls)
    x = on_grid(100, 4)
    is_bad = torch.arange(100) % 7 == 3
    x[is_bad, 2] = bad
    codes, outputs = compiled(module, tmp_path)(x)
    assert torch.equal(codes.bool(), is_bad)
    assert torch.equal(outputs[~is_bad], steps(module, x[~is_bad]))
    assert torch.equal(outputs[is_bad], outputs[torch.where(is_bad)[0] - 1])


def test_a_token_beyond_the_last_changes_nothing(tmp_path):
    module = network("tokens")
    codes, outputs = compiled(module, tmp_path)(torch.tensor([2, 6, 3]))
    assert codes.tolist() == [0, 1, 0]
    torch.testing.assert_close(outputs[[0, 2]], steps(module, torch.tensor([2, 3])))


# ------------------------------------------------------------------------------------------ compilers


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


@pytest.mark.parametrize("cls", ALL)
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


FAULTS = {
    "a tie does not write": (mk.BMRU, "return magnitude >= ", "return magnitude > "),
    "zero is negative": (mk.BMRU, "positive = candidate >= 0.0f", "positive = candidate > 0.0f"),
    "the threshold has a sign": (mk.BMRU, "(threshold >= 0.0f ? threshold : -threshold)", "threshold"),
    "a tie with high holds": (mk.FirstQuadrantBMRU, "candidate >= high", "candidate > high"),
    "a tie with low writes": (mk.FirstQuadrantBMRU, "candidate >= low", "candidate > low"),
    "no ReLU": (mk.FirstQuadrantBMRU, "candidate = candidate > 0.0f ? candidate : 0.0f;", ""),
    "one byte for all channels": (mk.BMRU, "bits[d / 8]", "bits[0]"),
    "a write changes other bits": (mk.BMRU, "bits[d / 8] & ~mask", "0"),
    "a state is not read": (mk.CMRU, "value + epsilon * *state", "value + 0.0f * epsilon"),
    "no bias": (mk.CMRU, "sum + map->bias[r]", "sum"),
    "the threshold of another channel": (mk.CMRU, "11 + d", "10 + d"),
    "a negative write has a positive amplitude": (mk.AlphaCMRU, ": -amplitude", ": amplitude"),
}


@pytest.mark.check
@pytest.mark.parametrize("fault", FAULTS)
def test_the_tests_find_planted_faults(tmp_path, fault):
    cls, right, wrong = FAULTS[fault]
    module = make(cls, 4, 11, 2, integer=True)
    program = mk.export.c(module, tmp_path / "net.c")
    text = program.path.read_text()
    assert right in text
    program.path.write_text(text.replace(right, wrong))
    inputs = integers(500, 4)
    assert not torch.equal(Compiled(program)(inputs)[1], steps(module, inputs))


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
