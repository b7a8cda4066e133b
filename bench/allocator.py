"""Settings of glibc's allocator, by environment variables that a process reads when it starts.

By default glibc returns a large block to the system when it is freed, so every new output costs page faults. They can
take several times as long as a scan. `PINNED` keeps freed memory in the process.
"""

from __future__ import annotations

import os

PINNED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 40), "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": "0"}

#: For measuring memory: freed memory returns to the system, so resident memory is memory in use.
RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": str(1 << 16)}


def is_pinned() -> bool:
    return all(os.environ.get(name) == value for name, value in PINNED.items())


def pinned() -> dict[str, str]:
    """The environment of this process, with `PINNED`."""
    return os.environ | PINNED


def default() -> dict[str, str]:
    """The environment of this process, without `PINNED`: glibc's default settings."""
    return {name: value for name, value in os.environ.items() if name not in PINNED}


def describe() -> str:
    """The allocator settings of this process: the variables of its environment that glibc reads."""
    names = sorted(name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES")
    return " ".join(f"{name}={os.environ[name]}" for name in names) or "glibc's default"
