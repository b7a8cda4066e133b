"""Checks of the half-precision conversions in the CPU kernels.

They cover every bit pattern of a 16-bit input, every kind of rounding of an output, and a processor that flushes
subnormals. Run as a program, this file checks the kernels that ATEN_CPU_CAPABILITY selects and prints their
instruction set.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

import mru_kernels as mk
from mru_kernels.backends import cpu

_FEW = 2**14  # channels; so small a call runs in the calling thread, whose mode the test sets


@contextmanager
def flushing(flush: bool):
    """Set whether the processor flushes subnormal numbers to 0."""
    assert torch.set_flush_denormal(flush)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def _parts(x: Tensor) -> Iterator[Tensor]:
    """`x` in parts. The first parts have 1 to 70 elements, so that full and partial vectors occur."""
    at = 0
    for size in (*range(1, 71), *[_FEW] * (len(x) // _FEW + 1)):
        yield x[at : at + size]
        at += size


def _widened(x: Tensor) -> Tensor:
    """`x` widened to a float32 state: the kernel writes an amplitude."""
    one = torch.ones(1, 1, len(x), dtype=x.dtype)
    return mk.bmru(one, 0 * one, amplitude=x.view(1, 1, -1), backend="cpu")[1].view(-1)


def _narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The float32 state `x` narrowed to an output: the kernel holds the initial state."""
    one = torch.ones(1, 1, len(x), dtype=dtype)
    return mk.bmru(0 * one, one, x.view(1, -1), backend="cpu")[0].view(-1)


def _to_be_rounded(dtype: torch.dtype) -> Tensor:
    """Float32 numbers to round: all numbers of `dtype`, halfway points, neighbours of these, infinities and NaN."""
    infinity = torch.tensor([torch.inf], dtype=dtype).view(torch.int16).item()
    values = torch.arange(infinity, dtype=torch.int16).view(dtype).double()
    beyond = 2 * values[-1:] - values[-2:-1]
    halfway = (values + torch.cat([values[1:], beyond])) / 2
    exact = torch.cat([values, halfway]).float()
    near = torch.cat(
        [exact, exact.nextafter(-exact.new_tensor(torch.inf)), exact.nextafter(exact.new_tensor(torch.inf))]
    )
    nan = torch.tensor([0x7FFFFFFF, 0x7FC00001, 0x7FC0FFFF, 0x7FFF8000], dtype=torch.int32).view(torch.float32)
    near = torch.cat([near, near.new_tensor([torch.inf, 3e38, 1e-40, 1e-45]), nan])
    return torch.cat([near, -near])


def _check_same(what: str, got: Tensor, expected: Tensor) -> None:
    wrong = ~((got == expected) | (got.isnan() & expected.isnan()))
    assert not wrong.any(), f"{what}: {int(wrong.sum())} wrong, first {got[wrong][:3]}, expected {expected[wrong][:3]}"


def check(dtype: torch.dtype, flush: bool) -> None:
    """Raise where a conversion differs from IEEE 754."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = _to_be_rounded(dtype)
    smallest = torch.finfo(torch.float32).smallest_normal
    if flush:  # the processor flushes float32 subnormals to 0
        patterns = patterns[~(patterns.float().abs() < smallest) | (patterns == 0)]
        numbers = numbers[~(numbers.abs() < smallest) | (numbers == 0)]
    wide, narrow = patterns.float(), numbers.to(dtype)
    for x, expected in zip(_parts(patterns), _parts(wide), strict=True):
        with flushing(flush):
            got = _widened(x)
        _check_same(f"{dtype} widened", got, expected)
    for x, expected in zip(_parts(numbers), _parts(narrow), strict=True):
        with flushing(flush):
            got = _narrowed(x, dtype)
        _check_same(f"rounded to {dtype}", got, expected)


def check_all() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        for flush in (False, True):
            check(dtype, flush)


if __name__ == "__main__":
    check_all()
    print(cpu.isa())
