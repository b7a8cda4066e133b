"""The C++ header of a defined cell: the protocol of csrc/cell.h, printed from its program."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from .graph import Graph, Language, Number, Parts, nodes_of, statements
from .trace import EPSILON, Program


def _language(value: str, scalar: str) -> Language:
    """C++ with these names of types: `value` of the numbers that functions compute, `scalar` of the cell's scalars."""

    def constant(number: float) -> str:
        text = number.hex()
        if math.isnan(number):
            text = '__builtin_nan("")'
        elif math.isinf(number):
            text = f"{'-' * (number < 0)}__builtin_inf()"
        return f"splat<{value}>({scalar}({text}))"

    return Language(
        {"divide": "{} / {}", "negative": "-{}", "absolute": f"Lanes<{value}>::abs({{}})", "where": "{} ? {} : {}"},
        constant,
        number=f"const {value} {{}} = {{}};",
        mask="const auto {} = {};",
    )


REAL, COMPLEX = _language("V", "S"), _language("R", "Real")


def header(name: str, program: Program, kinds: Sequence[str], scalars: Mapping[str, tuple[float, float]]) -> str:
    """The text of csrc/cells/<name>.h.

    Args:
        kinds: "stream", "channel" or, where streams are real, "complex channel" for each input.
        scalars: the least and greatest value of each scalar by name, without epsilon.
    """
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
        *_cell(program),
        "",
        "namespace cells {",
        f"struct {name} : Declaration<{name}> {{",
        f"  static constexpr InputKind kInputs[] = {{{', '.join(_KINDS[kind] for kind in kinds)}}};",
        *([f"  static constexpr Scalar kScalars[] = {{{table}}};"] if ranges else []),
        *_of_streams(program),
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
_KINDS = {"stream": "kStream", "channel": "kChannel", "complex channel": "kComplexChannel"}


def _of_streams(program: Program) -> list[str]:
    """The lines of the declaration about the dtypes of streams and states."""
    if not program.is_complex:
        return ["  static constexpr bool kComplex = false;"]
    if not program.real_streams:
        return ["  static constexpr bool kComplex = true, kReal = false;"]
    state = "using State = Complex<typename StateOf<E>::type>;"
    return ["  static constexpr bool kComplex = false;", "  template <class E>", f"  {state}"]


def _cell(program: Program) -> list[str]:
    value, scalar = ("R", "Real") if program.is_complex else ("V", "S")
    in_code = {f"p[{i}]": f"splat<{value}>(p{i})" for i in range(program.scalars)}
    in_code |= {EPSILON: "splat<V>(this->epsilon)"}
    if program.is_complex:  # V has a real input or gradient as its real part
        in_code |= {name: f"{name}.re" for name in (*(f"x[{i}]" for i in range(len(program.grads))), "g")}
    graph = program.graph.renamed(in_code)
    base = f"WriteOrHold<{_CLASS}<S>, S>" if program.writes else "CellBase"
    construct = [f"p{i}({scalar}(scalars[{i + program.writes}]))" for i in range(program.scalars)]
    if program.writes:
        construct = ["Base(S(scalars[0]))", *construct]
    return [
        "template <class S>",
        f"struct {_CLASS} : {base} {{",
        *([f"  using Base = {base};"] if program.writes else []),
        *(["  using Real = typename RealOf<S>::type;"] if program.is_complex else []),
        f"  static constexpr bool kAdjointSeesState = {'true' if program.adjoint_sees_state else 'false'};",
        *(f"  {scalar} p{i};" for i in range(program.scalars)),
        f"  MRU_INLINE explicit {_CLASS}(const double* scalars){' : ' * bool(construct)}{', '.join(construct)} {{}}",
        *(_write if program.writes else _affine)(graph, program),
        *_of_output(graph, program),
        *_vjp(graph, program),
        "};",
    ]


def _function(signature: str, graph: Graph, program: Program, results: Sequence[Number], last: str) -> list[str]:
    """A function template that ends with the statements `last`, which have {} for each result."""
    language = COMPLEX if program.is_complex else REAL
    body, names = statements(graph, nodes_of(results), language)
    left = iter(names)
    written = [f"V{{{next(left)}, {next(left)}}}" if isinstance(n, Parts) else next(left) for n in results]
    if program.is_complex:
        written = [text if isinstance(n, Parts) else f"V({text})" for n, text in zip(results, written, strict=True)]
    template = "template <class V, class R = typename RealOf<V>::type>" if program.is_complex else "template <class V>"
    return [f"  {template}", f"  MRU_INLINE {signature} {{", *(f"    {line}" for line in body),
            *(f"    {line}" for line in last.format(*written).splitlines()), "  }"]  # fmt: skip


def _affine(graph: Graph, program: Program) -> list[str]:
    assert program.step is not None
    return [
        *_function("V step(const V* x, V s) const", graph, program, [program.step.after], "return {};"),
        *_function("V recompute(const V* x, V s) const", graph, program, [], "return step(x, s);"),
        *_function("V pull(const V* x, V m) const", graph, program, [program.step.pull], "return {};"),
    ]


def _write(graph: Graph, program: Program) -> list[str]:
    return [
        *_function("auto writes(const V* x) const", graph, program, [program.write], "return {};"),
        *_function("V written(const V* x) const", graph, program, [program.value], "return {};"),
        *_function("auto has_nan(const V* x) const", graph, program, [program.nan], "return {};"),
    ]


def _of_output(graph: Graph, program: Program) -> list[str]:
    output, cotangent = "V output(const V*{}, V, V after) const", "V cotangent(const V*{}, V, V{}, V g, V m) const"
    enter = _function("V enter(const V*, V s) const", graph, program, [], "return s;") if program.writes else []
    if program.output is None or program.cotangent is None:
        return [
            *_function(output.format(""), graph, program, [], "return after;"),
            *_function(cotangent.format("", ""), graph, program, [], "return g + m;"),
            *enter,
        ] if program.writes else []  # fmt: skip
    return [
        *_function(output.format(" x"), graph, program, [program.output], "return {};"),
        *_function(cotangent.format(" x", " after"), graph, program, [program.cotangent], "return {};"),
        *enter,
    ]


def _vjp(graph: Graph, program: Program) -> list[str]:
    last = "".join(f"dx[{i}] = {{}};\n" for i in range(len(program.grads))) + "return this->pull(x, lambda_);"
    of_x = _function("V vjp(const V* x, V s, V after, V g, V m, V* dx) const", graph, program, program.grads, last)
    of_x.insert(2, "    const V lambda_ = this->cotangent(x, s, after, g, m);")
    return of_x
