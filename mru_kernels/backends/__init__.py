"""The backends: one row a backend, one file a backend, and the only place that chooses between them.

A backend implements three ops per cell (see `mru_kernels.ops`) under its own overload name, such as `mru::bmru.cpu`,
and says in one function how it splits time.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from functools import cache, cached_property
from types import ModuleType

import torch

CHUNK = 64  #: steps between two boundary states that the forward pass saves for the backward pass, unless told


@dataclass(frozen=True)
class Backend:
    """A row of the table.

    Its module offers:

    load(): called once; registers the ops or raises ImportError with the reason why it cannot.
    segment(sequences, steps, channels, itemsize, device): how many steps one unit scans while others scan the same
        sequence (a multiple of `CHUNK`), or 0 where a sequence is scanned whole, for so many sequences that have so
        many steps all together, of streams with elements of so many bytes.
    CHUNK_SIZES: the least and the most steps between two boundary states, multiples of 16, that its kernels take.
    """

    name: str
    device_types: tuple[str, ...]
    needs: str  # what to say where the device is of another type
    module_name: str

    @cached_property
    def module(self) -> ModuleType:
        return importlib.import_module(self.module_name)


_CHOSEN = os.environ.get("MRU_BACKEND") or None  # read once: a look into the environment costs as much as a short scan
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

#: In order of preference.
TABLE: dict[str, Backend] = {
    row.name: row
    for row in (
        Backend("cpu", ("cpu",), "needs CPU tensors", f"{__name__}.cpu"),
        Backend("cuda", ("cuda",), "needs a CUDA device", f"{__name__}.cuda"),
        Backend(
            "triton",
            ("cuda", "cpu") if _INTERPRETED else ("cuda",),
            "needs a CUDA or ROCm device (or TRITON_INTERPRET=1 in the environment)",
            f"{__name__}.triton",
        ),
    )
}


@cache
def _load_error(name: str) -> str | None:
    try:
        TABLE[name].module.load()
    except (ImportError, OSError) as error:
        return str(error)
    return None


def why_not(name: str, device: torch.device) -> str | None:
    """Why backend `name` cannot run on `device`; None where it can."""
    backend = TABLE[name]
    if device.type == "meta":
        return None  # shapes need no kernels
    if device.type not in backend.device_types:
        return f"{backend.needs}, got a tensor on {device}"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA or ROCm device"
    return _load_error(name)


def available_backends(device: torch.device | str = "cpu") -> dict[str, str | None]:
    """Every backend's name, with None where it can run on `device`, else the reason why it cannot.

    On "meta" every backend runs: a call computes shapes, which needs no kernels.
    """
    device = torch.device(device)
    return {name: why_not(name, device) for name in TABLE}


@cache
def _resolve(name: str | None, device: torch.device) -> str:
    if name is None:
        reasons = available_backends(device)
        for candidate, reason in reasons.items():
            if reason is None:
                return candidate
        listed = "; ".join(f"{candidate}: {reason}" for candidate, reason in reasons.items())
        raise RuntimeError(f"backend: none can run on {device} ({listed})")
    if name not in TABLE:
        raise ValueError(f"backend: expected None or one of {', '.join(map(repr, TABLE))}, got {name!r}")
    reason = why_not(name, device)
    if reason is not None:
        raise RuntimeError(f"backend: {name!r} cannot run this call: {reason}")
    return name


@torch.compiler.assume_constant_result
def _resolved(name: str | None, device: torch.device) -> str:
    if name is not None and not isinstance(name, str):
        raise TypeError(f"backend: expected None or a name, got {type(name).__name__}")
    return _resolve(name or _CHOSEN, device)


def resolve(name: str | None, device: torch.device) -> Backend:
    """The backend that a call runs on. A name, given as argument or by `MRU_BACKEND`, is taken or raises; None chooses.

    Raises:
        ValueError: `name` is not a backend.
        RuntimeError: the backend cannot run on `device`, with the reason.
    """
    return TABLE[_resolved(name, device)]


def resolve_fake(name: str | None, device: torch.device) -> Backend | None:
    """As `resolve` for fake tensors, which need neither the device nor its kernels; None where `resolve` is right."""
    name = name or _CHOSEN
    rows = (row for row in TABLE.values() if device.type in row.device_types)
    return next((row for row in rows if name in (None, row.name)), None)
