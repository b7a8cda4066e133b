"""The tensors of a call: which input each one is, their checks, and the allocation of results."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks
from ..torch_private import is_fake
from .spec import Cell

CODES_PER_WORD = 16  #: write codes of 2 bits in an int32


def _unit_channels(t: Tensor) -> Tensor:
    return t if t.size(-1) <= 1 or t.stride(-1) == 1 else t.contiguous()


def is_time_major(t: Tensor) -> bool:
    """Whether results in the layout of the stream `t [B, T, D]` lie in memory as `[T, B, D]`."""
    return t.stride(1) > t.stride(0) > 0


def dense_like(t: Tensor) -> Tensor:
    """An uninitialised result `[B, T, D]` for a stream `t [B, T, D]` with unit channel stride.

    It is dense for any strides of `t`. It is time-major, `[T, B, D]` in memory, if the stride of `t` over time is
    larger than that over the batch and neither is 0. Otherwise it is batch-major, which is contiguous.
    """
    batch, time, channels = t.shape
    if is_time_major(t):
        return t.new_empty((time, batch, channels)).transpose(0, 1)
    return t.new_empty((batch, time, channels))


def split_gates(gates: Tensor, count: int) -> list[Tensor]:
    """The streams `[B, T, D]` that lie side by side in `gates [B, T, count D]`, as views."""
    channels = gates.size(-1) // count
    return [gates.narrow(-1, i * channels, channels) for i in range(count)]


def places(cell: Cell, given: int, packed: int) -> list[int | None]:
    """The position in `inputs` of each input of the cell, then of each scheduled scalar; None if it is not given."""
    position = 0
    found: list[int | None] = []
    for i in range(len(cell.names)):
        bit = 1 << i
        if packed & bit or i == 0:
            found.append(0)
        elif given & bit:
            position += 1
            found.append(position)
        else:
            found.append(None)
    return found


def first_stream(inputs: Sequence[Tensor], packed: int) -> Tensor:
    """The cell's first input `[B, T, D]`, with unit channel stride."""
    first = _unit_channels(inputs[0])
    return split_gates(first, packed.bit_count())[0] if packed else first


def as_streams(inputs: Sequence[Tensor]) -> list[Tensor]:
    """The inputs of a step as those of a scan with T = 1: streams `[B, 1, D]` for `[B, D]`."""
    for i, t in enumerate(inputs):
        if t.dim() > 2:
            raise ValueError(f"inputs[{i}]: expected [batch, channels], got shape {list(t.shape)}")
    return [t.unsqueeze(1) if t.dim() == 2 else t for t in inputs]


def arrays(cell: Cell, inputs: Sequence[Tensor], given: int, packed: int) -> list[Tensor | None]:
    """The cell's array inputs: a stream `[B, T, D]` with unit channel stride, a per-channel input `[D]`, or None."""
    gates = iter(split_gates(_unit_channels(inputs[0]), packed.bit_count()) if packed else [_unit_channels(inputs[0])])
    found: list[Tensor | None] = []
    for place in places(cell, given, packed)[: len(cell.inputs)]:
        if place is None:
            found.append(None)
        elif place == 0:
            found.append(next(gates))
        else:
            found.append(_unit_channels(inputs[place]))
    return found


def scalars(cell: Cell, inputs: Sequence[Tensor], numbers: Sequence[float]) -> list[float]:
    """The values of the cell's scalars, in order."""
    scheduled = inputs[len(inputs) - len(cell.scheduled) :]
    return [*(t.item() for t in scheduled), *numbers]


def sequences_of(inputs: Sequence[Tensor], cu_seqlens: Tensor | None) -> int:
    """The number of sequences N."""
    return inputs[0].shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1


def allocate(
    cell: Cell, inputs: Sequence[Tensor], given: int, packed: int, cu_seqlens: Tensor | None, chunk: int, segment: int,
    save: bool,
) -> list[Tensor]:  # fmt: skip
    """Uninitialised results of the forward op: h, the final state and, with `save`, checkpoints and write codes."""
    first = first_stream(inputs, packed)
    states = (sequences_of(inputs, cu_seqlens), first.shape[-1])
    results = [dense_like(first), first.new_empty(states, dtype=cell.state_dtype(first.dtype))]
    if not save:
        return results
    kept = (checkpoint_rows(first, chunk, segment), first.shape[-1])
    checkpoints = first.new_empty(kept, dtype=cell.state_dtype(first.dtype))
    return [*results, checkpoints, allocate_codes(cell, inputs, given, packed, cu_seqlens, segment)]


def checkpoint_rows(first: Tensor, chunk: int, segment: int) -> int:
    """The number of rows `[D]` of checkpoints that the forward op saves, for a stream `first [B, T, D]`."""
    batch, time, _ = first.shape
    return batch * (max(time - 1, 0) // chunk) + spare_rows(segment)


def spare_rows(segment: int) -> int:
    """The number of unused rows of checkpoints, and of write codes.

    If the backend chooses the segment, no size may be 0 or 1, because torch.compile would record another graph.
    """
    return 2 if segment < 0 else 0


def allocate_codes(
    cell: Cell, inputs: Sequence[Tensor], given: int, packed: int, cu_seqlens: Tensor | None, segment: int
) -> Tensor:
    """Uninitialised write codes of the forward op."""
    first = first_stream(inputs, packed)
    rows = code_rows(cell, inputs, given, cu_seqlens, segment)
    return first.new_empty((rows, first.shape[-1]), dtype=torch.int32)


def code_rows(cell: Cell, inputs: Sequence[Tensor], given: int, cu_seqlens: Tensor | None, segment: int) -> int:
    """The number of rows `[D]` of write codes that the forward op makes, in words of 16 steps."""
    if segment == 0 or not cell.has_codes(given):
        return 0
    batch, time, _ = inputs[0].shape
    in_batch_row = time // CODES_PER_WORD + (1 if cu_seqlens is None else sequences_of(inputs, cu_seqlens))
    return batch * in_batch_row + spare_rows(segment)


def allocate_backward(
    cell: Cell, inputs: Sequence[Tensor], initial_state: Tensor | None, reset_state: Tensor | None
) -> list[Tensor]:
    """Uninitialised results of the backward op: a gradient for each array in `inputs`, then for both states."""
    of_arrays = inputs[: len(inputs) - len(cell.scheduled)]
    grads = [dense_like(_unit_channels(t)) if t.dim() == 3 else t.new_empty(t.shape) for t in of_arrays]
    return [*grads, *(t.new_empty(t.shape) for t in (initial_state, reset_state) if t is not None)]


# ------------------------------------------------------------------------------------------------ checks


def check(
    cell: Cell, inputs, given: int, packed: int, initial_state, cu_seqlens, resets=None, reset_state=None
) -> None:
    """Raise unless the tensors of a call fit together. For fakes and for kernels that are written in Python."""
    array_bits = (1 << len(cell.inputs)) - 1
    if packed & ~(given & array_bits) or (packed and not packed & 1):
        raise ValueError(f"packed: expected a mask of given inputs, the first of them included, got {packed}")
    if given & cell.required != cell.required or given >> len(cell.names):
        raise ValueError(f"given: expected a mask of the inputs of {cell.name}, got {given}")
    expected = given.bit_count() - max(packed.bit_count() - 1, 0)
    if len(inputs) != expected:
        raise ValueError(f"inputs: expected {expected} tensors for the masks {given} and {packed}, got {len(inputs)}")
    streams, channel = {"inputs[0]": inputs[0]}, dict[str, Tensor]()
    of_complex = set(cell.complex_names)
    for i, (spec, place) in enumerate(zip(cell.inputs, places(cell, given, packed), strict=False)):
        per_channel = spec.kind == "channel" or (spec.kind == "either" and place and inputs[place].dim() == 1)
        if place == 0 and spec.kind == "channel":
            raise ValueError(f"packed: expected streams, got {spec.name} among them, which comes per channel")
        if place:
            (channel if per_channel else streams)[f"inputs[{place}]"] = inputs[place]
        if place and spec.complex:
            of_complex.add(f"inputs[{place}]")
        if i > 0 and packed and place and not per_channel:
            raise ValueError(f"packed: expected every stream side by side, got {spec.name} apart")
    states = {"initial_state": initial_state, "reset_state": reset_state}
    checks.arguments(streams, channel, states, cu_seqlens, resets, packed.bit_count(), cell.dtypes, of_complex)


def check_numbers(
    cell: Cell, inputs: Sequence[Tensor], numbers: Sequence[float], chunk: int, segment: int,
    chunk_sizes: tuple[int, int],
) -> None:  # fmt: skip
    """Raise unless scalars, `chunk` and `segment` are in their ranges.

    The value of a fake scalar is not checked, because it has none.
    """
    scheduled = inputs[len(inputs) - len(cell.scheduled) :]
    for scalar, t in zip(cell.scheduled, scheduled, strict=True):
        if t.device.type != "cpu" or t.dtype != torch.float64 or t.numel() != 1:
            came = f"{t.dtype} of shape {list(t.shape)} on {t.device}"
            raise ValueError(f"{scalar.name}: expected one float64 value on the CPU, got {came}")
        if not is_fake(t):
            scalar.check(t.item())
    if len(numbers) != len(cell.numbers):
        raise ValueError(f"numbers: expected {[s.name for s in cell.numbers]}, got {list(numbers)}")
    for scalar, value in zip(cell.numbers, numbers, strict=True):
        scalar.check(value)
    least, most = chunk_sizes
    if not least <= chunk <= most or chunk % CODES_PER_WORD:
        raise ValueError(f"chunk: expected a multiple of {CODES_PER_WORD} from {least} to {most}, got {chunk}")
    if not -1 <= segment <= checks.MOST_ELEMENTS:
        raise ValueError(f"segment: expected -1 for the backend's own choice or 0 to 2^60 steps, got {segment}")
