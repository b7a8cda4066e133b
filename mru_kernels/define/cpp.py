"""The C++ header of a defined cell: the protocol of csrc/cell.h, printed from its program."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from .graph import Graph, Language, statements
from .trace import EPSILON, Program


def _constant(value: float) -> str:
    if math.isnan(value):
        number = '__builtin_nan("")'
    elif math.isinf(value):
        number = f"{'-' * (value < 0)}__builtin_inf()"
    else:
        number = value.hex()
    return f"splat<V>(S({number}))"


CPP = Language(
    {"divide": "{} / {}", "negative": "-{}", "absolute": "Lanes<V>::abs({})", "where": "{} ? {} : {}"},
    _constant,
    number="const V {} = {};",
    mask="const auto {} = {};",
)


def header(name: str, program: Program, kinds: Sequence[str], scalars: Mapping[str, tuple[float, float]]) -> str:
    """The text of csrc/cells/<name>.h.

    Args:
        kinds: "stream" or "channel" for each input.
        scalars: the least and greatest value of each scalar by name, without epsilon.
    """
    in_code = {f"p[{i}]": f"splat<V>(p{i})" for i in range(len(scalars))} | {EPSILON: "splat<V>(this->epsilon)"}
    graph = program.graph.renamed(in_code)
    first_scalar = 1 if program.writes else 0
    base = f"WriteOrHold<{_CLASS}<S>, S>" if program.writes else "CellBase"
    construct = [f"p{i}(S(scalars[{i + first_scalar}]))" for i in range(len(scalars))]
    if program.writes:
        construct = ["Base(S(scalars[0]))", *construct]
    sees_state = program.adjoint_sees_state
    ranges = ([(EPSILON, (0.0, 1.0))] if program.writes else []) + list(scalars.items())
    table = ", ".join(f'{{"{n}", {least.hex()}, {most.hex()}}}' for n, (least, most) in ranges)
    lines = [
        f"// The cell {name}, made by mru_kernels.define_cell.",
        "#pragma once",
        '#include "functions.h"',
        '#include "maps/write_or_hold.h"' if program.writes else '#include "cell.h"',
        "",
        "namespace mru {",
        "",
        "template <class S>",
        f"struct {_CLASS} : {base} {{",
        *([f"  using Base = {base};"] if program.writes else []),
        f"  static constexpr bool kAdjointSeesState = {'true' if sees_state else 'false'};",
        *(f"  S p{i};" for i in range(len(scalars))),
        f"  MRU_INLINE explicit {_CLASS}(const double* scalars){' : ' * bool(construct)}{', '.join(construct)} {{}}",
        *(_write if program.writes else _affine)(graph, program),
        *_of_output(graph, program),
        *_vjp(graph, program),
        "};",
        "",
        "namespace cells {",
        f"struct {name} : Declaration<{name}> {{",
        f"  static constexpr InputKind kInputs[] = {{{', '.join(_KINDS[kind] for kind in kinds)}}};",
        *([f"  static constexpr Scalar kScalars[] = {{{table}}};"] if ranges else []),
        "  static constexpr bool kComplex = false;",
        "  template <class S, unsigned>",
        f"  using Cell = {_CLASS}<S>;",
        "};",
        "}  // namespace cells",
        "",
        "}  // namespace mru",
        "",
    ]
    return "\n".join(lines)


_CLASS = "Defined"
_KINDS = {"stream": "kStream", "channel": "kChannel"}


def _function(signature: str, graph: Graph, results: Sequence[int], last: str) -> list[str]:
    """A function template; `last` is its last statement, with {} for each result."""
    body, names = statements(graph, results, CPP)
    return ["  template <class V>", f"  MRU_INLINE {signature} {{", *(f"    {line}" for line in body),
            *(f"    {line}" for line in last.format(*names).splitlines()), "  }"]  # fmt: skip


def _affine(graph: Graph, program: Program) -> list[str]:
    both = [program.first, program.second]
    return [
        *_function("V step(const V* x, V s) const", graph, both, "return {} * s + {};"),
        *_function("V recompute(const V* x, V s) const", graph, [], "return step(x, s);"),
        *_function("V pull(const V* x, V m) const", graph, both[:1], "return {} * m;"),
    ]


def _write(graph: Graph, program: Program) -> list[str]:
    return [
        *_function("auto writes(const V* x) const", graph, [program.first], "return {};"),
        *_function("V written(const V* x) const", graph, [program.second], "return {};"),
        *_function("auto has_nan(const V* x) const", graph, [program.nan], "return {};"),
    ]


def _of_output(graph: Graph, program: Program) -> list[str]:
    if program.output is None or program.cotangent is None:
        return [
            *_function("V output(const V*, V, V after) const", graph, [], "return after;"),
            *_function("V cotangent(const V*, V, V, V g, V m) const", graph, [], "return g + m;"),
            *_enter(graph),
        ] if program.writes else []  # fmt: skip
    return [
        *_function("V output(const V* x, V, V after) const", graph, [program.output], "return {};"),
        *_function("V cotangent(const V* x, V, V after, V g, V m) const", graph, [program.cotangent], "return {};"),
        *(_enter(graph) if program.writes else []),
    ]


def _enter(graph: Graph) -> list[str]:
    return _function("V enter(const V*, V s) const", graph, [], "return s;")


def _vjp(graph: Graph, program: Program) -> list[str]:
    last = "".join(f"dx[{i}] = {{}};\n" for i in range(len(program.grads))) + "return this->pull(x, lambda_);"
    of_x = _function("V vjp(const V* x, V s, V after, V g, V m, V* dx) const", graph, program.grads, last)
    of_x.insert(2, "    const V lambda_ = this->cotangent(x, s, after, g, m);")
    return of_x
