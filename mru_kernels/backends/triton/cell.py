"""The protocol of a cell in Triton: what one step computes, on a block of channels.

A file of the folder `cells` implements the cell of the same name; cells/leaky_integrator.py is the example to copy. The
functions are those of csrc/cell.h, compiled by Triton, on blocks in the state dtype:

    x   the tuple of the inputs at one step, in the order of the cell's spec. An input that is not given is 1.
    s   the state before the step
    p   the tuple of floats that `scalars` makes

    step(x, s, p)                     the state after; exact, with the NaN rules of the cell
    recompute(x, s, p)                the same where nothing is NaN, which is all that gradients need
    output(x, s, after, p)            h
    push(x, m, p)                     a m, where s' = a s + b
    pull(x, m, p)                     conj(a) m; not called if steps do not compose, as time is not cut then
    cotangent(x, s, after, g, m, p)   dL/ds', where g = dL/dh, and m = dL/ds' through the next step
    vjp(x, s, after, g, m, p)         dL/ds, and the tuple of the gradients of x, given or not
    enter(x, s)                       the state that enters a sequence; only inputs per channel may be read
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .kernels.affine import REAL, Rules


class Codes(NamedTuple):
    """The functions of a cell whose step fits a write code: hold, one of two writes of magnitude at most 1, or NaN.

    encode(x)                         the code
    step(word, i, s, p), recompute(word, i, s, p), pull(word, i, m, p)
                                      the cell's functions for the i-th code of a word
    step_word(word, s, p)             the state after all 16 codes of a word
    writes(word)                      how many of them write
    factor(writes, steps, p)          a of `writes` writes among `steps` steps; p in float64

    With codes, `output`, `cotangent` and `enter` read inputs per channel only.
    """

    encode: Any = None
    step: Any = None
    recompute: Any = None
    pull: Any = None
    step_word: Any = None
    writes: Any = None
    factor: Any = None


NO_CODES = Codes()


class Cell(NamedTuple):
    """The functions of a cell, which a kernel takes as one argument. `cell` fills in what most cells share."""

    step: Any
    recompute: Any
    output: Any
    push: Any
    pull: Any
    cotangent: Any
    vjp: Any
    enter: Any
    rules: Rules  # of its factors
    adjoint_sees_state: Any  # whether `cotangent` depends on s or `after`
    codes: Codes
    gated: Any  # whether a step computes gates that read no state, for shorter tiles


class Implementation(NamedTuple):
    """A cell in Triton.

    scalars        turns the values of the spec's scalars, in order, into `p`, for a state dtype
    overwrites   whether every write overwrites the state, given `p`. Epsilon is then the first of `p`, and it is 0
    """

    real: Cell
    complex: Cell | None = None
    scalars: Callable[[Sequence[float], torch.dtype], tuple[float, ...]] = lambda values, state: tuple(values)
    overwrites: Callable[[tuple[float, ...]], bool] = lambda p: False


@triton.jit
def state_after(x, s, after, p):
    return after


@triton.jit
def sum_of_both(x, s, after, g, m, p):
    return g + m


@triton.jit
def unchanged(x, s):
    return s


def cell(
    step, pull, vjp, *, recompute=None, push=None, output=state_after, cotangent=sum_of_both, enter=unchanged,
    rules: Rules = REAL, adjoint_sees_state: bool = False, codes: Codes = NO_CODES, gated: bool = False,
) -> Cell:  # fmt: skip
    """A cell; by default h = s', and `recompute` and `push` are `step` and `pull`."""
    return Cell(
        step, recompute or step, output, push or pull, pull, cotangent, vjp, enter, rules,
        tl.constexpr(adjoint_sees_state), codes, tl.constexpr(gated),
    )  # fmt: skip


#: The cells that have no file in the folder `cells`, by name.
DEFINED: dict[str, Implementation] = {}


def find(name: str) -> Implementation | None:
    """The cell of that name; None if this backend does not have it."""
    if name in DEFINED:
        return DEFINED[name]
    module = f"{__package__}.cells.{name}"
    try:
        return importlib.import_module(module).CELL
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        return None
