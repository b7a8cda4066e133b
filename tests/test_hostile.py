"""Direct calls of `torch.ops.mru.*` with random numbers, lists, shapes, dtypes and devices.

Each call raises a Python exception or returns results of the right shapes. None ends the process. Under the sanitizers,
none reads or writes out of bounds.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from mru_kernels import backends, checks, ops
from tests import raw

# Shapes [B, T, D] of streams. HUGE has sizes that overflow, that are 0, or that exceed all memory. Its shapes that can
# be allocated need little memory, also with one dimension less.
USUAL = [(2, 40, 3), (1, 33, 5), (2, 0, 3), (1, 1, 1), (1, 130, 2)]
HUGE = [(2**20, 2**20, 2**19), (0, 2**41, 2**20), (2**61, 0, 0), (1, 0, 2**58), (1, 2**60, 0), (2**24, 3, 0)]
HUGE += [(2**45, 2, 3), (1, 2**45, 3), (1, 20, 2**45)]
SHAPES = [*USUAL, *HUGE, (), (3,), (2**62,), (5, 0), (2, 3), (2**40, 2**21), (1, 1, 1, 1)]
NUMBERS = [-(2**63), -64, -1, 0, 1, 2, 3, 8, 16, 24, 64, 128, 4096, 8192, 10**7, 2**31, 2**59, 2**60, 2**63 - 64]
FLOATS = [-1.0, 0.0, 1.0, 2.0, math.nan, math.inf, 1e-300, 1e300]
OFFSETS = [[], [0], [0, 33], [33, 0], [0, 2**62], [-1, 33], [0, 20, 10, 33], [0, 0, 33, 33], [1, 33], [-(2**63)] * 3]
DTYPES = [torch.float32, torch.bfloat16, torch.complex64, torch.int32, torch.int64, torch.bool]


@st.composite
def tensors(draw, good: Tensor | None, device: torch.device) -> Tensor:
    """A tensor of any kind, usually one that differs from `good` in one property."""
    good = torch.ones(2, 3, device=device) if good is None else good
    shape, dtype, one = list(good.shape), good.dtype, torch.ones((), device=good.device)
    kind = draw(st.sampled_from(["size", "size", "rank", "shape", "dtype", "value", "offsets", "meta", "sparse"]))
    if kind == "size" and shape:
        at = draw(st.integers(0, len(shape) - 1))
        shape[at] = draw(st.sampled_from([0, 1, shape[at] + 1, max(shape[at] - 1, 0)]))
    elif kind == "rank":
        shape = draw(st.sampled_from([shape[1:], [1, *shape], [*shape, 1]]))
    elif kind == "shape":
        shape = draw(st.sampled_from(SHAPES))
    elif kind == "dtype":
        dtype = draw(st.sampled_from(DTYPES))
    elif kind == "value":
        one = one * draw(st.sampled_from(FLOATS))
    elif kind == "offsets":
        return torch.tensor(draw(st.sampled_from(OFFSETS)), dtype=torch.int64, device=device)
    elif kind == "meta":
        one = torch.ones((), device="meta")
    elif kind == "sparse":
        return torch.ones(2, 3, device=device).to_sparse()
    return one.to(dtype).expand(shape)


@st.composite
def values(draw, kind: str, good: Any, device: torch.device) -> Any:
    """A value of a schema's type `kind`, for an argument whose right value is `good`."""
    if kind == "bool":
        return not good
    if kind == "int":
        return draw(st.sampled_from(NUMBERS))
    if kind == "float":
        return draw(st.sampled_from(FLOATS))
    if kind == "List[float]":
        return draw(st.sampled_from([[], [draw(st.sampled_from(FLOATS))], [*good, 1.0], 1000 * [1.0]]))
    if kind != "List[Tensor]":
        none = kind == "Optional[Tensor]" and draw(st.booleans())
        return None if none else draw(tensors(good, device))
    more = draw(tensors(good[0] if good else None, device))
    return draw(st.sampled_from([[], good[1:], [*good, more], [more, *good[1:]], [*good, *good], 1000 * [more]]))


@st.composite
def scans(draw, cell: ops.Cell, device: torch.device) -> dict[str, Any]:
    """Arguments of the forward op that agree with each other."""
    batch, time, channels = draw(st.sampled_from(2 * USUAL + HUGE))
    one = torch.ones((), dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])), device=device)
    names = [i.name for i in cell.inputs if not i.optional or draw(st.booleans())]
    streams = [i.name for i in cell.inputs if i.name in names and i.kind != "channel"]
    fits = batch * time * channels * len(streams) <= checks.MOST_ELEMENTS
    packed = streams if len(streams) > 1 and fits and draw(st.booleans()) else []
    shape = (batch, time, channels * (len(packed) or 1))
    dtypes = {name: checks.complex_dtype(torch.float32) if name in cell.complex_names else one.dtype for name in names}
    arrays = {
        name: one.to(dtypes[name]).expand(shape if name in streams else (channels,))
        for name in names
        if name not in packed
    }
    if packed:
        arrays = {"gates": one.expand(shape), **arrays}
    arrays = {name: t.requires_grad_(draw(st.booleans())) if t.dim() == 3 else t for name, t in arrays.items()}
    cu_seqlens = torch.tensor([0, time // 2, time], device=device) if batch == 1 and draw(st.booleans()) else None
    state = one.to(cell.state_dtype(one.dtype)).expand(batch if cu_seqlens is None else 2, channels)
    resets = reset_state = None
    if batch * time < 2**20 and draw(st.booleans()):  # the kernels need a dense mask
        resets = torch.ones((), dtype=torch.bool, device=device).expand(batch, time)
        reset_state = draw(st.sampled_from([None, state]))
    cuts = [0, 64, 65] + [-1] * ((batch, time, channels) not in HUGE)  # -1 keeps spare rows, which may not fit
    return raw.arguments(
        cell, arrays, packed=packed, initial_state=draw(st.sampled_from([None, state])), cu_seqlens=cu_seqlens,
        resets=resets, reset_state=reset_state, reverse=draw(st.booleans()), segment=draw(st.sampled_from(cuts)),
        save=draw(st.booleans()), epsilon=draw(st.sampled_from([0.0, 0.5])),
    )  # fmt: skip


def shapes(op: torch._ops.OpOverload, arguments: list[Any]) -> list[tuple[torch.Size, torch.dtype]]:
    """Shapes and dtypes of the results, by the fake kernel of the op."""
    with FakeTensorMode() as mode:
        results = op(*pytree.tree_map_only(Tensor, mode.from_tensor, arguments))
    return [(t.shape, t.dtype) for t in results]


def backward_of(forward: torch._ops.OpOverload, scan: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the backward op that agree with those of a forward op."""
    one = torch.ones((), device=scan["inputs"][0].device)
    made = shapes(forward, raw.of(raw.FORWARD, scan | {"save": True}))
    given = [one.to(dtype).expand(shape) for shape, dtype in made]
    grads = dict(zip(("grad_h", "grad_final", "checkpoints", "codes"), given, strict=True))
    return scan | grads | {"grad_checkpoints": given[2], "wanted": ops.ALL_WANTED}


def step_of(cell: ops.Cell, scan: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the step op from those of a forward op. Packed gates may have the wrong shape."""
    inputs = [t.detach().new_ones(()).expand(t.shape[0], t.shape[2]) if t.dim() == 3 else t for t in scan["inputs"]]
    state = inputs[0].new_ones((), dtype=cell.state_dtype(inputs[0].dtype)).expand(inputs[0].shape)
    return scan | {"inputs": inputs, "state": state}


@pytest.mark.parametrize("kind", ["forward", "backward", "step", "map"])
@pytest.mark.parametrize("cell", ops.CELLS.values(), ids=lambda cell: cell.name)
@given(data=st.data())
def test_a_hostile_call_raises_or_gives_the_right_shapes(backend, device, cell, kind, data):
    backends.resolve(backend, device)  # registers the kernels of the backend
    op = getattr(cell, kind)[backend]
    arguments = data.draw(scans(cell, device))
    if kind == "backward":
        if tuple(arguments["inputs"][0].shape) in HUGE:
            arguments["inputs"] = [t.detach() for t in arguments["inputs"]]
        arguments = backward_of(cell.forward[backend], arguments)
    elif kind == "step":
        arguments = step_of(cell, arguments)
    types = {argument.name: str(argument.type) for argument in op._schema.arguments}
    changed = data.draw(st.lists(st.sampled_from(list(types)), max_size=3))
    refused = kind == "map" and not cell.composes
    must_run = not changed and not refused and kind != "step" and max(arguments["inputs"][0].shape) < 1000
    for name in changed:
        arguments[name] = data.draw(values(types[name], arguments[name], device))
    given_arguments = [arguments[name] for name in types]
    try:
        results = op(*given_arguments)
    except Exception as error:
        if must_run or "INTERNAL ASSERT" in str(error):
            raise
        return
    assert [(t.shape, t.dtype) for t in results] == shapes(op, given_arguments)
