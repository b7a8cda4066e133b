"""minLSTM (arXiv 2410.01201), with its gates in the scan."""

from __future__ import annotations

from torch import Tensor

from .. import backends, ops
from . import min_gates
from .call import call, step

CELL = ops.add_cell(
    ops.Cell(
        name="min_lstm",
        inputs=(ops.Input("candidate"), ops.Input("update"), ops.Input("forget")),
        plain=ops.affine(min_gates.min_lstm, min_gates.min_lstm_vjp),
    )
)


def min_lstm(
    candidate: Tensor,
    update: Tensor,
    forget: Tensor,
    initial_state: Tensor | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: Tensor | None = None,
    chunk_size: int | None = backends.CHUNK,
    return_boundaries: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Scan minLSTM over time.

    ::

        i_t = sigmoid(update_t)        f_t = sigmoid(forget_t)
        g(x) = x + 1/2 for x >= 0, else sigmoid(x)
        h_t = f_t / (f_t + i_t) h_{t-1} + i_t / (f_t + i_t) g(candidate_t)

    The gates are computed in the state dtype, so a decay near 1 does not round to 1 in half precision. Their shares are
    accurate also where i_t and f_t underflow; where both gates are -infinity the state is NaN. There are derivatives of
    any order, in forward and in reverse mode.

    Args:
        candidate, update, forget: `[B, T, D]`; float32, float64, bfloat16 or float16, all the same. Strides over
            B and T may be any.
        initial_state: `[B, D]` (`[N, D]` with `cu_seqlens`), the state before the first step scanned, in the
            candidate's or the state dtype; zeros if None.
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
        `h [B, T, D]` in the candidate's dtype, and the final state `[B, D]` (`[N, D]`): float64 for float64 streams,
        else float32. Under autocast floating streams are cast to the autocast dtype. Layouts are those of `bmru`.

        With `return_boundaries` a third result, `[B, floor((T - 1) / chunk_size), D]` in the state dtype: the raw state
        after every `chunk_size` steps, before a reset there. With `cu_seqlens`, the state after k chunks of a sequence
        whose first step has the scan position p is in row `floor(p / chunk_size) + k - 1`; other rows are zeros.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        RuntimeError: the backend cannot run this call.

    Example::

        >>> candidate, update, forget = torch.randn(3, 8, 100, 64).unbind()
        >>> h, state = mk.min_lstm(candidate, update, forget)
        >>> h.shape, state.shape
        (torch.Size([8, 100, 64]), torch.Size([8, 64]))
    """
    return call(
        CELL, (candidate, update, forget), (), initial_state, reverse=reverse, cu_seqlens=cu_seqlens, resets=resets,
        reset_state=reset_state, chunk_size=chunk_size, return_boundaries=return_boundaries, backend=backend,
    )  # fmt: skip


def min_lstm_packed(
    gates: Tensor,
    initial_state: Tensor | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: Tensor | None = None,
    chunk_size: int | None = backends.CHUNK,
    return_boundaries: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """`min_lstm` on streams that lie side by side, as one projection leaves them; its gradient is one tensor too.

    Args:
        gates: `[B, T, 3 D]`: candidate, update, forget.

    The other arguments, results and errors are those of `min_lstm`.
    """
    return call(
        CELL, (gates, None, None), (), initial_state, reverse=reverse, cu_seqlens=cu_seqlens, resets=resets,
        reset_state=reset_state, chunk_size=chunk_size, return_boundaries=return_boundaries, backend=backend,
        packed=CELL.required,
    )  # fmt: skip


def min_lstm_step(
    candidate: Tensor, update: Tensor, forget: Tensor, state: Tensor, *, state_indices: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One step of `min_lstm`, for streaming inference.

    Args:
        candidate, update, forget: `[B, D]`.
        state: `[B, D]`, the state before the step; with `state_indices` slots `[slots, D]`, as for `bmru_step`.
        state_indices: int32 or int64 `[B]`, the slot of each sequence, or -1; see `bmru_step`.

    Returns:
        `h [B, D]` and the state after the step `[B, D]`, equal to `min_lstm` with T = 1; with `state_indices` the
        second is `state`, updated in place.

    Raises:
        TypeError, ValueError, RuntimeError: as `min_lstm` and `bmru_step`.

    Example::

        >>> h, state = mk.min_lstm_step(torch.randn(8, 64), torch.randn(8, 64), torch.randn(8, 64), torch.zeros(8, 64))
        >>> h.shape
        torch.Size([8, 64])
    """
    return step(CELL, (candidate, update, forget), (), state, state_indices)


def min_lstm_packed_step(gates: Tensor, state: Tensor, state_indices: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`min_lstm_step` on streams that lie side by side in `gates [B, 3 D]`, as for `min_lstm_packed`."""
    return step(CELL, (gates, None, None), (), state, state_indices, CELL.required)
