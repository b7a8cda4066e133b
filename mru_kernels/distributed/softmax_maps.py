"""Maps of the softmax recurrence: how the states of a sequence and their gradients pass through the segments.

States compose in float64, whose errors are below those of a state in float32 with its weight in two numbers. A state in
float64 loses z, about 1e-16 of Z.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..softmax import join_state, split_state
from .ranks import Ranks


class SoftmaxMaps:
    """The maps of the segments of all ranks.

    Args:
        order: the ranks, in the order in which the state passes through their segments.
        messages: `[ranks, N, D + 4 H]`, the map of each segment as `message` returns it.
    """

    def __init__(self, ranks: Ranks, order: list[int], messages: Tensor) -> None:
        self.ranks, self.order, self._messages = ranks, order, messages
        # Of each place in the order after this rank's: the share of the past in the weight after it, and the mean
        # before it less the mean after it.
        self._past_share: dict[int, Tensor] = {}
        self._mean_change: dict[int, Tensor] = {}

    @staticmethod
    def message(map_: Sequence[Tensor]) -> Tensor:
        """The state `[N, D + 2 H]` and the decay `[N, 2 H]` of a map as one tensor."""
        return torch.cat(list(map_), -1)

    def forward(self, state: Tensor, run: Callable[[Tensor], tuple[Any, Tensor]]) -> tuple[Any, Tensor]:
        """Run this rank's segment; return its result and the final state `[N, D + 2 H]` of the last segment.

        Args:
            state: `[N, D + 2 H]`, enters the first segment.
            run: a function of the state that enters a segment; it returns a result and the state that leaves it.
        """
        entries = self._compose(state)
        result, states = self._run(run, entries[self.order.index(self.ranks.rank)])
        return result, states[self.order[-1]]

    def backward(
        self, graph: tuple[Tensor, Tensor, Tensor], grads: tuple[Tensor, Tensor],
        run: Callable[[Tensor], tuple[Any, Tensor]],
    ) -> tuple[Any, Tensor]:  # fmt: skip
        """Run the gradient of this rank's segment; return its result and the gradient of the state of the first one.

        Args:
            graph: the state that entered this rank's segment, its output and the state that left it.
            grads: of this rank's output, and of the final state of the whole sequence.
            run: a function of the gradient of the state that leaves a segment; it returns a result and the gradient of
                the state that enters the segment.
        """
        (entry, y, _), (grad_y, grad_final) = graph, grads
        channels, heads = self._sizes(entry)
        sent = channels + heads  # the gradient of z is that of Z or has no effect

        def own() -> Tensor:
            (of_entry,) = torch.autograd.grad(y, entry, grad_y, retain_graph=True)
            return torch.stack([of_entry[:, :sent], grad_final[:, :sent]])

        every = self.ranks.gather(own, grad_final[:, :sent].expand(2, -1, -1)).double()
        of_mean, of_log = _by_head(every[:, 1].sum(0), channels, heads)
        place = self.order.index(self.ranks.rank)
        for later in range(len(self.order) - 1, place, -1):
            mean, log = _by_head(every[self.order[later], 0], channels, heads)
            share, change = self._past_share[later], self._mean_change[later]
            of_log = share * (of_log + (of_mean * change).sum(-1, keepdim=True)) + log
            of_mean = share * of_mean + mean
        of_final = join_state(of_mean.flatten(1), of_log.squeeze(-1), torch.zeros_like(of_log.squeeze(-1)))
        result, states = self._run(run, of_final.to(entry.dtype))
        return result, states[self.order[0]]

    def _run(self, run: Callable[[Tensor], tuple[Any, Tensor]], entry: Tensor) -> tuple[Any, Tensor]:
        """The result of `run` on this rank, and the states that leave the segments of all ranks."""
        result = None

        def left() -> Tensor:
            nonlocal result
            result, after = run(entry)
            return after

        states = self.ranks.gather(left, entry)
        return result, states

    def _compose(self, state: Tensor) -> list[Tensor]:
        """The states that enter the segments, in their order."""
        channels, heads = self._sizes(state)
        mean, log = _read(state, channels, heads)
        entries = [state]
        own_place = self.order.index(self.ranks.rank)
        for place, rank in enumerate(self.order):
            own_state, decay = self._messages[rank].split([channels + 2 * heads, 2 * heads], -1)
            own_mean, own = _read(own_state, channels, heads)
            past = log + decay.double().unflatten(-1, (2, heads)).sum(1).unsqueeze(-1)
            gap = torch.where(own == -torch.inf, -torch.inf, own - past)
            newer = gap > 0
            larger, smaller = torch.where(newer, own_mean, mean), torch.where(newer, mean, own_mean)
            after = larger + torch.sigmoid(-gap.abs()) * (smaller - larger)  # exact where a share is 0
            if place > own_place:
                self._past_share[place], self._mean_change[place] = torch.sigmoid(-gap), mean - after
            mean, log = after, torch.logaddexp(past, own)
            entries.append(_write(mean, log, state.dtype))
        return entries

    def _sizes(self, state: Tensor) -> tuple[int, int]:
        """The channels D and the heads H, from the numbers of columns of a state and of a message."""
        heads = (self._messages.shape[-1] - state.shape[-1]) // 2
        return state.shape[-1] - 2 * heads, heads


def _by_head(columns: Tensor, channels: int, heads: int) -> tuple[Tensor, Tensor]:
    """The mean `[N, H, G]` and the log `[N, H, 1]` from `[N, D + H]`, or gradients of them."""
    mean, log = columns.split([channels, heads], -1)
    return mean.unflatten(-1, (heads, channels // heads if heads else 0)), log.unsqueeze(-1)


def _read(state: Tensor, channels: int, heads: int) -> tuple[Tensor, Tensor]:
    """The mean `[N, H, G]` and the log of the weight `[N, H, 1]` in float64."""
    mean, high, low = split_state(state.double(), heads)
    return _by_head(torch.cat([mean, high + low], -1), channels, heads)


def _write(mean: Tensor, log: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `_read`: states of `dtype`."""
    high = log.squeeze(-1).to(dtype)
    low = torch.where(high.isfinite(), log.squeeze(-1) - high, 0.0)
    return join_state(mean.flatten(1).to(dtype), high, low.to(dtype))
