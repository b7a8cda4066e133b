"""Sequence-parallel ops."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .. import cells, checks, ops, softmax
from .ranks import NOT_COMPILED, CollectiveCall, Group, Ranks, describe
from .segments import Scan, scan_over_ranks


def scans() -> list[Scan]:
    """The public scan of every cell of the package, and those of the softmax recurrence."""
    modules = {name: f"{cells.__name__}.{name}" for name in ops.CELLS}
    found = [getattr(import_module(module), name) for name, module in modules.items() if find_spec(module)]
    return [*found, softmax.softmax_recurrence, softmax.wkv]


def parallel_op(op: Scan, group: Group) -> Scan:
    """`op` over the segments of all ranks of `group`."""
    signature = inspect.signature(op)
    ranks = Ranks(group)

    @torch.compiler.disable(reason=NOT_COMPILED)
    def eager(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        with CollectiveCall(ranks, scans=1) as call:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            arguments = bound.arguments
            what = ", ".join(f"{name} {describe(value)}" for name, value in arguments.items())
            initial_state, cu_seqlens = arguments.pop("initial_state", None), arguments.pop("cu_seqlens", None)
            resets = arguments.pop("resets", None)
            if arguments.pop("return_boundaries", False):
                raise ValueError("return_boundaries: expected False for a sequence over several ranks, got True")
            if arguments.get("membrane") is True:
                raise ValueError("membrane: expected False or 'only' for a sequence over several ranks, got True")
            reverse = checks.flag("reverse", arguments.pop("reverse", False))
            names = [name for name, value in arguments.items() if isinstance(value, Tensor) and value.dim() > 0]

            def scan(inputs: Sequence[Tensor], state: Tensor | None, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
                given = arguments | dict(zip(names, inputs, strict=True))
                if resets is not None:
                    given["resets"] = resets[:, : inputs[0].shape[1]]
                return op(**given, initial_state=state, cu_seqlens=offsets, reverse=reverse)

            inputs = [arguments[name] for name in names]
            what = f"{op.__name__}({what})"
            return scan_over_ranks(call, what, scan, inputs, initial_state, cu_seqlens, reverse)

    def parallel(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return eager(*args, **kwargs)  # in a frame of its own, because `torch.compile` traces into a disabled function

    parallel.__name__ = parallel.__qualname__ = f"sequence_parallel_{op.__name__}"
    parallel.__doc__ = f"`{op.__name__}` over a time axis that is split over ranks: see `sequence_parallel`."
    return parallel
