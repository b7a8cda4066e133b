"""A gradient that nobody wants may be left out, and the others do not change."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import inputs
from mru_kernels import backends, ops
from mru_kernels.ops import autograd
from tests import raw
from tests.calls import CELLS, SEGMENTS, assert_same_bits, cases, op_of


@pytest.mark.parametrize("cell", CELLS)
@given(data=st.data())
def test_what_is_not_wanted_changes_nothing_else(backend, device, cell, data):
    backends.resolve(backend, device)  # registers the kernels of the backend
    call = data.draw(cases((150, 40), cell, boundaries=False)).build().to(device)
    scan = raw.scan(call, gates=data.draw(st.booleans()), segment=data.draw(SEGMENTS))
    results = raw.run(ops.CELLS[cell].forward[backend], scan)
    arguments, op = raw.backward(scan, results), ops.CELLS[cell].backward[backend]
    count = len(scan["inputs"]) - len(ops.CELLS[cell].scheduled)
    everything = raw.run(op, arguments)
    for wanted in range(2**count):
        got = raw.run(op, arguments | {"wanted": wanted})
        for i, (a, b) in enumerate(zip(everything, got, strict=True)):
            if i < count and scan["inputs"][i].dim() == 1 and not wanted >> i & 1 and backend == "cpu":
                assert not b.any()
            else:
                torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True)  # a NaN may have either sign


@pytest.mark.parametrize("channels", [17, 64])
@pytest.mark.parametrize("cell", CELLS)
def test_a_gradient_is_wanted_where_a_tensor_requires_it(backend, device, cell, channels, monkeypatch):
    call = (
        inputs.case(cell, torch.float32, time=70, channels=channels, initial_state="real", resets="to a state")
        .build()
        .to(device)
    )
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
        assert_same_bits(gradients(needed), {name: everything[name] for name in needed})
        assert masks[-1] == sum(1 << names.index(name) for name in needed if name in names)


def test_a_second_derivative_by_an_input_whose_gradient_is_not_wanted(backend, device):
    """The gradient by the update alone, and its derivative by the decay."""
    decay = torch.rand(40, dtype=torch.float64, device=device)
    update, weight = (torch.randn(2, 70, 40, dtype=torch.float64, device=device) for _ in range(2))
    op = op_of("linear_recurrence", backend)

    def loss(update, decay):
        return op(decay, update)[0].square().mul(weight).sum()

    def of_update(decay):
        return torch.func.grad(loss)(update, decay).square().sum()

    leaves = [t.clone().requires_grad_() for t in (update, decay)]
    both = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    (expected,) = torch.autograd.grad(both[0].square().sum(), leaves[1])
    torch.testing.assert_close(torch.func.grad(of_update)(decay), expected, rtol=1e-12, atol=1e-12)
