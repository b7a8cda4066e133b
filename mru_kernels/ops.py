"""The torch ops: schemas, fakes, autograd and vmap, the same for every cell and backend.

For each cell there are `mru::<cell>` and `mru::<cell>_backward`, with one overload per backend. A cell's inputs come as
streams `[B, T, D]` and, where a cell allows it, as one value per channel `[D]`:

    streams    one tensor per stream; or, if packed = k > 0, one tensor `[B, T, k D]` with k streams side by side
    channel    inputs given per channel; they stand between the first stream and the others in the cell's order
    chunk      steps between the boundary states that are saved for the backward pass
    segment    steps of a segment that is scanned in parallel with others; 0 scans each sequence as a whole. Results
               differ from those of a whole scan by rounding only: where composed states leave the range of their
               dtype, the call is scanned again as a whole (csrc/cells/cut.h)
    save       whether a backward pass may follow, so whether what it needs is a result

Results of the forward op: `h` in the layout that `dense_like` gives the first stream, and the final state `[N, D]`;
with `save` also the boundary states `[B, floor((T - 1) / chunk), D]` and the write events `[B, floor(T / 16) + (N or
1), D]` (int32, 16 steps of 2 bits), which have no rows where there are no segments. The gradient of a stream has the
layout that `dense_like` gives that stream. States have the state dtype: float64 for float64 streams, float32 for other
real ones, and that of complex streams. N is B, or the number of packed sequences.

A third, `mru::<cell>_step`, is one step without gradients, on streams `[B, D]`: the call costs more than the step does,
so it has few and simple arguments, the inputs in the cell's order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch._subclasses.fake_tensor import is_fake
from torch.autograd import forward_ad

from . import backends, checks
from .checks import state_dtype

_EVENTS_PER_WORD = 16

_INPUTS = (
    "Tensor[] streams, Tensor[] channel, Tensor? alpha, Tensor? initial_state, Tensor? cu_seqlens, Tensor epsilon, "
    "float surrogate_scale, bool reverse, int packed, int chunk, SymInt segment"
)
_FORWARD = f"({_INPUTS}, bool save) -> Tensor[]"
_STEP = "(Tensor first, Tensor? second, Tensor? third, Tensor? alpha, Tensor state, float epsilon) -> (Tensor, Tensor)"
_BACKWARD = f"(Tensor grad_h, Tensor grad_final, {_INPUTS}, Tensor checkpoints, Tensor events) -> Tensor[]"

_STEP_INPUTS = 3

_TRACED_BACKEND = "cpu"  # TorchScript drops the name of an overload and takes the first: that of this backend

_library = torch.library.Library("mru", "DEF")
_library.define("cpu_isa() -> str")
_library.define("no_derivative(Tensor[] grads, Tensor[] inputs, str reason) -> Tensor[]")


@dataclass(frozen=True)
class Cell:
    """What the ops need to know of a cell.

    Attributes:
        name: of its ops, `mru::<name>`.
        inputs: how many it has, at least and at most; the first is a stream.
        vectors: the inputs that come as one value per channel, `[D]`.
        either: those that come as a stream or as one value per channel.
        event_inputs: the number of inputs with which a step fits a 2-bit event (hold, one of two writes, NaN).
        dtypes: of its streams. Where these are complex there is no alpha.
        forward, backward, step: the ops of each backend.
    """

    name: str
    inputs: tuple[int, int]
    event_inputs: int | None
    vectors: tuple[str, ...] = ()
    either: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = checks.STREAM_DTYPES
    forward: dict[str, torch._ops.OpOverload] = field(default_factory=dict, repr=False, compare=False)
    backward: dict[str, torch._ops.OpOverload] = field(default_factory=dict, repr=False, compare=False)
    step: dict[str, torch._ops.OpOverload] = field(default_factory=dict, repr=False, compare=False)


# ------------------------------------------------------------------------------------------------ the one way in


def scan(
    cell: Cell,
    streams: list[Tensor],
    channel: list[Tensor],
    alpha: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    epsilon: Tensor,
    surrogate_scale: float,
    reverse: bool,
    packed: int,
    chunk_size: int | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Run `cell` on the backend that `backend` resolves to: (h, final state)."""
    first = streams[0]
    row = _backend(backend, first)
    chunk = checks.chunk_size(chunk_size) or backends.CHUNK
    if chunk != backends.CHUNK:
        checks.taken(chunk, row)
    batch, time, channels = first.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    segment = row.module.segment(sequences, batch * time, channels // (packed or 1), first.itemsize, first.device)
    segment = -(-segment // chunk) * chunk
    differentiated = torch.is_grad_enabled() and _requires_grad(*streams, *channel, alpha, initial_state)
    compiling = torch.compiler.is_compiling()
    tracing = not compiling and torch._C._is_tracing()
    if tracing and row.name != _TRACED_BACKEND:
        raise RuntimeError(
            f"backend: torch.jit.trace records {_TRACED_BACKEND!r} only, got {row.name!r}; trace the model on the CPU,"
            " or use torch.export"
        )
    # A recorded graph saves no boundary states: their number would pin T where it is 1, and jit.trace compares its
    # graph with one made under no_grad. A backward pass makes up for it.
    recorded = tracing or (compiling and torch.compiler.is_exporting())
    save = differentiated and chunk_size is not None and not recorded
    arguments = (
        *(streams, channel, alpha, initial_state, cu_seqlens, epsilon, surrogate_scale, reverse),
        *(packed, chunk, segment, save),
    )
    if compiling or tracing or torch._C._are_functorch_transforms_active():
        results = cell.forward[row.name](*arguments)
        return results[0], results[1]
    try:
        if differentiated or forward_ad._current_level >= 0:  # as the autograd kernel, without the dispatcher's detours
            results = _Scan.apply(cell, row.name, arguments, *_differentiable_inputs(arguments))
        else:
            with torch._C._AutoDispatchBelowAutograd():
                results = cell.forward[row.name](*arguments)
    except RuntimeError as error:
        _raise_as_torch(error, allocate, cell, streams, channel, cu_seqlens, packed, chunk, segment, save)
        raise
    return results[0], results[1]


def step(
    cell: Cell, inputs: Sequence[Tensor], state: Tensor, alpha: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor]:
    """`scan` of a single step, without gradients: streams are `[B, D]`, and so are the results."""
    op = cell.step[_backend(None, state).name]
    with torch._C._AutoDispatchBelowAutograd():
        return op(*inputs, *(None,) * (_STEP_INPUTS - len(inputs)), alpha, state, epsilon)


def _raise_as_torch(error: RuntimeError, allocate_results: Callable[..., object], *arguments) -> None:
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


def _backend(name: str | None, first: Tensor) -> backends.Backend:
    """The backend of a call. Fake tensors have one even if their device is absent."""
    try:
        return backends.resolve(name, first.device)
    except RuntimeError:
        row = backends.resolve_fake(name, first.device) if is_fake(first) else None
        if row is None:
            raise
        return row


# ------------------------------------------------------------------------------------------------ shapes


def _unit_channels(t: Tensor) -> Tensor:
    return t if t.size(-1) <= 1 or t.stride(-1) == 1 else t.contiguous()


def dense_like(t: Tensor) -> Tensor:
    """An uninitialised tensor for a stream `t [B, T, D]` with unit channel stride, in the layout of every such result.

    It is dense with unit stride on D, whatever the strides of `t`: time-major, as `[T, B, D]` in memory, where the
    stride of `t` over time is larger than that over the batch and neither is 0; else batch-major, which is contiguous.
    """
    batch, time, channels = t.shape
    if t.stride(1) > t.stride(0) > 0:
        return t.new_empty((time, batch, channels)).transpose(0, 1)
    return t.new_empty((batch, time, channels))


def split_gates(gates: Tensor, packed: int) -> list[Tensor]:
    """The streams `[B, T, D]` that lie side by side in `gates [B, T, packed D]`, as views."""
    channels = gates.size(-1) // packed
    return [gates.narrow(-1, i * channels, channels) for i in range(packed)]


def streams_of(streams: Sequence[Tensor], packed: int) -> list[Tensor]:
    """One view `[B, T, D]` with unit channel stride per stream."""
    units = [_unit_channels(t) for t in streams]
    return split_gates(units[0], packed) if packed else units


def allocate(
    cell: Cell, streams: Sequence[Tensor], channel: Sequence[Tensor], cu_seqlens: Tensor | None, packed: int,
    chunk: int, segment: int, save: bool,
) -> list[Tensor]:  # fmt: skip
    """Uninitialised results of the forward op, all four of them; the first `returned(save)` are returned."""
    views = streams_of(streams, packed)
    first = views[0]
    batch, time, channels = first.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    state = state_dtype(first.dtype)
    packs_events = segment > 0 and len(views) + len(channel) == cell.event_inputs
    checkpoint_rows = max(time - 1, 0) // chunk if save else 0
    event_rows = time // _EVENTS_PER_WORD + (1 if cu_seqlens is None else sequences) if packs_events else 0
    return [
        dense_like(first),
        first.new_empty((sequences, channels), dtype=state),
        first.new_empty((batch, checkpoint_rows, channels), dtype=state),
        first.new_empty((batch, event_rows, channels), dtype=torch.int32),
    ]


def check(cell: Cell, streams, channel, alpha, initial_state, cu_seqlens, packed) -> None:
    """Raise unless the tensors of a call fit together: for the kernels that are written in Python."""
    if packed < 0 or (packed and len(streams) != 1):
        raise ValueError(f"packed: expected the number of gates in one tensor, got {packed}, {len(streams)} tensors")
    least, most = cell.inputs
    vectors = len(channel) - len(cell.vectors)
    if not (least <= (packed or len(streams)) + len(channel) <= most and 0 <= vectors <= len(cell.either)):
        came = f"{len(streams)} and {len(channel)}"
        raise ValueError(f"streams, channel, packed: expected the {least} to {most} inputs of {cell.name}, got {came}")
    named = {f"streams[{i}]": t for i, t in enumerate(streams)}
    per_channel = {f"channel[{i}]": t for i, t in enumerate(channel)}
    checks.arguments(named, per_channel, alpha, initial_state, cu_seqlens, packed, cell.dtypes)
    if alpha is not None and alpha.is_complex():
        raise ValueError("alpha: expected None with complex streams")


def check_numbers(
    cell: Cell, epsilon: float | Tensor, surrogate_scale: float, packed: int, chunk: int, segment: int | torch.SymInt,
    chunk_sizes: tuple[int, int],
) -> None:  # fmt: skip
    """Raise unless the numbers of a call are such that the kernels may compute with them.

    A fake epsilon (no value) and a symbolic segment (made by `scan`) are not checked.
    """
    if isinstance(epsilon, Tensor):
        if epsilon.device.type != "cpu" or epsilon.dtype != torch.float64 or epsilon.numel() != 1:
            came = f"{epsilon.dtype} of shape {list(epsilon.shape)} on {epsilon.device}"
            raise ValueError(f"epsilon: expected one float64 value on the CPU, got {came}")
        epsilon = 0.0 if is_fake(epsilon) else epsilon.item()
    if not 0.0 <= epsilon <= 1.0:
        raise ValueError(f"epsilon: expected a value in [0, 1], got {epsilon}")
    checks.surrogate_scale(surrogate_scale)
    if not 0 <= packed <= cell.inputs[1]:
        raise ValueError(f"packed: expected a number of gates from 0 to {cell.inputs[1]}, got {packed}")
    least, most = chunk_sizes
    if not least <= chunk <= most or chunk % _EVENTS_PER_WORD:
        raise ValueError(f"chunk: expected a multiple of {_EVENTS_PER_WORD} from {least} to {most}, got {chunk}")
    if isinstance(segment, int) and (not 0 <= segment <= checks.MOST_ELEMENTS or segment % chunk):
        raise ValueError(f"segment: expected a multiple of the chunk {chunk} from 0 to 2^60, got {segment}")


def returned(save: bool) -> int:
    """How many results the forward op has."""
    return 4 if save else 2


def allocate_backward(
    streams: Sequence[Tensor], channel: Sequence[Tensor], alpha: Tensor | None, initial_state: Tensor | None,
    packed: int,
) -> list[Tensor]:  # fmt: skip
    """Uninitialised results of the backward op."""
    vectors = [*channel, *((alpha,) if alpha is not None else ())]
    states = (initial_state,) if initial_state is not None else ()
    return [
        *(dense_like(_unit_channels(t)) for t in streams),
        *(t.new_empty(t.shape) for t in vectors),
        *(t.new_empty(t.shape) for t in states),
    ]


# ------------------------------------------------------------------------------------------------ registration


#: Every cell that has ops.
CELLS: list[Cell] = []


def add_cell(cell: Cell) -> Cell:
    """Define the ops of `cell` for every backend."""
    CELLS.append(cell)
    for backend in backends.TABLE:
        _define(cell, backend)
    return cell


def add_backend(row: backends.Backend) -> None:
    """Add a row to the table of backends and define the ops of every cell for it."""
    backends.TABLE[row.name] = row
    for cell in CELLS:
        _define(cell, row.name)


def _define(cell: Cell, backend: str) -> None:
    """Define `mru::<cell>.<backend>` and its backward op with fake, autograd and vmap; the kernels come elsewhere."""
    forward, backward = f"mru::{cell.name}.{backend}", f"mru::{cell.name}_backward.{backend}"
    _library.define(f"{cell.name}.{backend}{_FORWARD}")
    _library.define(f"{cell.name}_backward.{backend}{_BACKWARD}")
    _library.define(f"{cell.name}_step.{backend}{_STEP}")
    cell.forward[backend] = getattr(getattr(torch.ops.mru, cell.name), backend)
    cell.backward[backend] = getattr(getattr(torch.ops.mru, f"{cell.name}_backward"), backend)
    cell.step[backend] = getattr(getattr(torch.ops.mru, f"{cell.name}_step"), backend)

    @torch.library.register_fake(forward, lib=_library)
    def _(streams, channel, alpha, initial_state, cu_seqlens, epsilon, surrogate_scale, reverse, packed, chunk,
          segment, save):  # fmt: skip
        check(cell, streams, channel, alpha, initial_state, cu_seqlens, packed)
        chunk_sizes = backends.TABLE[backend].module.CHUNK_SIZES
        check_numbers(cell, epsilon, surrogate_scale, packed, chunk, segment, chunk_sizes)
        return allocate(cell, streams, channel, cu_seqlens, packed, chunk, segment, save)[: returned(save)]

    @torch.library.register_fake(backward, lib=_library)
    def _(grad_h, grad_final, streams, channel, alpha, initial_state, cu_seqlens, epsilon, surrogate_scale, reverse,
          packed, chunk, segment, checkpoints, events):  # fmt: skip
        check(cell, streams, channel, alpha, initial_state, cu_seqlens, packed)
        check_numbers(
            cell, epsilon, surrogate_scale, packed, chunk, segment, backends.TABLE[backend].module.CHUNK_SIZES
        )
        given = {"grad_h": grad_h, "grad_final": grad_final, "checkpoints": checkpoints, "events": events}
        for name, t in given.items():
            if t.device != streams[0].device:
                raise ValueError(f"{name}: expected the streams' device {streams[0].device}, got {t.device}")
        return allocate_backward(streams, channel, alpha, initial_state, packed)

    @torch.library.register_fake(f"mru::{cell.name}_step.{backend}", lib=_library)
    def _(first, second, third, alpha, state, epsilon):
        inputs = [t for t in (first, second, third) if t is not None]
        streams = [t.unsqueeze(1) for t in inputs if t.dim() != 1]
        check(cell, streams, [t for t in inputs if t.dim() == 1], alpha, state, None, 0)
        checks.epsilon_value(epsilon)
        return first.new_empty(first.shape), first.new_empty(first.shape, dtype=state_dtype(first.dtype))

    _library.impl(forward, _differentiable(cell, backend), "Autograd")
    _library.impl(backward, _once_differentiable(cell, backend), "Autograd")
    _library.impl(f"mru::{cell.name}_step.{backend}", _not_differentiable(cell, backend), "Autograd")
    torch.library.register_vmap(forward, _fold_into_channels(cell.forward[backend]), lib=_library)
    torch.library.register_vmap(backward, _fold_into_channels(cell.backward[backend]), lib=_library)
    _library.impl(backward, _batch_of_gradients(cell.backward[backend]), "Batched")


def _differentiable(cell: Cell, backend: str):
    def autograd_kernel(*arguments):
        inputs = _differentiable_inputs(arguments)
        if _is_differentiated(*inputs):
            return list(_apply(_Scan, cell, backend, arguments, *inputs))
        with torch._C._AutoDispatchBelowAutograd():
            return cell.forward[backend](*arguments)

    return autograd_kernel


def _once_differentiable(cell: Cell, backend: str):
    def autograd_kernel(*arguments):
        grad_h, grad_final, *rest = arguments
        inputs = (grad_h, grad_final, *_differentiable_inputs(rest))
        if _is_differentiated(*inputs):
            reason = _no_other_derivative(cell)
            return list(_apply(_WithoutDerivative, cell.backward[backend], reason, arguments, *inputs))
        with torch._C._AutoDispatchBelowAutograd():
            return cell.backward[backend](*arguments)

    return autograd_kernel


def _not_differentiable(cell: Cell, backend: str):
    def autograd_kernel(*arguments):
        reason = f"mru::{cell.name}_step: there is no derivative; use mru::{cell.name} with T = 1"
        return _apply(_WithoutDerivative, cell.step[backend], reason, arguments, *arguments[:-1])

    return autograd_kernel


def _is_differentiated(*inputs: Tensor | None) -> bool:
    return (torch.is_grad_enabled() and _requires_grad(*inputs)) or forward_ad._current_level >= 0


def _apply(function: type[torch.autograd.Function], *arguments):
    """`function.apply` in an autograd kernel, which the dispatcher calls once for each level of torch.func."""
    if not torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    with enable_single_level_autograd_function():
        return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


def _below_autograd(op: torch._ops.OpOverload, arguments) -> list[Tensor]:
    """`op` in the forward of an autograd Function: the kernel, or the next level of torch.func."""
    if not torch._C._are_functorch_transforms_active():
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)
    # The Function has turned gradients off; the next level has its own.
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def _requires_grad(*tensors: Tensor | None) -> bool:
    for t in tensors:  # noqa: SIM110  (a generator costs more)
        if t is not None and t.requires_grad:
            return True
    return False


def _differentiable_inputs(arguments) -> list[Tensor]:
    streams, channel, alpha, initial_state, *_ = arguments
    return [t for t in (*streams, *channel, alpha, initial_state) if t is not None]


class _Scan(torch.autograd.Function):
    """`mru::<cell>` below autograd, and `mru::<cell>_backward` as its gradient."""

    @staticmethod
    def forward(ctx, cell, backend, arguments, *inputs):
        results = _below_autograd(cell.forward[backend], arguments)
        streams, channel, alpha, initial_state, cu_seqlens, epsilon, *numbers, _save = arguments
        saved = results[2:]
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)  # zeros for what is saved would be filled and never read
        ctx.save_for_backward(*inputs, cu_seqlens, epsilon, *saved)
        ctx.call = (cell, backend, len(streams), len(channel), alpha is not None, initial_state is not None)
        ctx.numbers = numbers
        return tuple(results)

    @staticmethod
    def backward(ctx, grad_h, grad_final, *_):
        cell, backend, n_streams, n_channel, has_alpha, has_initial = ctx.call
        rest = list(ctx.saved_tensors)
        streams, rest = rest[:n_streams], rest[n_streams:]
        channel, rest = rest[:n_channel], rest[n_channel:]
        alpha = rest.pop(0) if has_alpha else None
        initial_state = rest.pop(0) if has_initial else None
        cu_seqlens, epsilon, *saved = rest
        call = (streams, channel, alpha, initial_state, cu_seqlens, epsilon, *ctx.numbers)
        if not saved:
            with torch.no_grad():
                saved = cell.forward[backend](*call, True)[2:]
        _scale, _reverse, packed, *_ = ctx.numbers
        batch, time, channels = streams[0].shape
        channels //= packed or 1
        if grad_h is None:
            grad_h = streams[0].new_zeros((batch, time, channels))
        if grad_final is None:
            sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
            grad_final = streams[0].new_zeros((sequences, channels), dtype=state_dtype(streams[0].dtype))
        try:
            grads = cell.backward[backend](grad_h, grad_final, *call, *saved)
        except RuntimeError as error:
            _raise_as_torch(error, allocate_backward, streams, channel, alpha, initial_state, packed)
            raise
        return None, None, None, *grads

    @staticmethod
    def jvp(ctx, *_):
        raise NotImplementedError(_no_other_derivative(ctx.call[0]))


class _WithoutDerivative(torch.autograd.Function):
    """Run `op` below autograd; its derivatives raise NotImplementedError(`reason`).

    Under torch.compile the derivative is traced whether or not it is asked for: there it is an op that raises when it
    runs.
    """

    @staticmethod
    def forward(ctx, op, reason, arguments, *inputs):
        ctx.reason = reason
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        return tuple(_below_autograd(op, arguments))

    @staticmethod
    def backward(ctx, *grads):
        if any(t is not None and is_fake(t) for t in grads):
            inputs = [t for t in ctx.saved_tensors if t is not None]
            made = iter(torch.ops.mru.no_derivative([t for t in grads if t is not None], inputs, ctx.reason))
            return None, None, None, *(None if t is None else next(made) for t in ctx.saved_tensors)
        raise NotImplementedError(ctx.reason)

    @staticmethod
    def jvp(ctx, *_):
        raise NotImplementedError(ctx.reason)


def _raise_no_derivative(grads: list[Tensor], inputs: list[Tensor], reason: str) -> list[Tensor]:
    """Of `grads`, on which it depends so that a compiler leaves it in the backward pass."""
    raise NotImplementedError(reason)


_library.impl("no_derivative", _raise_no_derivative, "CompositeExplicitAutograd")


@torch.library.register_fake("mru::no_derivative", lib=_library)
def _(grads, inputs, reason):
    return [torch.empty_like(t) for t in inputs]


def _no_other_derivative(cell: Cell) -> str:
    return (
        f"mru::{cell.name}: there is a first derivative in reverse mode only, no second derivative and no forward-mode"
        " derivative (jvp, jacfwd, hessian)"
    )


def _fold_into_channels(op):
    """vmap: channels are independent, so the mapped dimension is folded into them."""

    def fold(size: int, t, dim: int | None):
        if not isinstance(t, Tensor):
            return t
        t = t.unsqueeze(-2).expand(*t.shape[:-1], size, t.shape[-1]) if dim is None else t.movedim(dim, -2)
        return t.flatten(-2)

    def unfold(size: int, t: Tensor) -> tuple[Tensor, int]:
        return t.unflatten(-1, (size, t.shape[-1] // size)), t.dim() - 1

    def fold_streams(size: int, t: Tensor, dim: int | None, packed: int) -> Tensor:
        if not packed:
            return fold(size, t, dim)
        t = t.unsqueeze(0).expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
        return t.unflatten(-1, (packed, t.shape[-1] // packed)).movedim(0, -2).flatten(-3)

    def rule(info, in_dims, *arguments):
        size = info.batch_size
        names = [a.name for a in op._schema.arguments]
        packed = arguments[names.index("packed")]
        folded = []
        for name, dims, value in zip(names, in_dims, arguments, strict=True):
            if name in ("epsilon", "cu_seqlens"):
                if dims is not None:
                    raise ValueError(f"{name}: expected one tensor for the whole batch, got one that vmap maps over")
                folded.append(value)
            elif name == "streams":
                folded.append([fold_streams(size, t, d, packed) for t, d in zip(value, dims, strict=True)])
            elif isinstance(value, list):
                folded.append([fold(size, t, d) for t, d in zip(value, dims, strict=True)])
            else:
                folded.append(fold(size, value, dims))
        results = op(*folded)
        unfolded = [unfold(size, t) for t in results]
        if packed and names[0] == "grad_h":  # the first is the gradient of the packed gates
            gates = results[0].unflatten(-1, (packed, size, results[0].shape[-1] // (packed * size)))
            unfolded[0] = (gates.movedim(-2, 0).flatten(-2), 0)
        return tuple(map(list, zip(*unfolded, strict=True)))

    return rule


def _batch_of_gradients(op):
    """The backward op under `is_grads_batched=True`, which uses torch's legacy vmap, not that of torch.func."""
    rule, level = _fold_into_channels(op), 1  # torch does not nest this vmap

    def kernel(*arguments):
        in_dims: list[int | list[None] | None] = []
        plain, size = [], 0
        for value in arguments:
            if isinstance(value, Tensor) and torch._C._functorch.is_legacy_batchedtensor(value):
                value = torch._remove_batch_dim(value, level, size, 0)
                size = value.shape[0]
                in_dims.append(0)
            else:
                in_dims.append([None] * len(value) if isinstance(value, list) else None)
            plain.append(value)
        results, dims = rule(SimpleNamespace(batch_size=size), in_dims, *plain)
        return [torch._add_batch_dim(t, dim, level) for t, dim in zip(results, dims, strict=True)]

    return kernel
