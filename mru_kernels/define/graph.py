"""Graphs of pointwise operations on one step's inputs, and their printing as C++.

A node is an input, a constant or an operation on earlier nodes. Equal nodes are one.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

#: Operations on numbers as C++ expressions of their operands; csrc/functions.h has the functions.
NUMBERS = {
    "add": "{} + {}",
    "subtract": "{} - {}",
    "multiply": "{} * {}",
    "divide": "{} / {}",
    "negative": "-{}",
    "absolute": "Lanes<V>::abs({})",
    "where": "{} ? {} : {}",
    "maximum": "maximum({}, {})",
    "minimum": "minimum({}, {})",
    **{name: name + "({}, {})" for name in ("power", "hypotenuse", "arctangent_2")},
    **{
        name: name + "({})"
        for name in ("square_root", "exponential", "exponential_minus_1", "logarithm", "logarithm_of_1_plus", "sine",
                     "cosine", "tanh", "sigmoid", "error_function", "arctangent")
    },
}  # fmt: skip
#: The same for operations whose result is a mask, true or false.
MASKS = {
    "equal": "{} == {}",
    "not_equal": "{} != {}",
    "less": "{} < {}",
    "less_equal": "{} <= {}",
    "greater": "{} > {}",
    "greater_equal": "{} >= {}",
    "and": "{} & {}",
    "or": "{} | {}",
    "xor": "{} ^ {}",
    "not": "{} == 0",
}

_OF_CONSTANTS: dict[str, Callable[..., float]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "negative": operator.neg,
    "absolute": abs,
}


@dataclass(frozen=True)
class Node:
    """A node: `operation` on the nodes numbered `operands`.

    An input has the operation "input" and the text `name`, which C++ code reads it by. A constant has "constant" and
    a value.
    """

    operation: str
    operands: tuple[int, ...] = ()
    name: str = ""
    value: float = 0.0

    @property
    def is_mask(self) -> bool:
        return self.operation in MASKS


@dataclass
class Graph:
    """Nodes, each after its operands."""

    nodes: list[Node] = field(default_factory=list)
    _numbers: dict[object, int] = field(default_factory=dict)

    def input(self, name: str) -> int:
        return self._number(Node("input", name=name))

    def constant(self, value: float) -> int:
        return self._number(Node("constant", value=float(value)))

    def add(self, operation: str, *operands: int) -> int:
        """The number of a node, which may be an older one with the same value."""
        nodes = [self.nodes[i] for i in operands]
        if operation in _OF_CONSTANTS and all(map(self._is_constant, operands)):
            return self.constant(_OF_CONSTANTS[operation](*(node.value for node in nodes)))
        if operation in _OF_CONSTANTS and (found := self._of_choice(operation, operands)) is not None:
            return found
        if operation == "multiply":
            for one, other in (operands, operands[::-1]):
                if self._is(one, 1.0):
                    return other
        if operation == "subtract" and self._is(operands[1], 0.0) and math.copysign(1, nodes[1].value) > 0:
            return operands[0]
        if operation == "divide" and self._is(operands[1], 1.0):
            return operands[0]
        if operation == "where" and operands[1] == operands[2]:
            return operands[1]
        if operation in ("not_equal", "equal"):  # a mask that has become zeros and ones is that mask
            mask = self._mask_of(operands[0])
            if mask is not None and self._is(operands[1], float(operation == "equal")):
                return mask
        return self._number(Node(operation, operands))

    def reached(self, results: Iterable[int]) -> list[int]:
        """The numbers of the nodes that the results need, in order."""
        needed: set[int] = set()
        rest = list(results)
        while rest:
            i = rest.pop()
            if i not in needed:
                needed.add(i)
                rest += self.nodes[i].operands
        return sorted(needed)

    def inputs(self, results: Iterable[int]) -> set[str]:
        """The inputs that the results need, by name."""
        return {self.nodes[i].name for i in self.reached(results) if self.nodes[i].operation == "input"}

    def _of_choice(self, operation: str, operands: Sequence[int]) -> int | None:
        """An operation on one of two constants and on constants: again one of two. None for other operands."""
        choices = [i for i in operands if self._is_choice(i)]
        if len(choices) != 1 or not all(self._is_constant(i) or i in choices for i in operands):
            return None
        mask, *branches = self.nodes[choices[0]].operands
        made = [self.add(operation, *(branch if i in choices else i for i in operands)) for branch in branches]
        return self.add("where", mask, *made)

    def _is_constant(self, number: int) -> bool:
        return self.nodes[number].operation == "constant"

    def _is_choice(self, number: int) -> bool:
        node = self.nodes[number]
        return node.operation == "where" and all(self._is_constant(i) for i in node.operands[1:])

    def _number(self, node: Node) -> int:
        # 0.0 == -0.0 and nan != nan, so a constant is known by its bits.
        key = node if node.operation != "constant" else ("constant", node.value.hex())
        if key not in self._numbers:
            self._numbers[key] = len(self.nodes)
            self.nodes.append(node)
        return self._numbers[key]

    def _is(self, number: int, value: float) -> bool:
        node = self.nodes[number]
        return node.operation == "constant" and node.value == value

    def _mask_of(self, number: int) -> int | None:
        """The mask of a `where(mask, 1, 0)`; None for other nodes."""
        node = self.nodes[number]
        if node.operation == "where" and self._is(node.operands[1], 1.0) and self._is(node.operands[2], 0.0):
            return node.operands[0]
        return None


def statements(graph: Graph, results: Sequence[int]) -> tuple[list[str], list[str]]:
    """C++ statements that compute the results, and an expression for each result."""
    lines, names = [], {}
    for i in graph.reached(results):
        node = graph.nodes[i]
        if node.operation == "input":
            names[i] = node.name
        elif node.operation == "constant":
            names[i] = f"splat<V>({_literal(node.value)})"
        else:
            expression = (NUMBERS | MASKS)[node.operation].format(*(names[o] for o in node.operands))
            names[i] = f"v{i}"
            lines.append(f"const {'auto' if node.is_mask else 'V'} v{i} = {expression};")
    return lines, [names[i] for i in results]


def _literal(value: float) -> str:
    if math.isnan(value):
        return 'S(__builtin_nan(""))'
    if math.isinf(value):
        return f"S({'-' * (value < 0)}__builtin_inf())"
    return f"S({value.hex()})"
