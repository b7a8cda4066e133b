"""Modules as ONNX models: one step, and a whole pass as an ONNX Scan, run in onnxruntime."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import mru_kernels as mk
from tests.drawn import assert_close, assert_equal, draw
from tests.units import integers, make

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.check

ANY = torch.export.Dim.AUTO
BISTABLE = [mk.BMRU, mk.CMRU, mk.AlphaCMRU, mk.FirstQuadrantBMRU]


class Step(torch.nn.Module):
    """The step of a module as its forward pass. The states are single arguments."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module = module

    def forward(self, input, *states):
        return self.module.step(input, states if isinstance(self.module, mk.MRUNetwork) else states[0])


class Function(torch.nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Callable):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def converted(module: torch.nn.Module, inputs: tuple[Tensor, ...], shapes, path) -> Callable[..., list[Tensor]]:
    """The module as an ONNX model that onnxruntime runs."""
    program = torch.export.export(module.eval().requires_grad_(False), inputs, dynamic_shapes=shapes)
    program = program.run_decompositions(mk.export.decompositions())
    torch.onnx.export(program, (), str(path), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def run(*inputs):
        feed = {name: t.numpy() for name, t in zip(names, inputs, strict=True)}
        return [torch.from_numpy(result) for result in session.run(None, feed)]

    return run


def operators(path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


# ------------------------------------------------------------------------------------------ a whole pass


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", ["bmru", "schmitt"])
def test_a_scan_has_the_bits_of_the_kernel(tmp_path, cell, reverse):
    """With epsilon 0, for any values of the streams."""

    def op(candidate, gate, initial_state):
        if cell == "bmru":
            return mk.bmru(candidate, gate, initial_state, reverse=reverse)
        return mk.schmitt(candidate, -gate[0, 0].abs(), gate[0, 0].abs(), initial_state, reverse=reverse)

    path = tmp_path / "scan.onnx"
    sizes = {0: ANY, 1: ANY}
    run = converted(Function(op), (draw(2, 5, 3), draw(2, 5, 3, seed=1), draw(2, 3)), ((sizes, sizes, {0: ANY}),), path)
    assert operators(path).count("Scan") == 1
    for batch, time in ((1, 1), (2, 14), (5, 14)):
        inputs = draw(batch, time, 3), draw(batch, time, 3, seed=1), draw(batch, 3)
        assert_equal(run(*inputs), list(op(*inputs)))


@pytest.mark.parametrize("cls", BISTABLE)
def test_a_pass_of_integers_has_the_bits_of_the_module(tmp_path, cls):
    """Sums of integers have no rounding errors, so that the gates are equal."""
    module = make(cls, 4, 6, 2, integer=True)
    if cls is mk.AlphaCMRU:
        module.epsilon = 0.0
    path = tmp_path / "unit.onnx"
    run = converted(module, (integers(2, 5, 4),), ({0: ANY, 1: ANY},), path)
    assert operators(path).count("Scan") == 2
    for batch, time in ((1, 1), (2, 14), (5, 14)):
        x = integers(batch, time, 4)
        assert_equal(run(x), list(module(x)))


MODULES = {
    "MinGRU": lambda: mk.MinGRU(4, 6),
    "MinLSTM": lambda: mk.MinLSTM(4, 6),
    "both directions": lambda: mk.BMRU(4, 6, 2, bidirectional=True),
    "MRUBlock": lambda: mk.MRUBlock(4, ("bmru", "min_gru"), conv_size=3),
    "MRUNetwork": lambda: mk.MRUNetwork(4, 3, width=6, num_blocks=2, units=("bmru", "cmru"), conv_size=3),
    "tokens": lambda: mk.MRUNetwork(4, 3, width=6, num_blocks=1, tokens=True, pool="last"),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_pass_equals_the_module(tmp_path, name):
    torch.manual_seed(0)
    module = MODULES[name]()

    def input_of(batch, time):
        return torch.randint(4, (batch, time)) if name == "tokens" else draw(batch, time, 4)

    run = converted(module, (input_of(2, 5),), ({0: ANY, 1: ANY},), tmp_path / "module.onnx")
    for batch, time in ((1, 1), (2, 14), (5, 14)):
        x = input_of(batch, time)
        assert_close(run(x), pytree.tree_leaves(module(x)))


# ------------------------------------------------------------------------------------------ a step


@pytest.mark.parametrize(("cls", "steps"), [(cls, 100_000 if cls is mk.BMRU else 2_000) for cls in BISTABLE])
def test_steps_of_integers_have_the_bits_of_the_module(tmp_path, cls, steps):
    module = make(cls, 4, 6, integer=True)
    path = tmp_path / "step.onnx"
    states = torch.zeros(1, 1, 6)
    run = converted(Step(module), (integers(1, 4), states), None, path)
    assert "Scan" not in operators(path)
    ours = states
    for x in integers(steps, 1, 4):
        h, states = run(x, states)
        expected, ours = module.step(x, ours)
        assert torch.equal(h, expected)
        assert torch.equal(states, ours)


STEPS = {
    "MinGRU": lambda: mk.MinGRU(4, 6),
    "two layers": lambda: mk.BMRU(4, 6, 2),
    "MRUNetwork": lambda: mk.MRUNetwork(4, 3, width=6, num_blocks=2, units=("bmru", "min_gru"), conv_size=3),
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_equal_the_module(tmp_path, name):
    torch.manual_seed(0)
    module = STEPS[name]()
    _, states = module.step(draw(2, 4))
    run = converted(Step(module), (draw(2, 4), *_listed(states)), None, tmp_path / "step.onnx")
    for x in draw(100, 2, 4):
        got = run(x, *_listed(states))
        expected, states = module.step(x, states)
        assert_close(got, [expected, *_listed(states)])


def _listed(states: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [states] if isinstance(states, Tensor) else list(states)
