"""How time is cut and how kernels are compiled: measured numbers, and functions of sizes alone."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...checks import state_dtype
from .. import CHUNK

CHUNK_SIZES = (CHUNK, CHUNK)  # each other size would be one more set of kernels
LANES = 64 if torch.version.hip else 32
VECTOR_BYTES = 16  # the most that a lane loads or stores at once
#: Programs, a warp each, for each multiprocessor if time is cut, by bytes of an element. They are about as many as its
#: registers have room for; up to twice as many are faster forward in float32 and backward in half precision.
_WARPS = {2: 18, 4: 32, 8: 18, 16: 18}
_BACKWARD_WARPS = {2: 16, 4: 12, 8: 12, 16: 12}
_WHOLE = 9  # programs for each multiprocessor from which on time is not cut
_LEAST = 4 * CHUNK  # steps of a sequence that is worth cutting
_START = 16  # fixed cost of a `backward` program, in steps
MOST_WALKED = 32  # segments that one program walks over; if there are more, groups of segments are composed first
_MULTIPROCESSORS_ELSEWHERE = 132  # where no GPU can be queried: interpreter, meta and fake tensors


def segment(sequences: int, steps: int, channels: int, itemsize: int, device: torch.device) -> int:
    """Steps of a segment, from sizes and the number of multiprocessors only; 0 if sequences are scanned whole.

    Sequences are scanned whole if they alone give each multiprocessor `_WHOLE` programs. Else time is cut so that it
    gets about `_WARPS`.
    """
    multiprocessors = multiprocessors_of(device)
    programs = sequences * _blocks(channels, itemsize)  # if time were not cut
    if programs == 0 or programs >= _WHOLE * multiprocessors or steps < _LEAST * sequences:
        return 0
    return ceil_div(ceil_div(steps, sequences * (_WARPS[itemsize] * multiprocessors // programs)), CHUNK) * CHUNK


def adjoint_segment(sequences: int, steps: int, channels: int, itemsize: int, device: torch.device) -> int:
    """Steps of a segment in the backward pass, if the forward pass cuts time.

    All programs take about as long, so the last round of them should leave few multiprocessors idle. Of a few numbers
    of rounds it takes the fastest, counted in steps.
    """
    at_once = _BACKWARD_WARPS[itemsize] * multiprocessors_of(device)
    programs = sequences * _blocks(channels, max(itemsize, 4))  # by the bytes of states
    length = ceil_div(steps, sequences)
    lengths: dict[int, int] = {}
    for rounds in range(1, 5):
        segment = ceil_div(ceil_div(length, max(rounds * at_once // programs, 1)), CHUNK) * CHUNK
        needed = ceil_div(programs * ceil_div(length, segment), at_once)
        lengths.setdefault(needed * (segment + _START), segment)
    return lengths[min(lengths)]


def _blocks(channels: int, itemsize: int) -> int:
    return ceil_div(channels * itemsize, LANES * VECTOR_BYTES)


def multiprocessors_of(device: torch.device) -> int:
    if device.type != "cuda" or not (torch.cuda.is_initialized() or torch.cuda.is_available()):
        return _MULTIPROCESSORS_ELSEWHERE
    return torch.cuda.get_device_properties(device).multi_processor_count


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# ------------------------------------------------------------------------- how a kernel is compiled


class Reads(NamedTuple):
    """What decides how a kernel is compiled: mostly how many registers it needs for a step."""

    dtype: torch.dtype  # of the streams; of their parts if they are complex
    streams: int
    per_channel: int = 0  # inputs per channel, but for optional ones
    codes: bool = False
    resets: bool = False
    doubled: bool = False  # whether a channel has two parts in states and one in streams
    composes: bool = True  # whether the cell's steps do; if not, the last bit of a state may decide a step
    gated: bool = False  # whether a step computes gates that read no state

    @property
    def is_single(self) -> bool:
        return state_dtype(self.dtype) == torch.float32

    @property
    def is_half(self) -> bool:
        return self.dtype.itemsize == 2


#: The most registers of a lane, from streams and from codes, each with float32 and with float64 states. Without a limit
#: (None) ptxas sometimes takes too many for the warps that should fit, and sometimes too few, and spills.
_REGISTERS = {
    "forward": ((168, 255), (None, None)),
    "summarize": ((255, 255), (255, 255)),
    "summarize_adjoint": ((None, 208), (168, None)),
    "fold": ((255, 255), (255, 255)),
    "backward": ((168, 208), (168, 208)),
}
_REGISTERS_OF_ENCODING = (112, None)  # `summarize` with codes and without inputs per channel
_REGISTERS_OF_PULLING = (None, None)  # `summarize_adjoint` with neither codes nor inputs per channel
_REGISTERS_OF_TWO_TILES = 255  # `backward` in half precision, and of gates in float64 or of complex states


_REGISTERS_OF_MODES = 255  # of `forward` of a cell that selects between its modes
_REGISTERS_WITH_MORE = 168  # of `forward` and `summarize` with resets, and of codes to halves; they spill with less


def options(kernel: str, reads: Reads, amd: bool = bool(torch.version.hip)) -> dict:
    """The compiler's options.

    In the forward pass a fused multiply-add would round differently from the CPU. Where the last bit of a state
    decides, the backward pass must recompute the same states.
    """
    fuses = kernel in ("summarize_adjoint", "backward") and reads.composes
    common = {"num_warps": 1, "enable_fp_fusion": fuses}
    if amd or kernel not in _REGISTERS:
        return common
    limits = _REGISTERS[kernel][reads.codes]
    if kernel == "summarize" and reads.codes and reads.per_channel == 0:
        limits = _REGISTERS_OF_ENCODING
    if kernel == "summarize_adjoint" and not reads.codes and reads.per_channel == 0:
        limits = _REGISTERS_OF_PULLING
    limit = limits[not reads.is_single]
    if kernel == "backward" and (reads.is_half or (reads.gated and (reads.doubled or not reads.is_single))):
        limit = _REGISTERS_OF_TWO_TILES
    expands_halves = kernel == "forward" and reads.codes and reads.is_half
    if expands_halves or (kernel in ("forward", "summarize") and reads.resets):
        limit = max(limit or 0, _REGISTERS_WITH_MORE)
    if kernel == "forward" and not reads.composes:
        limit = _REGISTERS_OF_MODES
    return common | ({} if limit is None else {"maxnreg": limit})


def tile(kernel: str, reads: Reads) -> int:
    """Steps whose rows a kernel loads before their use, or maps in a walk: as many as registers allow."""
    if kernel in ("fold", "carry"):
        return 32 if reads.is_single else 16
    steps = _steps_loaded(kernel, reads)
    if not reads.gated:
        return steps
    # LLVM computes the gates of all steps of a tile before the first state.
    return max(1, steps // (2 if kernel == "backward" or reads.dtype == torch.float32 else 4))


def _steps_loaded(kernel: str, reads: Reads) -> int:
    """`tile` of a kernel that reads streams, for a cell whose steps compute no gates."""
    if kernel == "summarize" and reads.is_half:
        return 4  # and as many of the next tile
    if kernel == "forward" and reads.is_half and reads.doubled:
        return 2  # with 4, ptxas spills
    if kernel == "summarize_adjoint" and reads.codes:
        return 16
    if kernel == "backward":
        few = reads.streams <= 2 and reads.per_channel == 0 and not reads.resets
        return 4 if few and reads.is_single else 2
    return 8


def channels_of_lane(kernel: str, dtype: torch.dtype, parts: int, aligned: bool) -> int:
    """The most channels of a lane, each of `parts` numbers: 16 bytes of a row of a stream.

    Of a row of states in kernels that hold many states. One channel in walks, which take as long as their rounds of
    loads: more programs then load at once.
    """
    if kernel in ("fold", "carry"):
        return parts
    held = state_dtype(dtype) if kernel in ("summarize_adjoint", "backward") else dtype
    return VECTOR_BYTES // held.itemsize if aligned else 2
