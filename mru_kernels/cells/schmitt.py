"""The first-quadrant bistable memory recurrent unit, a Schmitt trigger (arXiv 2605.15216)."""

from __future__ import annotations

from torch import Tensor

from .. import backends, ops
from ..scalars import EPSILON, SURROGATE_SCALE
from . import write_or_hold
from .call import call, step


def _gates(x, p):
    candidate, low, high, _alpha = x
    at_least_low, at_least_high = (write_or_hold.unit_step(candidate, edge, p[1]) for edge in (low, high))
    return write_or_hold.gates(1 - at_least_low * (1 - at_least_high), at_least_high, x)


CELL = ops.add_cell(
    ops.Cell(
        name="schmitt",
        inputs=(
            ops.Input("candidate"),
            ops.Input("low", "channel"),
            ops.Input("high", "channel"),
            ops.Input("alpha", "channel", optional=True),
        ),
        scalars=(EPSILON, SURROGATE_SCALE),
        codes=True,
        plain=ops.Plain(write_or_hold.step, _gates, write_or_hold.output),
    )
)


def schmitt(
    candidate: Tensor,
    low: Tensor,
    high: Tensor,
    initial_state: Tensor | None = None,
    *,
    epsilon: float | Tensor = 0.0,
    alpha: Tensor | None = None,
    surrogate_scale: float = 1.0,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: Tensor | None = None,
    chunk_size: int | None = backends.CHUNK,
    return_boundaries: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Scan a first-quadrant bistable memory recurrent unit over time (arXiv 2605.15216).

    Each channel is a Schmitt trigger: it writes 1 if its candidate reaches `high`, 0 if the candidate is below `low`,
    and keeps its state in between::

        L_t = H(candidate_t - low)    U_t = H(candidate_t - high)    hold_t = L_t (1 - U_t)
        s_t = hold_t s_{t-1} + (1 - hold_t) (U_t + epsilon s_{t-1})
        h_t = alpha s_t

    In gradients and in forward mode the derivative of H is the arctangent surrogate `k / (1 + (pi k x)^2)`. `epsilon`
    has no derivative.

    Args:
        candidate: `[B, T, D]`; float32, float64, bfloat16 or float16. Strides over B and T may be any.
        low, high: `[D]`, in the candidate's dtype or float32. Usually `high >= low`; the formulas hold in any case.
        initial_state: `[B, D]` (`[N, D]` with `cu_seqlens`), the state before the first step scanned, in the
            candidate's or the state dtype; zeros if None.
        epsilon: the share of the old state that a write keeps, in [0, 1]; a float, or a 0-dim CPU tensor, on which
            torch.compile does not specialise.
        alpha: `[D]`, scale of the output; ones if None.
        surrogate_scale: k > 0 of the surrogate derivative, any finite value. Gradients out of range become infinite
            or 0.
        reverse: scan from the last step to the first.
        cu_seqlens: int32 or int64 `[N + 1]`, offsets of N sequences packed along T of streams with B = 1.
        resets: bool `[B, T]` (`[1, total]` with `cu_seqlens`), true where a new episode begins: before that step, in
            scan order, the state becomes `reset_state`.
        reset_state: `[D]`, `[B, D]` or, with `cu_seqlens`, `[N, D]`, in a dtype that `initial_state` may have; zeros if
            None.
        chunk_size: the largest number of steps between two checkpoints, a multiple of 16 that the backend supports.
            Checkpoints are states that the forward pass saves for the backward pass, which recomputes the states
            between them. With None the forward pass saves no state, and the backward pass first scans the whole again.
        return_boundaries: whether to return the state after every `chunk_size` steps too.
        backend: None chooses; a name (see `available_backends`) runs or raises.

    Returns:
        `h [B, T, D]` in the candidate's dtype, and the final state `[B, D]` (`[N, D]`): the raw state s, float64 for
        float64 streams, else float32. Under autocast floating streams are cast to the autocast dtype. `h` is dense
        with unit stride on D, whatever the candidate's strides: as `[T, B, D]` in memory if the candidate has unit
        stride on D and a larger stride over T than over B, else contiguous. The gradient of each stream follows the
        same rule.

        With `return_boundaries` a third result, `[B, floor((T - 1) / chunk_size), D]` in the state dtype: the raw state
        after every `chunk_size` steps, before a reset there. With `cu_seqlens`, the state after k chunks of a sequence
        whose first step has the scan position p is in row `floor(p / chunk_size) + k - 1`; other rows are zeros.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        RuntimeError: the backend cannot run this call.
        NotImplementedError: a second derivative is taken.

    Example::

        >>> candidate = torch.rand(8, 100, 64)
        >>> h, state = mk.schmitt(candidate, torch.full((64,), 0.2), torch.full((64,), 0.8))
        >>> h.shape, state.shape
        (torch.Size([8, 100, 64]), torch.Size([8, 64]))
    """
    return call(
        CELL, (candidate, low, high, alpha), (epsilon, surrogate_scale), initial_state, reverse=reverse,
        cu_seqlens=cu_seqlens, resets=resets, reset_state=reset_state, chunk_size=chunk_size,
        return_boundaries=return_boundaries, backend=backend,
    )  # fmt: skip


def schmitt_step(
    candidate: Tensor,
    low: Tensor,
    high: Tensor,
    state: Tensor,
    *,
    epsilon: float | Tensor = 0.0,
    alpha: Tensor | None = None,
    state_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of `schmitt`, for streaming inference.

    Args:
        candidate: `[B, D]`.
        state: `[B, D]`, the raw state before the step; with `state_indices` slots `[slots, D]`, as for `bmru_step`.
        low, high, epsilon, alpha: as for `schmitt`.
        state_indices: int32 or int64 `[B]`, the slot of each sequence, or -1; see `bmru_step`.

    Returns:
        `h [B, D]` and the state after the step `[B, D]`, equal to `schmitt` with T = 1; with `state_indices` the second
        is `state`, updated in place.

    Raises:
        TypeError, ValueError, RuntimeError: as `schmitt` and `bmru_step`.

    Example::

        >>> state = torch.zeros(8, 64)
        >>> h, state = mk.schmitt_step(torch.rand(8, 64), torch.full((64,), 0.2), torch.full((64,), 0.8), state)
        >>> h.shape
        torch.Size([8, 64])
    """
    return step(CELL, (candidate, low, high, alpha), (epsilon, 1.0), state, state_indices)
