"""Triton kernels for CUDA and ROCm devices, and for CPU tensors under Triton's interpreter.

The kernels are in triton_kernels.py, the cells in triton_cells.py. A kernel is compiled per dtype, set of inputs, kind
of layout (aligned to 16 bytes or not), whether epsilon is 0, and width of a block of channels, which is one unless
they are few; and not for sizes.
"""

from __future__ import annotations

import os
from functools import partial
from math import isqrt

import torch
from torch import Tensor

from .. import checks, ops
from . import CHUNK

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_LANES = 64 if torch.version.hip else 32
_VECTOR_BYTES = 16  # that a lane loads or stores at once
CHUNK_SIZES = (CHUNK, CHUNK)  # each would be a set of kernels more
#: Programs, a warp each, that a multiprocessor is given where time is cut, by the bytes of an element: about as many as
#: it has registers for at once, and of float32 forward and of half precision backward up to twice as many, which is
#: faster.
_WARPS = {2: 18, 4: 32, 8: 18, 16: 18}
_BACKWARD_WARPS = {2: 16, 4: 12, 8: 12, 16: 12}
_WHOLE = 9  # of them from which on time is not cut
_FEW = 4 * CHUNK  # steps of a sequence that is not worth cutting
_START = 16  # steps in the time of which a program of `backward` begins and ends
_WALK = 32  # segments that one program walks over; with more of them groups of segments are walked over first
_MULTIPROCESSORS_ELSEWHERE = 132  #: assumed where no GPU can be queried: interpreter, meta and fake tensors

_library = torch.library.Library("mru", "IMPL")


def load() -> None:
    """Register `mru::*.triton`. Raises ImportError where Triton is not installed."""
    from .triton_cells import CELLS

    for cell in ops.CELLS:
        if cell.name in CELLS:
            for key in ("CUDA", "CPU") if _INTERPRETED else ("CUDA",):
                _library.impl(f"{cell.name}.triton", partial(_forward, cell), key)
                _library.impl(f"{cell.name}_backward.triton", partial(_backward, cell), key)
                _library.impl(f"{cell.name}_step.triton", partial(_step, cell), key)


def segment(sequences: int, steps: int, channels: int, itemsize: int, device: torch.device) -> int:
    """Steps of a segment, from sizes and the number of multiprocessors only.

    Sequences are scanned whole where they alone give a multiprocessor `_WHOLE` programs; else time is cut so that it is
    given about `_WARPS`.
    """
    multiprocessors = _multiprocessors(device)
    programs = sequences * _blocks(channels, itemsize)  # if time were not cut
    if programs == 0 or programs >= _WHOLE * multiprocessors or steps < _FEW * sequences:
        return 0
    return _ceil_div(_ceil_div(steps, sequences * (_WARPS[itemsize] * multiprocessors // programs)), CHUNK) * CHUNK


def adjoint_segment(sequences: int, steps: int, channels: int, itemsize: int, device: torch.device) -> int:
    """Steps of a segment in the backward pass, where the forward pass cuts time.

    All programs take about as long, so few of the places that multiprocessors have for them should stay empty. Of a few
    numbers of rounds it is the one that takes the least time, counted in steps.
    """
    given = _BACKWARD_WARPS[itemsize] * _multiprocessors(device)
    programs = sequences * _blocks(channels, max(itemsize, 4))  # by the bytes of states
    length = _ceil_div(steps, sequences)
    lengths: dict[int, int] = {}
    for rounds in range(1, 5):
        segment = _ceil_div(_ceil_div(length, max(rounds * given // programs, 1)), CHUNK) * CHUNK
        taken = _ceil_div(programs * _ceil_div(length, segment), given)
        lengths.setdefault(taken * (segment + _START), segment)
    return lengths[min(lengths)]


def _of_backward(given: int, sizes: tuple[int, int, int], itemsize: int, device: torch.device) -> int:
    """The steps of a segment that were given, unless they are what the forward pass takes by itself."""
    if given == 0 or given != segment(*sizes, itemsize, device):
        return given
    return adjoint_segment(*sizes, itemsize, device)


def _blocks(channels: int, itemsize: int) -> int:
    return _ceil_div(channels * itemsize, _LANES * _VECTOR_BYTES)


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda" or not (torch.cuda.is_initialized() or torch.cuda.is_available()):
        return _MULTIPROCESSORS_ELSEWHERE
    return torch.cuda.get_device_properties(device).multi_processor_count


def options(
    kernel: str, events: bool, per_channel: int, dtype: torch.dtype, amd: bool = bool(torch.version.hip)
) -> dict:
    """How a kernel is compiled for streams of a dtype, that of its parts if complex. In the forward pass a fused
    multiply-add would round differently from the CPU.

    Left alone, ptxas takes at times so many registers that warps are lost, and at times so few that it spills.
    """
    common = {"num_warps": 1, "enable_fp_fusion": kernel in ("summarize_adjoint", "backward")}
    single = ops.state_dtype(dtype) == torch.float32
    most = {"forward": 168 if single else 255, "summarize": 255, "fold": 255, "backward": 168 if single else 255}
    if events:
        del most["forward"]  # it would take more
    if events and per_channel == 0:
        del most["summarize"]
    if events and single:
        most |= {"summarize_adjoint": 168} | ({"summarize": 112} if per_channel == 0 else {})
    if dtype.itemsize == 2:
        most["backward"] = 255  # two tiles at once
    limit = None if amd else most.get(kernel)
    return common | ({} if limit is None else {"maxnreg": limit})


def tile(kernel: str, inputs: int, events: bool, per_channel: int, dtype: torch.dtype) -> int:
    """Rows of each stream that a kernel loads ahead of their use: as many as registers allow. Of maps, for walks."""
    single = ops.state_dtype(dtype) == torch.float32
    if kernel in ("fold", "carry"):
        return 32 if single else 16
    if kernel == "summarize" and dtype.itemsize == 2:
        return 4  # beside as many of the next tile
    if kernel == "summarize_adjoint" and events:
        return 16
    if kernel == "backward":
        return 4 if inputs <= 2 and per_channel == 0 and single else 2
    return 8


def channels_of_lane(kernel: str, dtype: torch.dtype, parts: int, aligned: bool) -> int:
    """The most that a lane holds: 16 bytes of a row of states for kernels that keep many states, else of a stream; and
    one channel, of so many parts, where a walk is as long as its rounds of loads, of which there are then more at once.
    """
    if kernel in ("fold", "carry"):
        return parts
    held = ops.state_dtype(dtype) if kernel in ("summarize_adjoint", "backward") else dtype
    return _VECTOR_BYTES // held.itemsize if aligned else 2


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# ------------------------------------------------------------------------- a call, as kernels take it


def _strides(t: Tensor) -> list[int]:
    """Strides over batch and time; 0 for a dimension of size 1, whose stride is arbitrary."""
    return [n if size > 1 else 0 for size, n in zip(t.shape[:2], t.stride(), strict=False)]


def _real(t: Tensor) -> Tensor:
    """A complex tensor as the kernels take it, a channel as two real ones; a view if channels lie side by side."""
    return torch.view_as_real(t).flatten(-2) if t.is_complex() else t


class _Call:
    """The arguments of an op, bound to the names that the kernels give them.

    `packs` tells whether the split form packs events; `slots` counts the places for segments.
    """

    def __init__(
        self, cell, streams, channel, alpha, initial_state, cu_seqlens, epsilon, surrogate_scale, reverse, packed,
        chunk, segment, *, saved: bool = True, grad_h: Tensor | None = None,
    ):  # fmt: skip
        from .triton_cells import CELLS, COMPLEX_CELLS, surrogate
        from .triton_kernels import Scan, encode

        functions = (COMPLEX_CELLS if streams[0].is_complex() else CELLS)[cell.name]
        self.parts = 2 if streams[0].is_complex() else 1
        self.views = [_real(t) for t in ops.streams_of(streams, packed)]
        first = self.views[0]
        self.first, self.state = first, ops.state_dtype(first.dtype)
        batch, time, channels = first.shape
        self.time, self.channels = time, channels
        self.inputs = [first, *map(self.vector, channel), *self.views[1:]]
        self.per_channel = len(channel)
        self.packed = cu_seqlens is not None
        self.sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
        self.split = segment > 0
        self.packs = self.split and len(self.inputs) == cell.event_inputs
        self.slots = self.sequences
        if self.split and cu_seqlens is None:
            self.slots *= _ceil_div(time, segment)
        elif self.split and self.sequences > 0:  # lengths are not known: each has a place more than its share
            self.slots += time // segment

        element = first.element_size()
        vector = _VECTOR_BYTES // element
        every = [*self.views, *(() if grad_h is None else (grad_h,))]
        sizes = [channels, *(t.data_ptr() // element for t in every), *(n for t in every for n in _strides(t))]
        self.aligned = all(n % vector == 0 for n in sizes)
        self.align = vector if self.aligned else self.parts
        rows = max(time - 1, 0) // chunk if saved else 0
        flags = (reverse, cu_seqlens is not None, alpha is not None, initial_state is not None)
        scan = (self.sequences, time, channels // self.align, segment, self.slots, *flags, rows, False)
        nothing = self.rows(0)  # stands in for missing tensors; flags keep kernels from reading it
        offsets = first.new_empty(0, dtype=torch.int64) if cu_seqlens is None else self._offsets(cu_seqlens)
        bend, tie, gain = surrogate(surrogate_scale, self.state)
        self.arguments = {
            "inputs": tuple(map(self.stream, self.inputs)),
            "scan": Scan(*(encode(int(n)) for n in scan)),
            "offsets": offsets,
            "flag": offsets,  # likewise not read
            "alpha": nothing if alpha is None else self.vector(alpha),
            "initial": nothing if initial_state is None else self.vector(initial_state),
            "entries": nothing,
            "epsilon": epsilon.item(),
            "FORGETS": functions.encode is not None and epsilon.item() == 0,
            "bend": bend,
            "tie": tie,
            "gain": gain,
            **{name.upper(): function for name, function in functions._asdict().items()},
            "EVENTS": self.packs,
            "CHANNELS": ((1 << len(channel)) - 1) << 1,
            "CHUNK": chunk,
            "ALIGN": self.align,
        }

    def vector(self, t: Tensor) -> Tensor:
        """A tensor [D] or [N, D] in the state dtype."""
        return _real(t).to(self.state).contiguous()

    @staticmethod
    def _offsets(cu_seqlens: Tensor) -> Tensor:
        return cu_seqlens.to(torch.int64).contiguous()

    def rows(self, count: int) -> Tensor:
        """Uninitialised [count, D] in the state dtype."""
        return self.first.new_empty((count, self.channels), dtype=self.state)

    def sums(self, of_alpha: bool, chunk: int) -> Tensor:
        """Room for sums over chunks: of alpha, then of each input that comes per channel; nothing if there is none.

        Those of packed sequences have rows to spare, which are 0.
        """
        if not of_alpha and self.per_channel == 0:
            return self.rows(0)
        rows = self.time // chunk + self.sequences if self.packed else self.sequences * _ceil_div(self.time, chunk)
        new = self.first.new_zeros if self.packed else self.first.new_empty
        return new((1 + self.per_channel, rows, self.channels), dtype=self.state)

    def saved(self, checkpoints: Tensor, events: Tensor, batch: int, chunk: int) -> dict[str, Tensor]:
        """The saved tensors as kernel arguments. ValueError unless shape, dtype and device are this call's."""
        words = self.time // 16 + (self.sequences if self.packed else 1) if self.packs else 0
        rows, channels = max(self.time - 1, 0) // chunk, self.channels
        for name, t, expected, dtype in (
            ("checkpoints", _real(checkpoints), (batch, rows, channels), self.state),
            ("events", events, (batch, words, channels // self.parts), torch.int32),
        ):
            if t.shape != expected or t.dtype != dtype or t.device != self.first.device:
                came = f"{list(t.shape)}, {t.dtype} on {t.device}"
                raise ValueError(f"{name}: expected {list(expected)}, {dtype} on {self.first.device}, got {came}")
        return {"checkpoints": _real(checkpoints).contiguous(), "events": events.contiguous()}

    def stream(self, t: Tensor):
        """A tensor [B, T, D], or [D], as a kernel's argument."""
        from .triton_kernels import Stream, encode

        strides = (0, 0) if t.dim() == 1 else _strides(t)
        return Stream(t, *(encode(n // self.align) for n in strides))

    def tile(self, name: str) -> int:
        return tile(name, len(self.inputs), self.packs, self.per_channel, self.first.dtype)

    def options(self, name: str) -> dict:
        return options(name, self.packs, self.per_channel, self.first.dtype)

    def launch(self, name: str, programs: int, **own) -> None:
        """Run a kernel on `programs` times the blocks of channels, with the arguments that it names."""
        from . import triton_kernels

        most = _LANES * channels_of_lane(name, self.first.dtype, self.parts, self.aligned)
        block = min(most, max(1 << max(self.channels - 1, 0).bit_length(), 2 * _LANES))
        units = programs * _ceil_div(self.channels, block)
        if units > 0:
            kernel, row = getattr(triton_kernels, name), triton_kernels.GRID.value
            arguments = self.arguments | own | {"BD": block, "TILE": self.tile(name)}
            grid = (min(units, row), _ceil_div(units, row))
            with torch.cuda.device_of(self.first):
                kernel[grid](**{name: arguments[name] for name in kernel.arg_names}, **self.options(name))

    def scan(self, name: str, own: dict, enters: str, leaves: str, adjoint_of: Tensor | None = None) -> None:
        """Run the kernel `name`: over whole sequences, or over all segments at once if time is cut.

        Args:
            enters, leaves: names of the kernel's arguments for the states that enter and leave a segment, [slots, D],
                or a sequence, [sequences, D].
            adjoint_of: [sequences, D], enters from the right in the backward pass.

        After a cut, `check` decides on the device whether the call is scanned again as a whole (csrc/cells/cut.h).
        """
        from .triton_kernels import encode

        if not self.split:
            self.launch(name, self.sequences, **own)
            return
        factors, sums, lates, exits = (self.rows(self.slots) for _ in range(4))
        summary = "summarize" if adjoint_of is None else "summarize_adjoint"
        self.launch(summary, self.slots, **own, factors=factors, sums=sums, lates=lates)
        walked = self.walk(factors, sums, own[leaves], adjoint_of)
        own = own | {"flag": walked["flag"]}
        self.launch(name, self.slots, **own | {enters: walked["entries"], leaves: exits})
        if adjoint_of is None and self.arguments["FORGETS"]:
            return  # values were only copied
        self.launch("check", self.slots, **walked, lates=lates, exits=exits)
        whole = self.arguments["scan"]._replace(segment=encode(0), redo=encode(1))
        self.launch(name, self.sequences, **own | {"scan": whole})

    def walk(self, factors: Tensor, sums: Tensor, final_state: Tensor, adjoint_of: Tensor | None) -> dict:
        """Compose the segments' affine maps: `entries` takes what enters each segment, [slots, D], and `final_state`
        what leaves the last. It starts from the initial state or, from the right, with the gradient of the final state,
        `adjoint_of`. Returns the arguments of `carry`.
        """
        from .triton_kernels import Walk, encode

        segments = self.slots // max(self.sequences, 1)
        whole = self.packed or segments <= _WALK
        per_group = segments if whole else max(isqrt(segments // 2) // _WALK * _WALK, _WALK)
        groups = 1 if whole else _ceil_div(segments, per_group)
        own = {
            "walk": Walk(encode(groups), encode(per_group), encode(int(adjoint_of is not None))),
            "factors": factors,
            "sums": sums,
            "entries": self.rows(self.slots),
            "final_state": final_state,
            "flag": self.first.new_empty(1, dtype=torch.int64),
            "group_factors": self.rows(self.sequences * groups),
            "group_sums": self.rows(self.sequences * groups),
        }
        if adjoint_of is not None:
            own |= {"initial": adjoint_of, "scan": self.arguments["scan"]._replace(has_initial=encode(1))}
        if groups > 1:
            self.launch("fold", self.sequences * groups, **own)
        self.launch("carry", self.sequences * groups, **own)
        return own


# ------------------------------------------------------------------------- the two ops


def _forward(
    cell, streams, channel, alpha, initial_state, cu_seqlens, epsilon, surrogate_scale, reverse, packed, chunk, segment,
    save,
):  # fmt: skip
    ops.check_numbers(cell, epsilon, surrogate_scale, packed, chunk, segment, CHUNK_SIZES)
    ops.check(cell, streams, channel, alpha, initial_state, cu_seqlens, packed)
    call = _Call(
        cell, streams, channel, alpha, initial_state, cu_seqlens, epsilon, surrogate_scale, reverse, packed, chunk,
        segment, saved=save,
    )  # fmt: skip
    results = ops.allocate(cell, streams, channel, cu_seqlens, packed, chunk, segment, save)
    h, final_state, checkpoints, events = map(_real, results)
    own = {"h": call.stream(h), "final_state": final_state, "checkpoints": checkpoints, "events": events}
    call.scan("forward", own, "entries", "final_state")
    return results[: ops.returned(save)]


def _step(cell, first, second, third, alpha, state, epsilon):
    if second is None and third is not None:
        raise ValueError("second: expected a tensor beside the third, got None")
    given = [t for t in (first, second, third) if t is not None]
    streams = [t.unsqueeze(1) for t in given if t.dim() != 1]
    channel = [t for t in given if t.dim() == 1]
    if len(streams) > 1 and given[-1].dim() == 1:
        raise ValueError(f"third: expected [batch, channels] after another stream, got {list(given[-1].shape)}")
    epsilon = torch.tensor(epsilon, dtype=torch.float64, device="cpu")
    h, after = _forward(cell, streams, channel, alpha, state, None, epsilon, 1.0, False, 0, CHUNK, 0, False)
    return h.squeeze(1), after


def _backward(
    cell, grad_h, grad_final, streams, channel, alpha, initial_state, cu_seqlens, epsilon, surrogate_scale, reverse,
    packed, chunk, segment, checkpoints, events,
):  # fmt: skip
    ops.check_numbers(cell, epsilon, surrogate_scale, packed, chunk, segment, CHUNK_SIZES)
    ops.check(cell, streams, channel, alpha, initial_state, cu_seqlens, packed)
    batch, time, channels = streams[0].shape
    channels //= packed or 1
    sizes = (batch if cu_seqlens is None else cu_seqlens.numel() - 1, batch * time, channels)
    checks.like("grad_h", grad_h, streams[0], (batch, time, channels), "[batch, time, channels]")
    checks.like("grad_final", grad_final, streams[0], (sizes[0], channels), "[sequences, channels]")
    segment = _of_backward(segment, sizes, streams[0].dtype.itemsize, grad_h.device)
    grad_h = _real(ops.streams_of([grad_h.to(streams[0].dtype)], 0)[0])
    call = _Call(
        cell, streams, channel, alpha, initial_state, cu_seqlens, epsilon, surrogate_scale, reverse, packed, chunk,
        segment, grad_h=grad_h,
    )  # fmt: skip
    grads = ops.allocate_backward(streams, channel, alpha, initial_state, packed)
    written = [_real(t) for t in grads]
    n_streams = len(streams)
    views = ops.split_gates(written[0], packed) if packed else written[:n_streams]
    in_place = initial_state is not None and written[-1].dtype == call.state
    grad_initial = written[-1] if in_place else call.rows(call.sequences)
    partial = call.sums(alpha is not None, chunk)
    own = {"grad_h": call.stream(grad_h), "grad_final": call.vector(grad_final), "partial": partial}
    own |= call.saved(checkpoints, events, batch, chunk) | {"grad_initial": grad_initial}
    own["states"] = call.rows(call.slots * (min(call.time, chunk) // call.tile("backward")))
    own["grads"] = tuple(map(call.stream, [views[0], *(partial.view(-1) for _ in channel), *views[1:]]))
    call.scan("backward", own, "grad_final", "grad_initial", adjoint_of=own["grad_final"])

    summed = [*partial[1:], *partial[:1]]
    for grad, rows in zip(written[n_streams : n_streams + len(channel) + (alpha is not None)], summed, strict=False):
        grad.copy_(rows.sum(0, dtype=torch.float64))  # in a fixed order
    if initial_state is not None and not in_place:
        written[-1].copy_(grad_initial)
    return grads
