"""Compile exported C programs and run them on inputs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mru_kernels as mk

WARNINGS = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic"]

#: Compilers with their options; a program of another machine needs a command that runs it.
COMPILERS = {
    "gcc": ["gcc", "-O2"],
    "gcc without optimisation": ["gcc", "-O0"],
    "gcc in its own dialect": ["gcc", "-std=gnu99", "-O3"],  # there it fuses multiply-adds by default
    "clang": ["clang", "-O2"],
    "gcc with sanitizers": ["gcc", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "clang with sanitizers": ["clang", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "32-bit ARM": ["arm-linux-gnueabihf-gcc", "-O2", "-static"],
}
RUNNERS = {"32-bit ARM": "qemu-arm"}

_MAIN = """\
#define {NAME}_DECLARATIONS
#include "{file}"
#include <stdio.h>

/* Reads inputs and writes what the steps return, each an int32, and their outputs. */
int main(void)
{{
    static {name}_state state;
    static {kind} input[{count}];
    static float output[{NAME}_OUTPUT_SIZE];
    {name}_init(&state);
    while (fread(input, sizeof input, 1, stdin) == 1) {{
        const int code = {name}_step(&state, {argument}, output);
        fwrite(&code, sizeof code, 1, stdout);
        fwrite(output, sizeof output, 1, stdout);
    }}
    return 0;
}}
"""


def have(command: str) -> None:
    """Skip the test unless there is such a command."""
    if shutil.which(command) is None:
        pytest.skip(f"needs {command}")


class Compiled:
    """An exported program in an executable."""

    def __init__(
        self,
        program: mk.export.CProgram,
        compiler: str = "gcc without optimisation",
        options: tuple[str, ...] = (),
        token=False,
    ):
        command, *settings = COMPILERS[compiler]
        have(command)  # without optimisation gcc compiles fastest
        self.runner = [RUNNERS[compiler]] if compiler in RUNNERS else []
        for needed in self.runner:
            have(needed)
        folder = program.path.parent
        main = folder / f"{program.name}_main.c"
        self.executable = folder / f"{program.name}_main"
        names = {"NAME": program.name.upper(), "name": program.name, "file": program.path.name}
        integer = {"kind": "unsigned", "count": 1, "argument": "input[0]"}
        floats = {"kind": "float", "count": f"{names['NAME']}_INPUT_SIZE", "argument": "input"}
        main.write_text(_MAIN.format(**names, **(integer if token else floats)))
        files = [main, program.path, "-o", self.executable, "-lm"]
        subprocess.run([command, *WARNINGS, *settings, *options, *files], check=True)

    def __call__(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Steps from the initial state, of inputs `[T, features]` or tokens `[T]`: return values `[T]` and outputs."""
        data = (inputs if inputs.is_floating_point() else inputs.to(torch.int32)).contiguous().numpy().tobytes()
        run = subprocess.run([*self.runner, self.executable], input=data, capture_output=True, check=True)
        words = torch.frombuffer(bytearray(run.stdout), dtype=torch.int32).view(len(inputs), -1)
        return words[:, 0], words[:, 1:].contiguous().view(torch.float32)


def compiled(module: torch.nn.Module, folder: Path, **settings) -> Compiled:
    token = isinstance(module, mk.MRUNetwork) and module.tokens
    return Compiled(mk.export.c(module, folder / "net.c", **settings), token=token)


def steps(module: torch.nn.Module, inputs: Tensor) -> Tensor:
    """The outputs `[T, features]` of `module.step` for each input in turn."""
    state, outputs = None, []
    for x in inputs.unsqueeze(1):
        output, state = module.step(x, state)
        outputs.append(output)
    return torch.cat(outputs)


_FLAGS = Path("/proc/cpuinfo")
#: The option that lets gcc use fused multiply-adds, on a machine that has them.
FMA = ("-mfma",) if _FLAGS.exists() and " fma " in _FLAGS.read_text() else ()
