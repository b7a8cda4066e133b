"""Autograd of the ops: gradients and tangents.

The linear recurrence and cells with `Plain.vjp` also have second derivatives. Those of other cells raise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import torch_private as private
from .batching import BACKWARD_NAMES, FORWARD_NAMES
from .derivatives import LINEAR, gradient_by_parts, has_second_derivative, tangent, tangent_of_gradient
from .layout import allocate_backward, first_stream
from .spec import Cell


def differentiable(cell: Cell, backend: str):
    """The forward op's kernel for autograd."""

    def autograd_kernel(*arguments):
        inputs = differentiable_inputs(cell, arguments)
        if _is_differentiated(*inputs):
            return list(apply_function(Scan, cell, backend, arguments, *inputs))
        with private.BelowAutograd():
            return cell.forward[backend](*arguments)

    return autograd_kernel


def gradient(cell: Cell, backend: str):
    """The backward op's kernel for autograd."""

    def autograd_kernel(*arguments):
        grad_h, grad_final, grad_checkpoints, *rest = arguments
        inputs = (grad_h, grad_final, grad_checkpoints, *differentiable_inputs(cell, rest))
        if _is_differentiated(*inputs):
            if cell.name == LINEAR:
                return list(apply_function(Gradient, cell, backend, arguments, *inputs))
            if has_second_derivative(cell):
                if any(map(private.has_tangent_below_python, inputs)):
                    return gradient_by_parts(cell, backend, dict(zip(BACKWARD_NAMES, arguments, strict=True)))
                return list(apply_function(GradientByParts, cell, backend, arguments, *inputs))
            reason = f"mru::{cell.name}: there is no second derivative (gradient of a gradient, hessian)"
            return list(apply_function(WithoutDerivative, cell.backward[backend], reason, arguments, *inputs))
        with private.BelowAutograd():
            return cell.backward[backend](*arguments)

    return autograd_kernel


def not_differentiable(op: private.OpOverload, reason: str):
    """The kernel for autograd of an op without derivatives."""

    def autograd_kernel(inputs, *rest):
        tensors = [*inputs, *(t for t in rest if isinstance(t, Tensor))]
        return apply_function(WithoutDerivative, op, reason, (inputs, *rest), *tensors)

    return autograd_kernel


def never_differentiated(op: private.OpOverload, reason: str):
    """The kernel for autograd of an op that updates its last tensor but one in place and has no derivatives."""

    def autograd_kernel(inputs, *rest):
        *_, state, _state_indices = rest
        tensors = (*inputs, state)
        if (torch.is_grad_enabled() and requires_grad(tensors)) or any(map(private.has_tangent, tensors)):
            raise NotImplementedError(reason)
        with private.BelowAutograd():
            result = op(inputs, *rest)
        torch.autograd.graph.increment_version(state)
        return result

    return autograd_kernel


def differentiable_inputs(cell: Cell, arguments) -> list[Tensor]:
    """The arrays among the arguments of the forward op, then the initial state and the reset state, if given."""
    inputs, _given, _packed, _numbers, initial_state, _cu_seqlens, _resets, reset_state, *_ = arguments
    of_arrays = inputs[: len(inputs) - len(cell.scheduled)]
    if initial_state is None and reset_state is None:
        return of_arrays
    return [*of_arrays, *(t for t in (initial_state, reset_state) if t is not None)]


def requires_grad(tensors) -> bool:
    for t in tensors:  # noqa: SIM110  (a generator costs more)
        if t is not None and t.requires_grad:
            return True
    return False


def _is_differentiated(*inputs: Tensor | None) -> bool:
    return (torch.is_grad_enabled() and requires_grad(inputs)) or private.may_have_tangents()


def apply_function(function: type[torch.autograd.Function], *arguments):
    """`function.apply` in an autograd kernel, which the dispatcher calls once for each level of torch.func."""
    if not private.transforms_active():
        return function.apply(*arguments)
    with private.enable_single_level_autograd_function():
        return _single_level(function).apply(*arguments)


@cache
def _single_level(function: type[torch.autograd.Function]) -> Any:
    """`function` as a class whose `apply` works on one level of torch.func."""
    members = {name: vars(function)[name] for name in ("forward", "backward", "jvp") if name in vars(function)}
    return type(function.__name__, (private.SingleLevelFunction,), members)


def below_autograd(op: private.OpOverload, arguments) -> list[Tensor]:
    """`op` in the forward of an autograd Function: the kernel, or the next level of torch.func."""
    if not private.transforms_active():
        with private.BelowAutograd():
            return op(*arguments)
    # The Function has turned gradients off; the next level has its own.
    with torch.enable_grad(), private.enable_forward_gradients(True), private.BelowAutograd():
        return op(*arguments)


def run_backward(op: private.OpOverload, arguments) -> list[Tensor]:
    """Call a backward op in the backward of a Function.

    Its autograd kernel, which is Python and takes 10 us, runs only if the result may be differentiated or is compiled.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or private.may_have_tangents():
        return op(*arguments)
    with private.BelowAutograd():
        return op(*arguments)


class Scan(torch.autograd.Function):
    """`mru::<cell>` below autograd, and `mru::<cell>_backward` as its gradient."""

    @staticmethod
    def forward(ctx, cell, backend, arguments, *inputs):
        results = below_autograd(cell.forward[backend], arguments)
        saved = results[2:]
        ctx.mark_non_differentiable(*saved[1:])  # the checkpoints may be results
        ctx.set_materialize_grads(False)  # autograd would fill zeros for checkpoints that are no results
        tensors, given, packed, numbers, initial_state, cu_seqlens, resets, reset_state, *rest, _save = arguments
        scheduled = tensors[len(tensors) - len(cell.scheduled) :]
        kept = (*inputs, *scheduled, cu_seqlens, resets, *saved)
        ctx.save_for_backward(*kept)
        if private.may_have_tangents():
            ctx.save_for_forward(*kept)
        ctx.call = (cell, backend, len(tensors), initial_state is not None, reset_state is not None)
        ctx.constants = (given, packed, numbers)
        ctx.rest = rest
        return tuple(results)

    @staticmethod
    def backward(ctx, grad_h, grad_final, grad_checkpoints=None, _codes=None):
        cell, backend, *_ = ctx.call
        call, saved = _call_and_saved(ctx, ctx.saved_tensors)
        inputs, _given, packed, _numbers, initial_state, _cu_seqlens, _resets, reset_state = call[:8]
        wanted = _mask(ctx.needs_input_grad[3 : 3 + len(inputs) - len(cell.scheduled)])
        if grad_h is None:
            first = first_stream(inputs, packed)
            grad_h = first.new_zeros(first.shape)
        try:
            arguments = (grad_h, grad_final, grad_checkpoints, *call, *(saved or (None, None)), wanted)
            grads = run_backward(cell.backward[backend], arguments)
        except RuntimeError as error:
            raise_as_torch(error, allocate_backward, cell, inputs, initial_state, reset_state)
            raise
        return None, None, None, *grads

    @staticmethod
    def jvp(ctx, _cell, _backend, _arguments, *tangents):
        cell, backend, *_ = ctx.call
        with private.enable_forward_gradients(True):
            call, saved = _call_and_saved(ctx, private.primals(ctx))
            named = dict(zip(FORWARD_NAMES, (*call, len(saved) > 0), strict=True))
            h, final, *checkpoints = tangent(cell, backend, named, tangents)
        return h.to(call[0][0].dtype), final, *checkpoints, *[None] * (len(saved) - len(checkpoints))


def _mask(needed: tuple[bool, ...]) -> int:
    """Bit i: whether tensor i needs a gradient."""
    return sum(1 << i for i, need in enumerate(needed) if need)


#: `Scan.apply` where no transform of torch.func is active.
apply_scan = private.direct_apply(Scan)


def _call_and_saved(ctx, tensors) -> tuple[list, list[Tensor]]:
    """The arguments of the forward op without `save`, and what the op saved, from the context of `Scan`."""
    cell, _backend, count, has_initial, has_reset = ctx.call
    tensors, of_arrays = list(tensors), count - len(cell.scheduled)
    initial_state = tensors.pop(of_arrays) if has_initial else None
    reset_state = tensors.pop(of_arrays) if has_reset else None
    inputs, (cu_seqlens, resets, *saved) = tensors[:count], tensors[count:]
    return [inputs, *ctx.constants, initial_state, cu_seqlens, resets, reset_state, *ctx.rest], saved


class Gradient(torch.autograd.Function):
    """`mru::linear_recurrence_backward` below autograd. Its derivatives are made of scans."""

    @staticmethod
    def forward(ctx, cell, backend, arguments, *inputs):
        ctx.set_materialize_grads(False)
        names = dict(zip(BACKWARD_NAMES, arguments, strict=True))
        kept = (*inputs, names["cu_seqlens"], names["resets"])
        ctx.save_for_backward(*kept)
        if private.may_have_tangents():
            ctx.save_for_forward(*kept)
        ctx.cell, ctx.backend = cell, backend
        ctx.states = [name for name in ("initial_state", "reset_state") if names[name] is not None]
        ctx.constants = {name: t for name, t in names.items() if not isinstance(t, (Tensor, list))}
        return tuple(below_autograd(cell.backward[backend], arguments))

    @staticmethod
    def _call(ctx, tensors):
        """The gradients of the results, and the arguments of the forward op by name."""
        grads, (*inputs, cu_seqlens, resets) = tensors[:3], tensors[3:]
        states = {name: inputs.pop() for name in reversed(ctx.states)}
        call = ctx.constants | {"inputs": inputs, "numbers": [], "initial_state": None, "reset_state": None} | states
        call |= {"cu_seqlens": cu_seqlens, "resets": resets}
        call["save"] = grads[2] is not None
        return grads, {name: call[name] for name in FORWARD_NAMES}

    @staticmethod
    def backward(ctx, *tangents):
        # The gradient of h is linear in the tangent of h, and the second derivatives of a loss are symmetric.
        grads, call = Gradient._call(ctx, ctx.saved_tensors)
        of_results = tangent(ctx.cell, ctx.backend, call, tangents)
        of_inputs = tangent_of_gradient(ctx.cell, ctx.backend, call, grads, (None, None, None), tangents)
        of_grads = [None if grad is None else t.to(grad.dtype) for t, grad in zip(of_results, grads, strict=False)]
        missing = [None] * (len(grads) - len(of_grads))
        return None, None, None, *of_grads, *missing, *of_inputs

    @staticmethod
    def jvp(ctx, _cell, _backend, _arguments, *tangents):
        with private.enable_forward_gradients(True):
            grads, call = Gradient._call(ctx, private.primals(ctx))
            return tuple(tangent_of_gradient(ctx.cell, ctx.backend, call, grads, tangents[:3], tangents[3:]))


class GradientByParts(torch.autograd.Function):
    """`mru::<cell>_backward` below autograd, of a cell with `Plain.vjp`. Its gradient is that of `gradient_by_parts`.

    In forward mode the autograd kernel calls `gradient_by_parts` instead: inputs have no tangents inside a Function.
    """

    @staticmethod
    def forward(ctx, cell, backend, arguments, *inputs):
        ctx.set_materialize_grads(False)
        named = dict(zip(BACKWARD_NAMES, arguments, strict=True))
        ctx.save_for_backward(*inputs, named["cu_seqlens"], named["resets"])
        ctx.cell, ctx.backend = cell, backend
        ctx.states = [name for name in ("initial_state", "reset_state") if named[name] is not None]
        ctx.constants = {n: None if isinstance(t, Tensor) or n == "inputs" else t for n, t in named.items()}
        return tuple(below_autograd(cell.backward[backend], arguments))

    @staticmethod
    def backward(ctx, *tangents):
        create_graph = torch.is_grad_enabled()
        *saved, cu_seqlens, resets = ctx.saved_tensors
        with torch.enable_grad():
            # If one argument was computed from another, a gradient by the arguments would also follow that path.
            needed = ctx.needs_input_grad[3:]
            views = [t.view_as(t) if need else t for t, need in zip(saved, needed, strict=True)]
            for t, need in zip(views, needed, strict=True):
                if need and not t.requires_grad:  # the function of torch.func.vjp, called after the transform
                    t.requires_grad_()
            grads, inputs = dict(zip(BACKWARD_NAMES[:3], views, strict=False)), views[3:]
            states = {name: inputs.pop() for name in reversed(ctx.states)}
            call = ctx.constants | grads | {"inputs": inputs, "cu_seqlens": cu_seqlens, "resets": resets} | states
            results = gradient_by_parts(ctx.cell, ctx.backend, call)
        # A result such as the gradient of an input that only a mask reads is constant.
        pairs = [(t, v) for t, v in zip(results, tangents, strict=True) if v is not None and t.requires_grad]
        if not pairs:
            return (None,) * (3 + len(views))
        outputs, cotangents = zip(*pairs, strict=True)
        wanted = [t for t, need in zip(views, needed, strict=True) if need]
        found = iter(torch.autograd.grad(outputs, wanted, cotangents, create_graph=create_graph, allow_unused=True))
        return None, None, None, *(next(found) if need else None for need in needed)


class WithoutDerivative(torch.autograd.Function):
    """Run `op` below autograd; its derivatives raise NotImplementedError(`reason`).

    torch.compile traces the derivative whether or not it is asked for: there the derivative is an op that raises when
    it runs.
    """

    @staticmethod
    def forward(ctx, op, reason, arguments, *inputs):
        ctx.reason = reason
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        return tuple(below_autograd(op, arguments))

    @staticmethod
    def backward(ctx, *grads):
        if any(t is not None and private.is_fake(t) for t in grads):
            inputs = [t for t in ctx.saved_tensors if t is not None]
            made = iter(torch.ops.mru.no_derivative([t for t in grads if t is not None], inputs, ctx.reason))
            return None, None, None, *(None if t is None else next(made) for t in ctx.saved_tensors)
        raise NotImplementedError(ctx.reason)

    @staticmethod
    def jvp(ctx, *_):
        raise NotImplementedError(ctx.reason)


def raise_no_derivative(grads: list[Tensor], inputs: list[Tensor], reason: str) -> list[Tensor]:
    """The kernel of `mru::no_derivative`. It takes `grads` so that a compiler leaves it in the backward pass."""
    raise NotImplementedError(reason)


def raise_as_torch(error: RuntimeError, allocate_results: Callable[..., object], *arguments) -> None:
    """Raise torch's own exception where a C++ kernel ran out of memory.

    Torch's stable ABI reports an error without its type and, before torch 2.13, without its message; then the results
    are allocated once more from Python.
    """
    message = str(error)
    if "out of memory" in message and type(error) is RuntimeError:
        raise torch.OutOfMemoryError(message) from error
    if message.startswith("torch: "):
        try:
            allocate_results(*arguments)
        except RuntimeError as again:
            raise again from error
