"""Records what a gate does: a graph of the pointwise operations that torch runs for it, backward ones included."""

from __future__ import annotations

import linecache
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .. import torch_private as private
from .complex_operations import COMPLEX_RULES, OF_PAIRS
from .graph import Graph, Number, Parts, nodes_of
from .operations import RULES, to_number

SHAPE = (2, 3)  # of the tensors that a gate is run on
DTYPE, COMPLEX_DTYPE = torch.float64, torch.complex128

_CREATIONS = ("zeros_like", "ones_like", "full_like", "scalar_tensor", "lift_fresh")


class Recorder(TorchDispatchMode):
    """A mode under which operations on known tensors become nodes of `graph`.

    Args:
        function: the user's function, whose line an error names.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.graph = Graph()
        self.function = function
        self.stops_gradients = False  # whether a user's function does so; see Watch
        self._nodes: dict[int, Number] = {}  # of tensors, by id
        self._alive: list[Tensor] = []  # so that no id is used twice
        self._decompositions = 0  # number of those that run now

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False, because for True torch would import its compiler, which takes a second."""
        return False

    def leaf(self, name: str, value: Tensor) -> Tensor:
        """Make `value` the input `name` of the graph; if it is complex, the inputs `name`.re and `name`.im."""
        of_parts = (self.graph.input(f"{name}.{part}") for part in ("re", "im"))
        self._know(value, Parts(*of_parts) if value.is_complex() else self.graph.input(name))
        return value

    def node(self, value: Any) -> Number:
        """The node of a tensor or a number; both nodes of a complex one."""
        if not isinstance(value, Tensor):
            return self.graph.constant_parts(value) if isinstance(value, complex) else self.graph.constant(value)
        known = self._nodes.get(id(value))
        if known is None:
            self.refuse("its arguments and numbers only", f"a tensor of shape {list(value.shape)} from outside")
        return known

    def depends_on_inputs(self, value: Any) -> bool:
        """Whether `value` is a tensor of numbers that an input of the graph changes."""
        if not isinstance(value, Tensor) or value.dtype == torch.bool:
            return False
        return bool(self.graph.inputs(nodes_of([self.node(value)])))

    def refuse(self, expected: str, got: str) -> NoReturn:
        """Raise an error that names the line of the user's function."""
        raise ValueError(f"{name_of(self.function)}: expected {expected}, got {got}{self._line()}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if func._schema.is_mutable:
            if not self._decompositions and self._frame() is not None:
                self.refuse("no operation in place", name)
            name = name.removesuffix("_")  # torch's own, on tensors that nobody else reads
        if name == "_local_scalar_dense":
            self.refuse("no branch on values (use torch.where)", "the value of a tensor")
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.refuse("a function of its arguments", f"the random {name}")
        is_complex = self._is_complex(name, args, kwargs)
        rules, of = (COMPLEX_RULES, " on complex numbers") if is_complex else (RULES, "")
        if name not in rules:
            decomposition = _decomposition(func)
            if decomposition is None:
                self.refuse(f"pointwise operations{of} that kernels have", name)
            self._decompositions += 1
            with self:
                result = decomposition(*args, **kwargs)
            self._decompositions -= 1
            return result
        result = func(*args, **kwargs)
        is_pair = result.shape == (*SHAPE, 2) and name in OF_PAIRS
        if is_pair and name == "add" and not all(isinstance(t, Tensor) and t.shape == result.shape for t in args):
            self.refuse("a sum of two results of view_as_real", "add of one and a number, which changes both parts")
        if result.shape not in (SHAPE, ()) and not is_pair:
            self.refuse("pointwise operations", f"{name}, whose result has another shape")
        exact = name in _CREATIONS or self._chooses_numbers(name, args)
        if result.dtype not in (DTYPE, COMPLEX_DTYPE, torch.bool) and not exact:
            self.refuse("the dtype of its arguments", f"{name} to {result.dtype}")
        if name == "lift_fresh":  # torch.tensor(number)
            self._know(result, self.node(result.item()))
            return result
        operands = self._operands(name, args, result.dtype, is_complex)
        made = rules[name](self.graph, *operands, **self._options(func, args, kwargs))
        if made is None or isinstance(made, Parts) != (result.is_complex() or is_pair):
            self.refuse(f"pointwise operations{of} that kernels have", f"{name} with {kwargs or args[1:]}")
        self._know(result, made)
        return result

    def _is_complex(self, name: str, args, kwargs) -> bool:
        """Whether an operation has a complex operand or a complex result."""
        dtype = kwargs.get("dtype")
        makes = name in ("complex", "polar") or (dtype is not None and dtype.is_complex)
        return makes or any(isinstance(v, complex) or isinstance(self._nodes.get(id(v)), Parts) for v in args)

    def _chooses_numbers(self, name: str, args) -> bool:
        """Whether this is `torch.where(mask, 1.0, -1.0)`, of numbers that are exact in any dtype that torch chooses."""
        nodes = [self.graph.nodes[i] for i in nodes_of(map(self.node, args[1:]))] if name == "where" else []
        exact = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
        return bool(nodes) and all(node.operation == "constant" and node.value in exact for node in nodes)

    def _operands(self, name: str, args, dtype: torch.dtype, is_complex: bool) -> list[Any]:
        """The nodes of the arguments by position. Where numbers are expected, masks become zeros and ones.

        The operands of an operation on complex numbers are `Parts`.
        """
        nodes: list[Any] = [self.node(v) for v in args if isinstance(v, (Tensor, int, float, complex))]
        if name == "clamp" or (name in ("add", "sub", "rsub") and len(nodes) == 3):
            nodes = nodes[: 1 if name == "clamp" else 2]  # the others are options
        keeps = {"where": (0,), "masked_fill": (1,)}.get(name, ())
        as_number = self.parts if is_complex else partial(to_number, self.graph)
        if not is_complex:
            masks = dtype == torch.bool and all(self.graph.nodes[i].is_mask for i in nodes)
            if masks or name in ("_to_copy", "to"):
                return nodes
        return [i if place in keeps else as_number(i) for place, i in enumerate(nodes)]

    def parts(self, number: Number) -> Parts:
        """A number as a complex one, with imaginary part 0 if it is real."""
        if isinstance(number, Parts):
            return number
        return Parts(to_number(self.graph, number), self.graph.constant(0.0))

    def _options(self, func, args, kwargs) -> dict[str, Any]:
        """The options of an operation that has some, by name, however they are given."""
        named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        options = {k: v for k, v in named.items() if k in ("alpha", "rounding_mode") and v is not None}
        if func._schema.name == "aten::clamp":
            options |= {k: self.node(v) for k, v in named.items() if k in ("min", "max") and v is not None}
        return options

    def _know(self, value: Tensor, node: Number) -> None:
        self._nodes[id(value)] = node
        self._alive.append(value)

    def _line(self) -> str:
        frame = self._frame()
        if frame is None:
            return ", in its gradient" if hasattr(self.function, "__code__") else ""
        line = linecache.getline(*frame).strip()
        return f", in `{line}` ({frame[0]}:{frame[1]})"

    def _frame(self) -> tuple[str, int] | None:
        """File and line where the user's function is; None where it does not run."""
        code = getattr(self.function, "__code__", None)
        for frame, number in traceback.walk_stack(sys._getframe()):
            if frame.f_code is code:
                return frame.f_code.co_filename, number
        return None


class Watch(TorchFunctionMode):
    """A mode for the user's functions that notes in `recorder` whether gradients stop at a value.

    They stop at `detach` and at what is computed under `no_grad`. The graph does not show that.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        differentiable = any(isinstance(t, Tensor) and t.requires_grad for t in private.tree_leaves((args, kwargs)))
        with private.DisableTorchFunction():  # not the modes around the definition
            result = func(*args, **kwargs)
        if differentiable:
            constants = (t for t in private.tree_leaves(result) if isinstance(t, Tensor) and not t.requires_grad)
            self.recorder.stops_gradients |= any(map(self.recorder.depends_on_inputs, constants))
        return result


def name_of(function: Callable[..., Any]) -> str:
    """The name of a function in errors; a callable object may have none."""
    return getattr(function, "__name__", type(function).__name__)


def _decomposition(func: Any) -> Callable[..., Any] | None:
    """Torch's own decomposition of an operation. The table takes a second to import, and few gates need it."""
    from torch._decomp import decomposition_table

    return decomposition_table.get(func)


def gradients(results: Sequence[Tensor], grads: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """The vector-Jacobian products for `inputs`; None where no result depends on one."""
    pairs = [(t, g) for t, g in zip(results, grads, strict=True) if t.requires_grad]
    if not pairs or not inputs:
        return [None] * len(inputs)
    outputs, cotangents = zip(*pairs, strict=True)
    return list(torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True, retain_graph=True))
