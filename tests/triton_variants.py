"""The variants of the Triton kernels that mru_kernels.backends.triton can launch.

A variant is a kernel, a cell, a dtype, which inputs come as streams, and whether rows are aligned to 16 bytes. They
follow from the specs of the cells. triton_offline.py compiles them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch

from mru_kernels import ops

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
REAL = {"c64": "fp32", "c128": "fp64"}  # the dtype of the two parts of a channel
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
COMPLEX = {"c64": torch.complex64, "c128": torch.complex128}
OF_MAPS = ("fold", "carry", "check")  # kernels that read no stream
MAIN = "bmru"  # the cell that is compiled for every dtype, layout and architecture
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Variant:
    kernel: str
    cell: str = MAIN
    arch: str = "sm_90"
    dtype: str = "fp32"
    streams: tuple[str, ...] = ()  # the inputs that come as streams
    codes: bool = False
    aligned: bool = True
    overwrites: bool = False  # epsilon is 0
    resets: bool = False  # the state is reset before some steps, and boundaries have gradients
    narrow: bool = False  # at most 64 channels, which leave two to a lane

    @property
    def spec(self) -> ops.Cell:
        return ops.CELLS[self.cell]

    @property
    def functions(self):
        from mru_kernels.backends.triton.cell import find

        implementation = find(self.cell)
        return implementation.complex if self.dtype in REAL else implementation.real

    @property
    def element(self) -> str:
        """Dtype of the streams as kernels take them."""
        return REAL.get(self.dtype, self.dtype)

    @property
    def state(self) -> str:
        return "fp64" if self.element == "fp64" else "fp32"

    @property
    def per_channel(self) -> tuple[str, ...]:
        """The inputs that come per channel, but for optional ones."""
        return tuple(i.name for i in self.spec.inputs if not i.optional and i.name not in self.streams)

    @property
    def reads(self):
        from mru_kernels.backends.triton.tuning import Reads

        counts = len(self.streams), len(self.per_channel)
        flags = self.codes, self.resets, self.spec.complex_state, self.spec.composes, self.functions.gated.value
        return Reads(DTYPES[self.element], *counts, *flags)

    @property
    def tile(self) -> int:
        from mru_kernels.backends.triton import tuning

        return tuning.tile(self.kernel, self.reads)

    @property
    def of_lane(self) -> int:
        from mru_kernels.backends.triton import tuning

        parts = 1 + (self.dtype in REAL or self.spec.complex_state)
        most = tuning.channels_of_lane(self.kernel, DTYPES[self.element], parts, self.aligned)
        return min(most, 2) if self.narrow else most

    @property
    def row_bits(self) -> int | None:
        """What a lane loads of a stream's row at once; None: not tested."""
        if not self.aligned:
            return 64 if self.dtype == "c64" else None
        if self.spec.complex_state and self.kernel not in OF_MAPS:
            return None  # two neighbours load one element of a stream
        bits = self.of_lane * 8 * BYTES[self.state if self.kernel in OF_MAPS else self.element]
        return bits if bits > 32 else None

    @property
    def stops(self) -> bool:
        """Whether it ends before its segment, which its lanes decide together."""
        return self.kernel == "summarize_adjoint" and self.overwrites

    @property
    def is_main(self) -> bool:
        """Whether every input that may be a stream and is not optional is one, and no other."""
        required = tuple(i.name for i in self.spec.inputs if not i.optional and i.kind != "channel")
        return self.streams == required and self.kernel not in OF_MAPS

    @property
    def name(self) -> str:
        words = [self.kernel, self.dtype, self.cell]
        if self.kernel not in OF_MAPS:
            words += ["codes" if self.codes else "streams", "+".join(self.streams)]
        words += ["epsilon 0"] * self.overwrites + ["resets"] * self.resets
        words += ["unaligned"] * (not self.aligned) + ["narrow"] * self.narrow
        return " ".join(words)


def variants() -> list[Variant]:
    """Every variant for sm_90, but only the main ones of fp16, whose code is bf16's, of unaligned rows, of few channels
    and of resets (bf16 and fp32); and for each other architecture the main ones of bf16 and fp32.
    """
    every = [v for cell in ops.CELLS.values() for dtype in _dtypes(cell) for v in _of_cell(cell, dtype)]
    every += _of_maps()
    main = [v for v in every if v.cell == MAIN and v.dtype == "bf16" and v.is_main]
    every += [replace(v, dtype="fp16") for v in main] + [replace(v, aligned=False) for v in main]
    every += [replace(v, dtype=dtype, narrow=True) for dtype in ("bf16", "fp32") for v in main]
    complex_main = [v for v in every if v.dtype == "c64" and v.is_main]
    every += [replace(v, aligned=False) for v in complex_main]
    others = [replace(v, dtype=dtype) for dtype in ("bf16", "fp32") for v in main] + complex_main
    every += [replace(v, arch=arch) for arch in ARCHITECTURES if arch != "sm_90" for v in others]
    every += [replace(v, resets=True) for v in others]
    resetting = [v for v in every if _writes_may_reset(v) and v.kernel not in ("fold", "carry")]
    return every + [replace(v, overwrites=True) for v in resetting]


def _dtypes(cell: ops.Cell) -> list[str]:
    return ["bf16", "fp32", "fp64", *(name for name, dtype in COMPLEX.items() if dtype in cell.dtypes)]


def _writes_may_reset(variant: Variant) -> bool:
    from mru_kernels.backends.triton.kernels.affine import WRITE_OR_HOLD

    return variant.functions.rules is WRITE_OR_HOLD


def _of_cell(cell: ops.Cell, dtype: str) -> Iterator[Variant]:
    """The kernels that read streams or codes, for every choice of streams."""
    sees_state = Variant("", cell.name, dtype=dtype).functions.adjoint_sees_state.value
    choices = [(False,) if i.kind == "channel" else (True,) if i.kind == "stream" and not i.optional else (True, False)
               for i in cell.inputs]  # fmt: skip
    for chosen in product(*choices):
        streams = tuple(i.name for i, is_stream in zip(cell.inputs, chosen, strict=True) if is_stream)
        absent = [i for i, is_stream in zip(cell.inputs, chosen, strict=True) if i.kind == "stream" and not is_stream]
        codes = cell.has_codes(((1 << len(cell.inputs)) - 1) & ~cell.mask(*(i.name for i in absent)))
        form = Variant("", cell.name, dtype=dtype, streams=streams)
        yield replace(form, kernel="forward")
        yield replace(form, kernel="backward")
        if not cell.composes:
            continue
        yield replace(form, kernel="summarize", codes=codes)
        if codes:
            yield replace(form, kernel="backward", codes=True)
            if form.is_main:  # from codes these two read no stream of the cell's
                yield replace(form, kernel="forward", codes=True)
                yield replace(form, kernel="summarize_adjoint", codes=True)
        elif not sees_state:
            yield replace(form, kernel="summarize_adjoint")


def _of_maps() -> list[Variant]:
    """The kernels that compose maps, for each kind of factor and state dtype."""
    found = {}
    for cell in ops.CELLS.values():
        for dtype in _dtypes(cell):
            variant = Variant("", cell.name, dtype=dtype, streams=tuple(i.name for i in cell.inputs[:2]))
            if dtype != "bf16":  # its states are float32
                found.setdefault((variant.functions.rules, dtype), variant)
    return [replace(v, kernel=kernel) for v in found.values() for kernel in OF_MAPS]
