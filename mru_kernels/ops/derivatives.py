"""Tangents of the ops: forward mode, and the derivatives of the gradient of the linear recurrence.

The tangent of a result is its derivative along a change of the inputs; `dx` is the tangent of `x`. A step is pointwise,
so the tangent of the states is a linear recurrence: with the states s before each step,

    ds_t = (d step / d s) ds_{t-1} + sum_i (d step / d x_i) dx_i

The backward op of the cell gives these factors for all steps at once, see `_Steps`. So a tangent has the surrogate
derivatives that the gradient has, on every backend. The rules consist of ops, which have derivatives of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import state_dtype
from .batching import BACKWARD_NAMES, FORWARD_NAMES
from .layout import places, split_gates
from .spec import CELLS, Cell

#: The cell whose op scans tangents. It is its own tangent, so its gradient is differentiable.
LINEAR = "linear_recurrence"

Call = dict[str, Any]
Tensors = Sequence[Any]  # each a tensor or None


def tangent(cell: Cell, backend: str, call: Call, tangents: Tensors) -> tuple[Tensor, Tensor]:
    """The tangents of h `[B, T, D]` and of the final state `[N, D]`, in the state dtype.

    Args:
        call: the arguments of the forward op, by name.
        tangents: of the arrays among its inputs, then of the initial state if there is one; None for zeros.
    """
    if cell.name != LINEAR:
        return _tangent(cell, backend, call, tangents)
    (update, decay), initial_state = _by_input(cell, call, _values(cell, call))
    (d_update, d_decay), d_initial = _by_input(cell, call, tangents)
    scan = _LinearScan(backend, call, decay, state_dtype(update.dtype))
    states = None if d_decay is None else scan.before(scan(update, initial_state)[0], initial_state)
    return scan(scan.sum(update, d_update, _times(d_decay, states)), d_initial)


def tangent_of_gradient(
    cell: Cell, backend: str, call: Call, grads: Tensors, of_grads: Tensors, tangents: Tensors
) -> list[Tensor]:
    """The tangents of the results of the linear recurrence's backward op.

    Args:
        call, tangents: as for `tangent`.
        grads: grad_h `[B, T, D]` and grad_final `[N, D]`.
        of_grads: their tangents; None for zeros.
    """
    (update, decay), initial_state = _by_input(cell, call, _values(cell, call))
    (d_update, d_decay), d_initial = _by_input(cell, call, tangents)
    scan = _LinearScan(backend, call, decay, state_dtype(update.dtype))
    states = scan.before(scan(update, initial_state)[0], initial_state)
    d_states = scan.before(scan(scan.sum(update, d_update, _times(d_decay, states)), d_initial)[0], d_initial)

    # lambda_t = dL/ds_t = grad_h_t + mu_{t+1}. mu_t = conj(decay_t) lambda_t = dL/ds_{t-1} is a scan of the other
    # direction, from grad_final to dL/ds_0.
    adjoint = _LinearScan(backend, call | {"reverse": not call["reverse"]}, scan.decay.conj(), scan.state)

    def lambda_and_first(grad_h: Tensor | None, grad_final: Tensor | None, source: Tensor | None = None):
        mu, first = adjoint(adjoint.sum(update, _times(grad_h, adjoint.decay), source), grad_final)
        return adjoint.sum(update, grad_h, adjoint.before(mu, grad_final)), first

    grad_h, grad_final = grads
    lambda_, _ = lambda_and_first(grad_h, grad_final)
    source = None if d_decay is None else d_decay.conj() * lambda_
    d_grad_h, d_grad_final = of_grads
    d_lambda, of_initial = lambda_and_first(d_grad_h, d_grad_final, source)
    of_decay = d_lambda * states.conj() + lambda_ * d_states.conj()
    if decay.dim() == 1:
        of_decay = of_decay.sum((0, 1))
    results = [torch.cat([d_lambda, of_decay], -1)] if call["packed"].bit_count() == 2 else [d_lambda, of_decay]
    if initial_state is not None:
        results.append(of_initial)
    return [t.to(value.dtype) for t, value in zip(results, _values(cell, call), strict=True)]


def _tangent(cell: Cell, backend: str, call: Call, tangents: Tensors) -> tuple[Tensor, Tensor]:
    """`tangent` of any cell whose step is affine in the state."""
    x, initial_state = _by_input(cell, call, _values(cell, call))
    dx, d_initial = _by_input(cell, call, tangents)
    steps = _Steps(cell, backend, call, x)
    zeros, ones = steps.like.new_zeros(steps.like.shape), steps.like.new_ones(steps.like.shape)
    *_, decay = steps.slopes(zeros, zeros, ones)
    scan = _LinearScan(backend, call, decay, decay.dtype)
    states = scan.before(scan(steps.after(zeros), initial_state)[0], initial_state)
    *of_state, _ = steps.slopes(states, zeros, ones)
    *of_output, through = steps.slopes(states, ones, zeros)
    dx = [t for t, value in zip(dx, x, strict=True) if value is not None]
    d_states, d_final = scan(scan.sum(zeros, *map(_times, dx, of_state)), d_initial)
    return scan.sum(zeros, scan.before(d_states, d_initial) * through, *map(_times, dx, of_output)), d_final


class _Steps:
    """The steps of a call side by side: as channels of one step, each with a state of its own before it.

    Channels are independent, so the gradients of that one step are the derivatives of every step.
    """

    def __init__(self, cell: Cell, backend: str, call: Call, x: Tensors):
        self.cell, self.backend = cell, backend
        state = state_dtype(x[0].dtype)
        self.like = x[0].to(state)
        inputs = []
        for spec, t in zip(cell.inputs, x, strict=True):
            if t is not None:
                t = t.to(state).expand(self.like.shape)
                inputs.append(t.reshape(-1) if spec.kind == "channel" else t.reshape(1, 1, -1))
        inputs += call["inputs"][len(call["inputs"]) - len(cell.scheduled) :]
        self.call = {"inputs": inputs, "packed": 0, "reverse": False, "segment": 0, "save": False}
        self.call |= {name: call[name] for name in ("given", "numbers", "chunk")}

    def after(self, states: Tensor) -> Tensor:
        """The states `[B, T, D]` after the steps, each from its state before in `states`."""
        call = dict.fromkeys(FORWARD_NAMES) | self.call | {"initial_state": states.reshape(1, -1)}
        _, after = self.cell.forward[self.backend](*call.values())
        return after.reshape(states.shape)

    def slopes(self, states: Tensor, of_output: Tensor, of_state: Tensor) -> list[Tensor]:
        """The derivatives of `of_output` h + `of_state` s by each input and by the state before, all `[B, T, D]`."""
        call = dict.fromkeys(BACKWARD_NAMES) | {name: t for name, t in self.call.items() if name in BACKWARD_NAMES}
        call |= {"grad_h": of_output.reshape(1, 1, -1), "grad_final": of_state.reshape(1, -1)}
        call |= {"initial_state": states.reshape(1, -1)}
        return [t.reshape(states.shape) for t in self.cell.backward[self.backend](*call.values())]


class _LinearScan:
    """The linear recurrence with a decay, over the sequences and in the direction of a call, in the state dtype."""

    def __init__(self, backend: str, call: Call, decay: Tensor, state: torch.dtype):
        self.op, self.call = CELLS[LINEAR].forward[backend], call
        self.decay, self.state = decay.to(state), state

    def __call__(self, update: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
        """The states after each step, and the final state."""
        call = self.call | {"inputs": [update.to(self.state), self.decay], "given": CELLS[LINEAR].required, "packed": 0}
        call |= {"numbers": [], "save": False}
        call["initial_state"] = None if initial_state is None else initial_state.to(self.state)
        s, final = self.op(*call.values())
        return s, final

    def sum(self, like: Tensor, *terms: Tensor | None) -> Tensor:
        """The sum of the terms, all `[B, T, D]`; zeros in the shape of `like` if each is None."""
        given = [t.to(self.state) for t in terms if t is not None]
        return sum(given[1:], start=given[0]) if given else like.new_zeros(like.shape, dtype=self.state)

    def before(self, states: Tensor, initial_state: Tensor | None) -> Tensor:
        """The states `[B, T, D]` before each step, from those after it."""
        reverse, cu_seqlens = self.call["reverse"], self.call["cu_seqlens"]
        if cu_seqlens is None:
            first = states.new_zeros(()) if initial_state is None else initial_state.unsqueeze(1)
            first = first.to(states.dtype).expand(states.shape[0], 1, states.shape[-1])
            return torch.cat([states, first], 1)[:, 1:] if reverse else torch.cat([first, states], 1)[:, :-1]
        steps = torch.arange(states.shape[1], device=cu_seqlens.device)
        sequence = torch.searchsorted(cu_seqlens[1:].to(steps.dtype), steps, right=True)
        sequence = sequence.clamp(max=cu_seqlens.shape[0] - 2)  # no read out of bounds if the offsets are wrong
        is_first = steps == (cu_seqlens[sequence + 1] - 1 if reverse else cu_seqlens[sequence])
        first = states.new_zeros(()) if initial_state is None else initial_state[sequence].to(states.dtype)
        return torch.where(is_first.unsqueeze(-1), first, states.roll(-1 if reverse else 1, 1))


def _values(cell: Cell, call: Call) -> Tensors:
    """The tensors of a call that have derivatives, in the order of the results of the backward op."""
    of_arrays = call["inputs"][: len(call["inputs"]) - len(cell.scheduled)]
    return of_arrays if call["initial_state"] is None else [*of_arrays, call["initial_state"]]


def _by_input(cell: Cell, call: Call, tensors: Tensors) -> tuple[list[Any], Tensor | None]:
    """`tensors`, in the order of `_values`: one for each input of the cell, and that of the initial state."""
    *of_arrays, initial_state = tensors if call["initial_state"] is not None else (*tensors, None)
    count = call["packed"].bit_count() or 1
    gates = iter([None] * count if of_arrays[0] is None else split_gates(of_arrays[0], count))
    found: list[Tensor | None] = []
    for place in places(cell, call["given"], call["packed"])[: len(cell.inputs)]:
        found.append(None if place is None else next(gates) if place == 0 else of_arrays[place])
    return found, initial_state


def _times(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else a * b
