"""Sequence-parallel ops."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..cells.bmru import bmru
from ..cells.linear_recurrence import linear_recurrence
from ..cells.schmitt import schmitt
from .ranks import NOT_COMPILED, CollectiveCall, Group, Ranks, describe
from .segments import Scan, probed, scan_over_ranks


def _no_amplitude(arguments: dict[str, Any]) -> dict[str, Any]:
    candidate = arguments["candidate"]
    return arguments | {"amplitude": candidate.new_zeros(candidate.shape[-1]).expand_as(candidate)}


def _no_update(arguments: dict[str, Any]) -> dict[str, Any]:
    update = arguments["update"]
    return arguments | {"update": update.new_zeros(update.shape[-1]).expand_as(update)}


#: For each op a function to the arguments with which it writes zeros only: a scan from state 1 then ends in the decay
#: `a` of the segment. None where there are no such arguments.
HOMOGENEOUS: dict[Scan, Callable[[dict[str, Any]], dict[str, Any]] | None] = {
    bmru: _no_amplitude,
    linear_recurrence: _no_update,
    schmitt: None,
}


def parallel_op(op: Scan, group: Group) -> Scan:
    """`op` over the segments of all ranks of `group`."""
    signature, homogeneous = inspect.signature(op), HOMOGENEOUS[op]
    ranks = Ranks(group)

    @torch.compiler.disable(reason=NOT_COMPILED)
    def eager(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        with CollectiveCall(ranks, scans=1) as call:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            arguments = bound.arguments
            what = ", ".join(f"{name} {describe(value)}" for name, value in arguments.items())
            initial_state, cu_seqlens = arguments.pop("initial_state", None), arguments.pop("cu_seqlens", None)
            reverse = checks.flag("reverse", arguments.pop("reverse", False))
            names = [name for name, value in arguments.items() if isinstance(value, Tensor) and value.dim() > 0]

            def scan(inputs: Sequence[Tensor], state: Tensor | None, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
                given = arguments | dict(zip(names, inputs, strict=True))
                return op(**given, initial_state=state, cu_seqlens=offsets, reverse=reverse)

            def decay(inputs: Sequence[Tensor], b: Tensor, offsets: Tensor | None) -> Tensor:
                if homogeneous is None:
                    return probed(scan, inputs, b, offsets)
                zeroed = homogeneous(arguments | dict(zip(names, inputs, strict=True)))
                return op(**zeroed, initial_state=torch.ones_like(b), cu_seqlens=offsets, reverse=reverse)[1]

            inputs = [arguments[name] for name in names]
            what = f"{op.__name__}({what})"
            return scan_over_ranks(call, what, scan, decay, inputs, initial_state, cu_seqlens, reverse)

    def parallel(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return eager(*args, **kwargs)  # in a frame of its own, because `torch.compile` traces into a disabled function

    parallel.__name__ = parallel.__qualname__ = f"sequence_parallel_{op.__name__}"
    parallel.__doc__ = f"`{op.__name__}` over a time axis that is split over ranks: see `sequence_parallel`."
    return parallel
