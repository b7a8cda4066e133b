"""Evaluates a graph in plain torch. Torch differentiates that, which gives the derivatives of gradients."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .graph import Graph, Number, Parts, nodes_of

_OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "add": operator.add, "subtract": operator.sub, "multiply": operator.mul, "divide": operator.truediv,
    "negative": torch.neg, "absolute": torch.abs, "where": torch.where, "square_root": torch.sqrt,
    "exponential": torch.exp, "exponential_minus_1": torch.expm1, "logarithm": torch.log,
    "logarithm_of_1_plus": torch.log1p, "sine": torch.sin, "cosine": torch.cos, "tanh": torch.tanh,
    "sigmoid": torch.sigmoid, "error_function": torch.erf, "maximum": torch.maximum, "minimum": torch.minimum,
    "power": torch.pow, "equal": operator.eq, "not_equal": operator.ne, "less": operator.lt, "less_equal": operator.le,
    "greater": operator.gt, "greater_equal": operator.ge, "and": operator.and_, "or": operator.or_,
    "xor": operator.xor, "not": torch.logical_not,
}  # fmt: skip


def evaluate(
    graph: Graph, results: Sequence[Number], inputs: Mapping[str, Tensor | float], like: Tensor
) -> list[Tensor]:
    """The values of the results, in the shape of `like`.

    Args:
        inputs: by their names in the graph; a complex one by its name without ".re" and ".im".
        like: a real tensor. Constants have its dtype and device.
    """

    def number(value: Tensor | float) -> Tensor:
        return value if isinstance(value, Tensor) else torch.full_like(like, value)

    values: dict[int, Tensor] = {}
    for i in graph.reached(nodes_of(results)):
        node = graph.nodes[i]
        if node.operation == "input":
            name, _, part = node.name.partition(".")
            values[i] = number(inputs[name])
            if values[i].is_complex():
                values[i] = values[i].imag if part == "im" else values[i].real
        elif node.operation == "constant":
            values[i] = number(node.value)
        else:
            values[i] = _OPERATIONS[node.operation](*(values[o] for o in node.operands))
    return [torch.complex(values[n.re], values[n.im]) if isinstance(n, Parts) else values[n] for n in results]
