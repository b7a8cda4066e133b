"""Random gates: what is printed for them equals the function and its gradient, in one program that holds all of them.

The program has the functions of each cell's header, without the scan, whose kernels are those of every other cell.
"""

from __future__ import annotations

import ctypes
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mru_kernels as mk
from mru_kernels.define import build
from mru_kernels.define.cpp import header
from mru_kernels.define.trace import Functions, trace

GATES, COMPLEX_GATES = 200, 100
LANES = 64
INPUTS = ("x", "y", "z")

UNARY: list[Callable[[Tensor], Tensor]] = [
    torch.neg, torch.abs, torch.tanh, torch.sigmoid, torch.sin, torch.cos, torch.relu, torch.square, torch.erf,
    torch.sign, torch.nn.functional.silu, torch.nn.functional.softplus, torch.nn.functional.gelu,
    torch.nn.functional.leaky_relu, torch.nn.functional.elu, torch.nn.functional.hardtanh, mk.heaviside, mk.sign,
    lambda t: (-t.square()).exp(), lambda t: (1 + t.square()).log(), lambda t: (1 + t.square()).sqrt(),
    lambda t: t.square().log1p(), lambda t: (1 + t.square()).rsqrt(), lambda t: (1 + t.square()).reciprocal(),
    lambda t: t.clamp(-0.5, 0.75), lambda t: t.clamp(max=0.25), lambda t: t.clamp(min=-0.25), lambda t: t**3,
    lambda t: (1 + t.abs()) ** -0.7, lambda t: (-t.abs()).expm1(), lambda t: 2.5 - t, lambda t: 0.3 * t - 1,
    lambda t: torch.where(t > 0.1, t, -0.5), lambda t: t.masked_fill(t < -1, 0.0), lambda t: t.nan_to_num(),
    lambda t: (t > 0) * t, lambda t: ((t > 0) & (t <= 1) | ~(t > -1)).to(t.dtype),
]  # fmt: skip
BINARY: list[Callable[[Tensor, Tensor], Tensor]] = [
    torch.add, torch.sub, torch.mul, torch.maximum, torch.minimum, lambda a, b: a / (1 + b.square()),
    lambda a, b: torch.where(a >= b, a, 2 * b), lambda a, b: torch.lerp(a, b, 0.3), torch.logaddexp,
    lambda a, b: mk.heaviside(a, threshold=b, surrogate="fast_sigmoid"), lambda a, b: torch.add(a, b, alpha=0.5),
    lambda a, b: a.sigmoid() * b, lambda a, b: a * b.detach(), lambda a, b: (1 + a.square()) ** b.tanh(),
]  # fmt: skip


def expression(draw: random.Random, depth: int) -> Callable[[dict[str, Tensor]], Tensor]:
    if depth == 0:
        name = draw.choice(INPUTS)
        return lambda x: x[name]
    if draw.random() < 0.5:
        one, of = draw.choice(UNARY), expression(draw, depth - 1)
        return lambda x: one(of(x))
    both, of_one, of_other = draw.choice(BINARY), expression(draw, depth - 1), expression(draw, draw.randrange(depth))
    return lambda x: both(of_one(x), of_other(x))


COMPLEX_UNARY: list[Callable[[Tensor], Tensor]] = [
    torch.neg, torch.conj, torch.square, torch.sgn, lambda t: 1j * t, lambda t: (0.5 - 2j) * t, lambda t: 1.5 - t,
    lambda t: (t / (1 + t.abs())).exp(), lambda t: t**3, lambda t: (2.5 + t / (1 + t.abs())).reciprocal(),
    lambda t: t.conj() * t, lambda t: torch.where(t.real > 0, t, 0.0), lambda t: t.masked_fill(t.imag > 1, 0.5j),
     lambda t: torch.complex(t.imag, t.real), lambda t: t + t.detach(),
]  # fmt: skip
REAL_OF_COMPLEX: list[Callable[[Tensor], Tensor]] = [
    torch.abs, torch.real, torch.imag, lambda t: (t * t.conj()).real, lambda t: t.real + 2 * t.conj().imag,
    lambda t: t.abs().square(), lambda t: (t != t.conj()) * t.real,
]  # fmt: skip
COMPLEX_BINARY: list[Callable[[Tensor, Tensor], Tensor]] = [
    torch.add, torch.sub, torch.mul, lambda a, b: a / (2.5 + b / (1 + b.abs())), lambda a, b: torch.sub(a, b, alpha=2j),
    lambda a, b: torch.where(a.real >= b.imag, a, 2 * b), lambda a, b: torch.lerp(a, b, 0.3), lambda a, b: a * b.conj(),
]  # fmt: skip
COMPLEX_AND_REAL: list[Callable[[Tensor, Tensor], Tensor]] = [
    torch.add, torch.mul, lambda a, b: b - a, lambda a, b: a / (1 + b.square()), lambda a, b: b / (2.5 + a.sgn()),
    lambda a, b: a + torch.polar(1 + b.square(), b), lambda a, b: torch.complex(b, b.tanh()) * a,
    lambda a, b: torch.where(b > 0.1, a, b + 0j), lambda a, b: a + (1j * b).exp(),
]  # fmt: skip


def complex_expression(draw: random.Random, depth: int) -> Callable[[dict[str, Tensor]], Tensor]:
    """An expression in `x` and `y`, which are complex, and `z`, which is real."""
    if depth == 0:
        name = draw.choice("xy")
        return lambda x: x[name]
    of = complex_expression(draw, depth - 1)
    kind = draw.choice(["one", "both", "real"])
    if kind == "one":
        one = draw.choice(COMPLEX_UNARY)
        return lambda x: one(of(x))
    if kind == "both":
        both, of_other = draw.choice(COMPLEX_BINARY), complex_expression(draw, draw.randrange(depth))
        return lambda x: both(of(x), of_other(x))
    mixed, real = draw.choice(COMPLEX_AND_REAL), real_expression(draw, draw.randrange(depth))
    return lambda x: mixed(of(x), real(x))


def real_expression(draw: random.Random, depth: int) -> Callable[[dict[str, Tensor]], Tensor]:
    if depth == 0:
        return lambda x: x["z"]
    one, of = draw.choice(REAL_OF_COMPLEX), complex_expression(draw, depth - 1)
    return lambda x: one(of(x))


def complex_gate_of(draw: random.Random) -> Callable[..., mk.Affine]:
    first, second = (complex_expression(draw, draw.randrange(1, 4)) for _ in range(2))

    def gate(x: Tensor, y: Tensor, z: Tensor) -> mk.Affine:
        named = {"x": x, "y": y, "z": z}
        factor = first(named)
        return mk.Affine(factor / (1 + factor.abs()), second(named) + 0.01 * (x + y + z))

    return gate


def gate_of(draw: random.Random) -> Callable[..., mk.Affine | mk.Write]:
    first, second, third = (expression(draw, draw.randrange(1, 5)) for _ in range(3))
    kind = draw.choice(["affine", "write", "mask"])

    def gate(x: Tensor, y: Tensor, z: Tensor) -> mk.Affine | mk.Write:
        named = {"x": x, "y": y, "z": z}
        value = second(named) + 0.01 * (x + y + z)  # so that every input is used
        if kind == "affine":
            return mk.Affine(first(named).tanh(), value)
        if kind == "write":
            return mk.Write(mk.heaviside(first(named), threshold=third(named)), value)
        return mk.Write(first(named) >= third(named), value)

    return gate


def expected(gate: Callable, rows: Tensor) -> Tensor:
    """The state after the step, dL/ds, and the gradients by x, y and z, for rows x, y, z, s, m; epsilon is 0.5."""
    *x, s, m = (t.clone() for t in rows)
    x[2] = x[2].real.clone()
    leaves = [t.requires_grad_() for t in (*x, s)]
    made = gate(*leaves[:3])
    if isinstance(made, mk.Affine):
        after = made.factor * s + made.offset
    else:
        write = made.write.to(s.dtype)
        after = write * (made.value + 0.5 * s) + (1 - write) * s
    of_x, of_y, of_z, of_s = torch.autograd.grad(after, leaves, m, allow_unused=True, materialize_grads=True)
    return torch.stack([after.detach(), of_s, of_x, of_y, of_z.to(of_s.dtype)])


def program(folder: Path, gates: list[Callable], complex_inputs: str = "", number: str = "double") -> ctypes.CDLL:
    """A library with `gate_<i>(in, out)` for each gate, on rows of LANES numbers."""
    page = []
    for i, gate in enumerate(gates):
        functions = Functions(gate, None, INPUTS, (), frozenset(complex_inputs))
        text = header(f"gate_{i}", trace(functions), ("stream",) * 3, {})
        page.append(f"namespace of_{i} {{ using namespace mru; {body(text)} }}")
        call = f"run<of_{i}::Defined<{number}>, {number}>(in, out);"
        page.append(f'extern "C" void gate_{i}(const double* in, double* out) {{ {call} }}')
    source = folder / "gates.cpp"
    source.write_text(PREAMBLE + "\n".join(page))
    target = folder / "gates.so"
    flags = ("-std=c++20", "-O1", "-ffp-contract=off", "-fno-math-errno", "-mavx2", "-fPIC", "-shared")
    command = [*build._compiler(), *flags, f"-I{build.csrc()}", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    return ctypes.CDLL(str(target))


def body(text: str) -> str:
    """The struct of a printed header."""
    start = text.index("template <class S>\nstruct Defined")
    return text[start : text.index("namespace cells {")]


PREAMBLE = f"""#include "functions.h"
#include "maps/write_or_hold.h"
template <class C, class S>
void run(const double* in, double* out) {{
  using V = mru::Vector<S, 4>;
  const double scalars[] = {{0.5}};
  const C cell(scalars);
  for (int i = 0; i < {LANES}; i += 4) {{
    const auto at = [&](auto* data, int r) {{ return (S*)data + r * {LANES} + i; }};
    const auto row = [&](int r) {{ return mru::load(mru::Full<4>{{}}, at(in, r)); }};
    const V x[] = {{row(0), row(1), row(2)}}, s = row(3), m = row(4);
    V dx[3];
    const V after = cell.step(x, s), ds = cell.vjp(x, s, after, m - m, m, dx);
    const V rows[] = {{after, ds, dx[0], dx[1], dx[2]}};
    for (int r = 0; r < 5; ++r) mru::store(mru::Full<4>{{}}, at(out, r), rows[r]);
  }}
}}
"""


def worst_error(library: ctypes.CDLL, gates: list[Callable], dtype: torch.dtype) -> float:
    """The greatest error of the functions that are printed for the gates; z is real."""
    torch.manual_seed(0)
    worst = 0.0
    for i, gate in enumerate(gates):
        rows = torch.randn(5, LANES, dtype=dtype)
        rows[2] = rows[2].real
        out = torch.full((5, LANES), float("nan"), dtype=dtype)
        getattr(library, f"gate_{i}")(ctypes.c_void_p(rows.data_ptr()), ctypes.c_void_p(out.data_ptr()))
        right = expected(gate, rows)
        error = ((out - right).abs() / (1 + right.abs())).nan_to_num(nan=1.0).max().item()
        worst = max(worst, error)
        assert error < 1e-12, (i, error, out[:, :4], right[:, :4])
    return worst


@pytest.mark.check
def test_random_gates_are_what_they_define(tmp_path):
    draw = random.Random(7)
    gates = [gate_of(draw) for _ in range(GATES)]
    worst = worst_error(program(tmp_path, gates), gates, torch.float64)
    print(f"{GATES} gates, worst error {worst:.1e}")


@pytest.mark.check
def test_random_complex_gates_are_what_they_define(tmp_path):
    draw = random.Random(7)
    gates = [complex_gate_of(draw) for _ in range(COMPLEX_GATES)]
    library = program(tmp_path, gates, complex_inputs="xy", number="mru::Complex<double>")
    worst = worst_error(library, gates, torch.complex128)
    print(f"{COMPLEX_GATES} gates, worst error {worst:.1e}")
