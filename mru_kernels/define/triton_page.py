"""The Triton functions of a defined cell: the protocol of backends/triton/cell.py, printed from its program."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .graph import FUNCTIONS, Graph, Language, Number, Parts, nodes_of, statements
from .trace import EPSILON, Program


def _language(shape: str) -> Language:
    """Triton, with blocks of a shape."""

    def constant(value: float) -> str:
        return _block(shape, repr(value) if math.isfinite(value) else f'float("{value}")')

    return Language(
        # A negative is a product because Triton 3.6 subtracts from 0, which has another sign where x is 0.
        {"divide": "{} / {}", "negative": "-1.0 * {}", "absolute": "tl.abs({})", "where": "tl.where({}, {}, {})"},
        constant,
        number="{} = {}",
        mask="{} = {}",
    )


def _block(shape: str, number: str) -> str:
    """A block in the state dtype. A bare number may become a float32; and the interpreter fails at masks of scalars."""
    return f"tl.full({shape}, {number}, STATE)"


_SHAPE, _SHAPE_OF_PARTS = "x[0].shape", "(x[0].shape[0] // 2,)"
REAL, COMPLEX = _language(_SHAPE), _language(_SHAPE_OF_PARTS)


def page(name: str, program: Program) -> str:
    """The text of backends/triton/cells/<name>.py."""
    shape = _SHAPE_OF_PARTS if program.is_complex else _SHAPE
    in_code = {f"p[{i}]": _block(shape, f"p[{i + program.writes}]") for i in range(program.scalars)}
    in_code |= {EPSILON: _block(shape, "p[0]")}
    if program.is_complex:
        for block, (re, im) in _parts(program).items():  # a real block is read by its first part
            in_code |= {block: re, f"{block}.re": re, f"{block}.im": im}
    graph = program.graph.renamed(in_code)
    options = ["output=output, cotangent=cotangent"] if program.output is not None else []
    options += ["recompute=recompute, rules=WRITE_OR_HOLD"] if program.writes else []
    options += ["push=push, rules=COMPLEX"] if program.is_complex else []
    options += [f"adjoint_sees_state={program.adjoint_sees_state}, gated={program.gated}"]
    made = ", complex=_FUNCTIONS" * program.is_complex + ", overwrites=overwrites" * program.writes
    lines = [
        f'"""The cell {name}, made by mru_kernels.define_cell."""',
        "",
        "import triton",
        "import triton.language as tl",
        "",
        "from mru_kernels.backends.triton.cell import Implementation, cell, sum_of_both",
        f"from mru_kernels.backends.triton.functions import {', '.join(FUNCTIONS)}",
        "from mru_kernels.backends.triton.kernels.affine import COMPLEX, WRITE_OR_HOLD",
        "from mru_kernels.backends.triton.parts import pairs, parts",
        "from mru_kernels.backends.triton.write_or_hold import overwrites, recomputed, scaled, write_or_hold",
        *(_write if program.writes else _affine)(graph, program),
        *_of_output(graph, program),
        *_vjp(graph, program),
        "",
        "",
        f"_FUNCTIONS = cell(step, pull, vjp, {', '.join(options)})",
        f"CELL = Implementation(_FUNCTIONS{made})",
        "",
    ]
    return "\n".join(lines)


def _parts(program: Program) -> dict[str, tuple[str, str]]:
    """For each block that a function of a complex cell may get, the variables with its two parts."""
    blocks = {f"x[{i}]": f"x{i}" for i in range(len(program.grads))}
    blocks |= {block: block.strip("_") for block in ("s", "after", "g", "m", "lambda_")}
    return {block: (f"{name}_re", f"{name}_im") for block, name in blocks.items()}


def _function(signature: str, graph: Graph, program: Program, results: Sequence[Number], *last: str) -> list[str]:
    """A function whose last statements are `last`. The final one has {} for each result."""
    nodes = nodes_of(results)
    body, names = statements(graph, nodes, COMPLEX if program.is_complex else REAL)
    written: Sequence[str] = names
    if program.is_complex:
        used = graph.inputs(nodes)
        opened = {block: both for block, both in _parts(program).items() if not used.isdisjoint(both)}
        body = [*(f"{', '.join(both)} = parts({block})" for block, both in opened.items()), *body]
        written = _as_blocks(program, results, names)
    body = ["STATE: tl.constexpr = x[0].dtype", *last[:-1], *body, last[-1].format(*written)]
    return ["", "", "@triton.jit", f"def {signature}:", *(f"    {line}" for line in body)]


def _as_blocks(program: Program, results: Sequence[Number], names: Sequence[str]) -> list[str]:
    """The results of a complex cell as blocks in which a channel has two neighbours: its real and imaginary part.

    A real result is in both if streams are real. Otherwise its imaginary part is 0.
    """
    left, zero = iter(names), COMPLEX.constant(0.0)
    pairs = []
    for result in results:
        re = next(left)
        pairs.append((re, next(left) if isinstance(result, Parts) else re if program.real_streams else zero))
    return [f"pairs({re}, {im})" for re, im in pairs]


def _affine(graph: Graph, program: Program) -> list[str]:
    assert program.step is not None
    after, push, pull = program.step
    return [
        *_function("step(x, s, p)", graph, program, [after], "return {}"),
        *(_function("push(x, m, p)", graph, program, [push], "return {}") if program.is_complex else []),
        *_function("pull(x, m, p)", graph, program, [pull], "return {}"),
    ]


def _write(graph: Graph, program: Program) -> list[str]:
    step = "return write_or_hold(writes(x, p), has_nan(x, p), written(x, p), s, p[0])"
    recompute = "return recomputed(writes(x, p) == 0, written(x, p), s, p[0])"
    return [
        *_function("writes(x, p)", graph, program, [program.write], "return {}"),
        *_function("written(x, p)", graph, program, [program.value], "return {}"),
        *_function("has_nan(x, p)", graph, program, [program.nan], "return {}"),
        *_function("step(x, s, p)", graph, program, [], step),
        *_function("recompute(x, s, p)", graph, program, [], recompute),
        *_function("pull(x, m, p)", graph, program, [], "return tl.where(writes(x, p), scaled(m, p[0]), m)"),
    ]


def _of_output(graph: Graph, program: Program) -> list[str]:
    if program.output is None or program.cotangent is None:
        return []
    return [
        *_function("output(x, s, after, p)", graph, program, [program.output], "return {}"),
        *_function("cotangent(x, s, after, g, m, p)", graph, program, [program.cotangent], "return {}"),
    ]


def _vjp(graph: Graph, program: Program) -> list[str]:
    of_output = "sum_of_both" if program.output is None else "cotangent"
    grads = ", ".join("{}" for _ in program.grads)
    return _function(
        "vjp(x, s, after, g, m, p)", graph, program, program.grads, f"lambda_ = {of_output}(x, s, after, g, m, p)",
        f"return pull(x, lambda_, p), ({grads},)",
    )  # fmt: skip
