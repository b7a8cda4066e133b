"""`export.c`: the steps of a module as one file of C99, for machines without an operating system."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from ..nn.arguments import check_choice
from ..nn.wrappers import unwrapped
from . import c_layers
from .c_program import MARKER, CProgram, Program
from .stages import check_parameters, kind


@torch.no_grad()
def c(
    module: torch.nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    weights: str = "float32",
    activations: str = "float32",
) -> CProgram:
    """Write the steps of a module as one freestanding C99 file, for microcontrollers.

    The file allocates no memory, prints nothing and does not depend on the byte order. It defines a type, two functions
    and macros with the sizes; here the name is "unit"::

        #define UNIT_INPUT_SIZE 3
        #define UNIT_OUTPUT_SIZE 8
        typedef struct { ... } unit_state;
        void unit_init(unit_state *state);
        int unit_step(unit_state *state, const float *input, float *output);

    `unit_step` is `module.step` of one sequence. It returns 0. If a value of the input is not finite, it returns 1 and
    changes nothing. A network with `tokens` takes a `size_t token` as its input.

    With epsilon 0 a state of BMRU, CMRU and FirstQuadrantBMRU has one bit a channel. It has two bits in a layer with an
    initial state that is not a written value (-1 or 1; 0 or 1 for FirstQuadrantBMRU), because the channel keeps that
    value until its first write. All other states are float32. MinGRU and MRUNetwork need expf and sqrtf of libm;
    the other units need no library.

    Given the same gates, a step has the bits of `module.step`. The sums of a matrix product are added in order, so
    gates may differ from torch's in rounding. See "Small machines" in the documentation for the errors.

    Args:
        module: BMRU, CMRU, AlphaCMRU, FirstQuadrantBMRU or MinGRU with any number of layers; MRUNetwork of these units;
            or a `torch.nn.Sequential` of these units, `Linear` and `ReLU`, where the stage after a unit reads its
            output without `h_n`. In float32, with one direction. Dropout is left out.
        path: the file to write. A file that exists is replaced only if this function has written it.
        name: how all names of the file begin, an identifier of C; the path's stem if None.
        weights: "float32", or "int8" for the weights of all linear maps and embeddings, with one scale a row. All other
            parameters stay float32.
        activations: "float32", or "int8" to round the input of every linear map to 8 bits, with one scale a step, and
            to sum in int32. It needs int8 weights.

    Returns:
        A `CProgram` with the bytes of flash and RAM and the operations a step.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        FileExistsError: `path` exists and was not written by this function.

    Example::

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     program = mk.export.c(mk.FirstQuadrantBMRU(3, 16), folder + "/unit.c", weights="int8")
        >>> program.name, program.flash, program.ram
        ('unit', 306, 2)
    """
    check_choice("weights", weights, ("float32", "int8"))
    check_choice("activations", activations, ("float32", "int8"))
    if activations == "int8" and weights != "int8":
        raise ValueError(f'activations: expected "float32" with {weights} weights, got "int8"')
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module: expected a module, got {type(module).__name__}")
    module = unwrapped(module)
    c_layers.check(module)
    check_parameters(module)
    path = Path(path)
    name = _checked_name(path, name)
    _check_ours(path)
    program = Program(weights, activations)
    sizes, token = c_layers.add(program, module)
    path.write_text(program.text(name, kind(module).__name__, sizes, token), encoding="ascii")
    ram = program.state_bytes() + program.buffer_bytes()
    return CProgram(path, name, program.flash, ram, program.multiply_adds, program.comparisons, program.libm_calls)


def _checked_name(path: Path, name: str | None) -> str:
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name: expected a string, got {type(name).__name__}")
    given = path.stem if name is None else name
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", given):
        hint = "" if name is not None else " from path; give a name"
        raise ValueError(f"name: expected an identifier of C, got {given!r}{hint}")
    return given


def _check_ours(path: Path) -> None:
    if not path.exists():
        return
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(MARKER)) == MARKER.encode():
                return
    raise FileExistsError(f"path: expected a new file or one that export.c has written, got {path}")
