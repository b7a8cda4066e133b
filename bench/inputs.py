"""Seeded inputs of every cell, for tests, comparison, timing and the demo.

A case has a value for each factor. Some factors are common to all cells; a cell declares the others
(`python_ref.Cell`). The cell draws its tensors.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor

from .reference import CELLS, python_ref

DTYPES: dict[str, torch.dtype] = python_ref.DTYPES
COMPLEX_DTYPES: dict[str, torch.dtype] = python_ref.COMPLEX_DTYPES  # for the cells that take complex streams

CHUNK_SIZE = 64  # steps between two boundaries; every backend supports it

Options = Mapping[str, Any]

#: The factors of every cell. The first value of each is the default of `case`.
COMMON_FACTORS: dict[str, tuple] = {
    "time": (64, 0, 1, 2, 3, 63, 65, 127, 1000, 4097),
    "batch": (3, 1, "packed"),
    "channels": (17, 1, 3, 8, 64, 100),
    "initial_state": ("none", "integer", "real"),
    "layout": ("contiguous", "chunked", "time-major"),
    "parameters": ("float32", "as streams"),
    "reverse": (False, True),
    "resets": ("none", "to zeros", "to a state"),
    "boundaries": (False, True),
    "nonfinite": (False, True),
}


@dataclass(frozen=True)
class Case:
    """Everything that determines a call except its device: cell, dtype of the streams, a value per factor, seed."""

    cell: str
    dtype: torch.dtype
    options: Options
    seed: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, T, D) of the streams."""
        batch = self.options["batch"]
        return (1 if batch == "packed" else batch, self.options["time"], self.options["channels"])

    def label(self) -> str:
        """The options that differ from the default, sizes excepted."""
        factors = COMMON_FACTORS | CELLS[self.cell].factors
        words = ["packed"] if self.options["batch"] == "packed" else []
        for name, value in self.options.items():
            if name not in ("time", "batch", "channels") and value != factors[name][0]:
                words.append(name if value is True else f"{name}={value}")
        return " ".join(words)

    def build(self) -> Call:
        """Draw the inputs, on the CPU."""
        cell = CELLS[self.cell]
        draw = python_ref.Draw(self.shape, self.dtype, self.options, self.seed, cell.complex_state)
        tensors = cell.draw(draw, self.options)
        if self.options["initial_state"] != "none":
            tensors["initial_state"] = draw.initial_state(self.options["initial_state"])
        tensors |= _laid_out({k: t for k, t in tensors.items() if t.dim() == 3}, self.options["layout"])
        settings = {name: self.options.get(name, default) for name, default in cell.scalars.items()}
        settings["reverse"] = self.options["reverse"]
        if draw.cu_seqlens is not None:
            settings["cu_seqlens"] = draw.cu_seqlens
        if self.options["resets"] != "none":
            settings["resets"] = draw.resets()
        if self.options["resets"] == "to a state":
            tensors["reset_state"] = draw.initial_state("real")
        if self.options["boundaries"]:
            settings |= {"return_boundaries": True, "chunk_size": CHUNK_SIZE}
        if cell.settle is not None:
            tensors |= cell.settle(tensors | settings)
        return call(self.cell, tensors, settings, label=self.label(), generator=draw.generator)


@dataclass(frozen=True)
class Call:
    """Arguments of a cell's op, and the gradients of its results.

    Attributes:
        cell: name of the op.
        tensors: floating-point arguments by name. The first is a stream `[B, T, D]`. Each has a gradient.
        settings: the other arguments.
        grad_h: `[B, T, D]` in the streams' dtype.
        grad_final: `[B, D]`, or `[N, D]` with cu_seqlens, in the state dtype.
        grad_boundaries: `[B, floor((T - 1) / chunk_size), D]` in the state dtype; None if these are not returned.
        label: names the case in tables.
    """

    cell: str
    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    grad_h: Tensor
    grad_final: Tensor
    grad_boundaries: Tensor | None = None
    label: str = ""

    @property
    def stream(self) -> Tensor:
        """The first stream."""
        return next(iter(self.tensors.values()))

    def to(self, device: torch.device | str) -> Call:
        """The same call on another device, with the same strides. 0-dim settings stay on the CPU, as ops require."""

        def moved(x: Any) -> Any:
            if not isinstance(x, Tensor) or x.dim() == 0:
                return x
            if x.device.type == torch.device(device).type or 0 in x.stride():
                return x.to(device)
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)

        return replace(
            self,
            tensors={name: moved(x) for name, x in self.tensors.items()},
            settings={name: moved(x) for name, x in self.settings.items()},
            grad_h=moved(self.grad_h),
            grad_final=moved(self.grad_final),
            grad_boundaries=moved(self.grad_boundaries),
        )


def call(
    cell: str,
    tensors: dict[str, Tensor],
    settings: dict[str, Any],
    *,
    label: str = "",
    generator: torch.Generator | None = None,
) -> Call:
    """A call on given tensors, such as a model's activations. The gradients of its results are normally distributed."""
    generator = generator or torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=generator)
    tensors = {name: t.detach() for name, t in tensors.items()}
    stream = next(iter(tensors.values()))
    cu_seqlens = settings.get("cu_seqlens")
    sequences = stream.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    dtype = CELLS[cell].state_dtype(stream.dtype)
    of_streams, normal = normal, partial(normal, dtype=torch.complex64) if dtype.is_complex else normal
    grad_h = (normal if stream.is_complex() else of_streams)(stream.shape)
    grad_final = normal((sequences, stream.shape[2]))
    grad_boundaries = None
    if settings.get("return_boundaries"):
        batch, time, channels = stream.shape
        grad_boundaries = normal((batch, max(time - 1, 0) // settings["chunk_size"], channels))
    state = {"device": stream.device, "dtype": dtype}
    return Call(
        cell,
        tensors,
        settings,
        grad_h.to(stream.device, stream.dtype),
        grad_final.to(**state),
        grad_boundaries if grad_boundaries is None else grad_boundaries.to(**state),
        label,
    )


def _laid_out(streams: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """The same values in another layout: chunks of a wider tensor, as a projection gives them, or time-major."""
    if layout == "chunked":
        wide = torch.cat([*streams.values(), *streams.values()], -1)
        return dict(zip(streams, wide.chunk(2 * len(streams), -1), strict=False))
    if layout == "time-major":
        return {name: t.transpose(0, 1).contiguous().transpose(0, 1) for name, t in streams.items()}
    return streams


_DRAWN = 2**20  # elements of a stream that `repeated` draws


def repeated(case: Case) -> Call:
    """A call of a case without packed sequences, whose streams repeat about 2^20 drawn elements, to draw in less time.

    If the cell settles its inputs, all elements are drawn, as `Case.build` does. The number of drawn steps has no
    common divisor with the steps of a sequence, so sequences differ. It is odd, so segments whose size is a power of 2
    differ too.
    """
    batch, time, channels = case.shape
    steps = max(_DRAWN // channels, 1)
    if batch * time <= steps or CELLS[case.cell].settle is not None:
        return case.build()
    while math.gcd(steps, 2 * time) > 1:
        steps -= 1
    drawn = replace(case, options={**case.options, "batch": 1, "time": steps}).build()
    times = -(-batch * time // steps)
    tensors = {
        name: t.repeat(1, times, 1)[0, : batch * time].view(case.shape) if t.dim() == 3 else t
        for name, t in drawn.tensors.items()
    }
    return call(case.cell, tensors, drawn.settings, label=drawn.label)


# ----------------------------------------------------------------------------------------- selections


def values_of(factor: str) -> list:
    """All values that cells declare for a factor."""
    return list(dict.fromkeys(value for cell in CELLS.values() for value in cell.factors.get(factor, ())))


def case(cell: str, dtype: torch.dtype, seed: int = 0, **options: Any) -> Case:
    """A case with the given options, and the default for every other factor."""
    factors = COMMON_FACTORS | CELLS[cell].factors
    unknown = options.keys() - factors.keys()
    if unknown:
        raise ValueError(f"options: expected some of {', '.join(factors)}, got {', '.join(sorted(unknown))}")
    for name, value in options.items():
        if isinstance(value, str) and value not in factors[name]:
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, factors[name]))}, got {value!r}")
    return Case(cell, dtype, {name: values[0] for name, values in factors.items()} | options, seed)


def covering_cases(cell: str, dtype: torch.dtype) -> list[Case]:
    """A short list of cases with every pair of values of two factors, except some pairs of time and channels."""
    factors = COMMON_FACTORS | CELLS[cell].factors
    index = list(CELLS[cell].dtypes.values()).index(dtype)
    rows = _covering_rows(factors, apart=("time", "channels"), seed=index)
    return [Case(cell, dtype, row, seed) for seed, row in enumerate(rows)]


def brief_cases(cell: str, dtype: torch.dtype) -> list[Case]:
    """About half as many cases, with four numbers of channels and every pair of values of two factors except time.

    Each time occurs. The longest occurs once.
    """
    times, factors = COMMON_FACTORS["time"], COMMON_FACTORS | CELLS[cell].factors | {"channels": (17, 1, 64, 100)}
    del factors["time"]
    index = list(CELLS[cell].dtypes.values()).index(dtype)
    others = [time for time in times if time != max(times)]
    rows = _covering_rows(factors, apart=("time", "channels"), seed=index)
    return [
        Case(cell, dtype, row | {"time": others[(seed + index) % len(others)] if seed else max(times)}, seed)
        for seed, row in enumerate(rows)
    ]


def _covering_rows(factors: dict[str, tuple], apart: tuple[str, str], seed: int) -> Iterator[dict]:
    """Rows that cover all pairs. Greedy: of random rows with the first missing pair, take the one with the most."""
    rng = random.Random(seed)
    missing = dict.fromkeys(
        ((a, x), (b, y))
        for a, b in combinations(factors, 2)
        if {a, b} != set(apart)
        for x, y in product(factors[a], factors[b])
    )
    while missing:
        rows = [
            {name: rng.choice(values) for name, values in factors.items()} | dict(next(iter(missing)))
            for _ in range(100)
        ]
        best = max(rows, key=lambda row: sum(pair in missing for pair in combinations(row.items(), 2)))
        for pair in combinations(best.items(), 2):
            missing.pop(pair, None)
        yield best
