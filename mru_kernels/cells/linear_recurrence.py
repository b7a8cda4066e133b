"""The linear recurrence, real or complex: the scan of the LRU (arXiv 2303.06349)."""

from __future__ import annotations

from torch import Tensor

from .. import backends, checks, ops
from .call import call, step


def _step(gates, s, p):
    update, decay = gates
    return decay * s + update


CELL = ops.add_cell(
    ops.Cell(
        name="linear_recurrence",
        inputs=(ops.Input("update"), ops.Input("decay", "either")),
        dtypes=checks.STREAM_DTYPES + checks.COMPLEX_DTYPES,
        plain=ops.Plain(_step),
    )
)


def linear_recurrence(
    decay: Tensor,
    update: Tensor,
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
    """Scan a linear recurrence over time.

    ::

        s_t = decay_t s_{t-1} + update_t

    The kernels do not work in log space, so `decay` may have any sign and be 0. Gradients of complex arguments follow
    torch's convention. There are derivatives of any order, in forward and in reverse mode.

    Args:
        decay: `[B, T, D]` in the update's dtype, or `[D]`, then also in float32 if the update is real.
        update: `[B, T, D]`; float32, float64, bfloat16, float16, complex64 or complex128. Strides over B
            and T may be any.
        initial_state: `[B, D]` (`[N, D]` with `cu_seqlens`), the state before the first step scanned, in the
            update's or the state dtype; zeros if None.
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
        The states `s [B, T, D]` in the update's dtype, and the final state `[B, D]` (`[N, D]`) in the state dtype:
        float32 for half-precision streams, else theirs. Under autocast floating streams are cast to the autocast
        dtype. `s` is dense with unit stride on D, whatever the update's strides: as `[T, B, D]` in memory if the
        update has unit stride on D and a larger stride over T than over B, else contiguous. The gradient of each
        stream follows the same rule.

        With `return_boundaries` a third result, `[B, floor((T - 1) / chunk_size), D]` in the state dtype: the raw state
        after every `chunk_size` steps, before a reset there. With `cu_seqlens`, the state after k chunks of a sequence
        whose first step has the scan position p is in row `floor(p / chunk_size) + k - 1`; other rows are zeros.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        RuntimeError: the backend cannot run this call.

    Example::

        >>> update = torch.randn(8, 100, 64)
        >>> s, final = mk.linear_recurrence(torch.full((64,), 0.9), update)
        >>> s.shape, final.shape
        (torch.Size([8, 100, 64]), torch.Size([8, 64]))

        A Hessian-vector product of a loss, with the tangent `update` of the update:

        >>> loss = lambda update: mk.linear_recurrence(torch.full((64,), 0.9), update)[0].pow(3).sum()
        >>> _, product = torch.func.jvp(torch.func.grad(loss), (update,), (update,))
        >>> product.shape
        torch.Size([8, 100, 64])
    """
    return call(
        CELL, (update, decay), (), initial_state, reverse=reverse,
        cu_seqlens=cu_seqlens, resets=resets, reset_state=reset_state, chunk_size=chunk_size,
        return_boundaries=return_boundaries, backend=backend,
    )  # fmt: skip


def linear_recurrence_step(
    decay: Tensor, update: Tensor, state: Tensor, *, state_indices: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One step of `linear_recurrence`, for streaming inference.

    Args:
        decay: `[B, D]` or `[D]`.
        update: `[B, D]`.
        state: `[B, D]`, the state before the step; with `state_indices` slots `[slots, D]`, as for `bmru_step`. Slots
            of complex states have the update's dtype.
        state_indices: int32 or int64 `[B]`, the slot of each sequence, or -1; see `bmru_step`.

    Returns:
        The state after the step `[B, D]`, in the update's dtype and in the state dtype, equal to
        `linear_recurrence` with T = 1; with `state_indices` the second is `state`, updated in place.

    Raises:
        TypeError, ValueError, RuntimeError: as `linear_recurrence` and `bmru_step`.

    Example::

        >>> s, state = mk.linear_recurrence_step(torch.full((64,), 0.9), torch.randn(8, 64), torch.zeros(8, 64))
        >>> s.shape, state.shape
        (torch.Size([8, 64]), torch.Size([8, 64]))
    """
    return step(CELL, (update, decay), (), state, state_indices)
