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

GATES = 200
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
    leaves = [t.requires_grad_() for t in (*x, s)]
    made = gate(*leaves[:3])
    if isinstance(made, mk.Affine):
        after = made.factor * s + made.offset
    else:
        write = made.write.to(s.dtype)
        after = write * (made.value + 0.5 * s) + (1 - write) * s
    of_x, of_y, of_z, of_s = torch.autograd.grad(after, leaves, m, allow_unused=True, materialize_grads=True)
    return torch.stack([after.detach(), of_s, of_x, of_y, of_z])


def program(folder: Path, gates: list[Callable]) -> ctypes.CDLL:
    """A library with `gate_<i>(in, out)` for each gate, on rows of LANES doubles."""
    page = []
    for i, gate in enumerate(gates):
        text = header(f"gate_{i}", trace(Functions(gate, None, INPUTS, ())), ("stream",) * 3, {})
        page.append(f"namespace of_{i} {{ using namespace mru; {body(text)} }}")
        call = f"run<of_{i}::Defined<double>>(in, out);"
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
using V = mru::Vector<double, 4>;
template <class C>
void run(const double* in, double* out) {{
  const double scalars[] = {{0.5}};
  const C cell(scalars);
  for (int i = 0; i < {LANES}; i += 4) {{
    const auto row = [&](int r) {{ return mru::load_as<V>(in + r * {LANES} + i); }};
    const V x[] = {{row(0), row(1), row(2)}}, s = row(3), m = row(4);
    V dx[3];
    const V after = cell.step(x, s), ds = cell.vjp(x, s, after, m - m, m, dx);
    const V rows[] = {{after, ds, dx[0], dx[1], dx[2]}};
    for (int r = 0; r < 5; ++r) __builtin_memcpy(out + r * {LANES} + i, &rows[r], sizeof(V));
  }}
}}
"""


@pytest.mark.check
def test_random_gates_are_what_they_define(tmp_path):
    draw = random.Random(7)
    gates = [gate_of(draw) for _ in range(GATES)]
    library = program(tmp_path, gates)
    torch.manual_seed(0)
    worst = 0.0
    for i, gate in enumerate(gates):
        rows = torch.randn(5, LANES, dtype=torch.float64)
        out = torch.full((5, LANES), float("nan"), dtype=torch.float64)
        getattr(library, f"gate_{i}")(ctypes.c_void_p(rows.data_ptr()), ctypes.c_void_p(out.data_ptr()))
        right = expected(gate, rows)
        error = ((out - right).abs() / (1 + right.abs())).nan_to_num(nan=1.0).max().item()
        worst = max(worst, error)
        assert error < 1e-12, (i, error, out[:, :4], right[:, :4])
    print(f"{GATES} gates, worst error {worst:.1e}")
