"""`python -m bench NAME ...` runs `main` of the module of that name, imported only then."""

from __future__ import annotations

import importlib
import os
import sys
from importlib.util import find_spec

from . import allocator

SUBCOMMANDS = {
    "compare": "errors of every backend against the float64 reference",
    "speed": "times against a pass over the same bytes",
    "gpu-check": "on a machine with a GPU: build, tests, comparison, times; see `make gpu-check`",
    "profile": "where the time goes",
    "memory": "what a training step keeps, by the length of its chunks",
    "report": "tables and figures from recorded results",
}

_TIMED = ("speed", "profile", "memory")  # with the allocator pinned


def _module(name: str) -> str:
    return f"bench.{name.replace('-', '_')}"


def main(argv: list[str]) -> int:
    present = {name: what for name, what in SUBCOMMANDS.items() if find_spec(_module(name))}
    name, *rest = argv or [""]
    if name in _TIMED and not allocator.is_pinned():
        os.execve(sys.executable, [sys.executable, "-m", "bench", *argv], allocator.pinned())
    if name in present:
        return importlib.import_module(_module(name)).main(rest) or 0
    print("usage: python -m bench NAME [--help]\n")
    for name, what in present.items():
        print(f"  {name:10}{what}")
    return 0 if argv in (["-h"], ["--help"]) else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
