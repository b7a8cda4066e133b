"""Scans of the segments of all ranks: from states composed of the segments' maps, and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .. import checks, ops
from .. import torch_private as private
from ..softmax.state import SegmentMap
from .ranks import CollectiveCall, Ranks
from .softmax_maps import SoftmaxMaps

Scan = Callable[..., tuple[Tensor, Tensor]]


def scan_over_ranks(
    call: CollectiveCall, what: str, scan: Scan, inputs: list[Tensor], initial_state: Tensor | None,
    cu_seqlens: Tensor | None, reverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scan this rank's segment: its output `[B, T_rank, D]`, and the final state `[N, D]` of the whole sequence.

    Args:
        what: a description of the scan, which must be the same on every rank.
        scan: `scan(inputs, initial_state, cu_seqlens)`, the scan of one segment.
        inputs: streams, this rank's segment `[B, T_rank, D]` of each, and per-channel inputs `[D]`.
        initial_state: `[N, D]`, that of the whole sequence.
        cu_seqlens: `[N + 1]`, offsets in the whole sequence.
    """
    tensors = inputs if initial_state is None else [*inputs, initial_state]
    if any(map(private.has_tangent, tensors)):
        raise NotImplementedError("sequence_parallel: there is no forward-mode derivative (jvp, jacfwd, hessian)")
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    with torch.no_grad():  # a scan of 0 steps checks the arguments and gives the state dtype and the kind of map
        no_steps = [t[:, :0] if t.dim() == 3 else t for t in inputs]
        nowhere = None if cu_seqlens is None else torch.zeros_like(cu_seqlens)
        state = scan(no_steps, initial_state, nowhere)[1]
        with ops.as_maps():
            none = scan(no_steps, None, nowhere)
    kind: Any = SoftmaxMaps if isinstance(none, SegmentMap) else _AffineMaps
    time = next((t.shape[1] for t in inputs if t.dim() == 3), 0)
    ranks = call.ranks
    with call.agreed(f"{what}{', with gradients' if differentiated else ''}", time) as times:
        order = list(range(len(times)))[:: -1 if reverse else 1]
        offsets = cu_seqlens

        def own_map() -> Tensor:
            nonlocal offsets
            if cu_seqlens is not None:
                offsets = _offsets_of_segment(cu_seqlens, times, ranks.rank)
            with ops.as_maps():
                return kind.message(scan(inputs, None, offsets))

        with torch.no_grad():
            maps = kind(ranks, order, ranks.gather(own_map, kind.message(none)))
            if not differentiated:
                h, final = maps.forward(state, lambda entry: scan(inputs, entry, offsets))
                return h, final
        if initial_state is not None:
            state = initial_state.to(state.dtype)
        return _Segment.apply(call, what, maps, lambda leaves, entry: scan(leaves, entry, offsets), *inputs, state)


def _offsets_of_segment(cu_seqlens: Tensor, times: list[int], rank: int) -> Tensor:
    """`cu_seqlens [N + 1]` clipped to the segment of `rank`; a sequence may be empty there."""
    checks.offsets(cu_seqlens, sum(times))
    return (cu_seqlens - sum(times[:rank])).clamp(0, times[rank])


class _AffineMaps:
    """The affine maps of the segments of all ranks, `[ranks, 2, N, D]`. `SoftmaxMaps` describes the methods."""

    def __init__(self, ranks: Ranks, order: list[int], messages: Tensor) -> None:
        self.ranks, self.order, self._messages = ranks, order, messages

    @staticmethod
    def message(factor_and_offset: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(factor_and_offset))

    def forward(self, state: Tensor, run: Callable[[Tensor], tuple[Any, Tensor]]) -> tuple[Any, Tensor]:
        return _chain(self.ranks, self.order, self._messages, state, run)

    def backward(
        self, graph: tuple[Tensor, Tensor, Tensor], grads: tuple[Tensor, Tensor],
        run: Callable[[Tensor], tuple[Any, Tensor]],
    ) -> tuple[Any, Tensor]:  # fmt: skip
        (entry, h, final), (grad_h, grad_final) = graph, grads
        composes = bool(self._messages.any())  # all are 0 where steps do not compose

        def own_map() -> Tensor:
            (adjoint,) = torch.autograd.grad(h, entry, grad_h, retain_graph=True)
            if composes:
                return torch.stack([adjoint, grad_final])
            (factor,) = torch.autograd.grad(final, entry, torch.ones_like(final), retain_graph=True)
            return torch.stack([adjoint, grad_final, factor])

        every = self.ranks.gather(own_map, grad_final.expand(2 + (not composes), *grad_final.shape))
        of_final = every[0, 1]
        for grad in every[1:, 1]:
            of_final = of_final + grad
        factors = self._messages[:, 0].conj() if composes else every[:, 2]
        maps = torch.stack([factors, every[:, 0]], 1)
        return _chain(self.ranks, self.order[::-1], maps, of_final, run)


def _chain(
    ranks: Ranks, order: list[int], maps: Tensor, state: Tensor, run: Callable[[Tensor], tuple[Any, Tensor]]
) -> tuple[Any, Tensor]:
    """Run this rank's segment; return its result and the final state `[N, D]` of the last segment.

    All segments run at once, from composed states. Where a state that leaves a segment differs from the one that
    entered the next, the segments run again, one after another.

    Args:
        order: the ranks, in the order in which the state passes through their segments.
        maps: `[ranks, 2, N, D]`, the factor `a` and the offset `b` of the map `s -> a s + b` of each segment.
        state: `[N, D]`, enters the first segment.
        run: a function of the state that enters a segment; it returns a result and the state that leaves the segment.
    """
    entries = [state]
    for rank in order:
        a, b = maps[rank]
        entries.append(a * entries[-1] + b)
    place = order.index(ranks.rank)
    result, left = None, state

    def run_from(entry: Tensor) -> Tensor:
        nonlocal result, left
        result, left = run(entry)
        return left

    def run_and_check() -> Tensor:
        entry, following = entries[place : place + 2]
        differs = ~_consistent(run_from(entry), following, maps[ranks.rank, 0], maps[ranks.rank, 1], entry)
        if place == len(order) - 1:
            differs = torch.zeros_like(differs)  # no segment follows
        return torch.cat([left.flatten(), differs.to(left.dtype).reshape(1)])

    every = ranks.gather(run_and_check, state.new_empty(state.numel() + 1))
    states = every[:, :-1].reshape(len(order), *state.shape)
    if every[:, -1].any():
        for before, rank in pairwise(order):
            entry = states[before]
            states = ranks.gather(partial(run_from, entry) if rank == ranks.rank else lambda: left, state)
    return result, states[order[-1]]


def _consistent(left: Tensor, following: Tensor, a: Tensor, b: Tensor, entry: Tensor) -> Tensor:
    """Whether the states `left` that left a segment equal the composed states `following`; a 0-dim bool tensor.

    The bound is looser than that of csrc/maps/cut.h, which knows the size of recent states. States that cancellation
    leaves small are mostly rounding errors, and after a false alarm ranks scan one after another. A factor that may
    have underflowed has few correct bits, so its bound is tight.
    """
    share = torch.where(_magnitude(a) < 2.0**-62, 2.0**-16, 0.5)
    bound = (_magnitude(a * entry) + _magnitude(b)) * share
    near = (_magnitude(left - following) <= bound) & bound.isfinite()
    return (near | (left == following) | (left.isnan() & following.isnan())).all()


def _magnitude(t: Tensor) -> Tensor:
    return torch.view_as_real(t).abs().sum(-1) if t.is_complex() else t.abs()


class _Segment(torch.autograd.Function):
    """The scan of a rank's segment; the gradients use the adjoint that enters from the segment that follows."""

    @staticmethod
    def forward(ctx, call: CollectiveCall, what: str, maps: _AffineMaps | SoftmaxMaps, scan: Scan, *tensors: Tensor):
        *inputs, state = tensors
        needs = ctx.needs_input_grad[-len(tensors) :]
        leaves = [t.detach().requires_grad_(need) for t, need in zip(inputs, needs, strict=False)]

        def run(entry: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
            entry = entry.detach().requires_grad_()
            with torch.enable_grad():
                h, final = scan(leaves, entry)
            return (entry, h, final), final.detach()

        graph, last = maps.forward(state, run)
        ctx.graph, ctx.maps = (leaves, graph), maps
        ctx.name, ctx.what = f"backward pass of {call.name}", what
        h = graph[1]
        return h.detach(), last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_h: Tensor, grad_final: Tensor):
        maps = ctx.maps
        with CollectiveCall(maps.ranks, scans=1, name=ctx.name) as call:
            if ctx.graph is None:
                raise RuntimeError("sequence_parallel: a second backward pass through the same call; it keeps no graph")
            (leaves, graph), ctx.graph = ctx.graph, None
            entry, h, final = graph
            wanted = [leaf for leaf in leaves if leaf.requires_grad]

            def run(of_final: Tensor) -> tuple[list[Tensor], Tensor]:
                ends = (grad_h, of_final)
                *grads, adjoint = torch.autograd.grad((h, final), [*wanted, entry], ends, retain_graph=True)
                return grads, adjoint

            with call.agreed(ctx.what, 0):
                grads, of_state = maps.backward(graph, (grad_h, grad_final), run)
        given = iter(grads)
        if maps.ranks.rank != maps.order[0]:
            of_state = torch.zeros_like(of_state)  # the first rank returns the whole gradient, so the sum is right
        return *[None] * 4, *(next(given) if leaf.requires_grad else None for leaf in leaves), of_state
