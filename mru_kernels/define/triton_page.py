"""The Triton functions of a defined cell: the protocol of backends/triton/cell.py, printed from its program."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .graph import FUNCTIONS, Graph, Language, statements
from .trace import EPSILON, Program


def _constant(value: float) -> str:
    return _block(repr(value) if math.isfinite(value) else f'float("{value}")')


def _block(number: str) -> str:
    """A block in the state dtype. A bare number may become a float32; and the interpreter fails at masks of scalars."""
    return f"tl.full(x[0].shape, {number}, STATE)"


TRITON = Language(
    # A negative is a product because Triton 3.6 subtracts from 0, which has another sign where x is 0.
    {"divide": "{} / {}", "negative": "-1.0 * {}", "absolute": "tl.abs({})", "where": "tl.where({}, {}, {})"},
    _constant,
    number="{} = {}",
    mask="{} = {}",
)


def page(name: str, program: Program) -> str:
    """The text of backends/triton/cells/<name>.py."""
    in_code = {f"p[{i}]": _block(f"p[{i + program.writes}]") for i in range(program.scalars)}
    graph = program.graph.renamed(in_code | {EPSILON: _block("p[0]")})
    options = ["output=output, cotangent=cotangent"] if program.output is not None else []
    options += ["recompute=recompute, rules=WRITE_OR_HOLD"] if program.writes else []
    options += [f"adjoint_sees_state={program.adjoint_sees_state}"]
    lines = [
        f'"""The cell {name}, made by mru_kernels.define_cell."""',
        "",
        "import triton",
        "import triton.language as tl",
        "",
        "from mru_kernels.backends.triton.cell import Implementation, cell, sum_of_both",
        f"from mru_kernels.backends.triton.functions import {', '.join(FUNCTIONS)}",
        "from mru_kernels.backends.triton.kernels.affine import WRITE_OR_HOLD",
        "from mru_kernels.backends.triton.write_or_hold import overwrites, recomputed, scaled, write_or_hold",
        *(_write if program.writes else _affine)(graph, program),
        *_of_output(graph, program),
        *_vjp(graph, program),
        "",
        "",
        f"_FUNCTIONS = cell(step, pull, vjp, {', '.join(options)})",
        f"CELL = Implementation(_FUNCTIONS{', overwrites=overwrites' * program.writes})",
        "",
    ]
    return "\n".join(lines)


def _function(signature: str, graph: Graph, results: Sequence[int], *last: str) -> list[str]:
    """A function whose last statements are `last`, with {} for each result in the last of them."""
    body, names = statements(graph, results, TRITON)
    body = ["STATE: tl.constexpr = x[0].dtype", *last[:-1], *body, last[-1].format(*names)]
    return ["", "", "@triton.jit", f"def {signature}:", *(f"    {line}" for line in body)]


def _affine(graph: Graph, program: Program) -> list[str]:
    both = [program.first, program.second]
    return [
        *_function("step(x, s, p)", graph, both, "return {} * s + {}"),
        *_function("pull(x, m, p)", graph, both[:1], "return {} * m"),
    ]


def _write(graph: Graph, program: Program) -> list[str]:
    step = "return write_or_hold(writes(x, p), has_nan(x, p), written(x, p), s, p[0])"
    recompute = "return recomputed(writes(x, p) == 0, written(x, p), s, p[0])"
    return [
        *_function("writes(x, p)", graph, [program.first], "return {}"),
        *_function("written(x, p)", graph, [program.second], "return {}"),
        *_function("has_nan(x, p)", graph, [program.nan], "return {}"),
        *_function("step(x, s, p)", graph, [], step),
        *_function("recompute(x, s, p)", graph, [], recompute),
        *_function("pull(x, m, p)", graph, [], "return tl.where(writes(x, p), scaled(m, p[0]), m)"),
    ]


def _of_output(graph: Graph, program: Program) -> list[str]:
    if program.output is None or program.cotangent is None:
        return []
    return [
        *_function("output(x, s, after, p)", graph, [program.output], "return {}"),
        *_function("cotangent(x, s, after, g, m, p)", graph, [program.cotangent], "return {}"),
    ]


def _vjp(graph: Graph, program: Program) -> list[str]:
    of_output = "sum_of_both" if program.output is None else "cotangent"
    grads = ", ".join("{}" for _ in program.grads)
    return _function(
        "vjp(x, s, after, g, m, p)", graph, program.grads, f"lambda_ = {of_output}(x, s, after, g, m, p)",
        f"return pull(x, lambda_, p), ({grads},)",
    )  # fmt: skip
