"""The operations on complex numbers that a gate may use, as nodes of their real and imaginary parts.

A rule gets a `Graph` and its operands as `Parts`. A real operand has the imaginary part 0, a constant that products and
sums leave out. Masks stay nodes. The result of `view_as_real` has the parts of its argument.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

from .graph import Graph, Parts

#: Operations whose results may have a last dimension of 2: real and imaginary part, as `view_as_real` returns them.
OF_PAIRS = ("view_as_real", "select_backward", "_neg_view", "neg", "add", "clone", "alias", "detach")


# A product with a negative becomes the negative of a product, and the sum with a negative becomes a difference. So
# conjugates cost nothing, and no bit changes.


def _negated(graph: Graph, x: int) -> int | None:
    """The operand of `x` if `x` is a negative, else None."""
    node = graph.nodes[x]
    return node.operands[0] if node.operation == "negative" else None


def _times(graph: Graph, x: int, y: int) -> int:
    if graph.is_zero(x) or graph.is_zero(y):
        return graph.constant(0.0)
    for one, other in ((x, y), (y, x)):
        if (positive := _negated(graph, one)) is not None:
            return graph.add("negative", _times(graph, positive, other))
    return graph.add("multiply", x, y)


def _plus(graph: Graph, x: int, y: int) -> int:
    if graph.is_zero(x) or graph.is_zero(y):
        return y if graph.is_zero(x) else x
    for one, other in ((x, y), (y, x)):
        if (positive := _negated(graph, other)) is not None:
            return _minus(graph, one, positive)
    return graph.add("add", x, y)


def _minus(graph: Graph, x: int, y: int) -> int:
    if graph.is_zero(y):
        return x
    if (positive := _negated(graph, y)) is not None:
        return _plus(graph, x, positive)
    return graph.add("negative", y) if graph.is_zero(x) else graph.add("subtract", x, y)


def _over(graph: Graph, x: int, y: int) -> int:
    return x if graph.is_zero(x) else graph.add("divide", x, y)


def _add(graph: Graph, x: Parts, y: Parts, alpha: complex = 1) -> Parts:
    y = _scaled(graph, y, alpha)
    return Parts(_plus(graph, x.re, y.re), _plus(graph, x.im, y.im))


def _subtract(graph: Graph, x: Parts, y: Parts, alpha: complex = 1) -> Parts:
    y = _scaled(graph, y, alpha)
    return Parts(_minus(graph, x.re, y.re), _minus(graph, x.im, y.im))


def _scaled(graph: Graph, y: Parts, alpha: complex) -> Parts:
    return y if alpha == 1 else _multiply(graph, y, graph.constant_parts(alpha))


def _multiply(graph: Graph, x: Parts, y: Parts) -> Parts:
    re = _minus(graph, _times(graph, x.re, y.re), _times(graph, x.im, y.im))
    return Parts(re, _plus(graph, _times(graph, x.re, y.im), _times(graph, x.im, y.re)))


def _divide(graph: Graph, x: Parts, y: Parts, rounding_mode: str | None = None) -> Parts | None:
    """Smith's rule for x / y, which divides by the larger part of y first, so that no square leaves the range."""
    if rounding_mode is not None:
        return None
    if graph.is_zero(y.im):
        return Parts(_over(graph, x.re, y.re), _over(graph, x.im, y.re))
    is_real = _real_part_is_larger(graph, y)

    def either(one: int, other: int) -> int:
        return graph.add("where", is_real, one, other)

    large, small = either(y.re, y.im), either(y.im, y.re)
    ratio = graph.add("divide", small, large)
    over = graph.add("divide", graph.constant(1.0), graph.add("add", large, graph.add("multiply", small, ratio)))
    one, other = either(x.re, x.im), either(x.im, x.re)
    re = graph.add("multiply", _plus(graph, one, _times(graph, other, ratio)), over)
    im = either(_minus(graph, x.im, _times(graph, x.re, ratio)), _minus(graph, _times(graph, x.im, ratio), x.re))
    return Parts(re, graph.add("multiply", im, over))


def _real_part_is_larger(graph: Graph, x: Parts) -> int:
    return graph.add("greater_equal", graph.add("absolute", x.re), graph.add("absolute", x.im))


def _negative(graph: Graph, x: Parts) -> Parts:
    zero = graph.constant(0.0)
    return Parts(_minus(graph, zero, x.re), _minus(graph, zero, x.im))


def _conjugate(graph: Graph, x: Parts) -> Parts:
    return Parts(x.re, _minus(graph, graph.constant(0.0), x.im))


def _absolute(graph: Graph, x: Parts) -> int:
    """The larger part times the square root of 1 + ratio^2, so that no square leaves the range.

    The ratio is 1 where both parts are 0 or infinite. It has its derivative where parts are equal otherwise.
    """
    re, im = graph.add("absolute", x.re), graph.add("absolute", x.im)
    if graph.is_zero(x.im):
        return re
    is_real, one = _real_part_is_larger(graph, x), graph.constant(1.0)
    large, small = graph.add("where", is_real, x.re, x.im), graph.add("where", is_real, x.im, x.re)
    undefined = graph.add("and", graph.add("equal", re, im), graph.add("equal", graph.add("add", re, re), re))
    ratio = graph.add("where", undefined, one, _divided(graph, small, undefined, large))
    root = graph.add("square_root", graph.add("add", one, graph.add("multiply", ratio, ratio)))
    return graph.add("multiply", graph.add("absolute", large), root)


def _divided(graph: Graph, x: int, undefined: int, y: int) -> int:
    """The quotient x / y, and x where that is undefined: NaN would enter the derivatives even if it is not chosen."""
    return _over(graph, x, graph.add("where", undefined, graph.constant(1.0), y))


def _direction(graph: Graph, x: Parts) -> Parts:
    """The quotient x / |x|, and 0 for 0. The gradient of |x| is a multiple of it."""
    size, zero = _absolute(graph, x), graph.constant(0.0)
    is_zero = graph.add("equal", size, zero)
    return Parts(*(graph.add("where", is_zero, zero, _divided(graph, part, is_zero, size)) for part in x))


def _exponential(graph: Graph, x: Parts) -> Parts:
    return _polar(graph, Parts(graph.add("exponential", x.re), x.im), Parts(x.im, x.im))


def _polar(graph: Graph, size: Parts, angle: Parts) -> Parts:
    turned = (graph.add(name, angle.re) for name in ("cosine", "sine"))
    return Parts(*(_times(graph, size.re, part) for part in turned))


def _power(graph: Graph, x: Parts, y: Parts) -> Parts | None:
    exponent = graph.nodes[y.re]
    if exponent.operation != "constant" or not graph.is_zero(y.im) or exponent.value not in range(9):
        return None
    if exponent.value == 0:
        return graph.constant_parts(1)
    return reduce(lambda made, _: _multiply(graph, made, x), range(int(exponent.value) - 1), x)


def _where(graph: Graph, mask: int, x: Parts, y: Parts) -> Parts:
    return Parts(*(graph.add("where", mask, *pair) for pair in zip(x, y, strict=True)))


def _compare(of_part: str, both: str) -> Callable[..., int]:
    def rule(graph: Graph, x: Parts, y: Parts) -> int:
        return graph.add(both, *(graph.add(of_part, *pair) for pair in zip(x, y, strict=True)))

    return rule


def _itself(graph: Graph, x: Parts, *_) -> Parts:
    return x


def _select(graph: Graph, x: Parts, _dim: Parts, index: Parts) -> int:
    return x[int(graph.nodes[index.re].value) % 2]


#: By the operation's name, without its namespace and overload.
COMPLEX_RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(
        ("view_as_real", "view_as_complex", "full", "scalar_tensor", "_to_copy", "to", "detach", "alias", "clone",
         "lift_fresh"), _itself
    ),
    "add": _add,
    "sub": _subtract,
    "rsub": lambda graph, x, y, alpha=1: _subtract(graph, y, x, alpha),
    "mul": _multiply,
    "div": _divide,
    "reciprocal": lambda graph, x: _divide(graph, graph.constant_parts(1), x),
    "square": lambda graph, x: _multiply(graph, x, x),
    "pow": _power,
    "neg": _negative,
    "_neg_view": _negative,
    "_conj": _conjugate,
    "conj_physical": _conjugate,
    "abs": _absolute,
    "sgn": _direction,
    "exp": _exponential,
    "complex": lambda graph, re, im: Parts(re.re, im.re),
    "polar": _polar,
    "where": _where,
    "masked_fill": lambda graph, x, mask, value: _where(graph, mask, value, x),
    "eq": _compare("equal", "and"),
    "ne": _compare("not_equal", "or"),
    "zeros_like": lambda graph, *_: graph.constant_parts(0),
    "ones_like": lambda graph, *_: graph.constant_parts(1),
    "full_like": lambda graph, _, value: value,
    "select": _select,
}  # fmt: skip
