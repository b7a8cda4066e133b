"""A defined cell in plain torch: the user's functions for the backend "torch", the graph for second derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..cells import write_or_hold
from .graph import Number
from .torch_language import evaluate
from .trace import Functions, Program, parameters


def plain(functions: Functions, program: Program) -> ops.Plain:
    """The cell of these functions."""
    first_scalar = 1 if program.writes else 0

    def named(x: Sequence[Any], p: Sequence[Any]) -> dict[str, Any]:
        scalars = p[first_scalar : first_scalar + len(functions.scalars)]  # a reset state may follow
        scalars = [x[0].real.new_full((), value) for value in scalars]  # as the trace has them
        inputs = {name: _own(functions, name, t) for name, t in zip(functions.inputs, x, strict=True)}
        return inputs | dict(zip(functions.scalars, scalars, strict=True))

    def gates(x, p):
        first, second = functions.gates(named(x, p))
        like = x[0]
        if not program.writes:
            return [_as(t, like) for t in (first, second)]
        used = [t for name, t in zip(functions.inputs, x, strict=True) if name in parameters(functions.gate)]
        return write_or_hold.gates(_as(first, like), _as(second, like), used)

    def outputs(x, s, p):
        return _as(functions.outputs(s, named(x, p)), s.real if program.real_streams else s)

    def values_of(numbers: Sequence[Number], x, p, **states: Tensor) -> list[Tensor]:
        """The values of numbers of the program, in the dtype of x."""
        inputs = {f"x[{i}]": t for i, t in enumerate(x)} | {f"p[{i}]": value for i, value in enumerate(p)} | states
        made = evaluate(program.graph, numbers, inputs, x[0].real)
        return [t.to(x[0].dtype) for t in made]

    def vjp(x, s, after, g, lam, p):
        return values_of(program.grads, x, p, s=s, after=after, g=g, lambda_=lam)

    def cotangent(x, after, g, p):
        if program.cotangent is None:
            return g
        (made,) = values_of([program.cotangent], x, p, after=after, g=g, m=torch.zeros_like(after))
        return made

    own: dict[str, Any] = {} if functions.output is None else {"output": outputs}
    if not program.writes and not program.surrogates:  # a surrogate has no second derivative
        own |= {"vjp": vjp, "cotangent": cotangent}
    return ops.Plain(write_or_hold.step if program.writes else ops.affine_step, gates, **own)


def _own(functions: Functions, name: str, t: Tensor) -> Tensor:
    """An input as the user's functions take it: the real part if it is defined as real but given in a complex dtype."""
    return t.real if t.is_complex() and name not in functions.complex_inputs else t


def _as(value: Tensor | complex, like: Tensor) -> Tensor:
    """A result of the user's function in the dtype and shape of `like`."""
    if not isinstance(value, Tensor):
        return torch.full_like(like, value)
    return value.to(like.dtype).expand(like.shape)
