"""First-quadrant units as graphs of NIR: the interpreter of nirtorch gives the bits of `step`."""

from __future__ import annotations

import sys

import pytest
import torch

import mru_kernels as mk
from tests.drawn import draw

nir = pytest.importorskip("nir")
nirtorch = pytest.importorskip("nirtorch")


# the nodes of a graph for nirtorch
class Threshold(torch.nn.Module):
    def __init__(self, node):
        super().__init__()
        self.register_buffer("threshold", torch.from_numpy(node.threshold))

    def forward(self, x):
        return (x > self.threshold).to(x.dtype)


class Scale(torch.nn.Module):
    def __init__(self, node):
        super().__init__()
        self.register_buffer("scale", torch.from_numpy(node.scale))

    def forward(self, x):
        return x * self.scale


def affine(node):  # the map of nirtorch 2.6 leaves the bias out
    module = torch.nn.Linear(node.weight.shape[1], node.weight.shape[0])
    module.weight.data, module.bias.data = torch.from_numpy(node.weight), torch.from_numpy(node.bias)
    return module


def delay(node):  # nirtorch reads the output of an edge that closes a loop one step later
    assert (node.delay == 1.0).all()
    return torch.nn.Identity()


NODES = {nir.Affine: affine, nir.Threshold: Threshold, nir.Scale: Scale, nir.Delay: delay}
# end


def unit(*sizes: int, **options) -> mk.FirstQuadrantBMRU:
    torch.manual_seed(0)
    module = mk.FirstQuadrantBMRU(*sizes, learn_initial_state=False, **options)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith("weight"):
                parameter.normal_()
            elif name.startswith("alpha"):
                parameter.uniform_(-1.0, 2.0)
    return module


def interpreted(graph, inputs: torch.Tensor) -> torch.Tensor:
    network = nirtorch.nir_to_torch(graph, NODES)
    state, outputs = None, []
    for x in inputs:
        output, state = network(x, state)
        outputs.append(output)
    return torch.stack(outputs)


def steps(module, inputs: torch.Tensor) -> torch.Tensor:
    state, outputs = None, []
    for x in inputs:
        output, state = module.step(x, state)
        outputs.append(output)
    return torch.stack(outputs)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"num_layers": 3}])
def test_the_interpreter_has_the_bits_of_step(options):
    module = unit(4, 7, **options)
    inputs = draw(300, 2, 4)
    expected = steps(module, inputs)
    assert torch.equal(interpreted(mk.export.nir(module), inputs), expected)
    assert 0.1 < (expected != 0.0).double().mean() < 0.9  # both values occur


@pytest.mark.parametrize("shift", [0.0, 0.1, 0.3])
def test_ties(shift):
    """A candidate that equals `high` sets the state, one that equals `low` holds it, for thresholds that round."""
    module = mk.FirstQuadrantBMRU(1, 1, bias=False, learn_initial_state=False)
    with torch.no_grad():
        module.weight_ih_l0.fill_(1.0)
        module.low_l0.fill_(0.15 + shift)
        module.width_l0.fill_(-0.35)
        low, high = module.low_l0, module.low_l0 + module.width_l0.abs()
        zero = torch.zeros(1)
        near = [torch.nextafter(t, zero) for t in (low, high)] + [torch.nextafter(t, zero + 9.0) for t in (low, high)]
        pairs = torch.cartesian_prod(*[torch.cat([low, high, zero, high + 1.0, *near])] * 2)
    inputs = pairs.flatten().view(-1, 1, 1)
    expected = steps(module, inputs)
    assert torch.equal(interpreted(mk.export.nir(module), inputs), expected)


def test_a_graph_survives_a_file(tmp_path):
    module, inputs = unit(4, 7, 2), draw(100, 2, 4)
    nir.write(tmp_path / "unit.nir", mk.export.nir(module))
    assert torch.equal(interpreted(nir.read(tmp_path / "unit.nir"), inputs), steps(module, inputs))


def test_linear_maps_and_units_in_turn():
    torch.manual_seed(0)
    first, module, last = torch.nn.Linear(3, 4), unit(4, 7), torch.nn.Linear(7, 2, bias=False)
    inputs = draw(100, 2, 3)
    graph = mk.export.nir(torch.nn.Sequential(first, module, last))
    with torch.no_grad():
        expected = last(steps(module, first(inputs)))
    torch.testing.assert_close(interpreted(graph, inputs), expected)
    kinds = [type(node).__name__ for node in graph.nodes.values()]
    assert kinds == ["Input", "Affine", "Affine", *["Threshold"] * 3, "Delay", "Scale", "Linear", "Output"]


def test_a_stage_may_occur_twice():
    module, inputs = unit(4, 4), draw(100, 2, 4)
    graph = mk.export.nir(torch.nn.Sequential(module, module))
    assert torch.equal(interpreted(graph, inputs), steps(module, steps(module, inputs)))


def test_a_linear_map_alone():
    module, inputs = torch.nn.Linear(3, 4), draw(5, 2, 3)
    with torch.no_grad():
        assert torch.equal(interpreted(mk.export.nir(module), inputs), torch.stack([module(x) for x in inputs]))


def test_the_parameters_of_the_graph_are_copies():
    module = unit(4, 7)
    graph = mk.export.nir(module)
    module.weight_ih_l0.data.zero_()
    assert graph.nodes["l0_affine"].weight.any()


def with_low() -> mk.FirstQuadrantBMRU:
    module = unit(3, 4)
    module.low_l0.data[2] = 0.0
    return module


LACKS = "expected a module or stages of class FirstQuadrantBMRU or Linear, got {}; NIR has no {}"


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        (mk.BMRU(3, 4), TypeError, LACKS.format("BMRU", "threshold that depends on the input")),
        (mk.CMRU(3, 4), TypeError, LACKS.format("CMRU", "threshold that depends on the input")),
        (mk.MinGRU(3, 4), TypeError, LACKS.format("MinGRU", "decay that depends on the input")),
        (mk.LRU(3, 4), TypeError, LACKS.format("LRU", "complex states")),
        (mk.MRUNetwork(3, 4, width=4, num_blocks=1), TypeError, LACKS.format("MRUNetwork", "RMSNorm")),
        (torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU()), TypeError, LACKS.format("ReLU", "ReLU")),
        (torch.nn.Sequential(torch.nn.Linear(3, 4), unit(5, 4)), ValueError, "stage 1 to read 4 features, got 5"),
        (torch.nn.Sequential(), ValueError, "module: expected a Sequential with stages, got an empty one"),
        (torch.nn.Tanh(), TypeError, "got Tanh"),
        (3, TypeError, "module: expected a module, got int"),
        (unit(3, 4, epsilon=0.5), ValueError, "epsilon: expected 0, .*, got 0.5"),
        (unit(3, 4, bidirectional=True), ValueError, "one direction, got a bidirectional FirstQuadrantBMRU"),
        (unit(3, 4, dtype=torch.float64), TypeError, "float32 parameters, got torch.float64 weight_ih_l0"),
        (mk.FirstQuadrantBMRU(3, 40), ValueError, "initial_state_l0: expected zeros, as states of NIR begin at 0"),
        (with_low(), ValueError, "low_l0: expected positive values, as NIR has no ReLU, got 0"),
    ],
)
def test_what_nir_cannot_say_is_refused_by_name(module, error, message):
    with pytest.raises(error, match=message):
        mk.export.nir(module)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nir", None)
    with pytest.raises(ImportError, match=r'nir: the package nir is not installed; pip install "mru_kernels\[nir\]"'):
        mk.export.nir(unit(3, 4))
