"""Calls of the Triton backend under the interpreter, with the addresses that they load and store."""

from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager

import numpy as np
import torch
from triton.runtime import interpreter

from mru_kernels.backends import CHUNK
from mru_kernels.ops import ALL_WANTED, CELLS


class Traffic:
    """Distinct addresses of 1 byte that each launch read and wrote: what has to come from memory and go there."""

    def __init__(self):
        self.launches: list[tuple[str, dict[str, set[int]]]] = []
        self.mask_bytes: list[int] = []  # of each launch: bytes of masks, each time that they are loaded

    def bytes_in(self, how: str, *tensors: torch.Tensor) -> int:
        """Bytes of the tensors' memory that launches loaded or stored, a byte once a launch."""
        total = 0
        for _, touched in self.launches:
            addresses = np.fromiter(touched[how], np.uint64, len(touched[how]))
            for t in tensors:
                begin = np.uint64(t.untyped_storage().data_ptr())
                end = begin + np.uint64(t.untyped_storage().nbytes())
                total += int(((addresses >= begin) & (addresses < end)).sum())
        return total

    def all_bytes(self) -> int:
        return sum(len(addresses) for _, touched in self.launches for addresses in touched.values())


@contextmanager
def recorded():
    """Traffic of what is launched within."""
    traffic = Traffic()
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    before = builder.create_masked_load, builder.create_masked_store, executor.__call__

    def record(how, pointers, mask):
        """Only masks of resets have elements of one byte."""
        element = pointers.get_element_ty().primitive_bitwidth // 8
        first = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))
        first = first[np.broadcast_to(mask.data, first.shape).astype(bool)]
        if element == 1:
            traffic.mask_bytes[-1] += first.size
        traffic.launches[-1][1][how].update((first[:, None] + np.arange(element, dtype=np.uint64)).ravel().tolist())

    def load(self, pointers, mask, *rest):
        record("load", pointers, mask)
        return before[0](self, pointers, mask, *rest)

    def store(self, pointers, value, mask, *rest):
        record("store", pointers, mask)
        return before[1](self, pointers, value, mask, *rest)

    def launch(self, *arguments, **keywords):
        traffic.launches.append((self.fn.__name__, defaultdict(set)))
        traffic.mask_bytes.append(0)
        return before[2](self, *arguments, **keywords)

    builder.create_masked_load, builder.create_masked_store, executor.__call__ = load, store, launch
    try:
        yield traffic
    finally:
        builder.create_masked_load, builder.create_masked_store, executor.__call__ = before


def arguments_of(
    tensors,
    segment,
    *,
    cell="bmru",
    epsilon=0.5,
    surrogate_scale=1.0,
    initial_state=None,
    cu_seqlens=None,
    resets=None,
    reset_state=None,
    reverse=False,
):
    """The arguments of a cell's op, from its array inputs by name."""
    spec = CELLS[cell]
    values = {"epsilon": epsilon, "surrogate_scale": surrogate_scale, "mode": 1.0}
    scheduled = [torch.tensor(values[s.name], dtype=torch.float64) for s in spec.scheduled]
    inputs_ = [tensors[i.name] for i in spec.inputs if i.name in tensors]
    given = spec.mask(*tensors, *(s.name for s in spec.scheduled))
    numbers = [values[s.name] for s in spec.numbers]
    states = (initial_state, cu_seqlens, resets, reset_state)
    return ([*inputs_, *scheduled], given, 0, numbers, *states, reverse, CHUNK, segment)


def run(arguments, grad_h, grad_final, save=True, cell="bmru", grad_checkpoints=None):
    """Forward and backward on the Triton backend: results, gradients, and the traffic of each."""
    with torch.no_grad():
        with recorded() as forward:
            results = CELLS[cell].forward["triton"](*arguments, save)
        with recorded() as backward:
            grads = CELLS[cell].backward["triton"](
                grad_h, grad_final, grad_checkpoints, *arguments, *results[2:], ALL_WANTED
            )
    return results, grads, forward, backward
