"""The parts of an exported C program, as the layers of a module add them, and its text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .c_functions import GUARDS, MAPS, functions_of

MARKER = "/* Written by mru_kernels.export.c"
"""How the first line of every file begins."""

_MOST_PRODUCTS = (2**31 - 1) // 127**2  # of two int8 values, which an int32 can sum


class CProgram(NamedTuple):
    """A program that `c` has written: where it is, and what it costs. The comment at its beginning says the same.

    Example::

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     program = mk.export.c(mk.BMRU(3, 8), folder + "/unit.c")
        >>> program.ram, program.multiply_adds, program.libm_calls
        (1, 48, 0)
    """

    path: Path
    """The file."""
    name: str
    """How the names of its functions, types and macros begin."""
    flash: int
    """Bytes of parameters. The code comes on top, with a size that depends on the compiler."""
    ram: int
    """Bytes of one state and of the buffers that a step has on the stack."""
    multiply_adds: int
    """Multiply-adds a step, of float32 or integers. A product or sum alone counts as one."""
    comparisons: int
    """Comparisons a step, in gates, ReLUs and the rounding of activations."""
    libm_calls: int
    """Calls of expf and sqrtf a step, at most. At 0 the program needs no library."""


class Program:
    """What a program consists of: tables of parameters, fields of the state, buffers, and the statements of a step."""

    def __init__(self, weights: str, activations: str) -> None:
        self.int8 = weights == "int8"
        self.quantises = activations == "int8"
        self.tables: list[str] = []
        self.fields: dict[str, tuple[str, int]] = {}  # C type and size
        self.buffers: dict[str, int] = {}
        self.largest_operand = 0
        self.init: list[str] = []
        self.step: list[str] = []
        self.flash = self.multiply_adds = self.comparisons = self.libm_calls = 0

    def count(self, multiply_adds: int = 0, comparisons: int = 0, libm_calls: int = 0) -> None:
        self.multiply_adds += multiply_adds
        self.comparisons += comparisons
        self.libm_calls += libm_calls

    # ------------------------------------------------------------------------------------------------ data

    def table(self, name: str, values: Tensor, kind: str = "float") -> str:
        """A constant array of float, signed char or unsigned char. Returns its name in C."""
        flat = values.detach().cpu().flatten().tolist()
        literals = [literal(value) if kind == "float" else str(value) for value in flat]
        body = textwrap.fill(", ".join(literals), 116, initial_indent="    ", subsequent_indent="    ")
        self.tables.append(f"static const {kind} {name}[{len(flat)}] = {{\n{body}\n}};\n")
        self.flash += len(flat) * (4 if kind == "float" else 1)
        return name

    def linear(self, name: str, weight: Tensor, bias: Tensor | None) -> str:
        """The map of a weight `[rows, inputs]` and a bias `[rows]` or None. Returns its name in C."""
        if self.quantises and weight.shape[1] > _MOST_PRODUCTS:
            raise ValueError(f"activations: expected float32 for a map of {weight.shape[1]} inputs, got int8")
        values = self.weight(name + "_weight", weight)
        values.append("NULL" if bias is None else self.table(name + "_bias", bias))
        self.tables.append(f"static const linear {name} = {{{', '.join(values)}, {weight.shape[1]}}};\n")
        self.count(weight.numel())
        return name

    def weight(self, name: str, weight: Tensor) -> list[str]:
        """The tables of a weight `[rows, inputs]`: its values, and for int8 the scale of each row."""
        if not self.int8:
            return [self.table(name, weight)]
        codes, scale = quantise_rows(weight)
        return [self.table(name, codes, "signed char"), self.table(name + "_scale", scale)]

    def state(self, name: str, initial: Tensor) -> str:
        """Floats of the state with their initial values. Returns the C expression."""
        return self._field(name, "float", initial)

    def bits(self, name: str, initial: Tensor) -> str:
        """One bit a channel, with initial values of 0 or 1. Returns the C expression."""
        size = -(-len(initial) // 8)
        padded = torch.zeros(size * 8, dtype=torch.int64, device="cpu")
        padded[: len(initial)] = initial.detach().cpu()
        octets = (padded.view(size, 8) << torch.arange(8, device="cpu")).sum(1)
        return self._field(name, "unsigned char", octets)

    def _field(self, name: str, kind: str, initial: Tensor) -> str:
        size = max(initial.numel(), 1)  # C has no empty arrays
        self.fields[name] = (kind, size)
        value = "0" if not initial.any() else self.table(name + "_initial", initial, kind) + "[i]"
        self.init += _loop("i", size, [f"state->{name}[i] = {value};"])
        return f"state->{name}"

    def buffer(self, name: str, size: int) -> str:
        """A buffer of a step, which may be used for several things of different sizes."""
        self.buffers[name] = max(size, self.buffers.get(name, 0))
        return name

    # ------------------------------------------------------------------------------------------------ statements

    def call(self, function: str, *arguments: object) -> None:
        self.step.append(f"{function}({', '.join(map(str, arguments))});")

    def loop(self, size: int, lines: Iterable[str]) -> None:
        """Statements for each d below `size`."""
        self.step += _loop("d", size, lines)

    def operand(self, x: str, size: int) -> str:
        """What the rows of a map read for a buffer x."""
        if not self.quantises:
            return x
        self.largest_operand = max(self.largest_operand, size)
        self.call("quantise", x, size, "&quantised")
        self.count(2 * size, 2 * size)
        return "&quantised"

    # ------------------------------------------------------------------------------------------------ text

    def text(self, name: str, source: str, sizes: dict[str, int], token: bool) -> str:
        """The whole file, for macros of these sizes. With `token` the input is the number of one."""
        upper = name.upper()
        argument = "size_t token" if token else "const float *input"
        check = f"token >= {upper}_INPUT_SIZE" if token else f"!all_finite(input, {upper}_INPUT_SIZE)"
        locals_ = [f"float {b}[{size}];" for b, size in self.buffers.items()]
        if self.quantises:
            locals_.append("operand quantised;")
        statements = [*locals_, f"if ({check})", "    return 1;", *self.step, "return 0;"]
        steps = _function(f"int {name}_step({name}_state *state, {argument}, float *output)", statements)
        fields = [f"{kind} {field}[{size}];" for field, (kind, size) in self._sorted_fields()]
        body = "".join(self.tables)
        maps = MAPS["int8 x int8" if self.quantises else "int8" if self.int8 else "float32"]
        includes = ["<stddef.h>", *["<stdint.h>"] * self.quantises]
        parts = []
        if self.libm_calls:
            parts.append("/* From libm. */\nfloat expf(float);\nfloat sqrtf(float);\n")
        if "_gate(" in steps:
            parts.append("/* What a gate returns where a step writes nothing. */\n#define HOLD 2\n")
        if self.quantises:
            parts.append(f"/* The most inputs of a map. */\n#define LARGEST_OPERAND {self.largest_operand}\n")
        return "\n".join([
            self._comment(name, source, token),
            f"#ifndef {upper}_H\n#define {upper}_H\n\n" + "".join(f"#include {file}\n" for file in includes),
            "".join(f"#define {upper}_{key} {value}\n" for key, value in sizes.items()),
            "typedef struct {\n" + textwrap.indent("\n".join(fields), "    ") + f"\n}} {name}_state;\n",
            f"void {name}_init({name}_state *state);\nint {name}_step({name}_state *state, {argument}, float *output);",
            f"\n#endif\n#ifndef {upper}_DECLARATIONS\n\n{GUARDS}",
            *parts,
            maps,
            *functions_of(steps),
            body,
            _function(f"void {name}_init({name}_state *state)", self.init),
            steps + "\n#endif\n",
        ])  # fmt: skip

    def _sorted_fields(self) -> list[tuple[str, tuple[str, int]]]:
        return sorted(self.fields.items(), key=lambda field: field[1][0] != "float")  # no padding between fields

    def state_bytes(self) -> int:
        """The size of the state's struct, where a float has 4 bytes and their alignment."""
        floats = sum(size for kind, size in self.fields.values() if kind == "float")
        octets = sum(size for kind, size in self.fields.values() if kind != "float")
        return 4 * floats + (-(-octets // 4) * 4 if floats else octets)

    def buffer_bytes(self) -> int:
        operand = -(-self.largest_operand // 4) * 4 + 4 if self.quantises else 0
        return 4 * sum(self.buffers.values()) + operand

    def _comment(self, name: str, source: str, token: bool) -> str:
        bad = "token is not below the number of tokens" if token else "value of the input is not finite"
        given = "token" if token else "input"
        return f"""\
{MARKER}: the steps of {source} in C99.

   flash          {self.flash} bytes of parameters; the code comes on top
   RAM            {self.state_bytes()} bytes of state, {self.buffer_bytes()} bytes of buffers on the stack
   multiply-adds  {self.multiply_adds} a step
   comparisons    {self.comparisons} a step
   libm           {self.libm_calls} calls of expf and sqrtf a step

   {name}_init(&state) sets the state before the first step. {name}_step(&state, {given}, output) makes a step and
   returns 0. If a {bad}, it returns 1 and changes nothing. Input and output may not overlap.
   Values that overflow float32 have no meaning.

   Compile this file on its own. Other files define {name.upper()}_DECLARATIONS and include it. */"""


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight `[rows, inputs]` as int8 values, and a float32 scale `[rows]`. The values reach from -127 to 127."""
    scale = weight.detach().abs().amax(1) / 127.0
    codes = torch.where(scale.unsqueeze(1) > 0.0, weight.detach() / scale.unsqueeze(1), 0.0).round().clamp_(-127, 127)
    return codes.to(torch.int8), scale


def literal(value: float) -> str:
    """A float32 in C. The hexadecimal form has no rounding."""
    if value == int(value) and abs(value) < 1e6:
        return f"{value:.1f}f"
    mantissa, exponent = float(value).hex().split("p")
    return f"{mantissa.rstrip('0').rstrip('.')}p{exponent}f"


def _loop(index: str, size: int, lines: Iterable[str]) -> list[str]:
    lines = list(lines)
    brace = len(lines) > 1
    head = f"for (size_t {index} = 0; {index} < {size}; {index}++)"
    return [head + " {" * brace, *("    " + line for line in lines), *["}"] * brace]


def _function(head: str, statements: Iterable[str]) -> str:
    return f"{head}\n{{\n" + textwrap.indent("\n".join(statements), "    ") + "\n}\n"
