"""What the ranks of a group exchange: tensors, errors, and descriptions of their calls, which must be equal."""

from __future__ import annotations

import hashlib
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup

NOT_COMPILED = "sequence_parallel: ranks exchange tensors, which runs eagerly, outside compiled graphs"

_HEADER = struct.Struct("<?q8s")  # whether the rank failed, the length of its segment, a digest of its text
_MESSAGE = 512  # bytes of the header and the text together


@dataclass
class _GroupState:
    """State shared by all calls of a group: a lock for the one thread that may be in a call, and a count of calls."""

    lock: Any = field(default_factory=threading.RLock)
    calls: int = 0


_GROUP_STATES: WeakKeyDictionary[Group, _GroupState] = WeakKeyDictionary()


class Ranks:
    """The ranks of a process group. They all make the same exchanges in the same order."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.shared = _GROUP_STATES.setdefault(group, _GroupState())

    def __deepcopy__(self, memo: dict) -> Ranks:
        return self  # a process group cannot be copied

    def __reduce__(self):
        raise TypeError("sequence_parallel: a process group cannot be pickled; pickle `module`, or save the state_dict")

    def gather(self, make: Callable[[], Tensor], like: Tensor) -> Tensor:
        """The result of `make` of every rank, `[ranks, *like.shape]`. If `make` raises on one rank, all ranks raise."""
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
        results = every[:, :-1].reshape(len(every), *real.shape).contiguous()  # `view_as_complex` needs the strides
        return torch.view_as_complex(results) if made.is_complex() else results


class CollectiveCall:
    """Context of one call on every rank of a group. Ranks compare their calls before they exchange tensors.

    If a rank raises before a comparison, the others receive its message in that comparison. `scans` is the number of
    comparisons in the call.
    """

    def __init__(self, ranks: Ranks, scans: int, name: str | None = None) -> None:
        self.ranks = ranks
        self.left = scans  # comparisons to come; 0 during a scan, where `Ranks.gather` reports errors
        if name is None:
            ranks.shared.calls += 1
            name = f"call {ranks.shared.calls}"
        self.name = name

    def __enter__(self) -> CollectiveCall:
        if not self.ranks.shared.lock.acquire(blocking=False):
            raise RuntimeError("sequence_parallel: expected one thread at a time in a group, and another is in a call")
        return self

    def __exit__(self, _kind: Any, error: BaseException | None, _traceback: Any) -> None:
        try:
            if isinstance(error, Exception) and self.left:
                self._compare(1, 0, f"{type(error).__name__}: {error}")
        finally:
            self.ranks.shared.lock.release()

    @contextmanager
    def agreed(self, what: str, time: int) -> Iterator[list[int]]:
        """The segment length of every rank. Raises on every rank where one rank failed or makes another call.

        Args:
            what: a description of the call, which must be the same on every rank.
            time: the length of this rank's segment.
        """
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
        """Exchange one row per rank: whether it failed, its segment length, a digest of its text, and the text."""
        encoded = text.encode(errors="replace")
        message = _HEADER.pack(failed, time, hashlib.sha256(encoded).digest()[:8]) + encoded
        message = message[:_MESSAGE].ljust(_MESSAGE, b"\0")
        rows = _gather(torch.frombuffer(bytearray(message), dtype=torch.uint8), self.ranks.group).tolist()
        texts = [bytes(row[_HEADER.size :]).rstrip(b"\0").decode(errors="replace") for row in rows]
        return [(*_HEADER.unpack(bytes(row[: _HEADER.size])), text) for row, text in zip(rows, texts, strict=True)]


def _gather(t: Tensor, group: Group) -> Tensor:
    """The real tensor `t` of every rank, `[ranks, *t.shape]`, on the device of `t`."""
    device = t.device
    if dist.get_backend(group) == "nccl" and device.type == "cpu":
        t = t.to("cuda")
    every = t.new_empty((dist.get_world_size(group), *t.shape))
    dist.all_gather(list(every.unbind(0)), t, group=group)
    return every.to(device)


def describe(value: Any) -> str:
    """A text of an argument, for `agreed`: dtype and shape of a tensor, with "T" for its time; else the value."""
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(describe, value))})"
    if isinstance(value, Tensor) and value.dim() == 0:
        value = value.item()
    if not isinstance(value, Tensor):
        return str(float(value) if type(value) is int else value)  # 1 equals 1.0
    over_time = value.dim() == 3 or (value.dim() == 2 and value.dtype == torch.bool)
    shape = ["T" if over_time and i == 1 else size for i, size in enumerate(value.shape)]
    text = f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, shape))}]"
    if value.dtype in (torch.int32, torch.int64) and value.device.type == "cpu":
        text += f" of checksum {zlib.crc32(str(value.tolist()).encode()):08x}"
    return text
