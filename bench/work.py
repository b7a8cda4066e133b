"""What is timed, by its names: the passes of a call, and the streams that each must move, once, in or out."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from .inputs import Call

FORWARD = "forward"  # without gradients; the output is allocated
SAVING = "forward with gradients"  # what the backward pass asks for is made too
BACKWARD = "backward"
BOTH = "forward + backward"
MAIN = (FORWARD, BACKWARD, BOTH)

ADD = "torch.add(out=)"  # the streaming pass that the floor is scaled from
GRU = "torch.nn.GRU"  # a peer of the modules: another unit, so that nothing is compared
PROJECTIONS = ", projections alone"  # of a module
DEFAULT_ALLOCATOR = ", default allocator"  # of the op and torch.add

NOISY = 1.0  # a spread from which on a figure says little: what is made of it is marked "?"

Passes = dict[str, Callable[[], object]]


def passes(call: Call, f: Callable[..., Tensor]) -> Passes:
    """Each pass of `f`, which takes the call's tensors by name and gives h, under its name."""
    leaves = {name: t.detach().requires_grad_() for name, t in call.tensors.items()}
    forward = cache(lambda: f(**leaves))

    def gradients(h: Tensor, keep: bool) -> object:
        return torch.autograd.grad(h, list(leaves.values()), call.grad_h, retain_graph=keep)

    return {
        FORWARD: lambda: f(**call.tensors),
        SAVING: lambda: f(**leaves),
        BACKWARD: lambda: gradients(forward(), keep=True),
        BOTH: lambda: gradients(f(**leaves), keep=False),
    }


def floor_bytes(call: Call) -> dict[str, int]:
    """Bytes that each pass must move.

    Forward it reads the inputs and writes h. Backward it reads as many streams (the inputs, or where those are not
    needed h) and the gradient of h, and writes the gradients. Vectors and states do not count, nor what is saved: how
    much that is, is a choice.
    """
    inputs = sum(t.dim() == 3 for t in call.tensors.values())
    forward, backward = inputs + 1, 2 * inputs + 1
    streams = {FORWARD: forward, SAVING: forward, BACKWARD: backward, BOTH: forward + backward}
    return {name: count * call.stream.nbytes for name, count in streams.items()}
