"""Seeded random tensors of the shapes and dtypes that a case calls for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
COMPLEX_DTYPES = {"c64": torch.complex64, "c128": torch.complex128}  # of the cells that take them


class Draw:
    """Draws in a fixed order from a generator of its own.

    Args:
        shape: (B, T, D) of the streams; B is 1 where sequences are packed.
        dtype: of the streams.
        options: by name: "batch" ("packed" or a number), "initial_state" ("none", "integer" or "real"), "parameters"
            ("float32" or "as streams"), "nonfinite" (whether some values are NaN or infinite).
        seed: of the generator.
        complex_state: whether states are complex though streams are real.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        options: Mapping[str, Any],
        seed: int,
        complex_state: bool = False,
    ):
        self.shape, self.dtype, self.nonfinite = shape, dtype, options["nonfinite"]
        self.generator = torch.Generator().manual_seed(seed)
        self.cu_seqlens = self._offsets() if options["batch"] == "packed" else None
        as_streams = options["parameters"] == "as streams" or dtype.is_complex
        self.parameter_dtype = dtype if as_streams else torch.float32
        self.complex_dtype = torch.complex128 if dtype == torch.float64 else torch.complex64
        self.complex_state = complex_state

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
        return self._finish(x, self.dtype)

    def parameter(self, x: Tensor) -> Tensor:
        """Values `[D]` in the dtype of the case's parameters; if asked for, a NaN in one of many channels."""
        return self._finish(x, self.parameter_dtype, nan=x.numel() >= 8)

    def complex_parameter(self, x: Tensor) -> Tensor:
        """Complex values `[D]` of a cell whose states alone are complex; NaN as for `parameter`."""
        return self._finish(x, self.complex_dtype, nan=x.numel() >= 8)

    def initial_state(self, kind: str) -> Tensor:
        """An initial state `[B, D]`, `[N, D]` of packed sequences; `kind` is "integer" or "real"."""
        sequences = self.shape[0] if self.cu_seqlens is None else self.cu_seqlens.numel() - 1
        x = self.normal((sequences, self.shape[2]), deviation=2.0)
        if self.complex_state:
            x = torch.complex(x, self.normal(x.shape, deviation=2.0))
            x = torch.view_as_complex(torch.view_as_real(x).round()) if kind == "integer" else x
            return self._finish(x, self.complex_dtype)
        return self._finish(self._turned(x.round() if kind == "integer" else x), self.parameter_dtype)

    def resets(self) -> Tensor:
        """A mask of resets `[B, T]`: few, many or all steps."""
        return self.some(self.shape[:2], (0.01, 0.3, 1.0)[self.integers(0, 2)])

    def _turned(self, x: Tensor) -> Tensor:
        """Where the case is complex, with a random phase, in steps that leave integers integer."""
        if not self.dtype.is_complex:
            return x
        return x * torch.tensor([1, 1j, -1, -1j])[torch.randint(4, x.shape, generator=self.generator)]

    def _finish(self, x: Tensor, dtype: torch.dtype, nan: bool = True) -> Tensor:
        x = x.to(dtype)
        if nan and self.nonfinite and x.numel():
            x.view(-1)[self.integers(0, x.numel() - 1)] = float("nan")
        return x
