"""Names of what is timed: the passes of a call. Also the bytes that each pass must move."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from .inputs import Call

FORWARD = "forward"  # without gradients; allocates the output
SAVING = "forward with gradients"  # also saves what the backward pass needs
BACKWARD = "backward"
BOTH = "forward + backward"
MAIN = (FORWARD, BACKWARD, BOTH)

ADD = "torch.add(out=)"  # the streaming pass whose rate sets the floor
GRU = "torch.nn.GRU"  # a peer of the modules; another unit, so its results are not compared
PROJECTIONS = ", projections alone"  # suffix of a module's name
OWN_JOB = ", own job"  # suffix of a peer's name: its scan alone, with its gates given in its layout
DEFAULT_ALLOCATOR = ", default allocator"  # suffix of the op's name and of torch.add's

NOISY = 0.25  # above this spread a figure is unreliable: ratios that depend on it are marked "?"
NOISE = f'"?" marks a ratio that depends on a figure whose spread is over {100 * NOISY:.0f} %.'

Passes = dict[str, Callable[[], object]]


def passes(call: Call, f: Callable[..., Tensor]) -> Passes:
    """The passes of `f` by name. `f` takes the call's tensors by name and returns h `[B, T, D]`."""
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

    The forward pass reads the input streams and writes h. The backward pass reads as many streams again (h instead of
    an input that it does not need) and the gradient of h, and writes the gradients. Per-channel inputs and states do
    not count. Saved tensors do not count: an implementation chooses how much it saves.
    """
    inputs, h = sum(t.nbytes for t in call.tensors.values() if t.dim() == 3), call.grad_h.nbytes
    forward, backward = inputs + h, 2 * inputs + h
    return {FORWARD: forward, SAVING: forward, BACKWARD: backward, BOTH: forward + backward}
