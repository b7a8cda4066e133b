"""From the arguments of an op to those of kernels, and the order in which kernels run."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ... import ops
from . import kernels
from .cell import find
from .kernels.affine import REAL
from .kernels.arguments import Block, Form, Maps, Resets, Scan, Stream, Walk, encode, encode_double
from .kernels.place import GRID
from .tuning import LANES, MOST_WALKED, VECTOR_BYTES, Reads, ceil_div, channels_of_lane, options, tile


def real(t: Tensor) -> Tensor:
    """A complex tensor as kernels take it, a channel as two real ones; a view if channels have unit stride."""
    return torch.view_as_real(t).flatten(-2) if t.is_complex() else t


def strides(t: Tensor) -> list[int]:
    """Strides over batch and time; 0 for a dimension of size 1, whose stride is arbitrary."""
    return [n if size > 1 else 0 for size, n in zip(t.shape[:2], t.stride(), strict=False)]


class Call:
    """A call of an op: its tensors as kernels take them.

    Attributes:
        parts: real numbers of a channel in states.
        doubled: whether it has one in streams and two in states.
        arrays: the cell's inputs, `[B, T, D]`, or `[D]` in the state dtype, or None; complex ones as real.
        segments: how many segments there is room for, those of all sequences together.
        codes: whether the call packs write codes.
        arguments: of the kernels, by name.
    """

    def __init__(
        self, cell: ops.Cell, inputs: Sequence[Tensor], given: int, packed: int, numbers: Sequence[float],
        initial_state: Tensor | None, cu_seqlens: Tensor | None, resets: Tensor | None, reset_state: Tensor | None,
        reverse: bool, chunk: int, segment: int, *, saved: bool = True, grad_h: Tensor | None = None,
        grad_checkpoints: Tensor | None = None, slots: Tensor | None = None,
    ) -> None:  # fmt: skip
        arrays = ops.arrays(cell, inputs, given, packed)
        implementation = find(cell.name)
        assert implementation is not None
        self.doubled = cell.complex_state
        self.parts = 2 if self.doubled or inputs[0].is_complex() else 1
        functions = implementation.complex if self.parts == 2 else implementation.real
        assert functions is not None
        self.functions = functions
        self.first = real(arrays[0])  # type: ignore[arg-type]
        self.state = ops.state_dtype(self.first.dtype)
        self.arrays = [None if t is None else real(t) if t.dim() == 3 else self.vector(t) for t in arrays]
        self.time, width = self.first.shape[1:]
        self.channels = 2 * width if self.doubled else width
        self.packed = cu_seqlens is not None
        self.sequences = ops.sequences_of(inputs, cu_seqlens)
        self.split = segment > 0
        self.codes = self.split and cell.has_codes(given)
        self.segments = self._count_segments(segment)
        self.reads = self._reads(cell, resets is not None)
        self.aligned = self._is_aligned(grad_h)
        self.align = VECTOR_BYTES // self.first.element_size() if self.aligned else 1 if self.doubled else self.parts
        self.p = implementation.scalars(ops.scalars(cell, inputs, numbers), self.state)
        self.overwrites = implementation.overwrites(self.p)
        self.nothing = self.rows(0)  # stands in for missing tensors; flags keep kernels from reading it
        self.arguments = self._arguments(cell, given, chunk, resets, grad_checkpoints)
        self.arguments["initial"] = self.nothing if initial_state is None else self.vector(initial_state)
        if resets is not None:
            state = self.nothing if reset_state is None else self.vector(reset_state)
            self.arguments["resets"] = Resets(resets.contiguous().view(torch.uint8), state, self.nothing)
        rows = max(self.time - 1, 0) // chunk if saved else 0
        states = (initial_state is not None, reset_state is not None)
        flags = (reverse, self.packed, given & ((1 << len(arrays)) - 1), *states, rows, False)
        sizes = (self.sequences, self.time, self.channels // self.align, segment, self.segments)
        count = -1 if slots is None or initial_state is None else initial_state.shape[0]
        offsets, rows_of = self._integers(cu_seqlens), self._integers(slots)
        self.scan_sizes = Scan(offsets, offsets, rows_of, *(encode(int(n)) for n in (*sizes, *flags, count)))
        self.arguments["scan"] = self.scan_sizes

    def _count_segments(self, segment: int) -> int:
        if segment == 0:
            return self.sequences
        if not self.packed:
            return self.sequences * ceil_div(self.time, segment)
        # Lengths are not known: each sequence has room for one more than its share.
        return self.sequences + self.time // segment if self.sequences > 0 else 0

    def _reads(self, cell: ops.Cell, resets: bool) -> Reads:
        streams = sum(t is not None and t.dim() == 3 for t in self.arrays)
        required = [t for t, spec in zip(self.arrays, cell.inputs, strict=True) if not spec.optional]
        per_channel = sum(t is not None and t.dim() == 1 for t in required)
        flags = (cell.complex_state, cell.composes, self.functions.gated.value)
        return Reads(self.first.dtype, streams, per_channel, self.codes, resets, *flags)

    def _is_aligned(self, grad_h: Tensor | None) -> bool:
        """Whether every row of every stream starts at a multiple of 16 bytes."""
        element = self.first.element_size()
        vector = VECTOR_BYTES // element
        streams = [t for t in (*self.arrays, grad_h) if t is not None and t.dim() == 3]
        starts = [t.data_ptr() // element for t in streams]
        sizes = [self.first.shape[2], *starts, *(n for t in streams for n in strides(t))]
        return all(n % vector == 0 for n in sizes)

    def _arguments(
        self, cell: ops.Cell, given: int, chunk: int, resets: Tensor | None, grad_checkpoints: Tensor | None
    ) -> dict:
        streams = sum(1 << i for i, t in enumerate(self.arrays) if t is not None and t.dim() == 3)
        absent = sum(1 << i for i, s in enumerate(cell.inputs) if s.kind != "channel" and not given >> i & 1)
        channels = ((1 << len(self.arrays)) - 1) & ~streams & ~absent
        given_resets = (resets is not None, grad_checkpoints is not None)
        form = (streams, channels, self.codes, self.overwrites, *given_resets, chunk, self.doubled)
        return {
            "cell": self.functions,
            "rules": self.functions.rules,
            "form": Form(*map(tl.constexpr, form)),
            "overwrites": self.overwrites,
            "inputs": tuple(self.stream(t) for t in self.arrays),
            "scalars": tuple(map(encode_double, self.p)),
            "entries": self.nothing,
            "lates": self.nothing,
            "resets": None,
            "grad_checkpoints": grad_checkpoints,
        }

    def _integers(self, t: Tensor | None) -> Tensor:
        return self.first.new_empty(0, dtype=torch.int64) if t is None else t.to(torch.int64).contiguous()

    def vector(self, t: Tensor) -> Tensor:
        """A tensor `[D]` or `[N, D]` in the state dtype."""
        if self.doubled and not t.is_complex():
            t = torch.complex(t.to(self.state), torch.zeros_like(t, dtype=self.state))
        return real(t).to(self.state).contiguous()

    def rows(self, count: int) -> Tensor:
        """An uninitialised tensor `[count, D]` in the state dtype."""
        return self.first.new_empty((count, self.channels), dtype=self.state)

    def maps(self, count: int) -> Maps:
        return Maps(self.rows(count), self.rows(count))

    def sums(self, chunk: int) -> Tensor:
        """Room for the sums over chunks of an input per channel, `[rows, D]`. Packed sequences leave some rows 0."""
        if self.packed:
            return self.rows(self.time // chunk + self.sequences).zero_()
        return self.rows(self.sequences * ceil_div(self.time, chunk))

    def stream(self, t: Tensor | None) -> Stream:
        """A tensor `[B, T, D]`, or one with rows `[..., D]`, as an argument of a kernel."""
        if t is None:
            return Stream(self.nothing, encode(0), encode(0))
        over = strides(t) if t.dim() == 3 else (0, 0)
        return Stream(t, *(encode(n // self.align) for n in over))

    # --------------------------------------------------------------------- launches

    def launch(self, name: str, programs: int, **own) -> None:
        """Run a kernel on `programs` times the blocks of channels, with the arguments that it names."""
        most = LANES * channels_of_lane(name, self.first.dtype, self.parts, self.aligned)
        width = min(most, max(1 << max(self.channels - 1, 0).bit_length(), 2 * LANES))
        units = programs * ceil_div(self.channels, width)
        if units == 0:
            return
        kernel, row = getattr(kernels, name), GRID.value
        block = Block(*map(tl.constexpr, (self.align, tile(name, self.reads), width)))
        arguments = self.arguments | own | {"block": block}
        grid = (min(units, row), ceil_div(units, row))
        with torch.cuda.device_of(self.first):
            kernel[grid](**{name: arguments[name] for name in kernel.arg_names}, **options(name, self.reads))

    def scan(self, name: str, own: dict, enters: str, leaves: str, adjoint_of: Tensor | None = None) -> None:
        """Run the kernel `name`: over whole sequences, or over all segments at once if time is cut.

        After a cut, `check` decides on the device whether the sequences are scanned again whole (csrc/maps/cut.h).

        Args:
            own: arguments of the kernel.
            enters, leaves: names of the arguments that enter and leave a segment, [segments, D], or a sequence, [N, D].
            adjoint_of: [N, D], enters from the right in the backward pass.
        """
        if not self.split:
            self.launch(name, self.sequences, **own)
            return
        lates = self.rows(self.segments)
        maps = self.summarize(name, own, enters, leaves, lates)
        walked = self.walk(maps, own[leaves], adjoint_of)
        exits = self.rows(self.segments)
        scan = self.scan_sizes._replace(flag=walked["scan"].flag)
        own = own | {"scan": scan, "lates": lates}
        self.launch(name, self.segments, **own | {enters: walked["entries"], leaves: exits})
        if name == "forward" and self.overwrites:
            return  # values were only copied
        self.launch("check", self.segments, **walked, lates=lates, exits=exits)
        whole = scan._replace(segment_size=encode(0), rescan=encode(1))
        self.launch(name, self.sequences, **own | {"scan": whole})

    def summarize(self, name: str, own: dict, enters: str, leaves: str, lates: Tensor) -> Maps:
        """The map of each segment: of the state, or of the adjoint for `backward`."""
        maps = self.maps(self.segments)
        if name == "forward":
            self.launch("summarize", self.segments, **own, maps=maps, lates=lates)
        elif not self.functions.adjoint_sees_state.value:
            self.launch("summarize_adjoint", self.segments, **own, maps=maps, lates=lates)
        else:
            # The adjoint has the conjugate factors of the state. Its offsets are what `backward` passes on from 0; the
            # gradients that this writes are overwritten.
            form = self.arguments["form"]._replace(boundaries=tl.constexpr(False))  # not read: no variant of its own
            self.launch("summarize", self.segments, **own, form=form, maps=maps, lates=lates)
            if self.parts == 2:
                maps.factor[:, 1::2].neg_()
            zeros = self.rows(self.segments).zero_()
            self.launch(name, self.segments, **own | {enters: zeros, leaves: maps.offset, "lates": lates})
        return maps

    def walk(self, maps: Maps, final_state: Tensor, adjoint_of: Tensor | None) -> dict:
        """Compose the maps of the segments into what enters each, `entries` [segments, D], and the final state.

        It starts from the initial state or, from the right, with the gradient of the final state, `adjoint_of`. Returns
        the arguments of `carry`.
        """
        count = self.segments // max(self.sequences, 1)
        whole = self.packed or count <= MOST_WALKED
        per_group = count if whole else max(isqrt(count // 2) // MOST_WALKED * MOST_WALKED, MOST_WALKED)
        groups = 1 if whole else ceil_div(count, per_group)
        own: dict[str, Any] = {
            "walk": Walk(encode(groups), encode(per_group), encode(int(adjoint_of is not None))),
            "scan": self.scan_sizes._replace(flag=self.first.new_empty(1, dtype=torch.int64)),
            "maps": maps,
            "groups": self.maps(self.sequences * groups),
            "entries": self.rows(self.segments),
            "final_state": final_state,
        }
        if adjoint_of is not None:
            own |= {"initial": adjoint_of, "scan": own["scan"]._replace(has_initial=encode(1))}
        if groups > 1:
            self.launch("fold", self.sequences * groups, **own)
        self.launch("carry", self.sequences * groups, **own)
        return own

    def compose(self, codes: Tensor) -> Maps:
        """The steps of each sequence as one map, [N, D]. `codes` is room for the write codes."""
        maps = self.maps(self.segments)
        self.launch("summarize", self.segments, codes=codes, maps=maps, lates=self.rows(self.segments))
        return self._composed(self.scan_sizes, maps, self.segments // max(self.sequences, 1))

    def total(self, sums: Tensor, chunk: int) -> Tensor:
        """The sum over the chunks of each sequence, [N, D] in float64: the offset of maps with the factor 1."""
        maps = Maps(torch.ones_like(sums, dtype=torch.float64), sums.double())
        count = ceil_div(self.time, chunk)
        scan = self.scan_sizes._replace(segment_size=encode(chunk), segments=encode(self.sequences * count))
        return self._composed(scan, maps, count, rules=REAL).offset

    def _composed(self, scan: Scan, maps: Maps, count: int, **own) -> Maps:
        """The maps of the segments of each sequence as one map, [N, D]. `count` is its number of segments."""
        if not self.packed and count > MOST_WALKED:
            groups, maps = self._fold(scan, maps, count, MOST_WALKED, **own)
            scan, count = scan._replace(segments=encode(self.sequences * groups)), groups
        _, maps = self._fold(scan, maps, count, maps.factor.shape[0], **own)
        return maps

    def _fold(self, scan: Scan, maps: Maps, count: int, per_group: int, **own) -> tuple[int, Maps]:
        """How many groups of segments a sequence has, and their maps. `count` is its number of segments."""
        groups = 1 if per_group >= count else ceil_div(count, per_group)
        rows = (self.sequences * groups, self.channels)
        folded = Maps(maps.factor.new_empty(rows), maps.offset.new_empty(rows))
        walk = Walk(encode(groups), encode(per_group), encode(0))
        self.launch("fold", self.sequences * groups, scan=scan, walk=walk, maps=maps, groups=folded, **own)
        return groups, folded
