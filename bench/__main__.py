"""`python -m bench NAME ...`, or `python -m mru_kernels.bench NAME ...` where the package is installed.

The module of a command is imported only when it is called.
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib.util import find_spec

from . import allocator

#: Module and purpose of each command. A command without its module is not listed: a wheel has no `gpu-check`.
SUBCOMMANDS = {
    "compare": ("compare", "errors of every backend against the float64 reference"),
    "speed": ("speed", "times against a pass over the same bytes"),
    "gpu-check": ("gpu.command", "on a machine with a GPU: build, tests, comparison, times; see `make gpu-check`"),
    "calls": ("calls", "microseconds of small calls and of their unavoidable parts"),
    "profile": ("profile", "the time of each op or kernel in a call"),
    "memory": ("memory", "memory of a training step for each chunk_size"),
    "resets": ("resets", "times of calls with resets against those without"),
    "define": ("define", "times of defined cells against cells by hand and composed ones"),
    "delays": ("delays", "times of the forms of delay_conv"),
    "spiking": ("spiking", "times of spiking neurons against snnTorch and SpikingJelly"),
    "mesa": ("mesa", "time and memory of mesa against a loop over steps"),
    "softmax": ("softmax", "time, memory and accuracy of wkv against other forms"),
    "online": ("online", "gradients of streams: errors and costs"),
    "blocks": ("blocks", "memory and time of training in blocks of time"),
    "report": ("report", "tables and figures from recorded results"),
}

_TIMED = (
    "speed",
    "calls",
    "profile",
    "memory",
    "resets",
    "define",
    "delays",
    "spiking",
    "mesa",
    "softmax",
    "online",
)  # commands that run with the allocator pinned


def main(argv: list[str]) -> int:
    present = {name: row for name, row in SUBCOMMANDS.items() if find_spec(f"{__package__}.{row[0].split('.')[0]}")}
    name, *rest = argv or [""]
    if name in _TIMED and not allocator.is_pinned():
        os.execve(sys.executable, [sys.executable, "-m", __package__, *argv], allocator.pinned())
    if name in present:
        return importlib.import_module(f".{present[name][0]}", __package__).main(rest) or 0
    print(f"usage: python -m {__package__} NAME [--help]\n")
    for name, (_, what) in present.items():
        print(f"  {name:10}{what}")
    return 0 if argv in (["-h"], ["--help"]) else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
