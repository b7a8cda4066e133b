"""Steps of modules in ExecuTorch's Python runtime."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree as pytree

import mru_kernels as mk
from tests.drawn import assert_close, draw
from tests.units import integers, make

exir = pytest.importorskip("executorch.exir")
runtime = pytest.importorskip("executorch.runtime")
pytestmark = pytest.mark.check

BISTABLE = [mk.BMRU, mk.CMRU, mk.AlphaCMRU, mk.FirstQuadrantBMRU]


class Step(torch.nn.Module):
    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module = module

    def forward(self, input, state):
        return self.module.step(input, state)


def lowered(module: torch.nn.Module, input, state):
    """The step of the module as a function that ExecuTorch runs: (output, *states)."""
    program = torch.export.export(Step(module.eval().requires_grad_(False)), (input, state))
    program = program.run_decompositions(mk.export.decompositions())
    buffer = exir.to_edge(program).to_executorch().buffer
    loaded = runtime.Runtime.get().load_program(buffer)
    method = loaded.load_method("forward")

    def run(input, state, keep=(buffer, loaded)):  # a method reads the memory of both
        return [t.clone() for t in method.execute([input, *pytree.tree_leaves(state)])]

    return run


@pytest.mark.parametrize("cls", BISTABLE)
def test_steps_of_integers_have_the_bits_of_the_module(cls):
    module, state = make(cls, 4, 6, integer=True), torch.zeros(1, 2, 6)
    run = lowered(module, integers(2, 4), state)
    ours = state
    for x in integers(1000, 2, 4):
        h, state = run(x, state)
        expected, ours = module.step(x, ours)
        assert torch.equal(h, expected)
        assert torch.equal(state, ours)


@pytest.mark.parametrize("name", ["MinGRU", "MRUNetwork"])
def test_steps_equal_the_module(name):
    torch.manual_seed(0)
    options = {"width": 6, "num_blocks": 2, "units": ("bmru", "min_gru"), "conv_size": 3}
    module = mk.MinGRU(4, 6) if name == "MinGRU" else mk.MRUNetwork(4, 3, **options)
    _, state = module.step(draw(2, 4))
    run = lowered(module, draw(2, 4), state)
    for x in draw(100, 2, 4):
        got = run(x, state)
        expected, state = module.step(x, state)
        assert_close(got, [expected, *pytree.tree_leaves(state)])
