"""Checks of an op on the very call that is timed: `faults`.

The reference loops over the steps in Python, so it gets a sample: a few channels, which do not depend on each other,
and of a long scan the first and the last steps. The last steps start from the state that the op computes before them.

All channels and steps are compared with the results of the same kernels under other settings: with time cut
differently and, on the CPU, with another number of threads. If the forward pass is exact (`compare.is_exact`), it must
also be the same with other CPU instructions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

import mru_kernels as mk
from mru_kernels.backends import CHUNK, TABLE
from mru_kernels.ops import entry

from . import compare, errors
from .inputs import Call

_STEPS = 256  # steps at each end of a scan that the reference computes
_CHANNELS = 8
#: Results with different cuts of time may differ by this factor times the limit of the state dtype: their sums round
#: differently, and terms that cancel enlarge the difference.
_CANCELLATION = 50
_BLOCK = 64  # steps of a sequence whose difference has a limit of its own, so a fault in few of many steps is found

Results = dict[str, Tensor]


def faults(call: Call, backend: str, bits: Callable[[], str] | None = None) -> list[str]:
    """What is wrong with the results of an op and with its gradients, a line for each; empty if all are right.

    Args:
        call: the arguments, on the device of the backend. It scans forward, without resets, packed sequences,
            boundaries or states.
        backend: the name of the backend.
        bits: returns `digest` of the call on the same backend with other instructions; None: they are not compared.
    """
    op = partial(getattr(mk, call.cell), backend=backend)
    got = compare.results_of(call, op)
    part, of_part = _sample(call, got, op)
    found = [f"{r.name} is not that of the reference" for r in compare.judge(part, of_part) if not r.passed]
    if TABLE[backend].plain:
        return found
    if call.stream.device.type == "cpu":
        with threads(1 if torch.get_num_threads() > 1 else 2):
            other = compare.results_of(call, op)
        found += [f"{name} depends on the number of threads" for name in got if not _same_bits(got[name], other[name])]
    with patch.object(entry, "SEGMENT", _other_segment(call, backend)):
        other = compare.results_of(call, op)
    exact = compare.is_exact(call)
    for name, result in got.items():
        if not _agree(result, other[name], exact and name in compare.FORWARD):
            found.append(f"{name} depends on where time is cut")
    if bits is not None and exact and bits() != digest(call, backend):
        found.append("the forward pass depends on the instruction set")
    return found


def digest(call: Call, backend: str) -> str:
    """A hash of the values of the forward pass."""
    found = hashlib.sha256()
    for result in getattr(mk, call.cell)(**call.tensors, **call.settings, backend=backend):
        values = torch.view_as_real(result) if result.is_complex() else result
        found.update(_bytes(values + 0.0).cpu().numpy())  # -0 + 0 is 0: signs do not count
    return found.hexdigest()


def _sample(call: Call, got: Results, op: Callable[..., tuple[Tensor, ...]]) -> tuple[Call, Results]:
    """A part of a call on the CPU, small enough for the reference, and the op's results for it.

    Of a long scan, the part has two batches of sequences: the first steps, and the last steps. The results are those of
    the call, except what depends on steps that the part lacks: the final state and the gradients of the first steps,
    and the gradients per channel and of states. The op computes these from the part.
    """
    assert not call.settings.get("reverse"), "the parts of a long scan are those of a forward one"
    batch, steps, size = call.stream.shape
    channels = torch.linspace(0, size - 1, min(_CHANNELS, size), dtype=torch.float64).long()
    if steps <= _STEPS:
        part = _mapped(call, lambda t: t[..., channels.to(t.device)])
        return part.to("cpu"), {name: t[..., channels] for name, t in got.items()}
    first, last = slice(_STEPS), slice(steps - _STEPS, steps)
    before = {name: t[:, :-_STEPS] if t.dim() == 3 else t for name, t in call.tensors.items()}
    with torch.no_grad():
        state = op(**before, **call.settings)[1]

    def ends(t: Tensor) -> Tensor:
        return torch.cat([t[:, first], t[:, last]]) if t.dim() == 3 else t.repeat(2, 1) if t.dim() == 2 else t

    both = _mapped(call, ends)  # with all channels: kernels may compute the last ones in another way
    both = replace(both, tensors=both.tensors | {"initial_state": torch.cat([torch.zeros_like(state), state])})
    results = compare.results_of(both, op)
    results["h"] = ends(got["h"])
    results["final_state"][batch:] = got["final_state"]
    for name, t in call.tensors.items():
        if t.dim() == 3:
            results[name][batch:] = got[name][:, last]
    part = _mapped(both, lambda t: t[..., channels.to(t.device)])
    return part.to("cpu"), {name: t[..., channels] for name, t in results.items()}


def _mapped(call: Call, f: Callable[[Tensor], Tensor]) -> Call:
    """The call with `f` applied to its tensors and to the gradients of its results."""
    tensors = {name: f(t) for name, t in call.tensors.items()}
    return replace(call, tensors=tensors, grad_h=f(call.grad_h), grad_final=f(call.grad_final))


def _other_segment(call: Call, backend: str) -> int:
    """A segment size that the backend does not choose: 0, for no cut, if it cuts the call, else the smallest."""
    batch, steps, channels = call.stream.shape
    sizes = (batch, batch * steps, channels, call.stream.itemsize, call.stream.device)
    return 0 if TABLE[backend].module.segment(*sizes) else CHUNK


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(t: Tensor) -> Tensor:
    """The bytes of a tensor in uint8. A dimension of size 1 may have any stride in it, also if it is contiguous."""
    return t.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _agree(result: Tensor, other: Tensor, exact: bool) -> bool:
    """Whether two results are equal. If they are not exact, each block of them may differ by a limit.

    The limit is a share of the norm of the block. This norm counts as at least that of a block of the RMS of the whole
    result, because sums that cancel leave small numbers with errors of large terms.
    """
    if exact or torch.equal(result, other):
        return errors.same_values(result, other)
    limit = max(errors.LIMITS[result.dtype], _CANCELLATION * errors.LIMITS[errors.state_dtype(result.dtype)])
    (difference, counts), (size, _) = (_squares(t) for t in (result - other, other))
    floor = size.sum() / other.numel() * counts
    return bool((difference <= limit**2 * torch.maximum(size, floor)).all())  # a NaN is a fault too


def _squares(t: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of squares over blocks, and the number of elements in each block.

    The blocks of `[B, T, D]` are those of `_BLOCK` steps of a sequence: `[B, blocks]` and `[blocks]`. The last may be
    shorter. A tensor without time is one block: two tensors without dimensions.
    """
    if t.dim() < 3:
        return torch.linalg.vector_norm(errors.wide(t)).square(), torch.tensor(t.numel())
    steps = torch.linalg.vector_norm(errors.wide(t), dim=2).square()

    def summed(x: Tensor) -> Tensor:
        return F.pad(x, (0, -x.shape[-1] % _BLOCK)).unflatten(-1, (-1, _BLOCK)).sum(-1)

    return summed(steps), summed(torch.full(t.shape[1:2], t.shape[2]))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """A context in which torch has `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
