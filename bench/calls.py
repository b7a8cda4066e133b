"""Microseconds of small calls, where Python and torch's dispatcher take most of the time: `python -m bench calls`.

Each figure is the lowest mean of many short rounds; other load only adds time. The op alone, the projection alone and
an autograd Function that does nothing are the unavoidable parts of a call.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mru_kernels as mk
from mru_kernels import ops
from mru_kernels import torch_private as private

from . import cli, inputs, records, timing

_SHAPE = {"batch": 2, "time": 256, "channels": 64}
_WIDTH = 512  # channels of the unit that makes a step
_IN_A_ROUND = 3  # calls: few enough that some rounds are not interrupted on a busy machine

Subjects = dict[str, Callable[[], object]]


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *tensors):
        return tensors[0].view_as(tensors[0])

    @staticmethod
    def backward(ctx, grad):
        return (grad,) * len(ctx.needs_input_grad)


def of_op(backend: str = "cpu") -> Subjects:
    """Calls of `bmru` on `[2, 256, 64]`."""
    call = inputs.case("bmru", torch.float32, **_SHAPE).build()
    leaves = {name: t.clone().requires_grad_() for name, t in call.tensors.items()}
    cell = ops.CELLS["bmru"]
    epsilon = torch.zeros((), dtype=torch.float64)
    given = cell.mask(*leaves) | cell.mask("epsilon")
    own = ([*call.tensors.values(), epsilon], given, 0, [1.0], None, None, None, None, False, 64, 0)
    *_, checkpoints, codes = cell.forward[backend](*own, True)

    def gradients(h: Tensor) -> object:
        return torch.autograd.grad(h, list(leaves.values()), call.grad_h)

    def both_ops() -> None:
        below(cell.forward[backend], *own, True)
        below(cell.backward[backend], call.grad_h, None, None, *own, checkpoints, codes, ops.ALL_WANTED)

    return {
        "bmru, forward": lambda: mk.bmru(**call.tensors),
        "its op": lambda: below(cell.forward[backend], *own, False),
        "bmru, forward + backward": lambda: gradients(mk.bmru(**leaves)[0]),
        "its ops": both_ops,
        "a Function that does nothing": lambda: gradients(_Nothing.apply(*leaves.values())),
    }


def of_step(backend: str = "cpu") -> Subjects:
    """Steps of a unit on `[1, 512]`, and of a network of two blocks."""
    unit = mk.BMRU(_WIDTH, _WIDTH)
    x = torch.randn(1, _WIDTH)
    _, hx = unit.step(x)
    weight, bias, alpha = (t.detach() for t in (unit.weight_ih_l0, unit.bias_ih_l0, unit.alpha_l0))
    cell, state, epsilon = ops.CELLS["bmru"], hx[0].clone(), torch.zeros((), dtype=torch.float64)
    packed = cell.mask("candidate", "threshold")
    own = ([F.linear(x, weight, bias), alpha, epsilon], packed | cell.mask("alpha", "epsilon"), packed, [1.0], state)
    network = mk.MRUNetwork(16, 8, width=64, num_blocks=2, units=("bmru", "min_gru")).eval()
    features = torch.randn(1, 16)
    _, before = network.step(features)
    return {
        "BMRU.step": lambda: unit.step(x, hx),
        "its projection": lambda: F.linear(x, weight, bias),
        "its op, step": lambda: below(cell.step[backend], *own),
        "MRUNetwork.step": lambda: network.step(features, before),
    }


def below(op: private.OpOverload, *arguments: Any) -> object:
    """An op without its autograd kernel."""
    with private.BelowAutograd():
        return op(*arguments)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=cli.prog("calls"), description=__doc__)
    parser.add_argument("--threads", type=cli.positive, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--calls", type=cli.positive, default=1500, help="of each subject (default: 1500)")
    arguments = parser.parse_args(argv)
    before = torch.get_num_threads()
    figures: dict[str, list[str]] = {}
    try:
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            for name, subject in (of_op() | of_step()).items():
                seconds = timing.per_call(subject, arguments.calls, max(arguments.calls // _IN_A_ROUND, 1))
                figures.setdefault(name, []).append(f"{1e6 * seconds:.1f}")
    finally:
        torch.set_num_threads(before)
    header = ["us", *(f"{threads} thread{'s' * (threads > 1)}" for threads in arguments.threads)]
    print(records.aligned([tuple(header), *((name, *values) for name, values in figures.items())]))
    print("\nbmru on [2, 256, 64]; BMRU(512, 512) on [1, 512]; two blocks of width 64 with BMRU and MinGRU on [1, 16].")
    return 0
