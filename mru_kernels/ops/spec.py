"""What the ops know of a cell: its inputs, its scalars and its dtypes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..scalars import Scalar
from ..torch_private import OpOverload


@dataclass(frozen=True)
class Input:
    """An array input of a cell.

    Attributes:
        name: of the argument of the public function.
        kind: "stream", `[B, T, D]`; "channel", one value per channel `[D]`; or "either".
        optional: whether it may be absent; then it is 1.
        complex: whether it is complex though the streams are real.
    """

    name: str
    kind: str = "stream"
    optional: bool = False
    complex: bool = False


def _all_inputs(x: Sequence[Tensor | None], p: Sequence[float | Tensor]) -> Sequence[Tensor]:
    return [t for t in x if t is not None]


def _g(x: Sequence[Tensor], after: Tensor, g: Tensor, p: Sequence[float | Tensor]) -> Tensor:
    return g


def _state(x: Sequence[Tensor | None], s: Tensor, p: Sequence[float | Tensor]) -> Tensor:
    return s


@dataclass(frozen=True)
class Plain:
    """A cell in plain torch, which the backend "torch" loops over.

    `x` is the list of the inputs `[B, T, D]` in the cell's order, None for one that is absent. `p` is the list of the
    scalars; one that is traced is a 0-dim tensor. Tensors have the state dtype, but h is real where streams are.

    Attributes:
        step: (gates, s, p) -> the state after one step, from its gates and the state before, all `[B, D]`.
        gates: (x, p) -> what the steps need and no state decides, a sequence of tensors `[B, T, D]`.
        output: (x, s, p) -> h, from the states after the steps, all `[B, T, D]`.
        vjp: (x, s, after, g, lam, p) -> the gradients of x, from the states before and after each step, g = dL/dh and
            lam = dL/ds', all `[B, T, D]`. A cell has it only if its gates are decay and update of a step that is affine
            in the state. Its gradients then have derivatives of any order, because torch differentiates `vjp`.
        cotangent: (x, after, g, p) -> the part of dL/ds' that comes from g, `[B, T, D]`. It is used with `vjp` only.
    """

    step: Callable[[Sequence[Tensor], Tensor, Sequence[float | Tensor]], Tensor]
    gates: Callable[[Sequence[Tensor | None], Sequence[float | Tensor]], Sequence[Tensor]] = _all_inputs
    output: Callable[[Sequence[Tensor | None], Tensor, Sequence[float | Tensor]], Tensor] = _state
    vjp: Callable[..., Sequence[Tensor]] | None = None
    cotangent: Callable[[Sequence[Tensor], Tensor, Tensor, Sequence[float | Tensor]], Tensor] = _g


def affine(
    gates: Callable[[Sequence[Any], Sequence[float | Tensor]], Sequence[Tensor]],
    vjp: Callable[[Sequence[Tensor], Tensor, Tensor], Sequence[Tensor]] | None = None,
) -> Plain:
    """The cell s' = decay s + update with h = s'. `gates` is (x, p) -> (decay, update).

    `vjp` is (x, of_decay, of_update) -> the gradients of x.
    """
    return Plain(affine_step, gates, vjp=vjp and (lambda x, s, after, g, lam, p: vjp(x, lam * s, lam)))


def affine_step(gates: Sequence[Tensor], s: Tensor, p: Sequence[float | Tensor]) -> Tensor:
    decay, update = gates
    return decay * s + update


@dataclass(frozen=True)
class Cell:
    """A cell, as csrc/cells/<name>.h states it in C++.

    Attributes:
        name: of its ops, `mru::<name>`, and of its public function.
        inputs: its array inputs; the first is a stream and never absent.
        scalars: its scalars; those that a schedule may change between calls come first.
        codes: whether a step fits a write code of 2 bits (hold, one of two writes, NaN).
        without_codes: inputs with which a step does not fit one.
        dtypes: of its streams.
        complex_state: whether states are complex though streams are real.
        plain: the cell in plain torch; without it the backend "torch" lacks the cell.
        numbers_of_states: (numbers) -> those with which h is the state. Given for a cell whose step is no affine map of
            the state, so that steps do not compose: time is not cut.
        forward, backward, step, step_slots, map: the ops of each backend.
    """

    name: str
    inputs: tuple[Input, ...]
    scalars: tuple[Scalar, ...] = ()
    codes: bool = False
    without_codes: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = checks.STREAM_DTYPES
    complex_state: bool = False
    plain: Plain | None = None
    numbers_of_states: Callable[[Sequence[float]], list[float]] | None = None
    forward: dict[str, OpOverload] = field(default_factory=dict, repr=False, compare=False)
    backward: dict[str, OpOverload] = field(default_factory=dict, repr=False, compare=False)
    step: dict[str, OpOverload] = field(default_factory=dict, repr=False, compare=False)
    step_slots: dict[str, OpOverload] = field(default_factory=dict, repr=False, compare=False)
    map: dict[str, OpOverload] = field(default_factory=dict, repr=False, compare=False)

    @property
    def composes(self) -> bool:
        """Whether steps compose as affine maps of the state."""
        return self.numbers_of_states is None

    def state_dtype(self, stream: torch.dtype) -> torch.dtype:
        """The dtype of states for streams of a dtype."""
        state = checks.state_dtype(stream)
        return checks.complex_dtype(state) if self.complex_state else state

    @cached_property
    def complex_names(self) -> frozenset[str]:
        """The names of inputs and states that are complex though the streams are real."""
        states = ("initial_state", "reset_state", "state") if self.complex_state else ()
        return frozenset((*states, *(i.name for i in self.inputs if i.complex)))

    @cached_property
    def scheduled(self) -> tuple[Scalar, ...]:
        """The scalars that come as 0-dim tensors, after the array inputs."""
        return tuple(scalar for scalar in self.scalars if scalar.scheduled)

    @cached_property
    def numbers(self) -> tuple[Scalar, ...]:
        """The scalars that come as numbers."""
        return tuple(scalar for scalar in self.scalars if not scalar.scheduled)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of what the op's list `inputs` may hold."""
        return (*(i.name for i in self.inputs), *(scalar.name for scalar in self.scheduled))

    def mask(self, *names: str) -> int:
        """The bits of these inputs."""
        return sum(1 << self.names.index(name) for name in names)

    @cached_property
    def required(self) -> int:
        """The bits of the inputs that are never absent."""
        return self.mask(*(i.name for i in self.inputs if not i.optional), *(s.name for s in self.scheduled))

    @cached_property
    def _without_codes(self) -> int:
        return self.mask(*self.without_codes)

    def has_codes(self, given: int) -> bool:
        """Whether a step with these inputs fits a write code."""
        return self.codes and given & self._without_codes == 0


#: Every cell that has ops, by name.
CELLS: dict[str, Cell] = {}
