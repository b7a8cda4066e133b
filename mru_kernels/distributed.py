"""Sequence parallelism over torch.distributed: each rank holds a contiguous piece of time.

A piece acts on each channel's state as one affine map, `s -> a s + w`, whatever the unit. Ranks exchange these maps, a
few numbers per sequence and channel, compose those of the pieces before their own, and scan from the state that enters
it. In the backward pass the adjoints of the pieces compose the other way. Every rank composes in the same order, so
results are the same from run to run.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from . import checks
from .cells.bmru import bmru
from .cells.linear_recurrence import linear_recurrence
from .cells.schmitt import schmitt
from .nn import MRUBase

__all__ = ["sequence_parallel"]

Group = dist.ProcessGroup
Scan = Callable[..., tuple[Tensor, Tensor]]

_STATE_DTYPES = (torch.float32, torch.float64, *checks.COMPLEX_DTYPES)
_PROBE = 2.0**30  # a state so large that what a piece writes is small beside it


def sequence_parallel(op_or_module: Scan | MRUBase, mesh_or_group: DeviceMesh | Group | None = None) -> Any:
    """An op or a module over a time axis that is cut into one piece a rank.

    Args:
        op_or_module: `bmru`, `schmitt` or `linear_recurrence`, or a module of this package that is used like
            `torch.nn.GRU`, such as `BMRU`.
        mesh_or_group: the ranks, in the order of their pieces: a process group, a one-dimensional DeviceMesh, or None
            for the default group. Pieces may differ in length and be empty.

    Returns:
        For an op a function of the same arguments. Streams are this rank's piece `[B, T_rank, D]`; every other
        argument is the same on every rank, so that `initial_state` is the one of the whole and `cu_seqlens` counts
        from the beginning of the whole. It returns this rank's piece of h and the final state of the whole. Gradients
        are those of the sum of all ranks' losses; for what is the same on every rank, each has its share, which
        ranks add up to the whole.

        For a module a `torch.nn.Module` of the same arguments (no PackedSequence), of which input and output are this
        rank's piece, and `hx` and `h_n` those of the whole. Gradients of its parameters are summed over the ranks, so
        that DistributedDataParallel along the batch needs no more than its own group.

        Every rank must make the same calls, and the backward pass too.

    Raises:
        TypeError, ValueError: an argument is not as described; in a call also that of an op.
        RuntimeError: another rank failed or was called with something else, which the message names; what the process
            group raises where a rank is gone or does not answer within the group's timeout.
    """
    group = _group(mesh_or_group)
    if isinstance(op_or_module, MRUBase):
        return SequenceParallel(op_or_module, group)
    if op_or_module not in _HOMOGENEOUS:
        names = ", ".join(op.__name__ for op in _HOMOGENEOUS)
        raise TypeError(f"op_or_module: expected one of {names} or a recurrent module, got {op_or_module!r}")
    return _op(op_or_module, group)


def _group(mesh_or_group: DeviceMesh | Group | None) -> Group:
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("mesh_or_group: expected torch.distributed to be initialised, and it is not")
    if mesh_or_group is None:
        return dist.distributed_c10d._get_default_group()
    if isinstance(mesh_or_group, DeviceMesh):
        if mesh_or_group.ndim != 1:
            raise ValueError(f"mesh_or_group: expected a mesh of one dimension, got {mesh_or_group.ndim}")
        return mesh_or_group.get_group()
    if not isinstance(mesh_or_group, Group):
        kind = type(mesh_or_group).__name__
        raise TypeError(f"mesh_or_group: expected a process group, a DeviceMesh or None, got {kind}")
    return mesh_or_group


# ------------------------------------------------------------------------------------------------ ops


def _no_amplitude(arguments: dict[str, Any]) -> dict[str, Any]:
    candidate = arguments["candidate"]
    return arguments | {"amplitude": candidate.new_zeros(candidate.shape[-1]).expand_as(candidate)}


def _no_update(arguments: dict[str, Any]) -> dict[str, Any]:
    update = arguments["update"]
    return arguments | {"update": update.new_zeros(update.shape[-1]).expand_as(update)}


#: The arguments with which an op writes nothing but zeros, so that a state of 1 becomes the factor of the piece.
_HOMOGENEOUS: dict[Scan, Callable[[dict[str, Any]], dict[str, Any]] | None] = {
    bmru: _no_amplitude,
    linear_recurrence: _no_update,
    schmitt: None,
}


def _op(op: Scan, group: Group) -> Scan:
    signature, homogeneous = inspect.signature(op), _HOMOGENEOUS[op]

    def parallel(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        arguments = signature.bind(*args, **kwargs).arguments
        initial_state, cu_seqlens = arguments.pop("initial_state", None), arguments.pop("cu_seqlens", None)
        reverse = checks.flag("reverse", arguments.pop("reverse", False))
        names = [name for name, value in arguments.items() if isinstance(value, Tensor) and value.dim() > 0]

        def scan(inputs: Sequence[Tensor], state: Tensor | None, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
            given = arguments | dict(zip(names, inputs, strict=True))
            return op(**given, initial_state=state, cu_seqlens=offsets, reverse=reverse)

        def factor(inputs: Sequence[Tensor], written: Tensor, offsets: Tensor | None) -> Tensor:
            if homogeneous is None:
                return _probed(scan, inputs, written, offsets, arguments.get("epsilon", 0.0))
            zeroed = homogeneous(arguments | dict(zip(names, inputs, strict=True)))
            return op(**zeroed, initial_state=torch.ones_like(written), cu_seqlens=offsets, reverse=reverse)[1]

        inputs = [arguments[name] for name in names]
        time = next((t.shape[1] for t in inputs if t.dim() == 3), 0)
        return _over_ranks(scan, factor, inputs, time, initial_state, cu_seqlens, reverse, group)

    parallel.__name__ = parallel.__qualname__ = f"sequence_parallel_{op.__name__}"
    parallel.__doc__ = f"`{op.__name__}` over a time axis that is cut among ranks: see `sequence_parallel`."
    return parallel


def _probed(scan, inputs, written: Tensor, offsets: Tensor | None, epsilon: float | Tensor) -> Tensor:
    """The factor of a piece of a unit of which only the scan is known: from what becomes of a large state."""
    if float(epsilon) == 1.0:
        return torch.ones_like(written)
    return (scan(inputs, torch.full_like(written, _PROBE), offsets)[1] - written) / _PROBE


# ------------------------------------------------------------------------------------------------ modules


class SequenceParallel(torch.nn.Module):
    """What `sequence_parallel` makes of a module, which it holds as `module`."""

    def __init__(self, module: MRUBase, group: Group) -> None:
        super().__init__()
        self.module = module
        self._group = group

    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As the module's: this rank's piece of the input, to that of the output and the final state of the whole."""
        if not isinstance(input, Tensor):
            raise TypeError(f"input: expected a tensor, got {type(input).__name__}")
        inner = copy.copy(self.module)
        inner.__dict__["_scan"] = self._scan  # of the copy alone; parameters are shared
        names, parameters = zip(*self.module.named_parameters(), strict=True)
        summed = _SummedGradients.apply(self._group, *parameters)
        return torch.func.functional_call(inner, dict(zip(names, summed, strict=True)), (input, hx))

    def _scan(
        self, gates: Tensor, initial_state: Tensor | None, *, reverse: bool, cu_seqlens: None, chunk_size: int | None,
        **vectors: Tensor,
    ):  # fmt: skip
        def scan(inputs: Sequence[Tensor], state: Tensor | None, _offsets: None) -> tuple[Tensor, Tensor]:
            named = dict(zip(vectors, inputs[1:], strict=True))
            return self.module._scan(inputs[0], state, reverse=reverse, cu_seqlens=None, chunk_size=chunk_size, **named)

        def factor(inputs: Sequence[Tensor], written: Tensor, _offsets: None) -> Tensor:
            return _probed(scan, inputs, written, None, getattr(self.module, "epsilon", 0.0))

        inputs = [gates, *vectors.values()]
        return _over_ranks(scan, factor, inputs, gates.shape[1], initial_state, None, reverse, self._group)


class _SummedGradients(torch.autograd.Function):
    """Tensors that are the same on every rank; their gradients are summed over the ranks."""

    @staticmethod
    def forward(ctx, group: Group, *tensors: Tensor):
        ctx.group = group
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        summed = [grad.clone(memory_format=torch.contiguous_format) for grad in grads]
        for grad in summed:
            dist.all_reduce(grad, group=ctx.group)
        return None, *summed


# ------------------------------------------------------------------------------------------------ between ranks


def _over_ranks(
    scan: Scan, factor: Callable[..., Tensor], inputs: list[Tensor], time: int, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, reverse: bool, group: Group,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """This rank's piece of the scan, and the final state of the whole."""
    offsets = cu_seqlens
    times = _gather(torch.tensor([time]), group)[:, 0].tolist()
    own: Tensor | Exception  # this piece's map [2, N, D]
    try:
        if cu_seqlens is not None:
            offsets = _offsets_of_piece(cu_seqlens, times, dist.get_rank(group))
        with torch.no_grad():
            _, written = scan(inputs, None, offsets)
            own = torch.stack([factor(inputs, written, offsets), written])
            if initial_state is not None:  # is it as it must be?
                scan([t[:, :0] if t.dim() == 3 else t for t in inputs], initial_state, _no_steps(offsets))
    except Exception as error:
        own = error
    maps = _agreed(own, group)
    state = torch.zeros_like(maps[0, 1]) if initial_state is None else initial_state.to(maps.dtype)
    return _Piece.apply(scan, offsets, reverse, group, maps, *inputs, state)


def _no_steps(offsets: Tensor | None) -> Tensor | None:
    return None if offsets is None else torch.zeros_like(offsets)


def _offsets_of_piece(cu_seqlens: Tensor, times: list[int], rank: int) -> Tensor:
    """Of every sequence its part in this rank's piece, which may be empty."""
    start, total = sum(times[:rank]), sum(times)
    if cu_seqlens.device.type == "cpu" and cu_seqlens.dim() == 1 and cu_seqlens.numel() > 0:
        first, last = cu_seqlens[0].item(), cu_seqlens[-1].item()
        if first != 0 or last != total:
            expected = f"offsets from 0 to the length of all pieces, {total}"
            raise ValueError(f"cu_seqlens: expected {expected}, got {first} to {last}")
    return (cu_seqlens - start).clamp(0, times[rank])


def _agreed(own: Tensor | Exception, group: Group) -> Tensor:
    """The maps of all ranks, `[ranks, 2, N, D]`. Raises on every rank if one failed or has states of another shape."""
    facts = [1, 0, 0, 0] if isinstance(own, Exception) else [0, *own.shape[1:], _STATE_DTYPES.index(own.dtype)]
    every = _gather(torch.tensor(facts), group).tolist()
    if isinstance(own, Exception):
        raise own
    for rank, (failed, *other) in enumerate(every):
        if failed:
            raise RuntimeError(f"sequence_parallel: rank {rank} of the group failed; its own error says why")
        if other != facts[1:]:
            raise RuntimeError(
                "sequence_parallel: expected the same batch, channels and dtype on every rank; rank"
                f" {dist.get_rank(group)} has states {facts[1:3]}, rank {rank} has {other[:2]}"
            )
    return _gather(own, group)


def _gather(t: Tensor, group: Group) -> Tensor:
    """The tensor of every rank, `[ranks, ...]`."""
    device = t.device
    if dist.get_backend(group) == "nccl" and device.type == "cpu":
        t = t.to("cuda")
    sent = (torch.view_as_real(t) if t.is_complex() else t).contiguous()
    every = sent.new_empty((dist.get_world_size(group), *sent.shape))
    dist.all_gather(list(every.unbind(0)), sent, group=group)
    every = every.to(device)
    return torch.view_as_complex(every) if t.is_complex() else every


def _apply(a: Tensor, w: Tensor, state: Tensor) -> Tensor:
    """`a state + w`. A NaN state stays; nothing is multiplied by 0."""
    after = torch.where(a == 0, w, a * state + w)
    return torch.where(state.isnan(), state, after)


class _Piece(torch.autograd.Function):
    """The scan of a rank's piece from the state that enters it, given the maps `[ranks, 2, N, D]` of all pieces."""

    @staticmethod
    def forward(ctx, scan, offsets, reverse: bool, group: Group, maps: Tensor, *tensors: Tensor):
        *inputs, state = tensors
        order = list(range(len(maps)))[:: -1 if reverse else 1]
        rank = dist.get_rank(group)
        for piece in order:
            if piece == rank:
                entry = state
            a, w = maps[piece].unbind()
            state = _apply(a, w, state)
        wants_grad = any(ctx.needs_input_grad)
        entry = entry.detach().requires_grad_(wants_grad)
        needs = ctx.needs_input_grad[-len(tensors) :]
        leaves = [t.detach().requires_grad_(need) for t, need in zip(inputs, needs, strict=False)]
        with torch.set_grad_enabled(wants_grad):
            h, final = scan(leaves, entry, offsets)
        if wants_grad:
            ctx.graph = (leaves, entry, h, final)
            ctx.order, ctx.group, ctx.rank, ctx.factors = order, group, rank, maps[:, 0].conj()
        return h.detach(), state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_h: Tensor, grad_final: Tensor):
        if ctx.graph is None:
            raise RuntimeError("sequence_parallel: a second backward pass through the same call; it keeps no graph")
        (leaves, entry, h, final), ctx.graph = ctx.graph, None
        (adjoint,) = torch.autograd.grad(h, entry, grad_h, retain_graph=True)
        every = _gather(torch.stack([adjoint, grad_final]), ctx.group)
        pulled = every[0, 1]
        for grad in every[1:, 1]:
            pulled = pulled + grad
        for piece in reversed(ctx.order):
            if piece == ctx.rank:
                of_final = pulled
            pulled = _apply(ctx.factors[piece], every[piece, 0], pulled)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        grads = iter(torch.autograd.grad((h, final), wanted, (grad_h, of_final)) if wanted else ())
        of_state = pulled if ctx.rank == ctx.order[0] else torch.zeros_like(pulled)
        return *[None] * 5, *(next(grads) if leaf.requires_grad else None for leaf in leaves), of_state
