"""Seeded inputs of every cell, declared once; tests, comparison, times and demo draw from here.

A cell is one declaration: the `factors` by which its calls differ, beside those that all cells share, and a
function that draws its tensors. Its name is that of its op, of its reference and of its adjoint.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor

from .errors import state_dtype

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
COMPLEX_DTYPES = {"c64": torch.complex64, "c128": torch.complex128}  # of the cells that take them

Options = Mapping[str, Any]

#: Of every cell. The first value of each is the default of `case`.
COMMON_FACTORS: dict[str, tuple] = {
    "time": (64, 0, 1, 2, 3, 63, 65, 127, 1000, 4097),
    "batch": (3, 1, "packed"),
    "channels": (17, 1, 3, 8, 64, 100),
    "initial_state": ("none", "integer", "real"),
    "layout": ("contiguous", "chunked", "time-major"),
    "parameters": ("float32", "as streams"),
    "reverse": (False, True),
    "nonfinite": (False, True),
}


@dataclass(frozen=True)
class Case:
    """What determines a call but for its device: cell, dtype of the streams, a value of each factor, seed."""

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
        """The options that are not the default, size aside."""
        factors = COMMON_FACTORS | CELLS[self.cell].factors
        words = ["packed"] if self.options["batch"] == "packed" else []
        for name, value in self.options.items():
            if name not in ("time", "batch", "channels") and value != factors[name][0]:
                words.append(name if value is True else f"{name}={value}")
        return " ".join(words)

    def build(self) -> Call:
        """Draw the inputs, on the CPU."""
        draw = Draw(self)
        tensors, settings = CELLS[self.cell].draw(draw, self.options)
        tensors |= _laid_out({k: t for k, t in tensors.items() if t.dim() == 3}, self.options["layout"])
        settings |= {"reverse": self.options["reverse"]}
        if draw.cu_seqlens is not None:
            settings["cu_seqlens"] = draw.cu_seqlens
        return call(self.cell, tensors, settings, label=self.label(), generator=draw.generator)


@dataclass(frozen=True)
class Call:
    """Arguments of a cell's op, and the gradients of its two results.

    Attributes:
        cell: name of the op.
        tensors: floating arguments by name, the first a stream `[B, T, D]`; gradients are taken for each.
        settings: the other arguments.
        grad_h: `[B, T, D]` in the streams' dtype.
        grad_final: `[B, D]`, `[N, D]` with cu_seqlens, in the state dtype.
        label: for people.
    """

    cell: str
    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    grad_h: Tensor
    grad_final: Tensor
    label: str = ""

    @property
    def stream(self) -> Tensor:
        """The first stream."""
        return next(iter(self.tensors.values()))

    def to(self, device: torch.device | str) -> Call:
        """The same call on another device, in the same strides; 0-dim settings stay on the CPU, where they belong."""

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
        )


def call(
    cell: str,
    tensors: dict[str, Tensor],
    settings: dict[str, Any],
    *,
    label: str = "",
    generator: torch.Generator | None = None,
) -> Call:
    """A call on given tensors, such as a model's activations, with normal gradients of its results."""
    generator = generator or torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=generator)
    tensors = {name: t.detach() for name, t in tensors.items()}
    stream = next(iter(tensors.values()))
    cu_seqlens = settings.get("cu_seqlens")
    sequences = stream.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    if stream.is_complex():
        normal = partial(normal, dtype=torch.complex64)
    grad_h = normal(stream.shape)
    grad_final = normal((sequences, stream.shape[2]))
    return Call(
        cell,
        tensors,
        settings,
        grad_h.to(stream.device, stream.dtype),
        grad_final.to(stream.device, state_dtype(stream.dtype)),
        label,
    )


class Draw:
    """Random tensors of the shapes that a case calls for."""

    def __init__(self, case: Case):
        self.case = case
        self.generator = torch.Generator().manual_seed(case.seed)
        self.shape = case.shape
        self.cu_seqlens = self._offsets() if case.options["batch"] == "packed" else None
        as_streams = case.options["parameters"] == "as streams" or case.dtype.is_complex
        self.parameter_dtype = case.dtype if as_streams else torch.float32

    def _offsets(self) -> Tensor:
        time = self.shape[1]
        cuts = [self.integers(0, time) for _ in range(2)]
        offsets = sorted([0, 0, *cuts, cuts[0], time])  # two of the five sequences are empty, or more
        return torch.tensor(offsets, dtype=(torch.int64, torch.int32)[self.integers(0, 1)])

    def integers(self, low: int, high: int) -> int:
        """One integer from low to high, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def normal(self, shape: tuple[int, ...], mean: float = 0.0, deviation: float = 1.0) -> Tensor:
        return mean + deviation * torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, shape: tuple[int, ...], low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def some(self, shape: tuple[int, ...], share: float) -> Tensor:
        """A mask, true with probability `share`."""
        return torch.rand(shape, generator=self.generator) < share

    def signs(self, shape: tuple[int, ...]) -> Tensor:
        return torch.where(self.some(shape, 0.5), 1.0, -1.0).double()

    def stream(self, x: Tensor) -> Tensor:
        """Values `[B, T, D]` in the streams' dtype; if the case asks for it, a NaN somewhere."""
        return self._finish(x, self.case.dtype)

    def parameter(self, x: Tensor) -> Tensor:
        """Values `[D]` in the dtype of the case's parameters; if asked for, a NaN in one of many channels."""
        return self._finish(x, self.parameter_dtype, nan=x.numel() >= 8)

    def common(self, options: Options) -> dict[str, Tensor]:
        """What cells take where the case asks for it: alpha `[D]`, an initial state `[B, D]` or `[N, D]`."""
        tensors = {}
        if options.get("alpha"):
            tensors["alpha"] = self.parameter(self.normal(self.shape[2:], mean=1.0, deviation=0.5))
        if options["initial_state"] != "none":
            tensors["initial_state"] = self._initial_state(options["initial_state"])
        return tensors

    def _initial_state(self, kind: str) -> Tensor:
        sequences = self.shape[0] if self.cu_seqlens is None else self.cu_seqlens.numel() - 1
        x = self.normal((sequences, self.shape[2]), deviation=2.0)
        return self._finish(self.turned(x.round() if kind == "integer" else x), self.parameter_dtype)

    def turned(self, x: Tensor) -> Tensor:
        """Where the case is complex, with a random phase, in steps that leave integers integer."""
        if not self.case.dtype.is_complex:
            return x
        return x * torch.tensor([1, 1j, -1, -1j])[torch.randint(4, x.shape, generator=self.generator)]

    def _finish(self, x: Tensor, dtype: torch.dtype, nan: bool = True) -> Tensor:
        x = x.to(dtype)
        if nan and self.case.options["nonfinite"] and x.numel():
            x.view(-1)[self.integers(0, x.numel() - 1)] = float("nan")
        return x


def _laid_out(streams: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """The same values in another place: within a wider tensor, as a projection leaves them, or time-major."""
    if layout == "chunked":
        wide = torch.cat([*streams.values(), *streams.values()], -1)
        return dict(zip(streams, wide.chunk(2 * len(streams), -1), strict=False))
    if layout == "time-major":
        return {name: t.transpose(0, 1).contiguous().transpose(0, 1) for name, t in streams.items()}
    return streams


# ------------------------------------------------------------------------------------------ the cells


@dataclass(frozen=True)
class Cell:
    """A cell's declaration.

    Attributes:
        factors: by which its calls differ beside `COMMON_FACTORS`; the first value of each is the default.
        draw: makes the op's tensors, streams first, and its other arguments, from a case's options.
        dtypes: of its streams, by their short names.
    """

    factors: dict[str, tuple]
    draw: Callable[[Draw, Options], tuple[dict[str, Tensor], dict[str, Any]]] = field(repr=False)
    dtypes: Mapping[str, torch.dtype] = field(default_factory=lambda: DTYPES, repr=False)


#: Of the bistable cells: how widely candidates are spread, and the share of steps that tie.
WRITES = {"often": (1.0, 0.05), "seldom": (0.3, 0.001)}


def _bmru(draw: Draw, options: Options) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A third of the steps write: candidates are standard normal, thresholds 0.8 to 1.2 in size; some tie. Or one step
    in three hundred.
    """
    shape = draw.shape
    deviation, share = WRITES[options["writes"]]
    per_channel = options["threshold"] == "channel"
    b_shape = shape[2:] if per_channel else shape
    b = draw.signs(b_shape) * draw.uniform(b_shape, 0.8, 1.2)
    b[draw.some(b_shape, 0.4 * share)] = -0.0
    b = draw.parameter(b) if per_channel else draw.stream(b)
    c = draw.normal(shape, deviation=deviation)
    c[draw.some(shape, 0.02)] = 0.0
    c[draw.some(shape, 0.02)] = -0.0
    tie = draw.some(shape, share)
    c = torch.where(tie & ~b.isnan(), draw.signs(shape) * b, c)
    if options["nonfinite"]:
        c = torch.where(draw.some(shape, 0.02), draw.signs(shape) * float("inf"), c)
    tensors = {"candidate": draw.stream(c), "threshold": b}
    if options["amplitude"]:
        tensors["amplitude"] = draw.stream(draw.normal(shape, mean=1.0, deviation=0.5))
    return tensors | draw.common(options), {name: options[name] for name in ("epsilon", "surrogate_scale")}


def _schmitt(draw: Draw, options: Options) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A quarter of the steps hold: candidates are normal around 1/2, low about 0.15, width about 0.7; some tie. Or
    nearly all in most channels: candidates lie close to the middle between low and high.
    """
    shape = draw.shape
    deviation, share = WRITES[options["writes"]]
    low = draw.uniform(shape[2:], -0.1, 0.4)
    high = low + draw.uniform(shape[2:], 0.5, 0.9)
    crossed = draw.some(shape[2:], 0.1)  # high < low is allowed
    middle = (low + high) / 2
    low, high = draw.parameter(torch.where(crossed, high, low)), draw.parameter(torch.where(crossed, low, high))
    if options["writes"] == "often":
        c = draw.normal(shape, mean=0.5)
    else:
        c = middle + draw.normal(shape, deviation=deviation / 4)
    for edge in (low, high):
        tie = draw.some(shape, share) & ~edge.isnan()
        c = torch.where(tie, edge.double(), c)
    if options["nonfinite"]:
        c = torch.where(draw.some(shape, 0.02), draw.signs(shape) * float("inf"), c)
    tensors = {"candidate": draw.stream(c), "low": low, "high": high}
    return tensors | draw.common(options), {name: options[name] for name in ("epsilon", "surrogate_scale")}


def _linear_recurrence(draw: Draw, options: Options) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Most decays are between 0.8 and 1 in size, one in ten is negative (or turned), a few are 0 or 1."""
    shape = draw.shape
    a_shape = shape[2:] if options["decay"] == "channel" else shape
    a = draw.uniform(a_shape, 0.8, 1.0) * torch.where(draw.some(a_shape, 0.1), -1.0, 1.0)
    a[draw.some(a_shape, 0.02)] = 1.0
    a[draw.some(a_shape, 0.02)] = 0.0
    w = draw.normal(shape)
    if draw.case.dtype.is_complex:
        a = torch.polar(a.abs(), draw.uniform(a_shape, -3.0, 3.0))
        w = torch.complex(w, draw.normal(shape))
    a = draw.parameter(a) if options["decay"] == "channel" else draw.stream(a)
    return {"update": draw.stream(w), "decay": a} | draw.common(options), {}


CELLS = {
    "bmru": Cell(
        factors={
            "epsilon": (0.0, 0.5, 1.0),
            "threshold": ("stream", "channel"),
            "amplitude": (False, True),
            "alpha": (False, True),
            "surrogate_scale": (1.0, 2.5),
            "writes": tuple(WRITES),
        },
        draw=_bmru,
    ),
    "schmitt": Cell(
        factors={
            "epsilon": (0.0, 0.5, 1.0),
            "alpha": (False, True),
            "surrogate_scale": (1.0, 2.5),
            "writes": tuple(WRITES),
        },
        draw=_schmitt,
    ),
    "linear_recurrence": Cell(
        factors={"decay": ("stream", "channel")}, draw=_linear_recurrence, dtypes=DTYPES | COMPLEX_DTYPES
    ),
}


# ----------------------------------------------------------------------------------------- selections


def case(cell: str, dtype: torch.dtype, seed: int = 0, **options: Any) -> Case:
    """A case with the given options, and the default of every other factor."""
    factors = COMMON_FACTORS | CELLS[cell].factors
    unknown = options.keys() - factors.keys()
    if unknown:
        raise ValueError(f"options: expected some of {', '.join(factors)}, got {', '.join(sorted(unknown))}")
    for name, value in options.items():
        if isinstance(value, str) and value not in factors[name]:
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, factors[name]))}, got {value!r}")
    return Case(cell, dtype, {name: values[0] for name, values in factors.items()} | options, seed)


def covering_cases(cell: str, dtype: torch.dtype) -> list[Case]:
    """A short list of cases in which any two values of two factors meet (of time and channels, most)."""
    factors = COMMON_FACTORS | CELLS[cell].factors
    index = list(CELLS[cell].dtypes.values()).index(dtype)
    rows = _covering_rows(factors, apart=("time", "channels"), seed=index)
    return [Case(cell, dtype, row, seed) for seed, row in enumerate(rows)]


def brief_cases(cell: str, dtype: torch.dtype) -> list[Case]:
    """Half as many, of four numbers of channels: any two values of two factors meet, time aside. It has each of its
    values, and the longest once.
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
    """Greedy: of some random rows that hold the first pair not yet met, the one with the most such pairs."""
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
