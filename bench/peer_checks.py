"""Checks of a peer in both jobs, before it is timed, against the op.

They run on the first steps of a call, in float32 or wider. Gradients are not compared if the peer does not give all of
them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import mru_kernels as mk

from . import errors, inputs
from .inputs import Call
from .peers import PEERS, job, own_call
from .work import BOTH, FORWARD

_CHECKED_STEPS = 256  # steps on which peers are compared with the op


def op(call: Call, backend: str | None) -> Callable[..., Tensor]:
    """A function that computes h by the op. It takes the call's tensors by name."""
    return lambda **tensors: getattr(mk, call.cell)(**tensors, **call.settings, backend=backend)[0]


def check_peer(name: str, call: Call, backend: str | None = None) -> None:
    """Raise unless a peer's h and gradients in the same job are those of the op."""
    peer, few = PEERS[name], _first_steps(call)
    _compare(few.cell, _results(few, op(few, backend)), _results(few, job(peer, few), peer.whole))


def check_own_job(name: str, call: Call, backend: str | None = None) -> None:
    """Raise unless h and the gradients from the passes of a peer's own job are those of the op.

    `call` is one of `linear_recurrence`. The results are converted from the peer's layout. If it takes log a, its
    gradient is that of log a, which is a times that of a.
    """
    peer = PEERS[name]
    few = _first_steps(own_call(peer, call))
    a, w = few.tensors["decay"], few.tensors["update"]
    expected = _results(few, op(few, backend))
    if peer.layout.log:
        expected["decay"] = expected["decay"] * a
    works = peer.own_passes(a, w, few.grad_h)

    def back(x: Any) -> Tensor:
        return peer.layout.back(x if isinstance(x, Tensor) else torch.from_dlpack(x), w.shape)

    got = {"h": back(works[FORWARD]())}
    if peer.whole:
        # A package without tensors has JAX's gradients of complex numbers, the conjugates of torch's.
        gradients = (back(x) if peer.own is None else back(x).conj() for x in works[BOTH]())
        got |= dict(zip(("decay", "update"), gradients, strict=True))
    _compare(few.cell, expected, got)


def _first_steps(call: Call) -> Call:
    """The first steps of a call, in float32 or wider."""
    dtype = errors.state_dtype(call.stream.dtype)
    first = {name: (t[:, :_CHECKED_STEPS] if t.dim() == 3 else t).to(dtype) for name, t in call.tensors.items()}
    return inputs.call(call.cell, first, call.settings)


def _results(call: Call, f: Callable[..., Tensor], whole: bool = True) -> dict[str, Tensor]:
    """The h of `f`, which takes the tensors of a call by name. If `whole`, also their gradients, by name."""
    if not whole:
        return {"h": f(**call.tensors)}
    leaves = {name: t.detach().requires_grad_() for name, t in call.tensors.items()}
    h = f(**leaves)
    return {"h": h, **dict(zip(leaves, torch.autograd.grad(h, list(leaves.values()), call.grad_h), strict=True))}


def _compare(cell: str, expected: dict[str, Tensor], got: dict[str, Tensor]) -> None:
    """Raise unless a peer's results are those expected of a cell."""
    for what, x in got.items():
        error = (x - expected[what]).abs().max().item()
        if not error <= 1e-4 * (1 + expected[what].abs().max().item()):  # a NaN is an error too
            place = "" if what == "h" else f": another gradient of {what}"
            raise RuntimeError(f"does not compute what {cell} computes{place}")
