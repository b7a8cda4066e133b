"""From the arguments of the ops to those of kernels, and the order in which kernels run."""

from __future__ import annotations

import os
from math import isqrt
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...backends.triton.kernels.arguments import encode
from ...backends.triton.kernels.place import GRID
from ...backends.triton.launch import strides
from ...backends.triton.tuning import LANES, ceil_div
from ...checks import state_dtype
from . import backward, forward
from .layout import Block, Scan, Stream
from .step import NONE, PER_HEAD, STREAM, Form

_NVIDIA = not torch.version.hip and os.environ.get("TRITON_INTERPRET") != "1"
KERNELS = {
    name: getattr(module, name)
    for module, names in (
        (forward, ("forward", "summarize", "fold", "carry")),
        (backward, ("backward", "fold_adjoint", "carry_adjoint")),
    )
    for name in names
}
#: Steps whose rows are loaded before the first is used, or maps of segments: with float32 states, and with float64.
TILES = {"forward": (4, 2), "summarize": (4, 2), "backward": (4, 2)}
_TILE_OF_WALKS = (4, 2)
#: The most registers of a lane. Without a limit ptxas sometimes takes too few and spills.
_REGISTERS = {"backward": 255}
#: What a kernel does not read of the form, so that one more is not compiled for each.
_UNREAD = {"forward": {}, "backward": {}, "summarize": {"bonus": tl.constexpr(False)}}
_UNREAD_OF_WALKS = {"decay": NONE, "bonus": tl.constexpr(False)}
_MOST_WALKED = 64  # segments that one program walks over; if there are more, groups of them are composed first


def options(kernel: str, warps: int, amd: bool = bool(torch.version.hip)) -> dict[str, Any]:
    """The compiler's options. In the forward pass fused multiply-adds would round tiles and single steps apart."""
    common = {"num_warps": warps, "enable_fp_fusion": kernel == "backward"}
    return common if amd or kernel not in _REGISTERS else common | {"maxnreg": _REGISTERS[kernel]}


def heads_of_program(group: int) -> int:
    """The heads of a program in float32, if a head has `group` channels."""
    return block_of("forward", group, True, torch.float32)[0].channels.value


def block_of(kernel: str, group: int, aligned: bool, state: torch.dtype) -> tuple[Block, int]:
    """How a program of a kernel is laid out, and its warps. `group` is G."""
    wide = state == torch.float64
    per_lane = 1 if wide else 2
    padded = 1 << (group - 1).bit_length()
    heads = max(LANES * per_lane // padded, 1)
    per_lane = min(max(heads * padded // LANES, per_lane), 4)
    tile = TILES.get(kernel, _TILE_OF_WALKS)[wide]
    if kernel == "backward" and (per_lane > 2 or not aligned):
        tile = 2  # registers are few
    align = 2 if aligned and not wide else 1
    block = Block(*map(tl.constexpr, (align if group == 1 else 1, align, tile, heads, padded)))
    return block, min(max(heads * padded // (LANES * per_lane), 1), 32)


class Call:
    """A call of an op: its tensors as kernels take them.

    Attributes:
        segments: how many segments there is room for, those of all sequences together.
        arguments: of the kernels, by name.
    """

    def __init__(
        self, score: Tensor, value: Tensor, decay: Tensor | None, bonus: Tensor | None, initial_state: Tensor | None,
        cu_seqlens: Tensor | None, reverse: bool, chunk: int, segment: int, others: tuple[Tensor, ...], saved: bool,
    ) -> None:  # fmt: skip
        self.score, self.chunk = score, chunk
        batch, self.time, self.heads = score.shape
        self.channels = value.shape[2]
        self.group = self.channels // max(self.heads, 1)
        self.state = state_dtype(score.dtype)
        self.packed = cu_seqlens is not None
        self.sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.segment, self.segments = segment, self._count_segments(segment)
        self.aligned = self._is_aligned([t for t in (score, value, decay, *others) if t is not None and t.dim() == 3])
        self.nothing = self.rows(0, 0)
        count = self.segments // max(self.sequences, 1)
        walked_whole = self.packed or count <= _MOST_WALKED  # lengths of packed sequences are not known
        self.per_group = max(self.segments, 1) if walked_whole else 8 * isqrt(ceil_div(count, 64))
        self.groups = 1 if walked_whole else ceil_div(count, self.per_group)
        self.has_initial = initial_state is not None
        kind = NONE if decay is None else STREAM if decay.dim() == 3 else PER_HEAD
        self.form = Form(kind, *map(tl.constexpr, (bonus is not None, self.group != 1, True, _NVIDIA)))
        offsets = score.new_empty(0, dtype=torch.int64) if cu_seqlens is None else cu_seqlens.long().contiguous()
        self.numbers: dict[str, Any] = {
            "offsets": offsets, "sequences": self.sequences, "time": self.time, "channels": self.heads,
            "group": self.group, "segment_size": segment, "segments": self.segments, "chunk": chunk,
            "reverse": int(reverse), "packed": int(self.packed), "has_initial": int(self.has_initial),
            "saved": int(saved), "room": 0, "groups": self.groups, "per_group": self.per_group,
        }  # fmt: skip
        self.arguments: dict[str, Any] = {
            "score": self.stream(score),
            "value": self.stream(value),
            "decay": self.stream(self.nothing if decay is None else decay),
            "bonus": self.nothing if bonus is None else self.vector(bonus),
            "initial": self.nothing if initial_state is None else self.vector(initial_state),
        }

    def _count_segments(self, segment: int) -> int:
        if segment == 0:
            return self.sequences
        if not self.packed:
            return self.sequences * ceil_div(self.time, segment)
        # Lengths are not known: each sequence has room for one more than its share.
        return self.sequences + self.time // segment if self.sequences > 0 else 0

    def _is_aligned(self, streams: list[Tensor]) -> bool:
        """Whether every row of every stream starts at an even number of elements."""
        first = [t.data_ptr() // t.element_size() for t in streams]
        sizes = [self.heads if self.group == 1 else self.group, *first, *(n for t in streams for n in strides(t))]
        return all(n % 2 == 0 for n in sizes)

    def vector(self, t: Tensor) -> Tensor:
        """A tensor [H] or [N, D + 2 H] in the state dtype."""
        return t.to(self.state).contiguous()

    def rows(self, count: int, planes: int) -> Tensor:
        """An uninitialised tensor [count, D + planes H] in the state dtype, with an even number of planes."""
        return self.score.new_empty((count, self.channels + planes * self.heads), dtype=self.state)

    def sums(self) -> Tensor:
        """Room for sums over chunks, [rows, H]. Packed sequences leave some rows 0."""
        if self.packed:
            count = self.time // self.chunk + self.sequences
        else:
            count = self.sequences * ceil_div(self.time, self.chunk)
        return self.score.new_zeros((count, self.heads), dtype=self.state)

    def stream(self, t: Tensor) -> Stream:
        """A tensor [B, T, H] or [B, T, D], or one of other dimensions, as an argument of a kernel."""
        if t.dim() != 3:
            return Stream(self.vector(t), encode(0), encode(0))
        align = 1 if t.shape[2] == self.heads != self.channels else self._align()
        return Stream(t, *(encode(n // align) for n in strides(t)))

    def _align(self) -> int:
        return block_of("forward", self.group, self.aligned, self.state)[0].group_align.value

    # --------------------------------------------------------------------- launches

    def launch(self, name: str, programs: int, **own) -> None:
        """Run a kernel on `programs` times the blocks of heads, with the arguments that it names."""
        block, warps = block_of(name, self.group, self.aligned, self.state)
        units, row = programs * ceil_div(self.heads, block.channels.value), GRID.value
        if units == 0 or self.channels == 0:
            return
        numbers = dict(self.numbers)
        numbers["channels"] //= block.align.value
        numbers["group"] //= block.group_align.value if self.group > 1 else 1
        scan = Scan(**{k: n if isinstance(n, Tensor) else encode(n) for k, n in numbers.items()})
        arguments = {"form": self.form._replace(**_UNREAD.get(name, _UNREAD_OF_WALKS))} | self.arguments | own
        arguments |= {"block": block, "scan": scan}
        kernel = KERNELS[name]
        grid = (min(units, row), ceil_div(units, row))
        with torch.cuda.device_of(self.score):
            kernel[grid](
                **{argument: arguments[argument] for argument in kernel.arg_names},
                **options(name, warps),
            )  # fmt: skip

    def forward(self, y: Tensor, final_state: Tensor, borders: Tensor) -> None:
        own = {"y": self.stream(y), "final_state": final_state, "borders": borders, "entries": self.nothing}
        if self.segment > 0:
            maps, groups = self.rows(self.segments, 4), self.rows(self.sequences * self.groups, 4)
            own["entries"] = self.rows(self.segments, 2)
            self.launch("summarize", self.segments, maps=maps)
            if self.groups > 1:
                self.launch("fold", self.sequences * self.groups, maps=maps, groups=groups)
            self.launch("carry", self.sequences * self.groups, maps=maps, groups=groups, **own)
        self.launch("forward", self.segments, **own)

    def backward(self, grads: dict[str, Any], grad_final: Tensor, grad_initial: Tensor) -> None:
        """`grads` are the arguments of the kernel for the gradients of its inputs, and grad_y."""
        block, _ = block_of("backward", self.group, self.aligned, self.state)
        tile = block.tile.value
        self.numbers["room"] = min(self.chunk, self.time) // tile + tile - 1
        heads, group = block.channels.value, block.group.value
        programs = self.segments * ceil_div(self.heads, heads)
        room = self.score.new_empty(programs * self.numbers["room"] * heads * (group + 3), dtype=self.state)
        own = grads | {"room": room, "shifts": self.nothing}
        own |= {"grad_final": grad_final, "grad_initial": grad_initial}
        if self.segment > 0:
            maps, shifts = self.rows(self.segments, 2), self.rows(self.segments, 0)
            count = self.sequences * self.groups
            walked = {"maps": maps, "shifts": shifts, "entries": self.rows(self.segments, 2)}
            walked |= {"groups": self.rows(count, 2), "group_shifts": self.rows(count, 0)}
            form = self.form._replace(gradients=tl.constexpr(False))
            self.launch("backward", self.segments, **own | {"form": form, "grad_initial": maps, "shifts": shifts})
            if self.groups > 1:
                self.launch("fold_adjoint", count, **walked)
            self.launch("carry_adjoint", count, **own | walked)
            own |= {"grad_final": walked["entries"], "grad_initial": self.rows(self.segments, 2)}
        self.launch("backward", self.segments, **own)
