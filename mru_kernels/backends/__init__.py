"""The backends: one row and one module each, and the only place that chooses between them.

A backend implements the ops of every cell (see `mru_kernels.ops`) under its own overload name, such as `mru::bmru.cpu`,
and decides in one function how to cut time into segments. The last backend, "torch", has no ops: see plain.py.
"""

from __future__ import annotations

import importlib
import math
import os
import warnings
from dataclasses import dataclass
from functools import cache, cached_property
from types import ModuleType

import torch

from .. import torch_private as private

#: The default of `chunk_size`: the largest number of steps between checkpoints, the states saved for the backward pass.
CHUNK = 64


@dataclass(frozen=True)
class Backend:
    """A row of the table.

    Its module offers:

    load(): called once; registers the kernels or raises ImportError with the reason why it cannot.
    segment(sequences, steps, channels, itemsize, device): steps of a segment, a multiple of `CHUNK`; 0 scans each
        sequence as a whole. `steps` is the total of all sequences, `itemsize` the bytes of a stream's element.
    CHUNK_SIZES: the least and the greatest `chunk_size`, multiples of 16, that its kernels support.
    """

    name: str
    device_types: tuple[str, ...]  # with kernels; none: plain torch, which runs on any device
    needs: str  # the reason in an error for a device of another type
    module_name: str
    wide_row: float = (
        math.inf
    )  # bytes of a sequence's state from which on checkpoints every `CHUNK // 2` steps are faster

    @cached_property
    def plain(self) -> bool:
        """Whether this is plain torch, without ops."""
        return not self.device_types

    @cached_property
    def module(self) -> ModuleType:
        return importlib.import_module(self.module_name)

    def chunk(self, row: int) -> int:
        """Steps between two checkpoints if `chunk_size` is `CHUNK` and the state of a sequence takes `row` bytes."""
        return CHUNK // 2 if row >= self.wide_row else CHUNK


_CHOSEN = os.environ.get("MRU_BACKEND") or None  # read once: reading the environment costs as much as a short scan
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

#: In order of preference.
TABLE: dict[str, Backend] = {
    row.name: row
    for row in (
        Backend("cpu", ("cpu",), "needs CPU tensors", f"{__name__}.cpu", wide_row=4096),
        Backend("cuda", ("cuda",), "needs a CUDA device", f"{__name__}.cuda"),
        Backend(
            "triton",
            ("cuda", "cpu") if _INTERPRETED else ("cuda",),
            "needs a CUDA or ROCm device (or TRITON_INTERPRET=1 in the environment)",
            f"{__name__}.triton",
        ),
        Backend("torch", (), "", f"{__name__}.plain"),
    )
}


@cache
def load_error(name: str) -> str | None:
    try:
        TABLE[name].module.load()
    except (ImportError, OSError) as error:
        return str(error)
    return None


def why_not(name: str, device: torch.device) -> str | None:
    """The reason why backend `name` cannot run on `device`; None if it can."""
    backend = TABLE[name]
    if device.type == "meta":
        return None  # shapes need no kernels
    if device.type not in backend.device_types and not backend.plain:
        return f"{backend.needs}, got a tensor on {device}"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA or ROCm device"
    return load_error(name)


def available_backends(device: torch.device | str = "cpu") -> dict[str, str | None]:
    """Every backend's name, with None if it can run on `device`, else the reason why it cannot.

    On "meta" every backend runs: a call computes shapes, which needs no kernels. "torch" is a loop over time in plain
    torch, which runs on any device. A call chooses it by itself only on devices for which there are no kernels.

    Example::

        >>> mk.available_backends("cpu")["cpu"]  # None: it can run

    """
    device = torch.device(device)
    return {name: why_not(name, device) for name in TABLE}


@cache
def _warn_of_plain() -> None:
    warnings.warn(
        "backend: no kernels run on this device, so calls run on 'torch', a slow loop over time in plain torch",
        stacklevel=2,
    )


@cache
def _resolve(name: str | None, device: torch.device, names: tuple[str, ...]) -> str:
    if name is None:
        reasons = {n: r for n, r in available_backends(device).items() if n in names or TABLE[n].plain or not names}
        if any(device.type in row.device_types for row in TABLE.values()):
            reasons |= {row.name: "runs if it is named" for row in TABLE.values() if row.plain}
        for candidate, reason in reasons.items():
            if reason is None:
                if TABLE[candidate].plain:
                    _warn_of_plain()
                return candidate
        listed = "; ".join(f"{candidate}: {reason}" for candidate, reason in reasons.items())
        raise RuntimeError(f"backend: none can run on {device} ({listed})")
    if name not in TABLE:
        raise ValueError(f"backend: expected None or one of {', '.join(map(repr, TABLE))}, got {name!r}")
    reason = why_not(name, device)
    if names and not (name in names or TABLE[name].plain):
        reason = f"the cell has kernels for {', '.join(names)} only; backend='torch' runs anywhere"
    if reason is not None:
        raise RuntimeError(f"backend: {name!r} cannot run this call: {reason}")
    return name


@private.assume_constant_result
def _resolved(name: str | None, device: torch.device, names: tuple[str, ...]) -> str:
    if name is not None and not isinstance(name, str):
        raise TypeError(f"backend: expected None or a name, got {type(name).__name__}")
    return _resolve(name or _CHOSEN, device, names)


def resolve(name: str | None, device: torch.device, names: tuple[str, ...] = ()) -> Backend:
    """The backend that a call runs on: `name`, else `MRU_BACKEND`; if neither is given, the first that can run.

    With `names`, it is one of these or plain torch: a cell may have kernels for some backends only.

    Raises:
        ValueError: `name` is not a backend.
        RuntimeError: the backend cannot run on `device`, with the reason.
    """
    return TABLE[_resolved(name, device, names)]


def resolve_fake(name: str | None, device: torch.device, names: tuple[str, ...]) -> Backend | None:
    """`resolve` for fake tensors, which need neither the device nor its kernels; None if `resolve` decides."""
    name = name or _CHOSEN
    rows = (row for row in TABLE.values() if device.type in row.device_types and row.name in names)
    return next((row for row in rows if name in (None, row.name)), None)
