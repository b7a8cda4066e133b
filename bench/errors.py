"""The error of a result, its limit, and the calls whose results must be equal to the reference.

    error = RMS(result - reference) / RMS(terms)

The reference is in float64, or complex128 for a complex result. Each element of a result is a sum of terms. `terms`
has the sums of their absolute values (`python_ref.Cell.adjoint` with `term=abs`); for an element without a sum this is
its absolute value. So the error stays small where terms cancel, and where the reference is zero everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: Limits by the dtype of the result.
LIMITS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
LIMITS |= {torch.complex128: LIMITS[torch.float64], torch.complex64: LIMITS[torch.float32]}

#: The state dtype represents every integer up to this one.
_LARGEST_LEVEL = {torch.float64: 2**53, torch.float32: 2**24}


class Verdict(NamedTuple):
    """An error, its limit (0: equality is required), and whether the result passes."""

    error: float
    limit: float
    passed: bool


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and sums for streams of `dtype`."""
    return dtype if dtype == torch.float64 or dtype.is_complex else torch.float32


def wide(t: Tensor) -> Tensor:
    """The tensor in float64 or complex128."""
    return t.to(torch.complex128 if t.is_complex() else torch.float64)


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether shapes and all values are equal. NaN equals NaN, and the sign of zero does not count."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def relative_error(result: Tensor, reference: Tensor, terms: Tensor) -> float:
    """The error as defined above, over the elements where the reference is finite.

    The error is infinite if the shapes differ, or if the NaN or infinite elements do. A reference that is too large for
    the result's dtype counts as infinite. RMS(terms) counts as at least the smallest normal number of that dtype,
    because smaller numbers have no relative precision.

    Args:
        result: any shape and floating or complex dtype.
        reference: float64 or complex128, the same shape.
        terms: float64, the same shape.
    """
    expected = reference.to(result.dtype)
    finite = expected.isfinite()
    if result.shape != expected.shape or not torch.equal(result.isfinite(), finite):
        return math.inf
    if not same_values(result[~finite], expected[~finite]):
        return math.inf
    scale = _rms(terms[finite])
    if not math.isfinite(scale):
        return math.inf
    return _rms((wide(result[finite]) - reference[finite]).abs()) / max(scale, torch.finfo(result.dtype).tiny)


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0


def judge(
    result: Tensor, reference: Tensor, terms: Tensor, float32_loop: Callable[[], Tensor] | None = None
) -> Verdict:
    """Compare the error of a result with the limit of its dtype.

    Args:
        result: as for `relative_error`.
        reference: as for `relative_error`.
        terms: as for `relative_error`.
        float32_loop: returns the same result from a plain sequential loop in float32. Twice its error is also
            accepted, except for float64 and complex128. It is called only if the error exceeds the dtype's limit.
    """
    error, limit = relative_error(result, reference, terms), LIMITS[result.dtype]
    if error > limit and float32_loop is not None and result.dtype not in (torch.float64, torch.complex128):
        of_loop = relative_error(float32_loop(), reference, terms)
        if math.isfinite(of_loop):
            limit = max(limit, 2 * of_loop)
    return Verdict(error, limit, error <= limit)


def judge_exact(result: Tensor, reference: Tensor, terms: Tensor, state: torch.dtype) -> Verdict:
    """Require equality with the reference, rounded to the state dtype and then to the dtype of the result."""
    error = relative_error(result, reference, terms)
    return Verdict(error, 0.0, same_values(result, reference.to(state).to(result.dtype)))


def is_exact(
    *, epsilon: float | None, amplitude: bool, states: Sequence[Tensor], time: int, state: torch.dtype
) -> bool:
    """Whether the forward pass must equal the reference on every backend.

    With `epsilon` 0 it must, because values are only copied. With `epsilon` 1 it must if all levels are integers that
    the state dtype represents: there is no amplitude, the states have integers, and no level gets too large. A
    write changes a level by 1.

    Args:
        epsilon: None for a cell without one, which is never exact.
        amplitude: whether the call has one.
        states: the initial state and the reset state, if given. A NaN in them stays NaN, so it may be there.
        time: steps of the longest sequence.
        state: the state dtype.
    """
    if epsilon != 1 or amplitude:
        return epsilon == 0
    start = torch.cat([torch.zeros(1), *(s[~s.isnan()] for s in states)])
    largest = start.abs().max().item() if start.numel() else 0.0
    return same_values(start, start.round()) and largest <= _LARGEST_LEVEL[state] - time
