"""Exported C programs: the bits of `step`, and stated errors."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils import parametrize

import mru_kernels as mk
from tests.c_programs import NETWORKS, Compiled, compiled, inputs_of, network, steps
from tests.drawn import draw
from tests.units import integers, make

BISTABLE = [mk.BMRU, mk.CMRU, mk.AlphaCMRU, mk.FirstQuadrantBMRU]


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
    steps = 100_000 if weights == "float32" else 20_000
    assert_bits(compiled(module, tmp_path, weights=weights), module, on_grid(steps, 4))


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


class CoarserGrid(torch.nn.Module):
    def forward(self, weight):
        return (4 * weight).round() / 4


def test_a_parametrized_module_is_exported_as_it_computes(tmp_path):
    module = grid_module(mk.BMRU)
    before = module.weight_ih_l0.detach().clone()
    parametrize.register_parametrization(module, "weight_ih_l0", CoarserGrid())
    assert not torch.equal(module.weight_ih_l0, before)
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


# ------------------------------------------------------------------------------------------ planted faults

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
