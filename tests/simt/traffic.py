"""The launches of the CUDA kernels and the bytes that they move, against the budget."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

import simt
from bench import errors
from mru_kernels import ops
from mru_kernels.backends import CHUNK
from simt.calls import Op, cells_of, measure, require

GROUPS = 32  # most groups of threads that share the steps of a tile

#: Values with which every step of a cell writes, or none does.
WRITES: dict[str, dict[str, dict[str, float]]] = {
    "bmru": {"always": {"threshold": 0.0}, "never": {"threshold": torch.inf}},
    "schmitt": {"always": {"low": 0.0, "high": 0.0}, "never": {"low": -torch.inf, "high": torch.inf}},
}


def forms(cell: ops.Cell) -> list[dict[str, str]]:
    """Each choice of a cell's optional inputs, and of how those come that may come as either: kinds by name."""
    choices = [[None, i.kind] if i.optional else ["stream", "channel"] if i.kind == "either" else [i.kind]
               for i in cell.inputs]  # fmt: skip
    names = [i.name for i in cell.inputs]
    return [{name: kind for name, kind in zip(names, row, strict=True) if kind} for row in product(*choices)]


def _dtype_of(cell: ops.Cell, name: str, kind: str, stream: torch.dtype) -> torch.dtype:
    """The dtype of an input in calls with streams of a dtype."""
    if name in cell.complex_names:
        return cell.state_dtype(stream)
    return errors.state_dtype(stream) if kind == "channel" else stream


def check_traffic(dtype: torch.dtype) -> None:
    """Launches, and bytes of streams and codes, equal the budget; what else is moved is a few states a segment."""
    batch, time = 2, 4 * CHUNK
    for name in cells_of(dtype):
        for form, channels, reverse, steps in product(forms(ops.CELLS[name]), (16, 3), (False, True), (0, CHUNK)):
            for when, values in WRITES.get(name, {"": {}}).items():
                arrays = {}
                for argument, kind in form.items():
                    shape = (channels,) if kind == "channel" else (batch, time, channels)
                    drawn = torch.rand(shape) - 0.5  # no decay reaches 1
                    arrays[argument] = drawn.to(_dtype_of(ops.CELLS[name], argument, kind, dtype))
                    if argument in values:
                        arrays[argument].fill_(values[argument])
                op = Op(ops.CELLS[name], arrays, reverse, steps)
                _check_launches(op, per_channel=sum(kind == "channel" for kind in form.values()))
                _check_traffic(op, arrays, when)


def _check_launches(op: Op, per_channel: int) -> None:
    """One launch scans whole sequences; a cut takes more. One adds up each gradient per channel."""
    traits = simt.control().cells()[op.cell.name]
    cut = op.arguments[-1] > 0 and op.cell.composes
    results, _ = measure(op.forward)
    forward = simt.control().launches()
    measure(op.backward, results)
    got = forward, simt.control().launches()
    expected = 1 + (2 + 2 * (not traits["resets"])) * cut, 1 + per_channel + (4 + traits["adjoint_sees_state"]) * cut
    require(got == expected, f"launches of {op.cell.name}, {cut=} {per_channel=}: {got}, not {expected}")


def _check_traffic(op: Op, arrays: dict[str, Tensor], when: str) -> None:
    stream = next(iter(arrays.values()))
    batch, time, channels = stream.shape
    dtype, steps = stream.dtype, op.arguments[-1] * op.cell.composes
    state = op.cell.state_dtype(dtype)
    e, s = dtype.itemsize, state.itemsize
    streams = sum(t.dim() == 3 for t in arrays.values())
    per_channel = len(arrays) - streams
    traits = simt.control().cells()[op.cell.name]
    resets, sees_state = traits["resets"], traits["adjoint_sees_state"]
    n = stream.numel()
    cut, has_codes = steps > 0, op.cell.has_codes(op.given)
    segments = batch * time // (steps or time)
    packs = cut and has_codes

    results, moved = measure(op.forward)
    _, final_state, checkpoints, _ = results
    states = checkpoints.nbytes + final_state.nbytes
    form = f"{op.cell.name} of {', '.join(arrays)}, {when=} {channels=} {per_channel=} {op.arguments[-3]=} {steps=}"
    where = f"{form} {moved}"
    rereads = 2 if cut and not has_codes else 1
    require(moved["stream"] == [rereads * streams * n * e, n * e], f"forward, streams: {where}")
    require(moved["codes"] == [n // 4 * packs] * 2, f"forward, codes: {where}")
    # factor, offset and entry written; inputs per channel for each kernel; factor and offset twice, entry.
    carries = segments * channels * s
    # Where `check` follows: `exit`, a flag and, unless writes overwrite, a magnitude each. All are read, `entry` twice,
    # and the flag by each thread of the uncut form.
    late = carries // (2 if state.is_complex else 1) * (not resets) * cut
    flags = 4 * (256 * batch + 1) * cut
    checked = cut and not resets
    written = states + 3 * carries * cut + (carries + late + 4) * checked
    require(moved["state"][1] == written, f"forward, states written: {where}, not {written}")
    # Each group of a tile's steps reads what comes per channel once more.
    block = -(-channels // 64) * 64
    groups = GROUPS * segments * block * s * per_channel
    bound = (9 if cut else 2) * carries + groups + (5 * carries + late + flags) * checked
    require(moved["state"][0] <= bound, f"forward, states read: {where}, at most {bound}")

    _, moved = measure(op.backward, results)
    where = f"{form} {moved}"
    again = n if cut else 0  # steps whose map is made first
    if cut and when == "always":  # of each segment the first steps that are loaded together
        again = segments * channels * (4 if channels == 16 and e == 2 and not has_codes else 8)
    passes = 2 if cut and sees_state else 1  # of `backward`; then the maps are made from the inputs alone
    reads = passes * (streams + 1) * n + (streams * (not has_codes) + (not sees_state)) * again
    require(moved["stream"] == [reads * e, passes * streams * n * e], f"backward, streams: {where}, not {reads * e}")
    words = 2 * segments if again < n else time * batch // 16  # and the word after it
    require(moved["codes"] == [4 * words * channels * packs, 0], f"backward, codes: {where}")
    sums = per_channel * carries * passes + per_channel * channels * s
    states = passes * final_state.nbytes + sums
    late = 0 if sees_state else late
    written = states + (4 * carries + late + 4 + (passes - 1) * carries) * cut
    require(moved["state"][1] == written, f"backward, states written: {where}, not {written}")
    flags += 4 * 1024 * per_channel * cut  # and by each thread that adds up sums
    bound = passes * (checkpoints.nbytes + groups) + (16 if cut else 3) * passes * carries + late + flags + sums
    require(moved["state"][0] <= bound, f"backward, states read: {where}, at most {bound}")
    require(moved["index"] == moved["mask"] == [0, 0], where)


def check_mask_traffic(dtype: torch.dtype) -> None:
    """The mask of resets is read once per step and row, and no reset costs few bits."""
    batch, time, channels = 2, 1024 + 4 * CHUNK, 16
    for name, reverse, steps in product(cells_of(dtype), (False, True), (0, CHUNK)):
        arrays = {}
        for i in ops.CELLS[name].inputs:
            shape = (channels,) if i.kind == "channel" else (batch, time, channels)
            arrays[i.name] = (torch.rand(shape) - 0.5).to(_dtype_of(ops.CELLS[name], i.name, i.kind, dtype))
        plain = Op(ops.CELLS[name], arrays, reverse, steps)
        op = Op(ops.CELLS[name], arrays, reverse, steps, resets=torch.zeros(batch, time, dtype=torch.bool))
        results, expected = measure(plain.forward)
        _check_mask_traffic(op, measure(op.forward)[1], expected, batch, time)
        _check_mask_traffic(op, measure(op.backward, results)[1], measure(plain.backward, results)[1], batch, time)


def _check_mask_traffic(op: Op, moved: dict[str, list[int]], expected: dict[str, list[int]], batch: int, time: int):
    where = f"{op.cell.name} {op.arguments[-3]=} {op.arguments[-1]=} {moved}"
    require(moved["mask"] == [batch * time, 0], f"mask: {where}")
    words, groups = batch * time // 32, batch * -(-time // 1024)
    require(moved["index"][1] == 4 * (words + groups), f"bits of the mask written: {where}")
    for kind in ("stream", "codes", "state"):
        require(moved[kind] == expected[kind], f"{kind}: {where}, not {expected[kind]}")
