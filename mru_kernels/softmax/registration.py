"""Defines the ops of the softmax recurrence and registers what Python adds: fakes, autograd and vmap.

The extension defines the ops of its backends, so that a process without Python has them; schemas.py describes them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends, checks
from .. import torch_private as private
from ..ops.autograd import WithoutDerivative, apply_function, below_autograd, run_backward
from ..ops.batching import legacy
from .layout import allocate, allocate_backward, border_rows, check, check_cut, sizes, split_gates
from .schemas import SCHEMAS
from .state import join_state, split_state

#: The arguments of the forward op that may have gradients, in the order of the backward op's results.
DIFFERENTIABLE = ("score", "value", "decay", "bonus", "initial_state")
_CALL = ("score", "value", "heads", "decay", "bonus", "initial_state", "cu_seqlens", "reverse", "chunk", "segment")
FORWARD_NAMES = (*_CALL, "save")
BACKWARD_NAMES = ("grad_y", "grad_final", *_CALL, "borders")

#: The ops of each backend by its name.
FORWARD: dict[str, private.OpOverload] = {}
BACKWARD: dict[str, private.OpOverload] = {}

backends.load_error("cpu")  # loads the extension, if there is one
_library = torch.library.Library("mru", "FRAGMENT")


def define(backend: str) -> None:
    """Define the ops for a backend, unless the extension has, and register what Python adds."""
    for suffix, table in (("", FORWARD), ("_backward", BACKWARD)):
        name = f"softmax_recurrence{suffix}"
        if not hasattr(getattr(torch.ops.mru, name, None), backend):
            _library.define(f"{name}.{backend}{SCHEMAS[suffix]}")
        table[backend] = getattr(getattr(torch.ops.mru, name), backend)
    _register_fakes(backend)
    of_forward, of_backward = (f"mru::softmax_recurrence{suffix}.{backend}" for suffix in ("", "_backward"))
    _library.impl(of_forward, _differentiable(backend), "Autograd")
    _library.impl(of_backward, _gradient(backend), "Autograd")
    for name, rule in ((of_forward, _fold_forward(backend)), (of_backward, _fold_backward(backend))):
        torch.library.register_vmap(name, rule, lib=_library)
        _library.impl(name, legacy(rule), "Batched")


# ------------------------------------------------------------------------------------------------ fakes


def _check(backend: str, score, value, heads, decay, bonus, initial_state, cu_seqlens, chunk, segment) -> None:
    check(score, value, heads, decay, bonus, initial_state, cu_seqlens)
    check_cut(backend, chunk, segment)


def _register_fakes(backend: str) -> None:
    @torch.library.register_fake(f"mru::softmax_recurrence.{backend}", lib=_library)
    def _(score, value, heads, decay, bonus, initial_state, cu_seqlens, reverse, chunk, segment, save):
        _check(backend, score, value, heads, decay, bonus, initial_state, cu_seqlens, chunk, segment)
        return allocate(score, value, heads, cu_seqlens, chunk, save)

    @torch.library.register_fake(f"mru::softmax_recurrence_backward.{backend}", lib=_library)
    def _(grad_y, grad_final, score, value, heads, decay, bonus, initial_state, cu_seqlens, reverse, chunk, segment,
          borders):  # fmt: skip
        _check(backend, score, value, heads, decay, bonus, initial_state, cu_seqlens, chunk, segment)
        n_heads, channels = sizes(score, value, heads)
        batch, time, _ = score.shape
        columns = channels + 2 * n_heads
        sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        expected = {
            "grad_y": (grad_y, (batch, time, channels)),
            "grad_final": (grad_final, (sequences, columns)),
            "borders": (borders, (batch, border_rows(time, chunk), columns)),
        }
        for name, (t, shape) in expected.items():
            if t.shape != shape:
                raise ValueError(f"{name}: expected shape {list(shape)}, got {list(t.shape)}")
            if t.device != score.device:
                raise ValueError(f"{name}: expected the score's device {score.device}, got {t.device}")
        return allocate_backward(score, value, decay, bonus, initial_state)


# ------------------------------------------------------------------------------------------------ autograd


def differentiable_inputs(arguments) -> list[Tensor]:
    """The tensors among the arguments of the forward op that may have gradients, those that are given."""
    score, value, _heads, decay, bonus, initial_state, *_ = arguments
    return [t for t in (score, value, decay, bonus, initial_state) if t is not None]


def _is_differentiated(tensors) -> bool:
    return (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)) or private.may_have_tangents()


def _differentiable(backend: str):
    """The forward op's kernel for autograd."""

    def autograd_kernel(*arguments):
        inputs = differentiable_inputs(arguments)
        if _is_differentiated(inputs):
            return list(apply_function(SoftmaxScan, backend, arguments, *inputs))
        with private.BelowAutograd():
            return FORWARD[backend](*arguments)

    return autograd_kernel


def _gradient(backend: str):
    """The backward op's kernel for autograd."""

    def autograd_kernel(*arguments):
        grad_y, grad_final, *rest = arguments
        inputs = [grad_y, grad_final, *differentiable_inputs(rest)]
        if _is_differentiated(inputs):
            reason = "mru::softmax_recurrence: there is no second derivative (gradient of a gradient, hessian)"
            return list(apply_function(WithoutDerivative, BACKWARD[backend], reason, arguments, *inputs))
        with private.BelowAutograd():
            return BACKWARD[backend](*arguments)

    return autograd_kernel


class SoftmaxScan(torch.autograd.Function):
    """`mru::softmax_recurrence` below autograd, and `mru::softmax_recurrence_backward` as its gradient."""

    @staticmethod
    def forward(ctx, backend, arguments, *inputs):
        results = below_autograd(FORWARD[backend], arguments)
        borders = results[2:]
        ctx.mark_non_differentiable(*borders)
        ctx.set_materialize_grads(False)
        call = dict(zip(FORWARD_NAMES, arguments, strict=True))
        ctx.save_for_backward(*inputs, call["cu_seqlens"], *borders)
        ctx.backend = backend
        ctx.given = [name for name in DIFFERENTIABLE if call[name] is not None]
        ctx.rest = {name: call[name] for name in ("heads", "reverse", "chunk", "segment")}
        return tuple(results)

    @staticmethod
    def backward(ctx, grad_y, grad_final, _grad_borders=None):
        count = len(ctx.given)
        cu_seqlens, *borders = ctx.saved_tensors[count:]
        call = dict.fromkeys(_CALL) | ctx.rest | {"cu_seqlens": cu_seqlens}
        call |= dict(zip(ctx.given, ctx.saved_tensors[:count], strict=True))
        if grad_y is None or grad_final is None:
            grad_y, grad_final = _zeros(call, grad_y, grad_final)
        if not borders:
            borders = FORWARD[ctx.backend](*(call[name] for name in _CALL), True)[2:]
        grads = run_backward(BACKWARD[ctx.backend], (grad_y, grad_final, *(call[name] for name in _CALL), *borders))
        return None, None, *grads

    @staticmethod
    def jvp(ctx, *_):
        raise NotImplementedError("mru::softmax_recurrence: there is no forward-mode derivative")


#: `SoftmaxScan.apply` where no transform of torch.func is active.
apply_scan = private.direct_apply(SoftmaxScan)


def _zeros(call, grad_y: Tensor | None, grad_final: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients of y and of the final state, zeros for one that is missing."""
    score, value = call["score"], call["value"]
    heads, channels = sizes(score, value, call["heads"])
    cu_seqlens = call["cu_seqlens"]
    if grad_y is None:
        grad_y = score.new_zeros((*score.shape[:2], channels))
    if grad_final is None:
        sequences = score.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        grad_final = score.new_zeros((sequences, channels + 2 * heads), dtype=checks.state_dtype(score.dtype))
    return grad_y, grad_final


# ------------------------------------------------------------------------------------------------ vmap


def _fold(size: int, t: Tensor, dim: int | None) -> Tensor:
    """`t [..., n]` of each call side by side, `[..., size n]`."""
    t = t.unsqueeze(-2).expand(*t.shape[:-1], size, t.shape[-1]) if dim is None else t.movedim(dim, -2)
    return t.flatten(-2)


def _unfold(size: int, t: Tensor) -> Tensor:
    """The inverse of `_fold`, `[..., size, n]`."""
    return t.unflatten(-1, (size, t.shape[-1] // size))


def _fold_gates(size: int, t: Tensor, dim: int | None, heads: int) -> Tensor:
    t = t.unsqueeze(0).expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    score, value = split_gates(t, heads)
    return torch.cat([_fold(size, score, 0), _fold(size, value, 0)], -1)


def _fold_states(size: int, t: Tensor, dim: int | None, heads: int) -> Tensor:
    t = t.unsqueeze(0).expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    return join_state(*(_fold(size, part, 0) for part in split_state(t, heads)))


def _unfold_gates(size: int, t: Tensor, heads: int) -> Tensor:
    return torch.cat([_unfold(size, part) for part in split_gates(t, heads)], -1)


def _unfold_states(size: int, t: Tensor, heads: int) -> Tensor:
    return join_state(*(_unfold(size, part) for part in split_state(t, heads)))


def _folded(size: int, values: dict, dims: dict) -> tuple[dict, int]:
    """The arguments of one call that does the work of `size` calls: their heads side by side; and its heads."""
    if dims["cu_seqlens"] is not None:
        raise ValueError("cu_seqlens: expected one tensor for the whole batch, got one that vmap maps over")
    score, value = values["score"], values["value"]
    if value is None:
        heads = values["heads"]
    else:
        heads = (score if dims["score"] is None else score.movedim(dims["score"], 0)).shape[-1]
    folded = dict(values)
    for name, t in values.items():
        if not isinstance(t, Tensor) or name == "cu_seqlens":
            continue
        if name == "score" and value is None:
            folded[name] = _fold_gates(size, t, dims[name], heads)
        elif name in ("initial_state", "grad_final", "borders"):
            folded[name] = _fold_states(size, t, dims[name], heads)
        else:
            folded[name] = _fold(size, t, dims[name])
    folded["heads"] = values["heads"] * size
    return folded, heads * size


def _fold_forward(backend: str):
    def rule(info, in_dims, *arguments):
        size = info.batch_size
        values, dims = (dict(zip(FORWARD_NAMES, given, strict=True)) for given in (arguments, in_dims))
        folded, heads = _folded(size, values, dims)
        y, *states = FORWARD[backend](*folded.values())
        results = [_unfold(size, y), *(_unfold_states(size, t, heads) for t in states)]
        return results, [t.dim() - 2 for t in results]

    return rule


def _fold_backward(backend: str):
    def rule(info, in_dims, *arguments):
        size = info.batch_size
        values, dims = (dict(zip(BACKWARD_NAMES, given, strict=True)) for given in (arguments, in_dims))
        folded, heads = _folded(size, values, dims)
        grads = BACKWARD[backend](*folded.values())
        results = []
        for name, t in zip([n for n in DIFFERENTIABLE if values[n] is not None], grads, strict=True):
            if name == "score" and values["value"] is None:
                results.append(_unfold_gates(size, t, heads))
            elif name == "initial_state":
                results.append(_unfold_states(size, t, heads))
            else:
                results.append(_unfold(size, t))
        return results, [t.dim() - 2 for t in results]

    return rule


for _row in backends.TABLE.values():
    if not _row.plain:
        define(_row.name)
