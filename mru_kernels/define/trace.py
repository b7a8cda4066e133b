"""From the functions of a definition to the graphs of a cell's step, its output and their derivatives."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .. import torch_private as private
from ..cells.write_or_hold import Select
from .gates import Affine, Write
from .graph import Graph
from .recording import DTYPE, SHAPE, Recorder, gradients, name_of

EPSILON = "epsilon"  # the scalar of gates that write


@dataclass(frozen=True)
class Functions:
    """The user's functions of a cell, and the names of their arguments.

    Attributes:
        gate: of the inputs and the scalars that it names; returns `Affine` or `Write`.
        output: of `state` and of the inputs and scalars that it names; None for the state itself.
        inputs: the names of the inputs, in the order of the gate's arguments, then of the output's.
        scalars: the names of the scalars.
    """

    gate: Callable[..., Any]
    output: Callable[..., Any] | None
    inputs: tuple[str, ...]
    scalars: tuple[str, ...]

    def gates(self, named: dict[str, Any]) -> Affine | Write:
        return self.gate(*(named[name] for name in parameters(self.gate)))

    def outputs(self, state: Tensor, named: dict[str, Any]) -> Tensor:
        assert self.output is not None
        return self.output(*((named | {"state": state})[name] for name in parameters(self.output)))


def parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


@dataclass(frozen=True)
class Program:
    """A cell as nodes of one graph, over the inputs named below.

    Inputs of the graph: `x[i]` and `p[i]`, the cell's inputs and its scalars without epsilon; `epsilon`; `s`, the state
    before a step; `after`, the state after it; `g` = dL/dh; `m` = dL/ds' through the next step; `lambda_` = dL/ds'.

    Attributes:
        scalars: how many there are, without epsilon.
        writes: whether the gate is a `Write`.
        first, second: factor and offset, or whether the step writes (a mask) and what.
        nan: whether an input of a gate that writes is NaN, a mask.
        output: h. It and the next two may be None where h is the state.
        cotangent: dL/ds'.
        grads: dL/dx for each input x.
    """

    graph: Graph
    scalars: int
    writes: bool
    first: int
    second: int
    nan: int
    output: int | None
    cotangent: int | None
    grads: tuple[int, ...]

    @property
    def adjoint_sees_state(self) -> bool:
        return self.cotangent is not None and "after" in self.graph.inputs([self.cotangent])


def trace(functions: Functions) -> Program:
    """Record the functions and their derivatives once, on small tensors.

    Raises:
        TypeError: a function returns what it must not.
        ValueError: it does what a kernel cannot, or an argument is not used; the message names the line or argument.
    """
    with private.without_modes():
        return _trace(functions)


def _trace(functions: Functions) -> Program:
    recorder = Recorder(functions.gate)

    def leaf(name: str, shape: tuple[int, ...] = SHAPE) -> Tensor:
        return recorder.leaf(name, torch.full(shape, 0.5, dtype=DTYPE, device="cpu"))

    x = {name: leaf(f"x[{i}]").requires_grad_() for i, name in enumerate(functions.inputs)}
    named = x | {name: leaf(f"p[{i}]", ()) for i, name in enumerate(functions.scalars)}
    s, after, g, m, lambda_, epsilon = (leaf(n) for n in ("s", "after", "g", "m", "lambda_", EPSILON))
    after.requires_grad_()
    with torch.enable_grad(), recorder:
        gate = functions.gates(named)
        if not isinstance(gate, (Affine, Write)):
            raise TypeError(f"{name_of(functions.gate)}: expected mk.Affine or mk.Write, got {type(gate).__name__}")
        first, second = (_number_or_tensor(recorder, *field) for field in gate._asdict().items())
        writes = isinstance(gate, Write)
        step = _written(first, second, s, epsilon) if writes else first * s + second
        results, cotangents = [step], [lambda_]
        output = cotangent = None
        if functions.output is not None:
            recorder.function = functions.output
            output = _number_or_tensor(recorder, "the output", functions.outputs(after, named))
            results, cotangents = [step, output], [lambda_, g]
        recorder.graph.selects = True
        if output is not None:
            (of_after,) = gradients([output], [g], [after])
            cotangent = m if of_after is None else m + of_after
        grads = gradients(results, cotangents, list(x.values()))
        if writes and first.dtype != torch.bool:
            first = first != 0
    graph = recorder.graph
    program = Program(
        graph=graph,
        scalars=len(functions.scalars),
        writes=writes,
        first=recorder.node(first),
        second=recorder.node(second),
        nan=_any_nan(graph, [recorder.node(x[name]) for name in parameters(functions.gate) if name in x]),
        output=None if output is None else recorder.node(output),
        cotangent=None if cotangent is None else recorder.node(cotangent),
        grads=tuple(graph.constant(0.0) if t is None else recorder.node(t) for t in grads),
    )
    _refuse_unused(functions, program)
    return program


def _any_nan(graph: Graph, numbers: Sequence[int]) -> int:
    return reduce(lambda a, b: graph.add("or", a, b), (graph.add("not_equal", i, i) for i in numbers))


def _written(write: Tensor, value: Tensor | float, s: Tensor, epsilon: Tensor) -> Tensor:
    """The state after a step that writes or holds, whose derivatives are those of the cell."""
    written = value + epsilon * torch.where(epsilon == 0, 0.0, s)
    return torch.where(write, written, s) if write.dtype == torch.bool else Select.apply(write, written, s)


def _number_or_tensor(recorder: Recorder, name: str, value: Any) -> Any:
    """A result of the user's functions, checked."""
    of = name_of(recorder.function)
    is_mask = isinstance(value, Tensor) and value.dtype == torch.bool
    if isinstance(value, Tensor) and (is_mask <= (name == "write")):
        if value.shape != SHAPE and value.shape != ():
            raise ValueError(f"{of}: expected {name} in the shape of the arguments, got another shape")
        recorder.node(value)
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool) and name in ("factor", "offset", "value"):
        return value
    raise TypeError(f"{of}: expected {name} as a floating tensor, got {'a mask' if is_mask else type(value).__name__}")


def _refuse_unused(functions: Functions, program: Program) -> None:
    used = program.graph.inputs(n for n in (program.first, program.second, program.output) if n is not None)
    in_graph = [(f"{of}[{i}]", name) for of, names in (("x", functions.inputs), ("p", functions.scalars))
                for i, name in enumerate(names)]  # fmt: skip
    for node, name in in_graph:
        if node not in used:
            raise ValueError(f"{name}: expected an argument that a result depends on, got one that none does")
    if functions.output is not None and "after" not in used:
        raise ValueError("state: expected an output that depends on it, got one that does not")
