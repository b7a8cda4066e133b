"""What a call asks of torch: each op takes longer than the arithmetic of a small call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch.overrides import TorchFunctionMode, resolve_name

import mru_kernels as mk


def dispatched(f: Callable[[], object]) -> Counter[str]:
    """The ops that `f` dispatches, those of the backward pass included. Its first call, which fills caches, is free."""
    f()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        f()
    return Counter({e.key: e.count for e in profile.key_averages() if e.key.startswith(("aten::", "mru::"))})


class _Functions(TorchFunctionMode):
    """Counts the functions of torch that Python calls, without those that only read a tensor or set the grad mode."""

    def __init__(self):
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = (resolve_name(function) or str(function)).split(".")[-1]
        if name not in ("__get__", "dim", "size") and "_set_grad_enabled" not in name:
            self.names[name] += 1
        return function(*args, **(kwargs or {}))


def called(f: Callable[[], object]) -> Counter[str]:
    f()
    with _Functions() as functions:
        f()
    return functions.names


def test_gradients():
    candidate, threshold = (torch.randn(1, 8, 4, requires_grad=True) for _ in range(2))

    def gradients():
        h, _ = mk.bmru(candidate, threshold)
        torch.autograd.grad(h, (candidate, threshold), grad_h)

    grad_h = torch.randn(1, 8, 4)
    # The zeros are the gradient of the final state.
    assert dispatched(gradients) == {"mru::bmru": 1, "mru::bmru_backward": 1, "aten::zero_": 1}


def test_step_of_a_unit():
    unit, x = mk.BMRU(3, 4), torch.randn(2, 3)
    _, hx = unit.step(x)
    seen = called(lambda: unit.step(x, hx))
    assert seen == {"unbind": 1, "linear": 1, "item": 1, "cpu": 1, "unsqueeze": 1}  # "cpu": the op


def test_step_of_a_network():
    """No view gives time back to a tensor or takes it away, and modules that change nothing are not called."""
    network, x = mk.MRUNetwork(3, 5, width=4, num_blocks=2, units=("bmru", "min_gru")).eval(), torch.randn(2, 3)
    _, state = network.step(x)
    seen = called(lambda: network.step(x, state))
    of_block = {"rms_norm": 2, "linear": 6, "cpu": 2, "item": 1, "glu": 1, "sigmoid": 1, "mul": 1, "add": 3}
    of_network = {"linear": 2, "rms_norm": 1, "to": 1}
    assert seen == sum(2 * [Counter(of_block)], Counter(of_network))


def test_another_dropout_runs_in_evaluation():
    class Doubled(torch.nn.Dropout):
        def forward(self, input):
            return 2.0 * input

    block = mk.MRUBlock(4, units=("min_gru",)).eval()
    x = torch.randn(2, 3, 4)
    before = block(x)[0]
    called_with = []
    block.dropout.register_full_backward_pre_hook(lambda *_: called_with.append(1))
    block(x)[0].sum().backward()
    assert called_with
    block.dropout = Doubled()
    assert not torch.equal(block(x)[0], before)


def test_hooks_of_every_module_run_in_a_step():
    network, x = mk.MRUNetwork(3, 5, width=4, num_blocks=1, units=("bmru", "min_gru")).eval(), torch.randn(2, 3)
    expected, state = network.step(x)
    ran = []
    leaves = [m for m in network.modules() if not isinstance(m, torch.nn.ModuleList)]
    for module in leaves:
        module.register_forward_hook(lambda module, *_: ran.append(module))
    output, after = network.step(x)
    assert torch.equal(output, expected)
    assert all(map(torch.equal, after, state))
    assert {id(m) for m in ran} == {id(m) for m in leaves}
