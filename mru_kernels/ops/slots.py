"""A step on states in slots `[slots, ...]` where no kernel addresses them: gather, step, scatter.

No shape depends on the indices, and on a device nothing waits for their values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import checks
from ..scalars import has_value


def step(
    run: Callable[[list[Tensor]], tuple[Tensor, Sequence[Tensor]]], states: Sequence[Tensor], state_indices: Tensor
) -> Tensor:
    """Run a step on the slots `state_indices [B]` of `states`, each `[slots, ...]`, and update them in place.

    Args:
        run: (states before `[B, ...]`) -> output `[B, ...]` and states after.

    Returns:
        The output. That of a skipped sequence has no meaning.

    Raises:
        TypeError: the dtype of a state is not that of the state after; no slot has changed.
        ValueError: on the CPU, a slot does not exist or occurs twice.
    """
    count, batch = states[0].shape[0], state_indices.shape[0]
    if state_indices.device.type == "cpu" and not torch.compiler.is_compiling() and has_value(state_indices):
        checks.slot_values(state_indices, count)
    if count == 0 or batch == 0:
        return run([t.new_zeros((batch, *t.shape[1:])) for t in states])[0]
    valid = (state_indices >= 0) & (state_indices < count)
    # A sequence without a slot writes again what another one writes. If none has a slot, all write row 0 as it is.
    some = valid.any()
    source = torch.where(valid, torch.arange(batch, device=valid.device), valid.int().argmax())
    rows = torch.where(some, state_indices[source], 0).long()
    before = [t.index_select(0, rows) for t in states]
    output, after = run(before)
    for i, (t, new) in enumerate(zip(states, after, strict=True)):
        if t.dtype != new.dtype:
            raise TypeError(f"state: expected dtype {new.dtype} for tensor {i}, got {t.dtype}")
    for t, old, new in zip(states, before, after, strict=True):
        t.index_copy_(0, rows, torch.where(some, new.index_select(0, source), old))
    return output
