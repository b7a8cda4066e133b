"""The pointwise operations of torch that a gate may use, as nodes of a graph.

A rule gets a `Graph`, the operands as nodes or numbers, and returns a node. Operations that have no rule are replaced
by torch's own decompositions; see recording.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .graph import Graph, Parts

Rule = Callable[..., int]


def _simple(operation: str) -> Rule:
    return lambda graph, *operands: graph.add(operation, *operands)


def _add(graph: Graph, x: int, y: int, alpha: float = 1) -> int:
    return graph.add("add", x, _scaled(graph, y, alpha))


def _subtract(graph: Graph, x: int, y: int, alpha: float = 1) -> int:
    return graph.add("subtract", x, _scaled(graph, y, alpha))


def _scaled(graph: Graph, y: int, alpha: float) -> int:
    return y if alpha == 1 else graph.add("multiply", y, graph.constant(alpha))


def _multiply(graph: Graph, x: int, y: int) -> int:
    masks = graph.nodes[x].is_mask and graph.nodes[y].is_mask
    return graph.add("and" if masks else "multiply", x, y)


def _divide(graph: Graph, x: int, y: int, rounding_mode: str | None = None) -> int | None:
    return graph.add("divide", x, y) if rounding_mode is None else None


def _power(graph: Graph, x: int, y: int) -> int:
    node = graph.nodes[y]
    if node.operation == "constant":
        if node.value == 0.5:
            return graph.add("square_root", x)
        if node.value in range(1, 9):
            result = x
            for _ in range(int(node.value) - 1):
                result = graph.add("multiply", result, x)
            return result
    return graph.add("power", x, y)


# Clamps are choices and not maxima, whose derivative torch halves between equal arguments. NaN stays NaN.


def _at_least(graph: Graph, x: int, least: int) -> int:
    return graph.add("where", _or_nan(graph, "less", x, least), least, x)


def _at_most(graph: Graph, x: int, most: int) -> int:
    return graph.add("where", _or_nan(graph, "greater", x, most), most, x)


def _or_nan(graph: Graph, comparison: str, x: int, bound: int) -> int:
    """Whether `x` is outside the bound, or the bound is NaN."""
    is_outside, node = graph.add(comparison, x, bound), graph.nodes[bound]
    if node.operation == "constant" and not math.isnan(node.value):
        return is_outside
    return graph.add("or", is_outside, graph.add("not_equal", bound, bound))


def _clamp(graph: Graph, x: int, min: int | None = None, max: int | None = None) -> int:
    x = x if min is None else _at_least(graph, x, min)
    return x if max is None else _at_most(graph, x, max)


def _hardtanh(graph: Graph, x: int, least: int | None = None, most: int | None = None) -> int:
    """Has no derivative at the bounds; a clamp has one there."""
    least = graph.constant(-1.0) if least is None else least
    most = graph.constant(1.0) if most is None else most
    x = graph.add("where", graph.add("less_equal", x, least), least, x)
    return graph.add("where", graph.add("greater_equal", x, most), most, x)


def _sign(graph: Graph, x: int) -> int:
    zero, one = graph.constant(0.0), graph.constant(1.0)
    negative = graph.add("where", graph.add("less", x, zero), graph.constant(-1.0), zero)
    return graph.add("where", graph.add("greater", x, zero), one, negative)


def _reciprocal(graph: Graph, x: int) -> int:
    return graph.add("divide", graph.constant(1.0), x)


def _like(value: float) -> Rule:
    return lambda graph, *_: graph.constant(value)


def _full_like(graph: Graph, _x: int, value: int) -> int:
    return value


def _itself(graph: Graph, x: int, *_) -> int:
    return x


def _select_backward(graph: Graph, grad: int, _dim: int, index: int) -> Parts:
    """The gradient that reaches one part of `view_as_real`, as a complex number whose other part is 0."""
    zero = graph.constant(0.0)
    return Parts(zero, grad) if graph.nodes[index].value % 2 else Parts(grad, zero)


def to_number(graph: Graph, x: int) -> int:
    """A mask as zeros and ones; a number as it is."""
    if graph.nodes[x].is_mask:
        return graph.add("where", x, graph.constant(1.0), graph.constant(0.0))
    return x


def _of_sigmoid(graph: Graph, grad: int, y: int) -> int:
    slope = graph.add("multiply", y, graph.add("subtract", graph.constant(1.0), y))
    return graph.add("multiply", grad, slope)


def _of_tanh(graph: Graph, grad: int, y: int) -> int:
    slope = graph.add("subtract", graph.constant(1.0), graph.add("multiply", y, y))
    return graph.add("multiply", grad, slope)


def _of_log_sigmoid(graph: Graph, grad: int, x: int, _: int) -> int:
    """As a sigmoid: torch's decomposition has |x|, which has no derivative at 0."""
    return graph.add("multiply", grad, graph.add("sigmoid", graph.add("negative", x)))


def _above(graph: Graph, grad: int, x: int, threshold: int) -> int:
    return graph.add("where", graph.add("less_equal", x, threshold), graph.constant(0.0), grad)


#: By the operation's name, without its namespace and overload.
RULES: dict[str, Callable[..., Any]] = {
    **{name: _simple(operation) for name, operation in {
        "neg": "negative", "abs": "absolute", "sqrt": "square_root", "exp": "exponential",
        "expm1": "exponential_minus_1", "log": "logarithm", "log1p": "logarithm_of_1_plus", "sin": "sine",
        "cos": "cosine", "tanh": "tanh", "sigmoid": "sigmoid", "erf": "error_function", "maximum": "maximum",
        "minimum": "minimum", "where": "where", "eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal",
        "gt": "greater", "ge": "greater_equal", "logical_and": "and", "logical_or": "or", "logical_xor": "xor",
        "logical_not": "not", "bitwise_and": "and", "bitwise_or": "or", "bitwise_xor": "xor", "bitwise_not": "not",
        "__and__": "and", "__or__": "or", "__xor__": "xor",
    }.items()},
    "add": _add,
    "mul": _multiply,
    "sub": _subtract,
    "rsub": lambda graph, x, y, alpha=1: _subtract(graph, y, x, alpha),
    "div": _divide,
    "pow": _power,
    "square": lambda graph, x: graph.add("multiply", x, x),
    "reciprocal": _reciprocal,
    "rsqrt": lambda graph, x: _reciprocal(graph, graph.add("square_root", x)),
    "clamp": _clamp,
    "clamp_min": _at_least,
    "clamp_max": _at_most,
    "hardtanh": _hardtanh,
    "relu": lambda graph, x: _above(graph, x, x, graph.constant(0.0)),
    "sign": _sign,
    "sgn": _sign,
    "isfinite": lambda graph, x: graph.add("less", graph.add("absolute", x), graph.constant(math.inf)),
    "isinf": lambda graph, x: graph.add("equal", graph.add("absolute", x), graph.constant(math.inf)),
    "isnan": lambda graph, x: graph.add("not_equal", x, x),
    "masked_fill": lambda graph, x, mask, value: graph.add("where", mask, value, x),
    "sigmoid_backward": _of_sigmoid,
    "tanh_backward": _of_tanh,
    "log_sigmoid_backward": _of_log_sigmoid,
    "threshold_backward": _above,
    "select_backward": _select_backward,
    "zeros_like": _like(0.0),
    "ones_like": _like(1.0),
    "full_like": _full_like,
    "full": _itself,
    "scalar_tensor": _itself,
    "_to_copy": to_number,
    "to": to_number,
    "real": _itself,
    "detach": _itself,
    "alias": _itself,
    "clone": _itself,
    "lift_fresh": _itself,
}  # fmt: skip
