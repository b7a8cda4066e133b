"""The bytes and steps that `mk.blocked` needs, by its cost formulas."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mru_kernels as mk
from mru_kernels import blocks
from tests import processes
from tests.test_blocks import close, network, random

pytestmark = pytest.mark.usefixtures("one_thread")  # the tensors are too small for two


def nbytes(tensors) -> int:
    return sum(t.nbytes for t in tensors)


def test_the_steps_that_run():
    """A pass over T steps runs 2 T, and 3 T less the last inner block of every block with `inner`."""
    module = network()
    steps = []
    module.register_forward_pre_hook(lambda module, given: steps.append(given[0].shape[1]))
    for options, expected in (({"steps": 16}, 2 * 64), ({"steps": 16, "inner": 4}, 3 * 64 - 64 // 4)):
        for offload in (False, True):
            steps.clear()
            mk.blocked(module, offload=offload, **options)(random(1, 64, 5))[0].sum().backward()
            assert sum(steps) == expected


@pytest.mark.parametrize("options", [{}, {"inner": 4}, {"offload": True}], ids=str)
def test_a_block_saves_its_input_and_its_first_states(options, monkeypatch):
    module = network()
    x = random(1, 64, 5)
    saved = []

    def pack(tensor):
        saved.append(tensor.nbytes)
        return tensor

    run = mk.blocked(module, 16, **options)
    if options.get("offload"):
        function = blocks._HostCopies.pack
        monkeypatch.setattr(blocks._HostCopies, "pack", lambda self, tensor: function(self, pack(tensor)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        _, state = run(x)
    assert sum(saved) == x.nbytes + (64 // 16 - 1) * nbytes(state)  # the first block has no state


class LiveBytes(TorchDispatchMode):
    """The bytes of live tensors that ops make within the mode, and their peak. Views of `known` do not count."""

    def __init__(self, known) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def now(self) -> int:
        self._made = {key: value for key, value in self._made.items() if not value[0].expired()}
        return sum(size for _, size in self._made.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.now())
        return made


def live_bytes(run, steps: int) -> tuple[int, int]:
    """Bytes between the passes, and the peak of both, of a training step, beyond input and parameters."""
    x = random(1, steps, 5)
    with LiveBytes([x, *run.parameters()]) as live:
        output, _ = run(x)
        kept = live.now()
        output.sum().backward()
    run.zero_grad()
    return kept, live.peak


@pytest.mark.parametrize(("steps", "inner"), [(16, None), (8, None), (32, 8)])
def test_the_bytes_of_the_formulas(steps, inner):
    """Between the passes the states of the blocks; at the peak these and what one block needs by itself."""
    module = network(("bmru", "lru"), pool="last")
    state, count = nbytes(module(random(1, 4, 5))[1]), 128 // steps
    kept, peak = live_bytes(mk.blocked(module, steps, inner=inner), 128)
    assert kept == count * state + 3 * 8  # the final state and the output are results
    _, block = live_bytes(module, inner or steps)
    states = count + (steps // inner if inner else 0)
    outputs = states * 3 * 8
    # Also the gradients of the blocks after it; and the final state of a block that runs again, and its gradient.
    assert peak <= block + (states + 2) * state + outputs + nbytes(module.parameters())
    assert peak < live_bytes(module, 128)[1] / 2


def test_offloading_reads_the_block_before_ahead(monkeypatch):
    module = network(units="bmru", num_blocks=1)
    order: list[object] = []
    events: list[tuple[str, int]] = []
    functions = {name: getattr(blocks._HostCopies, name) for name in ("pack", "unpack", "_fetch")}
    for name in functions:

        def logged(self, *args, name=name, function=functions[name]):
            if name == "pack" and self not in order:
                order.append(self)
            events.append((name, order.index(self)))
            return function(self, *args)

        monkeypatch.setattr(blocks._HostCopies, name, logged)
    output, _ = mk.blocked(module, 16, offload=True)(random(1, 64, 5))
    assert {name for name, _ in events} == {"pack"}
    output.sum().backward()
    assert [block for name, block in events if name == "_fetch"] == [3, 2, 1, 0]
    for block in (2, 1, 0):
        started = events.index(("_fetch", block))
        assert events.index(("unpack", block + 1)) < started < events.index(("unpack", block))
    assert not any(copies._fetched for copies in order)


def test_offloading_copies():
    """The backward pass does not read the input again."""
    module = network()
    x = random(1, 64, 5)
    gradients = []
    for offload in (False, True):
        output, _ = mk.blocked(module, 16, offload=offload)(x)
        if offload:
            x.zero_()
        gradients.append(torch.autograd.grad(output.square().sum(), list(module.parameters())))
    close(*gradients)


PROGRAM = """
import sys, torch
import mru_kernels as mk
torch.set_num_threads(1)
torch.manual_seed(0)
network = mk.MRUNetwork(4, 4, width=32, num_blocks=2, units=("bmru", "lru"), pool="mean")
mk.blocked(network, 8)(torch.randn(1, 16, 4))[0].sum().backward()  # imports what checkpointing needs
run = mk.blocked(network, int(sys.argv[2])) if int(sys.argv[2]) else network
run(torch.randn(1, int(sys.argv[1]), 4))[0].sum().backward()
"""


@pytest.mark.check
def test_the_resident_memory_of_a_fresh_process():
    sizes = ((2048, 1024), (65536, 0), (65536, 1024))
    least, whole, in_blocks = (processes.peak_memory(PROGRAM, *steps) for steps in sizes)
    assert whole > least + 256 * 1024
    assert in_blocks - least < (whole - least) / 4  # the graphs of all blocks stay
