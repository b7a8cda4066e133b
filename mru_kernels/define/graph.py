"""Graphs of pointwise operations on one step's inputs, and their printing in a language.

A node is an input, a constant or an operation on earlier nodes. Equal nodes are one.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

#: Functions of numbers that csrc/functions.h and backends/triton/functions.py have under these names.
FUNCTIONS = {
    **{
        name: name + "({})"
        for name in ("square_root", "exponential", "exponential_minus_1", "logarithm", "logarithm_of_1_plus", "sine",
                     "cosine", "tanh", "sigmoid", "error_function")
    },
    **{name: name + "({}, {})" for name in ("maximum", "minimum", "power")},
}  # fmt: skip
#: Operations on numbers that all languages write alike.
ARITHMETIC = {"add": "{} + {}", "subtract": "{} - {}", "multiply": "{} * {}"}
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

#: Operations that need many registers.
COSTLY = {*FUNCTIONS, "divide"} - {"maximum", "minimum"}


@dataclass(frozen=True)
class Node:
    """A node: `operation` on the nodes numbered `operands`.

    An input has the operation "input" and the text `name`, which printed code reads it by. A constant has "constant"
    and a value.
    """

    operation: str
    operands: tuple[int, ...] = ()
    name: str = ""
    value: float = 0.0

    @property
    def is_mask(self) -> bool:
        return self.operation in MASKS


class Parts(NamedTuple):
    """A complex number: the nodes of its real part and of its imaginary part."""

    re: int
    im: int


Number = int | Parts


def nodes_of(numbers: Iterable[Number | None]) -> list[int]:
    """The nodes of the numbers that are not None, in order."""
    return [node for number in numbers if number is not None
            for node in (number if isinstance(number, Parts) else (number,))]  # fmt: skip


@dataclass
class Graph:
    """Nodes, each after its operands.

    Attributes:
        selects: whether a product with -1, 0 or 1, which a mask chooses, becomes a choice. The product of 0 and an
            infinite number is then 0. It is true for gradients only: those of the package's own cells are choices too.
    """

    nodes: list[Node] = field(default_factory=list)
    selects: bool = False
    _numbers: dict[object, int] = field(default_factory=dict)

    def input(self, name: str) -> int:
        return self._number(Node("input", name=name))

    def constant(self, value: float) -> int:
        return self._number(Node("constant", value=float(value)))

    def constant_parts(self, value: complex) -> Parts:
        value = complex(value)
        return Parts(self.constant(value.real), self.constant(value.imag))

    def is_zero(self, number: int) -> bool:
        return self._is(number, 0.0)

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
                if self.selects and self._is_signs(one):
                    return self._times_signs(one, other)
        if operation == "negative" and nodes[0].operation == "negative":
            return nodes[0].operands[0]
        if operation == "subtract" and self._is(operands[1], 0.0) and math.copysign(1, nodes[1].value) > 0:
            return operands[0]
        if operation == "divide" and self._is(operands[1], 1.0):
            return operands[0]
        if operation == "where":
            _, one, other = operands
            if one == other:
                return one
            if nodes[0].operation == "not":
                return self.add("where", nodes[0].operands[0], other, one)
        if operation in ("not_equal", "equal"):  # a mask that has become zeros and ones is that mask
            found = self._mask_of(operands[0])
            if found is not None and self._is(operands[1], float(operation == "equal")):
                return found
            if found is not None and self._is(operands[1], float(operation == "not_equal")):
                return self.add("not", found)
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

    def is_costly(self, results: Iterable[int]) -> bool:
        """Whether the results need one of the operations COSTLY."""
        return any(self.nodes[i].operation in COSTLY for i in self.reached(results))

    def renamed(self, names: Mapping[str, str]) -> Graph:
        """The same graph, whose inputs have other names."""
        return Graph([replace(n, name=names.get(n.name, n.name)) if n.operation == "input" else n for n in self.nodes])

    def _of_choice(self, operation: str, operands: Sequence[int]) -> int | None:
        """An operation on constants and a choice of two constants, as such a choice. None for other operands."""
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

    def _is_signs(self, number: int) -> bool:
        """Whether a node is a choice from -1, 0 and 1."""
        node = self.nodes[number]
        if node.operation == "where":
            return all(map(self._is_signs, node.operands[1:]))
        return node.operation == "constant" and node.value in (-1.0, 0.0, 1.0)

    def _times_signs(self, signs: int, x: int) -> int:
        node = self.nodes[signs]
        if node.operation == "where":
            mask, *branches = node.operands
            return self.add("where", mask, *(self._times_signs(branch, x) for branch in branches))
        return signs if node.value == 0 else x if node.value > 0 else self.add("negative", x)

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


@dataclass(frozen=True)
class Language:
    """How a language writes a graph.

    Attributes:
        operations: expressions for the operations that are not in FUNCTIONS, ARITHMETIC and MASKS.
        constant: the expression for a value.
        number, mask: the statements that give a name to an expression of either kind.
    """

    operations: Mapping[str, str]
    constant: Callable[[float], str]
    number: str
    mask: str

    def expression(self, operation: str) -> str:
        return next(t[operation] for t in (self.operations, FUNCTIONS, ARITHMETIC, MASKS) if operation in t)


def statements(graph: Graph, results: Sequence[int], language: Language) -> tuple[list[str], list[str]]:
    """Statements that compute the results, and an expression for each result."""
    lines, names = [], {}
    for i in graph.reached(results):
        node = graph.nodes[i]
        if node.operation == "input":
            names[i] = node.name
        elif node.operation == "constant":
            names[i] = language.constant(node.value)
        else:
            expression = language.expression(node.operation).format(*(names[o] for o in node.operands))
            names[i] = f"v{i}"
            lines.append((language.mask if node.is_mask else language.number).format(names[i], expression))
    return lines, [names[i] for i in results]
