"""Records what a gate does: a graph of the pointwise operations that torch runs for it, backward ones included."""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.utils._python_dispatch import TorchDispatchMode

from .graph import Graph
from .operations import RULES, to_number

SHAPE = (2, 3)  # of the tensors that a gate is run on
DTYPE = torch.float64

_CREATIONS = ("zeros_like", "ones_like", "full_like", "scalar_tensor", "lift_fresh")
#: Operations in place that torch's gradients of clamp and maximum run, on tensors of their own.
_OF_GRADIENTS = ("logical_and_", "masked_fill_")


class Recorder(TorchDispatchMode):
    """A mode under which operations on known tensors become nodes of `graph`.

    Args:
        function: the user's function, whose line an error names.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.graph = Graph()
        self.function = function
        self._nodes: dict[int, int] = {}  # of tensors, by id
        self._alive: list[Tensor] = []  # so that no id is used twice

    def leaf(self, name: str, value: Tensor) -> Tensor:
        """`value` as the input `name` of the graph."""
        self._know(value, self.graph.input(name))
        return value

    def node(self, value: Any) -> int:
        """The node of a tensor or a number."""
        if not isinstance(value, Tensor):
            return self.graph.constant(value)
        known = self._nodes.get(id(value))
        if known is None:
            self.refuse("its arguments and numbers only", f"a tensor of shape {list(value.shape)} from outside")
        return known

    def refuse(self, expected: str, got: str) -> NoReturn:
        """Raise an error that names the line of the user's function."""
        raise ValueError(f"{self.function.__name__}: expected {expected}, got {got}{self._line()}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name in _OF_GRADIENTS and self.graph.selects:
            name = name[:-1]
        elif func._schema.is_mutable:
            self.refuse("no operation in place", name)
        if name == "_local_scalar_dense":
            self.refuse("no branch on values (use torch.where)", "the value of a tensor")
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.refuse("a function of its arguments", f"the random {name}")
        if name not in RULES:
            decomposition = decomposition_table.get(func)
            if decomposition is None:
                self.refuse("pointwise operations that C++ has", name)
            with self:
                return decomposition(*args, **kwargs)
        result = func(*args, **kwargs)
        if result.shape not in (SHAPE, ()):
            self.refuse("pointwise operations", f"{name}, whose result has another shape")
        if result.dtype not in (DTYPE, torch.bool) and name not in _CREATIONS:
            self.refuse("the dtype of its arguments", f"{name} to {result.dtype}")
        if name == "lift_fresh":  # torch.tensor(number)
            self._know(result, self.graph.constant(result.item()))
            return result
        made = RULES[name](self.graph, *self._operands(name, args, result.dtype), **self._options(func, args, kwargs))
        if made is None:
            self.refuse("pointwise operations that C++ has", f"{name} with {kwargs}")
        self._know(result, made)
        return result

    def _operands(self, name: str, args, dtype: torch.dtype) -> list[int]:
        """The nodes of the arguments by position. Where numbers are expected, masks become zeros and ones."""
        nodes = [self.node(v) for v in args if isinstance(v, (Tensor, int, float))]
        if name == "clamp" or (name in ("add", "sub", "rsub") and len(nodes) == 3):
            nodes = nodes[: 1 if name == "clamp" else 2]  # the others are options
        keeps = {"where": (0,), "masked_fill": (1,)}.get(name, ())
        if name == "_to_copy" or (dtype == torch.bool and all(self.graph.nodes[i].is_mask for i in nodes)):
            return nodes
        return [i if place in keeps else to_number(self.graph, i) for place, i in enumerate(nodes)]

    def _options(self, func, args, kwargs) -> dict[str, Any]:
        """The options of an operation that has some, by name, however they are given."""
        named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        options = {k: v for k, v in named.items() if k in ("alpha", "rounding_mode") and v is not None}
        if func._schema.name == "aten::clamp":
            options |= {k: self.node(v) for k, v in named.items() if k in ("min", "max") and v is not None}
        return options

    def _know(self, value: Tensor, node: int) -> None:
        self._nodes[id(value)] = node
        self._alive.append(value)

    def _line(self) -> str:
        code = getattr(self.function, "__code__", None)
        for frame, number in traceback.walk_stack(None):
            if frame.f_code is code:
                line = linecache.getline(code.co_filename, number).strip()
                return f", in `{line}` ({code.co_filename}:{number})"
        return ", in its gradient" * (code is not None)


def gradients(results: Sequence[Tensor], grads: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """The vector-Jacobian products for `inputs`; None where no result depends on one."""
    pairs = [(t, g) for t, g in zip(results, grads, strict=True) if t.requires_grad]
    if not pairs or not inputs:
        return [None] * len(inputs)
    outputs, cotangents = zip(*pairs, strict=True)
    return list(torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True, retain_graph=True))
