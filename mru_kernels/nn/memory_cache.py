"""A cache of the values that a unit has at the ends of segments of time (Memory Caching, arXiv 2602.24281)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from .. import checks
from ..scalars import has_value
from .arguments import check_choice, check_sizes, check_state, check_state_shapes, constructor
from .base import MRUBase
from .wrappers import fx_node

MODES = ("gated", "residual", "sparse", "average")


class MemoryCache(torch.nn.Module):
    """A unit that also reads the values it had at the ends of all past segments (Memory Caching, arXiv 2602.24281).

    Time is cut into segments of C steps. The cache `c_i [B, D]` of segment i is the unit's value after its last step,
    and `mean_i [B, E]` is the mean of the unit's inputs x over the segment. Let step t be in segment n, let h_t be the
    unit's output, and let now_t be the mean of x over the steps of segment n up to t. Then::

        residual    y_t = h_t + sum_{i<n} c_i
        average     y_t = (h_t + sum_{i<n} c_i) / (n + 1)
        gated       y_t = gamma_0 h_t + sum_{i<n} gamma_{i+1} c_i
                    gamma = softmax(<u_t, now_t> + b, <u_t, mean_0>, ..., <u_t, mean_{n-1}>)        u_t = W_u x_t
        sparse      as gated, with only the `top_k` past segments of the largest <u_t, mean_i>

    No step reads a later step: now_t is not the mean of the whole segment. In segment 0, y = h. The value of a unit is
    its output, without the skip connection of an LRU. In the modes gated and sparse, W_u `[E, E]` and b `[1]` are
    trained. Initially W_u is normal with standard deviation 0.02 and b is log 9, so that gamma_0 is near 0.9 with one
    cache and near 9 / (9 + n) with n.

    A call takes O(T N (E + D)) operations for N segments in the modes gated and sparse. Their state grows by D + E
    numbers per segment and sequence, so the memory of `mru_kernels.stream` grows with time. In the modes residual and
    average the state has a constant size. A NaN in a cache makes its channel NaN in all later segments, whether or not
    they select the cache. In the modes gated and sparse an infinite value does the same.

    Args:
        unit: a unit of this package with one layer and one direction.
        segment: number of steps C of a segment.
        mode: "gated", "residual", "sparse" or "average".
        top_k: number of past segments that a step reads, with `mode="sparse"` only.
        restart: whether the unit begins every segment from its own initial state, so that a cache summarises its
            segment alone. Otherwise the state continues, and a cache contains the whole past up to its step.

    Call:
        `output, state = module(input, state=None)`

        input: `[B, T, E]`, or `[T, B, E]` for a unit without `batch_first`, in a dtype that the unit accepts.
        output: `[B, T, D]`, or `[T, B, D]`, in the dtype of the unit's output.
        state: a tuple of tensors, each with the batch first. A call with the returned state continues the sequences.
            None begins new ones.

            - the unit's state, `[B, D]` for most units
            - the number of steps so far, int64 `[B]` on the CPU, the same for all sequences
            - in the modes gated and sparse: the sum of x over the open segment `[B, E]`, the caches `[B, N, D]` and the
              means `[B, N, E]`
            - in the modes residual and average: the sum of the caches `[B, D]`

            Sums and means are float32, or float64 for a float64 input.

        `step(input, state=None)` runs one step, for streaming.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Example::

        >>> unit = mk.MemoryCache(mk.MinGRU(3, 8), segment=4)
        >>> output, state = unit(torch.randn(2, 10, 3))
        >>> output.shape, [tuple(t.shape) for t in state]
        (torch.Size([2, 10, 8]), [(2, 8), (2,), (2, 3), (2, 2, 8), (2, 2, 3)])
    """

    @constructor
    def __init__(
        self,
        unit: MRUBase,
        segment: int = 256,
        *,
        mode: str = "gated",
        top_k: int | None = None,
        restart: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(unit, MRUBase):
            raise TypeError(f"unit: expected a recurrent module of this package, got {type(unit).__name__}")
        if unit.num_layers != 1 or unit.bidirectional:
            raise ValueError(
                f"unit: expected one layer and one direction, got num_layers={unit.num_layers},"
                f" bidirectional={unit.bidirectional}"
            )
        check_sizes(segment=segment)
        check_choice("mode", mode, MODES)
        if (top_k is None) == (mode == "sparse"):
            raise ValueError(f'top_k: expected an int with mode="sparse", else None, got {top_k} with mode={mode!r}')
        if top_k is not None:
            check_sizes(top_k=top_k)
        self.unit = unit
        self.segment = segment
        self.mode = mode
        self.top_k = top_k
        self.restart = checks.flag("restart", restart)
        self.query: torch.nn.Linear | None = None
        if mode in ("gated", "sparse"):
            first = next(unit.parameters())
            where: dict[str, Any] = {"device": first.device, "dtype": first.dtype}
            self.query = torch.nn.Linear(unit.input_size, unit.input_size, bias=False, **where)
            self.now_bias = torch.nn.Parameter(torch.empty(1, **where))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw W_u and b as the class describes. The unit stays as it is."""
        if self.query is not None:
            self.query.weight.normal_(std=0.02)
            self.now_bias.fill_(math.log(9.0))

    def extra_repr(self) -> str:
        top_k = "" if self.top_k is None else f", top_k={self.top_k}"
        return f"segment={self.segment}, mode={self.mode!r}{top_k}" + ", restart=True" * self.restart

    @property
    def batch_first(self) -> bool:
        return self.unit.batch_first

    @property
    def num_states(self) -> int:
        """Number of tensors of the state."""
        return 3 if self.query is None else 5

    def forward(self, input: Tensor, state: Sequence[Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run the unit and read its caches; the class describes the arguments, results and errors."""
        if isinstance(input, Proxy):
            return fx_node(self, input, state)
        order = "[batch, time, features]" if self.batch_first else "[time, batch, features]"
        checks.tensor("input", input, 3, order)
        x = input if self.batch_first else input.transpose(0, 1)
        steps, hx, kept = self._given(state, x)
        span = _Span(steps, x.shape[1], self.segment)
        scan = _Boundaries(self.unit, span, self.restart)
        if hx is not None:
            hx = None if self.restart and span.offset == 0 else hx.unsqueeze(0)
        output, final = self.unit(input, hx, _parallel=scan)
        h = output if self.batch_first else output.transpose(0, 1)
        read = self._summed if self.query is None else self._gated
        y, new = read(x, h, scan.values, span, *kept)
        after = torch.full((x.shape[0],), steps + x.shape[1], dtype=torch.int64, device="cpu")
        return (y if self.batch_first else y.transpose(0, 1)), (final.squeeze(0), after, *new)

    @torch.no_grad()
    def step(self, input: Tensor, state: Sequence[Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One step of `forward`, for streaming inference, without gradients.

        Args:
            input: `[B, E]`.
            state: as for `forward`.

        Returns:
            The output `[B, D]` and the state after the step.

        Raises:
            TypeError, ValueError: as `forward`.
        """
        checks.tensor("input", input, 2, "[batch, features]")
        time = 1 if self.batch_first else 0
        output, after = self(input.unsqueeze(time), state)
        return output.squeeze(time), after

    # ------------------------------------------------------------------------------------------------ reading

    def _summed(
        self, x: Tensor, h: Tensor, values: Tensor, span: _Span, total: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The modes residual and average: the output `[B, T, D]` and the sum of all caches `[B, D]`."""
        values = values.to(checks.state_dtype(values.dtype))
        if total is None:
            total = values.new_zeros(values.shape[0], values.shape[2])
        totals = torch.cat([total.unsqueeze(1), values], 1).cumsum(1)
        y = h + span.spread(totals)
        if self.mode == "average":
            y = y / (span.past(x.device) + 1).unsqueeze(1)
        return y.to(h.dtype), (totals[:, -1].clone(),)

    def _gated(
        self,
        x: Tensor,
        h: Tensor,
        values: Tensor,
        span: _Span,
        total: Tensor | None = None,
        caches: Tensor | None = None,
        means: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """The modes gated and sparse: the output `[B, T, D]`, and the sum of x, the caches and the means."""
        assert self.query is not None
        sums = span.sums(x.to(checks.state_dtype(x.dtype)), total)
        u = self.query(x)
        now = (u * (sums / span.counts(x.device).unsqueeze(1))).sum(-1, keepdim=True) + self.now_bias
        caches = _appended(caches, values)
        means = _appended(means, sums[:, span.first_end :: self.segment] / self.segment)
        scores = u @ means.to(u.dtype).transpose(1, 2)
        future = torch.arange(means.shape[1], device=x.device) >= span.past(x.device).unsqueeze(1)
        scores = scores.masked_fill(future, -math.inf)
        if self.mode == "sparse":
            chosen = scores.detach().sort(stable=True, dim=-1, descending=True).indices[..., : self.top_k]
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).scatter(-1, chosen, 0), -math.inf)
        gamma = torch.cat([now, scores.to(now.dtype)], -1).softmax(-1).to(h.dtype)
        # Masked weights are 0, and 0 times NaN is NaN: a NaN would reach earlier segments. So the product reads 0 for
        # values that are not finite, and `bad` makes their channel NaN in the segments after them.
        y = gamma[..., :1] * h + gamma[..., 1:] @ torch.where(caches.isfinite(), caches, 0.0)
        bad = 0.0 * caches.detach()
        before = bad.shape[1] - values.shape[1]
        bad = torch.cat([bad[:, :before].sum(1, keepdim=True), bad[:, before:]], 1).cumsum(1)
        if span.complete:
            total = sums.new_zeros(x.shape[0], x.shape[2])
        elif span.steps:
            total = sums[:, -1].clone()
        return y + span.spread(bad), (total, caches, means)

    # ------------------------------------------------------------------------------------------------ checks

    def _given(self, state: Sequence[Tensor] | None, x: Tensor) -> tuple[int, Tensor | None, list[Tensor]]:
        """The number of steps so far, the unit's state and the other tensors of `state`, all of them checked."""
        if state is None:
            return 0, None, []
        check_state(state, self.num_states)
        if x.shape[0] == 0:  # no sequence has a number of steps
            return 0, None, []
        hx, position, *kept = state
        batch, features, channels = x.shape[0], self.unit.input_size, self.unit.hidden_size
        check_state_shapes([position], [(batch,)], position.device, first=1)
        if not has_value(position):
            raise ValueError(
                "state: expected a number of steps on the CPU for tensor 1, got a meta or fake tensor, without values"
            )
        numbers = set(position.tolist())
        if position.dtype != torch.int64 or len(numbers) != 1 or not 0 <= min(numbers) < 2**62:
            raise ValueError(
                "state: expected one number of steps for all sequences, int64, for tensor 1, got"
                f" {sorted(numbers)} of {position.dtype}"
            )
        steps = numbers.pop()
        segments = steps // self.segment
        shapes: list[tuple[int, ...]] = [(batch, channels)]
        if self.query is not None:
            shapes = [(batch, features), (batch, segments, channels), (batch, segments, features)]
        check_state_shapes([hx], [(batch, self.unit._columns)], x.device)
        check_state_shapes(kept, shapes, x.device, first=2)
        return steps, hx, kept


class _Span:
    """The steps of one call, cut into pieces: the rest of the open segment, whole segments, and a tail."""

    def __init__(self, before: int, steps: int, segment: int) -> None:
        self.before, self.steps, self.segment = before, steps, segment
        self.offset = before % segment
        self.first_end = segment - 1 - self.offset  # the step of this call that ends its first segment
        self.head = min(self.first_end + 1, steps)
        self.whole = (steps - self.head) // segment
        self.tail = steps - self.head - self.whole * segment
        self.complete = (before + steps) % segment == 0

    def past(self, device: torch.device) -> Tensor:
        """The number of segments that ended before each step, `[T]`."""
        return torch.arange(self.before, self.before + self.steps, device=device) // self.segment

    def counts(self, device: torch.device) -> Tensor:
        """The number of steps in the segment of each step, up to that step, `[T]`."""
        return torch.arange(self.before, self.before + self.steps, device=device) % self.segment + 1

    def starts(self) -> list[int]:
        """The first step of each piece."""
        pieces = self.whole + (1 if self.tail else 0)  # a `range` up to `steps` would fix T in an exported program
        return [0, *(self.head + i * self.segment for i in range(pieces))]

    def spread(self, rows: Tensor) -> Tensor:
        """One row for each piece, `[B, pieces or more, D]`, repeated for each of its steps: `[B, T, D]`."""
        whole = rows[:, 1 : 1 + self.whole].unsqueeze(2).expand(-1, -1, self.segment, -1).flatten(1, 2)
        last = rows[:, 1 + self.whole : 2 + self.whole].expand(-1, self.tail, -1) if self.tail else rows[:, :0]
        return torch.cat([rows[:, :1].expand(-1, self.head, -1), whole, last], 1)

    def sums(self, x: Tensor, total: Tensor | None) -> Tensor:
        """For each step the sum of `x [B, T, E]` over its segment up to the step, `[B, T, E]`.

        `total [B, E]` is the sum over the steps of the open segment before the call.
        """
        first = x[:, : self.head].cumsum(1)
        if total is not None:
            first = first + total.unsqueeze(1)
        head, end = self.head, self.steps - self.tail
        whole = x[:, head:end].unflatten(1, (self.whole, self.segment)).cumsum(2).flatten(1, 2)
        return torch.cat([first, whole, x[:, end:].cumsum(1)], 1)


class _Boundaries:
    """The argument `_parallel` of a unit's forward pass: runs the unit's scan and records values at ends of segments.

    Attributes:
        values: the unit's values after the last step of each segment that ends in the call, `[B, N, D]`.
    """

    def __init__(self, unit: MRUBase, span: _Span, restart: bool) -> None:
        self._unit, self._span, self._restart = unit, span, restart
        self._parameters: dict[str, Tensor] = {}
        self.values = torch.empty(0, device="cpu")

    def parameters(self, parameters: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        (self._parameters,) = parameters
        return parameters

    def scan(self, scan: Any, gates: Tensor, initial_state: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
        if self._restart and len(self._span.starts()) > 1:
            h, final = self._restarted(scan, gates, initial_state, **options)
        else:
            h, final = scan(gates, initial_state, **options)
        ends = h[:, self._span.first_end :: self._span.segment].clone()  # a view would keep `h` in memory
        no_input = gates.new_zeros(*ends.shape[:2], self._unit.input_size)
        self.values = self._unit._output(ends, no_input, self._parameters)
        return h, final

    def _restarted(self, scan: Any, gates: Tensor, initial_state: Tensor | None, **options: Any) -> Any:
        """Scan the pieces of each sequence as sequences of their own, packed along time."""
        batch, steps, _ = gates.shape
        starts = torch.tensor(self._span.starts(), device=gates.device)
        pieces = len(starts)
        offsets = (torch.arange(batch, device=gates.device).unsqueeze(1) * steps + starts).flatten()
        options["cu_seqlens"] = torch.cat([offsets, torch.full((1,), batch * steps, device=gates.device)])
        if initial_state is not None:
            fresh = self._unit._initial_state(None, batch * (pieces - 1), self._parameters)
            if fresh is None:
                start = self._unit._start(self._parameters)
                start = initial_state.new_zeros(initial_state.shape[1]) if start is None else start
                fresh = start.to(initial_state.dtype).expand(batch * (pieces - 1), -1)
            fresh = fresh.unflatten(0, (batch, pieces - 1))
            with checks.without_autocast(gates.device):  # `cat` refuses the half precision that is not its own
                initial_state = torch.cat([initial_state.unsqueeze(1), fresh], 1).flatten(0, 1)
        h, final = scan(gates.reshape(1, batch * steps, gates.shape[2]), initial_state, **options)
        return h.unflatten(1, (batch, steps)).squeeze(0), final.unflatten(0, (batch, pieces))[:, -1].clone()


def _appended(before: Tensor | None, new: Tensor) -> Tensor:
    """`before` and `new`, joined along dimension 1; `before` itself if `new` has no rows."""
    if before is None:
        return new
    if before.dtype != new.dtype:
        raise TypeError(f"state: expected caches and means of dtype {new.dtype}, got {before.dtype}")
    return torch.cat([before, new], 1) if new.shape[1] else before
