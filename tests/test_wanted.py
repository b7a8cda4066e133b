"""A gradient that nobody wants may be left out, and the others do not change."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import inputs
from mru_kernels import ops
from mru_kernels.ops import autograd
from tests import raw
from tests.calls import CELLS, SEGMENTS, assert_same_bits, cases, op_of


@pytest.mark.parametrize("cell", CELLS)
@given(data=st.data())
def test_what_is_not_wanted_changes_nothing_else(backend, device, cell, data):
    call = data.draw(cases((150, 20), cell, boundaries=False)).build().to(device)
    scan = raw.scan(call, gates=data.draw(st.booleans()), segment=data.draw(SEGMENTS))
    results = raw.run(ops.CELLS[cell].forward[backend], scan)
    arguments, op = raw.backward(scan, results), ops.CELLS[cell].backward[backend]
    count = len(scan["inputs"]) - len(ops.CELLS[cell].scheduled)
    wanted = data.draw(st.integers(0, 2**count - 1))
    everything, got = raw.run(op, arguments), raw.run(op, arguments | {"wanted": wanted})
    for i, (a, b) in enumerate(zip(everything, got, strict=True)):
        if i < count and scan["inputs"][i].dim() == 1 and not wanted >> i & 1 and backend == "cpu":
            assert not b.any()
        else:
            assert_same_bits({"gradient": b}, {"gradient": a})


@pytest.mark.parametrize("cell", CELLS)
def test_a_gradient_is_wanted_where_a_tensor_requires_it(backend, device, cell, monkeypatch):
    call = inputs.case(cell, torch.float32, time=70, initial_state="real", resets="to a state").build().to(device)
    names = [i.name for i in ops.CELLS[cell].inputs if i.name in call.tensors]
    masks, run_backward = [], autograd.run_backward

    def recorded(op, arguments):
        masks.append(arguments[-1])
        return run_backward(op, arguments)

    monkeypatch.setattr(autograd, "run_backward", recorded)

    def gradients(needed: list[str]) -> dict[str, torch.Tensor]:
        leaves = {name: t.clone().requires_grad_(name in needed) for name, t in call.tensors.items()}
        h, _ = op_of(cell, backend)(**leaves, **call.settings)
        found = torch.autograd.grad(h, [leaves[name] for name in needed], call.grad_h)
        return dict(zip(needed, found, strict=True))

    everything = gradients(list(call.tensors))
    for needed in ([names[0]], names[1:], ["initial_state"]):
        if needed:
            assert_same_bits(gradients(needed), {name: everything[name] for name in needed})
            assert masks[-1] == sum(1 << names.index(name) for name in needed if name in names)
