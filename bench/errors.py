"""The error of a result, the limit it is held to, and where equality is asked instead.

    error = RMS(result - reference) / RMS(terms)

where the reference is in float64 (complex128 for a complex result), and `terms` is the sum of the absolute
values of the terms that each element of the result adds up (`adjoint` of `python_ref.Cell` with `term=abs`; for an
element that sums nothing that is its own absolute value). So neither cancellation nor a reference that is zero
everywhere decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

#: By the dtype of the result.
LIMITS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
LIMITS |= {torch.complex128: LIMITS[torch.float64], torch.complex64: LIMITS[torch.float32]}

#: Every integer up to this one is a value of the dtype that states are held in.
_LARGEST_LEVEL = {torch.float64: 2**53, torch.float32: 2**24}


class Verdict(NamedTuple):
    """An error, its limit (0: equality is asked), and whether it is met."""

    error: float
    limit: float
    passed: bool


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and sums for streams of `dtype`."""
    return dtype if dtype == torch.float64 or dtype.is_complex else torch.float32


def wide(t: Tensor) -> Tensor:
    """A tensor in double precision, real or complex."""
    return t.to(torch.complex128 if t.is_complex() else torch.float64)


def same_values(a: Tensor, b: Tensor) -> bool:
    """Equal in shape and in every value; NaN equals NaN, and the sign of zero does not count."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def relative_error(result: Tensor, reference: Tensor, terms: Tensor) -> float:
    """The error as defined above, over the elements where the reference is finite.

    Infinite where the result has another shape, NaN elsewhere than the reference, or other infinities. A
    reference too large for the result's dtype counts as infinite, and RMS(terms) as no smaller than the
    smallest normal number of that dtype, below which it has no relative precision.

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
    """Hold a result to the limit of its dtype.

    Args:
        result: as for `relative_error`.
        reference: as for `relative_error`.
        terms: as for `relative_error`.
        float32_loop: gives the same result from a plain sequential loop in float32. Twice its error is
            accepted as well, float64 excepted. Called only where it decides.
    """
    error, limit = relative_error(result, reference, terms), LIMITS[result.dtype]
    if error > limit and float32_loop is not None and result.dtype not in (torch.float64, torch.complex128):
        of_loop = relative_error(float32_loop(), reference, terms)
        if math.isfinite(of_loop):
            limit = max(limit, 2 * of_loop)
    return Verdict(error, limit, error <= limit)


def judge_exact(result: Tensor, reference: Tensor, terms: Tensor, state: torch.dtype) -> Verdict:
    """Ask for equality with the reference, rounded to the dtype of states and then to the result's."""
    error = relative_error(result, reference, terms)
    return Verdict(error, 0.0, same_values(result, reference.to(state).to(result.dtype)))


def is_exact(
    *, epsilon: float | None, amplitude: bool, initial_state: Tensor | None, time: int, state: torch.dtype
) -> bool:
    """Whether the forward pass is to equal the reference on every backend.

    With `epsilon` 0 always, as values are only copied. With 1 where levels are integers of the state's dtype:
    no amplitude, an integer initial state, and no level out of reach (a write moves it by 1).

    Args:
        epsilon: None for a cell without one, which is never exact.
        amplitude: whether one is given.
        initial_state: None for zeros. A NaN in it is no obstacle: it stays.
        time: steps of the longest sequence.
        state: dtype of states.
    """
    if epsilon != 1 or amplitude:
        return epsilon == 0
    start = torch.zeros(1) if initial_state is None else initial_state[~initial_state.isnan()]
    largest = start.abs().max().item() if start.numel() else 0.0
    return same_values(start, start.round()) and largest <= _LARGEST_LEVEL[state] - time
