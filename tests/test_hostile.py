"""Direct calls of `torch.ops.mru.*` with numbers, lists, shapes, dtypes and devices that no user means to give.

Each raises a Python exception or returns results of the right shapes; none ends the process. Run under the sanitizers,
none reads or writes beyond its memory either.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from bench import inputs
from mru_kernels import backends
from tests import raw

# Of streams [B, T, D]: usual ones; then sizes that overflow, that are nothing, or beyond all memory, also with a size
# less: what could be allocated is small.
USUAL = [(2, 40, 3), (1, 33, 5), (2, 0, 3), (1, 1, 1), (1, 130, 2)]
HUGE = [(2**20, 2**20, 2**19), (0, 2**41, 2**20), (2**61, 0, 0), (1, 0, 2**59), (1, 2**60, 0), (2**24, 3, 0)]
HUGE += [(2**45, 2, 3), (1, 2**45, 3), (1, 20, 2**45)]
SHAPES = [*USUAL, *HUGE, (), (3,), (2**62,), (5, 0), (2, 3), (2**40, 2**21), (1, 1, 1, 1)]
NUMBERS = [-(2**63), -64, -1, 0, 1, 2, 3, 8, 16, 24, 64, 128, 4096, 8192, 10**7, 2**31, 2**59, 2**60, 2**63 - 64]
FLOATS = [-1.0, 0.0, 1.0, 2.0, math.nan, math.inf, 1e-300, 1e300]
OFFSETS = [[], [0], [0, 33], [33, 0], [0, 2**62], [-1, 33], [0, 20, 10, 33], [0, 0, 33, 33], [1, 33], [-(2**63)] * 3]
DTYPES = [torch.float32, torch.bfloat16, torch.complex64, torch.int32, torch.int64, torch.bool]


@st.composite
def tensors(draw, good: Tensor | None, device: torch.device) -> Tensor:
    """A tensor of any kind, most often one that differs from `good` in one respect."""
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
    """What may come for an argument of a schema's type that should be `good`."""
    if kind == "bool":
        return not good
    if kind == "int":
        return draw(st.sampled_from(NUMBERS))
    if kind == "float":
        return draw(st.sampled_from(FLOATS))
    if kind != "List[Tensor]":
        none = kind == "Optional[Tensor]" and draw(st.booleans())
        return None if none else draw(tensors(good, device))
    more = draw(tensors(good[0] if good else None, device))
    return draw(st.sampled_from([[], good[1:], [*good, more], [more, *good[1:]], [*good, *good], 1000 * [more]]))


def ones(cell: str, shape: tuple[int, int, int], one: Tensor, alpha: bool, state: bool, packed: bool) -> inputs.Call:
    """A call of ones that takes no memory: streams `[B, T, D]` of `shape`; two packed sequences if `packed`."""
    batch, time, channels = shape
    drawn = inputs.case(cell, torch.float32, time=1, channels=1).build().tensors
    tensors = {name: one.expand(shape if t.dim() == 3 else shape[2:]) for name, t in drawn.items()}
    if alpha and "alpha" in inputs.CELLS[cell].optional:
        tensors["alpha"] = one.expand(channels)
    final = one.float().expand(2 if packed else batch, channels)
    if state:
        tensors["initial_state"] = final
    settings = {"epsilon": 0.5} if "epsilon" in inputs.CELLS[cell].scalars else {}
    offsets = {"cu_seqlens": torch.tensor([0, time // 2, time], device=one.device)} if packed else {}
    return inputs.Call(cell, tensors, settings | offsets, one.expand(shape), final)


@st.composite
def scans(draw, cell: str, device: torch.device) -> dict[str, Any]:
    """Arguments of the forward op that fit together."""
    shape = draw(st.sampled_from(2 * USUAL + HUGE))
    one = torch.ones((), dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])), device=device)
    one.requires_grad_(draw(st.booleans()))
    packed = shape[0] == 1 and draw(st.booleans())
    call = ones(cell, shape, one, draw(st.booleans()), draw(st.booleans()), packed)
    call = replace(call, settings=call.settings | {"reverse": draw(st.booleans())})
    streams = sum(t.dim() == 3 for t in call.tensors.values())
    gates = None
    if streams == sum(name not in ("alpha", "initial_state") for name in call.tensors) and draw(st.booleans()):
        gates = one.expand(*shape[:2], streams * shape[2])
    return raw.scan(call, gates=gates, segment=draw(st.sampled_from([0, 64])), save=draw(st.booleans()))


def shapes(op: torch._ops.OpOverload, arguments: list[Any]) -> list[tuple[torch.Size, torch.dtype]]:
    """The shapes and dtypes of the results, as the op's fake has them."""
    with FakeTensorMode() as mode:
        results = op(*pytree.tree_map_only(Tensor, mode.from_tensor, arguments))
    return [(t.shape, t.dtype) for t in results]


@pytest.mark.parametrize("kind", ["forward", "backward", "step"])
@pytest.mark.parametrize("cell", inputs.CELLS)
@given(data=st.data())
def test_a_hostile_call_raises_or_gives_the_right_shapes(backend, device, cell, kind, data):
    backends.resolve(backend, device)  # which registers its kernels
    ops = raw.CELLS[cell]
    op = getattr(ops, kind)[backend]
    if kind == "step":
        shape = data.draw(st.sampled_from(2 * USUAL + HUGE))
        one = torch.ones((), device=device)
        arguments = raw.step(ones(cell, (shape[0], 1, shape[2]), one, data.draw(st.booleans()), True, False))
    else:
        arguments = data.draw(scans(cell, device))
    if kind == "backward":
        if tuple(raw.stream_of(arguments).shape) in HUGE:
            arguments = pytree.tree_map_only(Tensor, Tensor.detach, arguments)
        one = torch.ones((), device=device)
        results = shapes(ops.forward[backend], list((arguments | {"save": True}).values()))
        arguments = raw.backward(arguments, [one.to(dtype).expand(size) for size, dtype in results])
    types = {argument.name: str(argument.type) for argument in op._schema.arguments}
    changed = data.draw(st.lists(st.sampled_from(list(types)), max_size=3))
    must_run = not changed and max(raw.stream_of(arguments).shape) < 1000
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
