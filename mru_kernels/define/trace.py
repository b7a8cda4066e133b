"""From the functions of a definition to the graphs of a cell's step, its output and their derivatives."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import torch_private as private
from ..cells.write_or_hold import Select
from .gates import Affine, Write
from .graph import Graph, Number, nodes_of
from .recording import COMPLEX_DTYPE, DTYPE, SHAPE, Recorder, Watch, gradients, name_of

EPSILON = "epsilon"  # the scalar of gates that write


@dataclass(frozen=True)
class Functions:
    """The user's functions of a cell, and the names of their arguments.

    Attributes:
        gate: of the inputs and the scalars that it names; returns `Affine` or `Write`.
        output: of `state` and of the inputs and scalars that it names; None for the state itself.
        inputs: the names of the inputs, in the order of the gate's arguments, then of the output's.
        scalars: the names of the scalars.
        complex_inputs: the names of the inputs that are complex.
    """

    gate: Callable[..., Any]
    output: Callable[..., Any] | None
    inputs: tuple[str, ...]
    scalars: tuple[str, ...]
    complex_inputs: frozenset[str] = frozenset()

    @property
    def complex_streams(self) -> bool:
        return self.inputs[0] in self.complex_inputs

    def gates(self, named: dict[str, Any]) -> Affine | Write:
        return self.gate(*(named[name] for name in parameters(self.gate)))

    def outputs(self, state: Tensor, named: dict[str, Any]) -> Tensor:
        assert self.output is not None
        return self.output(*((named | {"state": state})[name] for name in parameters(self.output)))


def parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


class Step(NamedTuple):
    """A step that is affine in the state.

    Attributes:
        after: the state after the step.
        push, pull: factor m, and conj(factor) m.
    """

    after: Number
    push: Number
    pull: Number


@dataclass(frozen=True)
class Program:
    """A cell as nodes of one graph, over the inputs named below.

    Inputs of the graph: `x[i]` and `p[i]`, the cell's inputs and its scalars without epsilon; `epsilon`; `s`, the state
    before a step; `after`, the state after it; `g` = dL/dh; `m` = dL/ds' through the next step; `lambda_` = dL/ds'. A
    complex one is two inputs, such as `s.re` and `s.im`.

    Attributes:
        scalars: how many there are, without epsilon.
        is_complex: whether the state is complex. Complex numbers are `Parts`, real ones are nodes.
        real_streams: whether streams are real.
        step: None for a gate that is a `Write`.
        write, value: whether a `Write` writes (a mask), and what. For an `Affine` its factor and its offset.
        nan: a mask: whether an input of the gate is NaN. Gates that write use it.
        output: h. It is None if h is the state, and so is `cotangent`.
        cotangent: dL/ds'.
        grads: dL/dx for each input x.
        surrogates: whether a derivative is not that of the operations: it is stated by an autograd.Function, such as
            `heaviside`, or it stops at a `detach` or at `no_grad`.
    """

    graph: Graph
    scalars: int
    is_complex: bool
    real_streams: bool
    step: Step | None
    write: Number
    value: Number
    nan: int
    output: Number | None
    cotangent: Number | None
    grads: tuple[Number, ...]
    surrogates: bool

    @property
    def writes(self) -> bool:
        return self.step is None

    @property
    def adjoint_sees_state(self) -> bool:
        return "after" in self.inputs(self.cotangent)

    @property
    def gated(self) -> bool:
        """Whether the gates have operations that need many registers: `gated` of backends/triton/cell.py."""
        return self.graph.is_costly(nodes_of([self.write, self.value]))

    def inputs(self, *numbers: Number | None) -> set[str]:
        """The names of the inputs that the numbers need; a complex one has one name, without ".re" and ".im"."""
        return {name.removesuffix(".re").removesuffix(".im") for name in self.graph.inputs(nodes_of(numbers))}


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
    leaf = partial(_leaf, recorder)
    x = {
        name: leaf(f"x[{i}]", is_complex=name in functions.complex_inputs).requires_grad_()
        for i, name in enumerate(functions.inputs)
    }
    named = x | {name: leaf(f"p[{i}]", ()) for i, name in enumerate(functions.scalars)}
    with torch.enable_grad(), recorder:
        gate = _gate(recorder, functions, named)
    first: Any = gate[0]
    second: Any = gate[1]
    writes = isinstance(gate, Write)
    is_complex = bool(functions.complex_inputs) or any(map(_is_complex, gate))
    s, after, m, lambda_ = (leaf(n, is_complex=is_complex) for n in ("s", "after", "m", "lambda_"))
    after.requires_grad_()
    epsilon, of_h = leaf(EPSILON), [leaf("g"), leaf("g", is_complex=True)]
    with torch.enable_grad(), recorder:
        step = _written(first, second, s, epsilon) if writes else first * s + second
        push, pull = (None, None) if writes else (first * m, _conjugate(first) * m)
        results, cotangents = [step], [lambda_]
        output = cotangent = None
        _check_output(functions, is_complex)
        if functions.output is not None:
            recorder.function = functions.output
            output = _output(recorder, functions, after, named)
            g = of_h[output.is_complex()]
            results, cotangents = [step, output], [lambda_, g]
        recorder.graph.selects = True
        if output is not None:
            (of_after,) = gradients([output], [g], [after])
            cotangent = m if of_after is None else m + of_after
        grads = gradients(results, cotangents, list(x.values()))
        if writes and first.dtype != torch.bool:
            first = first != 0
    graph, node = recorder.graph, recorder.node
    zeros = (graph.constant_parts(0) if t.is_complex() else graph.constant(0.0) for t in x.values())
    program = Program(
        graph=graph,
        scalars=len(functions.scalars),
        is_complex=is_complex,
        real_streams=not functions.complex_streams,
        step=None if writes else Step(node(step), node(push), node(pull)),
        write=node(first),
        value=node(second),
        nan=_any_nan(graph, nodes_of(node(x[name]) for name in parameters(functions.gate) if name in x)),
        output=None if output is None else node(output),
        cotangent=None if cotangent is None else node(cotangent),
        grads=tuple(zero if t is None else node(t) for zero, t in zip(zeros, grads, strict=True)),
        surrogates=recorder.stops_gradients or _has_surrogates(results),
    )
    _refuse_unused(functions, program)
    return program


def _leaf(recorder: Recorder, name: str, shape: tuple[int, ...] = SHAPE, is_complex: bool = False) -> Tensor:
    dtype, value = (COMPLEX_DTYPE, 0.5 + 0.25j) if is_complex else (DTYPE, 0.5)
    return recorder.leaf(name, torch.full(shape, value, dtype=dtype, device="cpu"))


def _gate(recorder: Recorder, functions: Functions, named: dict[str, Any]) -> Affine | Write:
    """What the gate returns, checked."""
    of = name_of(functions.gate)
    with private.EnableTorchFunction(), Watch(recorder):
        gate = functions.gates(named)
    if not isinstance(gate, (Affine, Write)):
        raise TypeError(f"{of}: expected mk.Affine or mk.Write, got {type(gate).__name__}")
    made = type(gate)(*(_number_or_tensor(recorder, *field) for field in gate._asdict().items()))
    if isinstance(gate, Write) and (functions.complex_inputs or any(map(_is_complex, made))):
        raise TypeError(f"{of}: expected mk.Affine, as an input or a result is complex, got mk.Write")
    return made


def _check_output(functions: Functions, is_complex: bool) -> None:
    if is_complex and functions.output is None and not functions.complex_streams:
        raise ValueError(
            f"output: expected a function with a real result, such as `lambda state: state.real`, as the stream"
            f" {functions.inputs[0]!r} is real and the state complex, got None"
        )


def _output(recorder: Recorder, functions: Functions, after: Tensor, named: dict[str, Any]) -> Tensor:
    """What the output returns, checked."""
    with private.EnableTorchFunction(), Watch(recorder):
        output = functions.outputs(after, named)
    output = _number_or_tensor(recorder, "the output", output)
    if output.is_complex() and not functions.complex_streams:
        of, first = name_of(recorder.function), functions.inputs[0]
        raise TypeError(f"{of}: expected a real output, as the stream {first!r} is real, got a complex one")
    return output


def _has_surrogates(results: Sequence[Tensor]) -> bool:
    """Whether the results depend on what an autograd.Function returned."""
    rest, seen = [t.grad_fn for t in results], set()
    while rest:
        node = rest.pop()
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return True
        if node is not None and node not in seen:
            seen.add(node)
            rest += [before for before, _ in node.next_functions]
    return False


def _is_complex(value: Any) -> bool:
    return value.is_complex() if isinstance(value, Tensor) else isinstance(value, complex)


def _conjugate(value: Any) -> Any:
    return value.conj() if isinstance(value, Tensor) else value.conjugate()


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
    if (
        isinstance(value, (int, float, complex))
        and not isinstance(value, bool)
        and name in ("factor", "offset", "value")
    ):
        return value
    raise TypeError(f"{of}: expected {name} as a floating tensor, got {'a mask' if is_mask else type(value).__name__}")


def _refuse_unused(functions: Functions, program: Program) -> None:
    used = program.inputs(program.write, program.value, program.output)
    in_graph = [(f"{of}[{i}]", name) for of, names in (("x", functions.inputs), ("p", functions.scalars))
                for i, name in enumerate(names)]  # fmt: skip
    for node, name in in_graph:
        if node not in used:
            raise ValueError(f"{name}: expected an argument that a result depends on, got one that none does")
    if functions.output is not None and "after" not in used:
        raise ValueError("state: expected an output that depends on it, got one that does not")
