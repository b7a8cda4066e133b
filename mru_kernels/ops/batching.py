"""vmap over the ops. Channels are independent, so the mapped dimension is folded into them."""

from __future__ import annotations

from types import SimpleNamespace

from torch import Tensor

from .. import torch_private as private
from .layout import places
from .spec import Cell

FORWARD_NAMES = (
    *("inputs", "given", "packed", "numbers", "initial_state", "cu_seqlens", "resets", "reset_state"),
    *("reverse", "chunk", "segment", "save"),
)
BACKWARD_NAMES = ("grad_h", "grad_final", "grad_checkpoints", *FORWARD_NAMES[:-1], "checkpoints", "codes", "wanted")
#: The value of `wanted` that asks for every gradient.
ALL_WANTED = -1
_OF_ALL_CHANNELS = ("cu_seqlens", "resets")


def fold_into_channels(cell: Cell, op: private.OpOverload, names: tuple[str, ...]):
    """The vmap rule of the forward or backward op, whose arguments have these names."""

    def rule(info, in_dims, *arguments):
        size = info.batch_size
        values = dict(zip(names, arguments, strict=True))
        gates = values["packed"].bit_count()
        folded = []
        for (name, value), dims in zip(values.items(), in_dims, strict=True):
            if name in _OF_ALL_CHANNELS and dims is not None:
                raise ValueError(f"{name}: expected one tensor for the whole batch, got one that vmap maps over")
            if name == "inputs":
                folded.append(_fold_inputs(cell, size, value, dims, values["given"], values["packed"]))
            elif name in _OF_ALL_CHANNELS:
                folded.append(value)
            else:
                folded.append(_fold(size, value, dims))
        results = op(*folded)
        unfolded = [_unfold(size, t) for t in results]
        if gates and names is BACKWARD_NAMES:  # the first is the gradient of the packed gates
            grad = results[0].unflatten(-1, (gates, size, results[0].shape[-1] // (gates * size)))
            unfolded[0] = (grad.movedim(-2, 0).flatten(-2), 0)
        return tuple(map(list, zip(*unfolded, strict=True)))

    return rule


def _fold_inputs(cell: Cell, size: int, inputs, dims, given: int, packed: int) -> list[Tensor]:
    names = dict(zip(places(cell, given, packed), cell.names, strict=True))
    folded = []
    for place, (t, dim) in enumerate(zip(inputs, dims, strict=True)):
        if t.dim() - (dim is not None) == 0:  # a scalar
            if dim is not None:
                message = "expected one tensor for the whole batch, got one that vmap maps over"
                raise ValueError(f"{names[place]}: {message}")
            folded.append(t)
        elif place == 0 and packed:
            t = t.unsqueeze(0).expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
            gates = packed.bit_count()
            folded.append(t.unflatten(-1, (gates, t.shape[-1] // gates)).movedim(0, -2).flatten(-3))
        else:
            folded.append(_fold(size, t, dim))
    return folded


def _fold(size: int, t, dim: int | None):
    if not isinstance(t, Tensor):
        return t
    t = t.unsqueeze(-2).expand(*t.shape[:-1], size, t.shape[-1]) if dim is None else t.movedim(dim, -2)
    return t.flatten(-2)


def _unfold(size: int, t: Tensor) -> tuple[Tensor, int]:
    return t.unflatten(-1, (size, t.shape[-1] // size)), t.dim() - 1


def fold_legacy_batch(cell: Cell, op: private.OpOverload, names: tuple[str, ...]):
    """The op under torch's legacy vmap."""
    return legacy(fold_into_channels(cell, op, names))


def legacy(rule):
    """A vmap rule for torch's legacy vmap, which `is_grads_batched=True` and `torch.autograd.functional` use."""
    level = 1  # torch does not nest this vmap

    def kernel(*arguments):
        size = 0

        def plain(value):
            """The argument without its batch dimension, which comes first; and 0, or None where it has none."""
            nonlocal size
            if isinstance(value, list) and value and isinstance(value[0], Tensor):
                return tuple(map(list, zip(*map(plain, value), strict=True)))
            if not (isinstance(value, Tensor) and private.is_legacy_batched(value)):
                return value, None
            value = private.remove_batch_dim(value, level, size, 0)
            size = value.shape[0]
            return value, 0

        values, in_dims = zip(*map(plain, arguments), strict=True)
        results, dims = rule(SimpleNamespace(batch_size=size), in_dims, *values)
        first = [t.movedim(dim, 0).contiguous() for t, dim in zip(results, dims, strict=True)]  # as tangents must be
        return [private.add_batch_dim(t, 0, level) for t in first]

    return kernel
