"""Tangents of the ops: forward mode, and derivatives of the gradients of the linear recurrence and of affine cells.

The tangent of a result is its derivative along a change of the inputs; `dx` is the tangent of `x`. A step is pointwise,
so the tangent of the states is a linear recurrence: with the states s before each step,

    ds_t = (d step / d s) ds_{t-1} + sum_i (d step / d x_i) dx_i

The backward op of the cell gives these factors for all steps at once, see `_Steps`. So a tangent has the surrogate
derivatives that the gradient has, on every backend. The rules consist of ops, which have derivatives of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import state_dtype
from .batching import ALL_WANTED, BACKWARD_NAMES, FORWARD_NAMES
from .layout import places, split_gates
from .spec import CELLS, Cell

#: The cell whose op scans tangents. It is its own tangent, so its gradient is differentiable.
LINEAR = "linear_recurrence"

Call = dict[str, Any]
Tensors = Sequence[Any]  # each a tensor or None


def tangent(cell: Cell, backend: str, call: Call, tangents: Tensors) -> tuple[Tensor, ...]:
    """The tangents of h `[B, T, D]`, of the final state `[N, D]` and, with `save`, of the checkpoints.

    All are in the state dtype.

    Args:
        call: the arguments of the forward op, by name.
        tangents: of the arrays among its inputs, then of the initial and the reset state if given; None for zeros.
    """
    if cell.name != LINEAR:
        return _tangent(cell, backend, call, tangents)
    (update, decay), enters = _by_input(cell, call, _values(cell, call))
    (d_update, d_decay), d_enters = _by_input(cell, call, tangents)
    scan = _LinearScan(backend, call, decay, state_dtype(update.dtype))
    states = None if d_decay is None else scan.before(scan(update, enters)[0], enters)
    return scan(scan.sum(update, d_update, _times(d_decay, states)), d_enters, save=call["save"])


def tangent_of_gradient(
    cell: Cell, backend: str, call: Call, grads: Tensors, of_grads: Tensors, tangents: Tensors
) -> list[Tensor]:
    """The tangents of the results of the linear recurrence's backward op.

    Args:
        call, tangents: as for `tangent`.
        grads: grad_h `[B, T, D]`, and grad_final `[N, D]` and grad_checkpoints; None for zeros.
        of_grads: their tangents; None for zeros.
    """
    (update, decay), enters = _by_input(cell, call, _values(cell, call))
    (d_update, d_decay), d_enters = _by_input(cell, call, tangents)
    scan = _LinearScan(backend, call, decay, state_dtype(update.dtype))
    states = scan.before(scan(update, enters)[0], enters)
    d_states = scan.before(scan(scan.sum(update, d_update, _times(d_decay, states)), d_enters)[0], d_enters)

    # lambda_t = dL/ds_t = grad_h_t + mu_{t+1}. mu_t = conj(decay_t) lambda_t, the gradient of what enters step t, is a
    # scan of the other direction, from grad_final to dL/ds_0. It does not pass a reset.
    adjoint = scan.adjoint()

    def lambda_and_mu(grads: Tensors, source: Tensor | None = None):
        grad_h, grad_final, grad_checkpoints = grads
        grad_h = scan.sum(update, grad_h, scan.at_boundaries(grad_checkpoints))
        mu, first = adjoint(adjoint.sum(update, _times(grad_h, adjoint.decay), source), Enters(grad_final, None))
        return adjoint.sum(update, grad_h, adjoint.before(mu, Enters(grad_final, None))), mu, first

    lambda_, *_ = lambda_and_mu(grads)
    source = None if d_decay is None else d_decay.conj() * lambda_
    d_lambda, mu, first = lambda_and_mu(of_grads, source)
    of_decay = d_lambda * states.conj() + lambda_ * d_states.conj()
    if decay.dim() == 1:
        of_decay = of_decay.sum((0, 1))
    results = [torch.cat([d_lambda, of_decay], -1)] if call["packed"].bit_count() == 2 else [d_lambda, of_decay]
    of_initial, of_reset = scan.enter_gradients(mu, first)
    results += [t for t, given in ((of_initial, enters.initial), (of_reset, enters.reset)) if given is not None]
    return [t.to(value.dtype) for t, value in zip(results, _values(cell, call), strict=True)]


def has_second_derivative(cell: Cell) -> bool:
    """Whether the gradient of the cell has derivatives, of any order."""
    return cell.name == LINEAR or (cell.plain is not None and cell.plain.vjp is not None)


def gradient_by_parts(cell: Cell, backend: str, call: Call) -> list[Tensor]:
    """What the backward op of a cell with `Plain.vjp` computes, by ops that have derivatives.

    These are plain torch for gates and output, and the ops of the linear recurrence.

    Args:
        call: the arguments of the backward op, by name.
    """
    plain, p, values = cell.plain, call["numbers"], _values(cell, call)
    assert plain is not None
    assert plain.vjp is not None
    of_arrays, enters = _by_input(cell, call, values)
    first, state = of_arrays[0], cell.state_dtype(of_arrays[0].dtype)
    x = [t.to(state).expand(first.shape) for t in of_arrays]
    decay, update = plain.gates(x, p)
    scan = _LinearScan(backend, {name: call.get(name) for name in FORWARD_NAMES}, decay, state)
    after, *_ = scan(update, enters)
    g = call["grad_h"].to(state)
    of_scan = {"grad_h": plain.cotangent(x, after, g, p), "inputs": [update, decay], "packed": 0, "numbers": []}
    # Without checkpoints it scans again.
    of_scan |= {"given": CELLS[LINEAR].required, "checkpoints": None, "codes": None, "wanted": ALL_WANTED}
    names = ("grad_final", "grad_checkpoints", "initial_state", "reset_state")
    of_scan |= {name: None if call[name] is None else call[name].to(state) for name in names}
    lam, _, *of_enters = CELLS[LINEAR].backward[backend](*(call | of_scan).values())
    found = plain.vjp(x, scan.before(after, enters), after, g, lam, p)
    found = [t.sum((0, 1)) if value.dim() == 1 else t for t, value in zip(found, of_arrays, strict=True)]
    found = [t if value.is_complex() else t.real for t, value in zip(found, of_arrays, strict=True)]
    found = [torch.cat(found, -1)] if call["packed"] else found
    return [t.to(value.dtype) for t, value in zip([*found, *of_enters], values, strict=True)]


def _tangent(cell: Cell, backend: str, call: Call, tangents: Tensors) -> tuple[Tensor, ...]:
    """`tangent` of any cell."""
    x, enters = _by_input(cell, call, _values(cell, call))
    dx, d_enters = _by_input(cell, call, tangents)
    steps = _Steps(cell, backend, call, x)
    zeros = steps.like.new_zeros(steps.like.shape)
    if cell.numbers_of_states is None:
        decay = steps.slopes_of_state(zeros)[-1].of_state()
        scan = _LinearScan(backend, call, decay, decay.dtype)
        states = scan.before(scan(steps.after(zeros), enters)[0], enters)
        *of_state, _ = steps.slopes_of_state(states)
    else:
        states = _LinearScan(backend, call, zeros, zeros.dtype).before(_states(cell, backend, call, x), enters)
        *of_state, through = steps.slopes_of_state(states)
        decay = through.of_state()
        scan = _LinearScan(backend, call, decay, decay.dtype)
    *of_output, through = steps.slopes_of_output(states)
    dx = [t for t, value in zip(dx, x, strict=True) if value is not None]
    d_states, *others = scan(scan.sum(zeros, *map(_change, of_state, dx)), d_enters, save=call["save"])
    dh = scan.sum(zeros, _change(through, scan.before(d_states, d_enters)), *map(_change, of_output, dx))
    return (dh.real if cell.complex_state else dh), *others


def _states(cell: Cell, backend: str, call: Call, x: Tensors) -> Tensor:
    """The states after all steps `[B, T, D]`, in the state dtype, of a cell that does not compose."""
    assert cell.numbers_of_states is not None
    inputs = [t.to(state_dtype(x[0].dtype)) for t in x if t is not None]
    inputs += call["inputs"][len(call["inputs"]) - len(cell.scheduled) :]
    numbers = cell.numbers_of_states(call["numbers"])
    own = {"inputs": inputs, "packed": 0, "numbers": numbers, "save": False}
    return cell.forward[backend](*(call | own).values())[0]


class Enters(NamedTuple):
    """The states that enter: the initial and the reset state, both `[N, D]`; None for zeros."""

    initial: Tensor | None
    reset: Tensor | None


class _Slope(NamedTuple):
    """How a result changes with an argument: the gradients of its real and of its imaginary part, `[B, T, D]`.

    Both together are the whole derivative, also of a gate that is not analytic in a complex input, such as |x|.
    """

    of_real: Tensor
    of_imaginary: Tensor | None  # None for a real result

    def of_state(self) -> Tensor:
        """The derivative with respect to the state, if this is a slope of it: a step is affine in the state."""
        return self.of_real.conj()


def _slopes(of_real: Sequence[Tensor], of_imaginary: Sequence[Tensor] | None) -> list[_Slope]:
    return list(map(_Slope, of_real, [None] * len(of_real) if of_imaginary is None else of_imaginary))


def _change(slope: _Slope, change: Tensor | None) -> Tensor | None:
    """The change of the result for a change of the argument; None for zeros."""
    if change is None:
        return None
    of_real = (slope.of_real.conj() * change).real
    if slope.of_imaginary is None:
        return of_real
    return torch.complex(of_real, (slope.of_imaginary.conj() * change).real)


class _Steps:
    """The steps of a call side by side: as channels of one step, each with a state of its own before it.

    Channels are independent, so the gradients of that one step are the derivatives of every step.
    """

    def __init__(self, cell: Cell, backend: str, call: Call, x: Tensors):
        self.cell, self.backend = cell, backend
        real, state = state_dtype(x[0].dtype), cell.state_dtype(x[0].dtype)
        self.like = x[0].to(state)
        inputs = []
        for spec, t in zip(cell.inputs, x, strict=True):
            if t is not None:
                t = t.to(state if spec.complex else real).expand(self.like.shape)
                inputs.append(t.reshape(-1) if spec.kind == "channel" else t.reshape(1, 1, -1))
        inputs += call["inputs"][len(call["inputs"]) - len(cell.scheduled) :]
        self.call = {"inputs": inputs, "packed": 0, "reverse": False, "segment": 0, "save": False}
        self.call |= {name: call[name] for name in ("given", "numbers", "chunk")}

    def after(self, states: Tensor) -> Tensor:
        """The states `[B, T, D]` after the steps, each from its state before in `states`."""
        call = dict.fromkeys(FORWARD_NAMES) | self.call | {"initial_state": states.reshape(1, -1)}
        _, after = self.cell.forward[self.backend](*call.values())
        return after.reshape(states.shape)

    def slopes_of_state(self, before: Tensor) -> list[_Slope]:
        """How the state after a step changes with each input and with the state before it."""
        zeros, ones = before.new_zeros(before.shape), before.new_ones(before.shape)
        of_imaginary = self._gradients(before, zeros, 1j * ones) if before.is_complex() else None
        return _slopes(self._gradients(before, zeros, ones), of_imaginary)

    def slopes_of_output(self, before: Tensor) -> list[_Slope]:
        """How h changes with each input and with the state before the step."""
        zeros, ones = before.new_zeros(before.shape), before.new_ones(before.shape)
        is_complex = before.is_complex() and not self.cell.complex_state
        of_imaginary = self._gradients(before, 1j * ones, zeros) if is_complex else None
        return _slopes(self._gradients(before, ones, zeros), of_imaginary)

    def _gradients(self, before: Tensor, of_output: Tensor, of_state: Tensor) -> list[Tensor]:
        """The gradients of `of_output` h + `of_state` s, as `slopes_of_state` orders them."""
        call = dict.fromkeys(BACKWARD_NAMES) | {name: t for name, t in self.call.items() if name in BACKWARD_NAMES}
        of_output = of_output.real if self.cell.complex_state else of_output
        call |= {"grad_h": of_output.reshape(1, 1, -1), "grad_final": of_state.reshape(1, -1)}
        call |= {"initial_state": before.reshape(1, -1), "wanted": ALL_WANTED}
        return [t.reshape(before.shape) for t in self.cell.backward[self.backend](*call.values())]


class _LinearScan:
    """The linear recurrence with a decay, over the sequences and in the direction of a call, in the state dtype."""

    def __init__(self, backend: str, call: Call, decay: Tensor, state: torch.dtype):
        self.backend, self.call = backend, call
        self.decay, self.state = decay.to(state), state

    def __call__(self, update: Tensor, enters: Enters, save: bool = False) -> tuple[Tensor, ...]:
        """The states after each step, the final state and, with `save`, the checkpoints."""
        call = self.call | {"inputs": [update.to(self.state), self.decay], "given": CELLS[LINEAR].required, "packed": 0}
        initial, reset = (None if t is None else t.to(self.state) for t in enters)
        call |= {"numbers": [], "save": save, "initial_state": initial, "reset_state": reset}
        return tuple(CELLS[LINEAR].forward[self.backend](*call.values())[:3])

    def adjoint(self) -> _LinearScan:
        """The scan of gradients, in the other direction: a reset before a step ends what comes from that step."""
        resets = self.call["resets"]
        if resets is not None:
            shifted = self._shifted(resets.unsqueeze(-1), towards_start=True).squeeze(-1)
            resets = shifted & ~self._at_ends(last=True)
        call = self.call | {"reverse": not self.call["reverse"], "resets": resets}
        return _LinearScan(self.backend, call, self.decay.conj(), self.state)

    def sum(self, like: Tensor, *terms: Tensor | None) -> Tensor:
        """The sum of the terms, all `[B, T, D]`; zeros in the shape of `like` if each is None."""
        given = [t.to(self.state) for t in terms if t is not None]
        return sum(given[1:], start=given[0]) if given else like.new_zeros(like.shape, dtype=self.state)

    def before(self, states: Tensor, enters: Enters) -> Tensor:
        """The states `[B, T, D]` before each step, from those after it."""
        at_start = self._at_ends(last=False).unsqueeze(-1)
        found = torch.where(
            at_start, self._of_steps(enters.initial, states), self._shifted(states, towards_start=False)
        )
        if self.call["resets"] is None:
            return found
        return torch.where(self.call["resets"].unsqueeze(-1), self._of_steps(enters.reset, states), found)

    def at_boundaries(self, rows: Tensor | None) -> Tensor | None:
        """Rows of checkpoints at the steps `[B, T, D]` after which these are the states; zeros at other steps."""
        chunk, cu_seqlens = self.call["chunk"], self.call["cu_seqlens"]
        batch, time, _ = self.call["inputs"][0].shape
        count = (time - 1) // chunk
        if rows is None or count <= 0:
            return None
        position = self._steps().flip(0) if self.call["reverse"] else self._steps()
        start, end = 0, time
        if cu_seqlens is not None:
            sequence = self._sequence()
            start, end = cu_seqlens[sequence], cu_seqlens[sequence + 1]
            if self.call["reverse"]:
                start, end = time - end, time - start
        scanned = position + 1 - start
        is_boundary = (scanned % chunk == 0) & (position + 1 < end)
        row = torch.where(is_boundary, start // chunk + scanned // chunk - 1, 0)
        rows = rows[: batch * count].view(batch, count, -1)
        return torch.where(is_boundary.unsqueeze(-1), rows[:, row], 0)

    def enter_gradients(self, mu: Tensor, first: Tensor) -> Enters:
        """The gradients of the states that enter, from those of what enters each step, `mu`, and the first one."""
        resets = self.call["resets"]
        if resets is None:
            return Enters(first, None)
        of_resets = torch.where(resets.unsqueeze(-1), mu, 0)
        at_start = torch.where(self._at_ends(last=False).unsqueeze(-1), of_resets, 0)
        return Enters(first - self._by_sequence(at_start), self._by_sequence(of_resets))

    def _by_sequence(self, steps: Tensor) -> Tensor:
        """The sums `[N, D]` over each sequence."""
        cu_seqlens = self.call["cu_seqlens"]
        if cu_seqlens is None:
            return steps.sum(1)
        sums = steps.new_zeros((cu_seqlens.shape[0] - 1, steps.shape[-1]))
        return sums.index_add(0, self._sequence(), steps[0])

    def _of_steps(self, state: Tensor | None, like: Tensor) -> Tensor:
        """A state `[N, D]` at every step of its sequence."""
        if state is None:
            return like.new_zeros(())
        cu_seqlens = self.call["cu_seqlens"]
        state = state.to(like.dtype)
        return state.unsqueeze(1) if cu_seqlens is None else state[self._sequence()]

    def _shifted(self, steps: Tensor, towards_start: bool) -> Tensor:
        """The steps `[B, T, *]`, one later in the order of the scan; or one earlier."""
        return steps.roll(-1 if self.call["reverse"] != towards_start else 1, 1)

    def _at_ends(self, last: bool) -> Tensor:
        """Whether a step is the first of its sequence in the order of the scan, or the last, `[1, T]`."""
        cu_seqlens, at_right = self.call["cu_seqlens"], self.call["reverse"] != last
        steps = self._steps()
        if cu_seqlens is None:
            return (steps == (steps.shape[0] - 1 if at_right else 0)).unsqueeze(0)
        sequence = self._sequence()
        return (steps == (cu_seqlens[sequence + 1] - 1 if at_right else cu_seqlens[sequence])).unsqueeze(0)

    def _steps(self) -> Tensor:
        first = self.call["inputs"][0]
        return torch.arange(first.shape[1], device=first.device)

    def _sequence(self) -> Tensor:
        """The number of the sequence of every step, `[T]`."""
        cu_seqlens, steps = self.call["cu_seqlens"], self._steps()
        sequence = torch.searchsorted(cu_seqlens[1:].to(steps.dtype), steps, right=True)
        return sequence.clamp(max=cu_seqlens.shape[0] - 2)  # no read out of bounds if the offsets are wrong


def _values(cell: Cell, call: Call) -> Tensors:
    """The tensors of a call that have derivatives, in the order of the results of the backward op."""
    of_arrays = call["inputs"][: len(call["inputs"]) - len(cell.scheduled)]
    return [*of_arrays, *(call[name] for name in ("initial_state", "reset_state") if call[name] is not None)]


def _by_input(cell: Cell, call: Call, tensors: Tensors) -> tuple[list[Any], Enters]:
    """`tensors`, in the order of `_values`: one for each input of the cell, and those of the states that enter."""
    of_arrays = list(tensors)
    reset = of_arrays.pop() if call["reset_state"] is not None else None
    initial = of_arrays.pop() if call["initial_state"] is not None else None
    count = call["packed"].bit_count() or 1
    gates = iter([None] * count if of_arrays[0] is None else split_gates(of_arrays[0], count))
    found: list[Tensor | None] = []
    for place in places(cell, call["given"], call["packed"])[: len(cell.inputs)]:
        found.append(None if place is None else next(gates) if place == 0 else of_arrays[place])
    return found, Enters(initial, reset)


def _times(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else a * b
