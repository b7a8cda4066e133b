"""Sequence parallelism over torch.distributed: each rank holds a contiguous piece of time.

A piece acts on each channel's state as one affine map, `s -> a s + w`, whatever the unit. Ranks exchange these maps, a
few numbers per sequence and channel, compose those of the pieces before their own, and scan from the state that enters
it. In the backward pass the adjoints of the pieces compose the other way. Every rank composes in the same order, so
results are the same from run to run.

Where composed states leave the range of their dtype, ranks scan their pieces again one after another, each from the
state that left the piece before.
"""

from __future__ import annotations

import hashlib
import inspect
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from . import cells, checks, ops
from .nn import MRUBase, unwrapped

__all__ = ["sequence_parallel"]

Group = dist.ProcessGroup
Scan = Callable[..., tuple[Tensor, Tensor]]

_HEADER = struct.Struct("<?q8s")  # whether a rank failed, the length of its piece, a digest of its text
_MESSAGE = 512  # bytes of the header and the text
_NOT_COMPILED = "sequence_parallel: ranks exchange tensors, which runs eagerly, outside compiled graphs"


def sequence_parallel(op_or_module: Scan | MRUBase, mesh_or_group: DeviceMesh | Group | None = None) -> Any:
    """An op or a module over a time axis that is cut into one piece a rank.

    Args:
        op_or_module: the scan of a cell, such as `bmru`, or a module of this package that is used like
            `torch.nn.GRU`, such as `BMRU`, also in `torch.compile` or DistributedDataParallel.
        mesh_or_group: the ranks, in the order of their pieces: a process group, a one-dimensional DeviceMesh, or None
            for the default group. Pieces may differ in length and be empty. Calls of one group come from one thread
            at a time.

    Returns:
        For an op a function of the same arguments. Streams are this rank's piece `[B, T_rank, D]`; every other
        argument is the same on every rank, so that `initial_state` is the one of the whole and `cu_seqlens` counts
        from the beginning of the whole. It returns this rank's piece of h and the final state of the whole. Gradients
        are those of the sum of all ranks' losses; for what is the same on every rank, each has its share, which
        ranks add up to the whole.

        For a module a `torch.nn.Module` of the same arguments (no PackedSequence), of which input and output are this
        rank's piece, and `hx` and `h_n` those of the whole. Gradients of its parameters are summed over the ranks, so
        that DistributedDataParallel along the batch needs no more than its own group. Attributes that are set on it,
        such as `epsilon`, are set on the module. `copy.deepcopy` shares the process group; pickle raises a TypeError.

        Every rank must make the same calls in the same order, and the backward pass too. Ranks compare their calls: a
        rank that fails makes the others raise as well, and the next call works again. Where a rank skipped a call or a
        backward pass, all raise from then on; a new process group starts anew. A call allows one backward pass; a
        second one raises, also after `retain_graph=True`. Under `torch.compile` it runs eagerly, between compiled
        graphs; with `fullgraph=True` compilation fails.

    Raises:
        TypeError, ValueError: an argument is not as described; in a call also that of an op.
        RuntimeError: another rank failed or makes another call, which the message names; another thread is in a call
            of the group; a second backward pass; what the process group raises where a rank is gone or does not answer
            within the group's timeout.
    """
    group = _group(mesh_or_group)
    if isinstance(op_or_module, torch.nn.Module) and isinstance(unwrapped(op_or_module), MRUBase):
        return SequenceParallel(op_or_module, group)
    if op_or_module not in _scans():
        names = ", ".join(op.__name__ for op in _scans())
        raise TypeError(f"op_or_module: expected one of {names} or a recurrent module, got {op_or_module!r}")
    return _op(op_or_module, group)


def _scans() -> list[Scan]:
    """The public scan of every cell."""
    return [getattr(import_module(f"{cells.__name__}.{name}"), name) for name in ops.CELLS]


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


def _op(op: Scan, group: Group) -> Scan:
    signature = inspect.signature(op)
    ranks = _Ranks(group)

    @torch.compiler.disable(reason=_NOT_COMPILED)
    def eager(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        with _Call(ranks, scans=1) as call:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            arguments = bound.arguments
            what = ", ".join(f"{name} {_described(value)}" for name, value in arguments.items())
            initial_state, cu_seqlens = arguments.pop("initial_state", None), arguments.pop("cu_seqlens", None)
            reverse = checks.flag("reverse", arguments.pop("reverse", False))
            names = [name for name, value in arguments.items() if isinstance(value, Tensor) and value.dim() > 0]

            def scan(inputs: Sequence[Tensor], state: Tensor | None, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
                given = arguments | dict(zip(names, inputs, strict=True))
                return op(**given, initial_state=state, cu_seqlens=offsets, reverse=reverse)

            inputs = [arguments[name] for name in names]
            what = f"{op.__name__}({what})"
            return _over_ranks(call, what, scan, inputs, initial_state, cu_seqlens, reverse)

    def parallel(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return eager(*args, **kwargs)  # a frame of its own: `torch.compile` would look behind `disable`

    parallel.__name__ = parallel.__qualname__ = f"sequence_parallel_{op.__name__}"
    parallel.__doc__ = f"`{op.__name__}` over a time axis that is cut among ranks: see `sequence_parallel`."
    return parallel


def _described(value: Any) -> str:
    """Text that must match on every rank: dtype and shape of a tensor, with T left open; else the value."""
    if isinstance(value, Tensor) and value.dim() == 0:
        value = value.item()
    if not isinstance(value, Tensor):
        return str(float(value) if type(value) is int else value)  # 1 is 1.0
    shape = ["T" if value.dim() == 3 and i == 1 else size for i, size in enumerate(value.shape)]
    text = f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, shape))}]"
    if value.dtype in (torch.int32, torch.int64) and value.device.type == "cpu":
        text += f" of checksum {zlib.crc32(str(value.tolist()).encode()):08x}"
    return text


# ------------------------------------------------------------------------------------------------ modules


class SequenceParallel(torch.nn.Module):
    """A module whose time is split over ranks; the wrapped module is `module`.

    Attributes of the module, such as `epsilon`, are read and set through it.
    """

    def __init__(self, module: torch.nn.Module, group: Group) -> None:
        super().__init__()
        self._ranks = _Ranks(group)
        self.module = module

    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As the module's: this rank's piece of the input, to that of the output and the final state of the whole."""
        return self._eager(input, hx)

    @torch.compiler.disable(reason=_NOT_COMPILED)
    def _eager(self, input: Tensor, hx: Tensor | None) -> tuple[Tensor, Tensor]:
        inner: Any = unwrapped(self.module)
        with _Call(self._ranks, scans=inner.num_layers * inner.num_directions) as call:
            if not isinstance(input, Tensor):
                raise TypeError(f"input: expected a tensor, got {type(input).__name__}")
            name = f"{type(inner).__name__}({inner.extra_repr()}), hx {_described(hx)}"
            return self.module(input, hx, _parallel=_Scans(call, name))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == "module":
                raise
            value = getattr(unwrapped(self.module), name)
            if callable(value):  # a method would run on this rank's piece alone
                raise
            return value

    def __setattr__(self, name: str, value: Any) -> None:
        module = self.__dict__.get("_modules", {}).get("module")
        own = module is None or name.startswith("_") or name in self.__dict__ or hasattr(type(self), name)
        if own or not hasattr(unwrapped(module), name):
            super().__setattr__(name, value)
        else:
            setattr(unwrapped(module), name, value)


class _Scans:
    """What a module's forward pass is given, to read its parameters and run its scans through."""

    def __init__(self, call: _Call, name: str) -> None:
        self._call = call
        self._name = name

    @torch.compiler.disable(reason=_NOT_COMPILED)
    def parameters(self, read: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """The same parameters, whose gradients are summed over the ranks."""
        if not torch.is_grad_enabled():
            return read
        summed = iter(_SummedGradients.apply(self._call.ranks.group, *(t for p in read for t in p.values())))
        return [{name: next(summed) for name in p} for p in read]

    @torch.compiler.disable(reason=_NOT_COMPILED)
    def scan(
        self, unit: Scan, gates: Tensor, initial_state: Tensor | None, *, reverse: bool, cu_seqlens: None,
        chunk_size: int | None, **vectors: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`unit`, a module's `_scan`, over the pieces of all ranks."""

        def scan(inputs: Sequence[Tensor], state: Tensor | None, _offsets: None) -> tuple[Tensor, Tensor]:
            named = dict(zip(vectors, inputs[1:], strict=True))
            return unit(inputs[0], state, reverse=reverse, cu_seqlens=None, chunk_size=chunk_size, **named)

        state = _described(initial_state)
        what = f"{self._name}, gates {_described(gates)}, initial_state {state}, reverse {reverse}"
        return _over_ranks(self._call, what, scan, [gates, *vectors.values()], initial_state, None, reverse)


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


@dataclass
class _Turn:
    """What all calls of a group share: the lock of the one thread that may be in a call, and the number of calls."""

    lock: Any = field(default_factory=threading.RLock)
    calls: int = 0


_TURNS: WeakKeyDictionary[Group, _Turn] = WeakKeyDictionary()


class _Ranks:
    """The ranks of a group, which make the same exchanges."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.turn = _TURNS.setdefault(group, _Turn())

    def __deepcopy__(self, memo: dict) -> _Ranks:
        return self  # the copy of a process group is the group

    def __reduce__(self):
        raise TypeError("sequence_parallel: a process group cannot be pickled; pickle `module`, or save the state_dict")

    def gather(self, make: Callable[[], Tensor], like: Tensor) -> Tensor:
        """What `make` makes on every rank, `[ranks, *like.shape]`; where it raises on one, all raise."""
        failed = None
        try:
            made = make()
        except Exception as error:
            failed, made = error, torch.zeros_like(like)
        real = torch.view_as_real(made) if made.is_complex() else made
        every = _gather(torch.cat([real.flatten(), real.new_full((1,), failed is not None)]), self.group)
        if failed is not None:
            raise failed
        for rank, flag in enumerate(every[:, -1].tolist()):
            if flag:
                raise RuntimeError(f"sequence_parallel: rank {rank} of the group failed; its own error says why")
        parts = every[:, :-1].reshape(len(every), *real.shape).contiguous()  # strides that complex numbers take
        return torch.view_as_complex(parts) if made.is_complex() else parts


class _Call:
    """A call on every rank of a group: they compare what they call before they exchange its tensors.

    If a rank raises before a comparison, the others receive its message there. `scans` is the number of comparisons.
    """

    def __init__(self, ranks: _Ranks, scans: int, name: str | None = None) -> None:
        self.ranks = ranks
        self.left = scans  # comparisons to come; 0 within a scan, where `_Ranks.gather` tells of errors
        if name is None:
            ranks.turn.calls += 1
            name = f"call {ranks.turn.calls}"
        self.name = name

    def __enter__(self) -> _Call:
        if not self.ranks.turn.lock.acquire(blocking=False):
            raise RuntimeError("sequence_parallel: expected one thread at a time in a group, and another is in a call")
        return self

    def __exit__(self, _kind: Any, error: BaseException | None, _traceback: Any) -> None:
        try:
            if isinstance(error, Exception) and self.left:
                self._compare(1, 0, f"{type(error).__name__}: {error}")
        finally:
            self.ranks.turn.lock.release()

    @contextmanager
    def agreed(self, what: str, time: int) -> Iterator[list[int]]:
        """The length of every rank's piece. Raises on every rank where one failed or calls something else."""
        left, self.left = self.left - 1, 0
        rows = self._compare(0, time, f"{self.name}, {what}")
        for rank, (failed, _, _, text) in enumerate(rows):
            if failed:
                raise RuntimeError(f"sequence_parallel: rank {rank} of the group failed: {text}")
        for rank, (_, _, digest, text) in enumerate(rows):
            if digest != rows[0][2]:
                raise RuntimeError(
                    "sequence_parallel: expected the same call on every rank;"
                    f" rank 0 of the group has {rows[0][3]}; rank {rank} has {text}"
                )
        yield [time for _, time, _, _ in rows]
        self.left = left

    def _compare(self, failed: int, time: int, text: str) -> list[tuple[int, int, bytes, str]]:
        """Exchange a row per rank: whether it failed, the length of its piece, a digest of its text, and the text."""
        encoded = text.encode(errors="replace")
        message = _HEADER.pack(failed, time, hashlib.sha256(encoded).digest()[:8]) + encoded
        message = message[:_MESSAGE].ljust(_MESSAGE, b"\0")
        rows = _gather(torch.frombuffer(bytearray(message), dtype=torch.uint8), self.ranks.group).tolist()
        texts = [bytes(row[_HEADER.size :]).rstrip(b"\0").decode(errors="replace") for row in rows]
        return [(*_HEADER.unpack(bytes(row[: _HEADER.size])), text) for row, text in zip(rows, texts, strict=True)]


def _over_ranks(
    call: _Call, what: str, scan: Scan, inputs: list[Tensor], initial_state: Tensor | None,
    cu_seqlens: Tensor | None, reverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """This rank's piece of the scan, and the final state of the whole."""
    tensors = inputs if initial_state is None else [*inputs, initial_state]
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    with torch.no_grad():  # a scan of 0 steps validates the arguments and gives the state dtype
        no_steps = [t[:, :0] if t.dim() == 3 else t for t in inputs]
        state = scan(no_steps, initial_state, None if cu_seqlens is None else torch.zeros_like(cu_seqlens))[1]
    time = next((t.shape[1] for t in inputs if t.dim() == 3), 0)
    ranks = call.ranks
    with call.agreed(f"{what}{', with gradients' if differentiated else ''}", time) as times:
        order = list(range(len(times)))[:: -1 if reverse else 1]
        offsets = cu_seqlens

        def own_map() -> Tensor:
            nonlocal offsets
            if cu_seqlens is not None:
                offsets = _offsets_of_piece(cu_seqlens, times, ranks.rank)
            with ops.as_maps():
                return torch.stack(scan(inputs, None, offsets))

        with torch.no_grad():
            maps = ranks.gather(own_map, state.expand(2, *state.shape))
            if not differentiated:
                h, final = _chain(ranks, order, maps, state, lambda entry: scan(inputs, entry, offsets))
                return h, final
        if initial_state is not None:
            state = initial_state.to(state.dtype)
        return _Piece.apply(call, what, order, maps, lambda leaves, entry: scan(leaves, entry, offsets), *inputs, state)


def _offsets_of_piece(cu_seqlens: Tensor, times: list[int], rank: int) -> Tensor:
    """`cu_seqlens [N + 1]` clipped to this rank's piece; a sequence may be empty there."""
    checks.offsets(cu_seqlens, sum(times))
    return (cu_seqlens - sum(times[:rank])).clamp(0, times[rank])


def _gather(t: Tensor, group: Group) -> Tensor:
    """The real tensor of every rank, `[ranks, ...]`."""
    device = t.device
    if dist.get_backend(group) == "nccl" and device.type == "cpu":
        t = t.to("cuda")
    every = t.new_empty((dist.get_world_size(group), *t.shape))
    dist.all_gather(list(every.unbind(0)), t, group=group)
    return every.to(device)


def _chain(
    ranks: _Ranks, order: list[int], maps: Tensor, state: Tensor, run: Callable[[Tensor], tuple[Any, Tensor]]
) -> tuple[Any, Tensor]:
    """Run this rank's piece; return its result and the final state `[N, D]` of the last piece.

    `run` takes the state that enters a piece and returns a result and the state that leaves it. Pieces run all at once,
    from composed states. Where a state that leaves a piece is not the one that entered the next, they run one after
    another.

    Args:
        order: the ranks, in the order in which the state passes through their pieces.
        maps: `[ranks, 2, N, D]`, the factor and the offset of each piece.
        state: `[N, D]`, enters the first piece.
    """
    entries = [state]
    for rank in order:
        factor, offset = maps[rank]
        entries.append(factor * entries[-1] + offset)
    place = order.index(ranks.rank)
    result, left = None, state

    def run_from(entry: Tensor) -> Tensor:
        nonlocal result, left
        result, left = run(entry)
        return left

    def run_and_check() -> Tensor:
        entry, following = entries[place : place + 2]
        differs = ~_consistent(run_from(entry), following, maps[ranks.rank, 0], maps[ranks.rank, 1], entry)
        if place == len(order) - 1:
            differs = torch.zeros_like(differs)  # no piece follows
        return torch.cat([left.flatten(), differs.to(left.dtype).reshape(1)])

    every = ranks.gather(run_and_check, state.new_empty(state.numel() + 1))
    states = every[:, :-1].reshape(len(order), *state.shape)
    if every[:, -1].any():
        for before, rank in pairwise(order):
            entry = states[before]
            states = ranks.gather(partial(run_from, entry) if rank == ranks.rank else lambda: left, state)
    return result, states[order[-1]]


def _consistent(left: Tensor, following: Tensor, factor: Tensor, offset: Tensor, entry: Tensor) -> Tensor:
    """Whether the states that left a piece are the composed ones that enter the next; a 0-dim bool tensor.

    The bound is looser than that of csrc/cells/cut.h, which knows the size of recent states: states that cancellation
    leaves small are mostly rounding, and after a false alarm ranks scan one after another. A factor that may have
    underflowed has few right bits, so its bound is tight.
    """
    share = torch.where(_magnitude(factor) < 2.0**-62, 2.0**-16, 0.5)
    bound = (_magnitude(factor * entry) + _magnitude(offset)) * share
    near = (_magnitude(left - following) <= bound) & bound.isfinite()
    return (near | (left == following) | (left.isnan() & following.isnan())).all()


def _magnitude(t: Tensor) -> Tensor:
    return torch.view_as_real(t).abs().sum(-1) if t.is_complex() else t.abs()


class _Piece(torch.autograd.Function):
    """The scan of a rank's piece, and its gradients from the adjoint that enters it from the piece that follows."""

    @staticmethod
    def forward(ctx, call: _Call, what: str, order: list[int], maps: Tensor, scan: Scan, *tensors: Tensor):
        *inputs, state = tensors
        needs = ctx.needs_input_grad[-len(tensors) :]
        leaves = [t.detach().requires_grad_(need) for t, need in zip(inputs, needs, strict=False)]

        def run(entry: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
            entry = entry.detach().requires_grad_()
            with torch.enable_grad():
                h, final = scan(leaves, entry)
            return (entry, h, final), final.detach()

        (entry, h, final), last = _chain(call.ranks, order, maps, state, run)
        ctx.graph = (leaves, entry, h, final)
        ctx.ranks, ctx.order, ctx.factors = call.ranks, order, maps[:, 0].conj()
        ctx.name, ctx.what = f"backward pass of {call.name}", what
        return h.detach(), last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_h: Tensor, grad_final: Tensor):
        with _Call(ctx.ranks, scans=1, name=ctx.name) as call:
            if ctx.graph is None:
                raise RuntimeError("sequence_parallel: a second backward pass through the same call; it keeps no graph")
            (leaves, entry, h, final), ctx.graph = ctx.graph, None
            wanted = [leaf for leaf in leaves if leaf.requires_grad]

            def own_map() -> Tensor:
                (adjoint,) = torch.autograd.grad(h, entry, grad_h, retain_graph=True)
                return torch.stack([adjoint, grad_final])

            def run(of_final: Tensor) -> tuple[list[Tensor], Tensor]:
                ends = (grad_h, of_final)
                *grads, adjoint = torch.autograd.grad((h, final), [*wanted, entry], ends, retain_graph=True)
                return grads, adjoint

            with call.agreed(ctx.what, 0):
                every = ctx.ranks.gather(own_map, grad_final.expand(2, *grad_final.shape))
                of_final = every[0, 1]
                for grad in every[1:, 1]:
                    of_final = of_final + grad
                maps = torch.stack([ctx.factors, every[:, 0]], 1)
                grads, of_state = _chain(ctx.ranks, ctx.order[::-1], maps, of_final, run)
        given = iter(grads)
        if ctx.ranks.rank != ctx.order[0]:
            of_state = torch.zeros_like(of_state)  # the first rank returns the whole gradient; ranks are summed
        return *[None] * 5, *(next(given) if leaf.requires_grad else None for leaf in leaves), of_state
