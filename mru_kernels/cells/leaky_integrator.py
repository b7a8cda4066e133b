"""The leaky integrator: the example of a cell, whose four files are the ones to copy (docs/adding-a-cell.md)."""

from __future__ import annotations

from torch import Tensor

from .. import backends, ops
from .call import call, step


def _step(gates, s, p):
    input, decay = gates
    return decay * s + input


def _output(x, s, p):
    return s.tanh()


CELL = ops.add_cell(
    ops.Cell(
        name="leaky_integrator",
        inputs=(ops.Input("input"), ops.Input("decay", "either")),
        plain=ops.Plain(_step, output=_output),
    )
)


def leaky_integrator(
    input: Tensor,
    decay: Tensor,
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
    """Scan a leaky integrator with a bounded output over time.

    ::

        s_t = decay_t s_{t-1} + input_t
        h_t = tanh(s_t)

    Args:
        input: `[B, T, D]`; float32, float64, bfloat16 or float16. Strides over B and T may be any.
        decay: `[B, T, D]` in the input's dtype, or `[D]`, then also in float32.
        initial_state: `[B, D]` (`[N, D]` with `cu_seqlens`), the state before the first step scanned, in the input's
            or the state dtype; zeros if None.
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
        `h [B, T, D]` in the input's dtype, and the final state `[B, D]` (`[N, D]`): the raw state s, float64 for
        float64 streams, else float32. Layouts are those of `bmru`.

        With `return_boundaries` a third result, `[B, floor((T - 1) / chunk_size), D]` in the state dtype: the raw state
        after every `chunk_size` steps, before a reset there. With `cu_seqlens`, the state after k chunks of a sequence
        whose first step has the scan position p is in row `floor(p / chunk_size) + k - 1`; other rows are zeros.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        RuntimeError: the backend cannot run this call.
        NotImplementedError: a second derivative is taken.

    Example::

        >>> h, state = mk.leaky_integrator(torch.randn(8, 100, 64), torch.full((64,), 0.9))
        >>> h.shape, state.shape
        (torch.Size([8, 100, 64]), torch.Size([8, 64]))
    """
    return call(
        CELL, (input, decay), (), initial_state, reverse=reverse,
        cu_seqlens=cu_seqlens, resets=resets, reset_state=reset_state, chunk_size=chunk_size,
        return_boundaries=return_boundaries, backend=backend,
    )  # fmt: skip


def leaky_integrator_step(
    input: Tensor, decay: Tensor, state: Tensor, *, state_indices: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One step of `leaky_integrator`, for streaming inference.

    Args:
        input: `[B, D]`.
        decay: `[B, D]` or `[D]`.
        state: `[B, D]`, the raw state before the step; with `state_indices` slots `[slots, D]`, as for `bmru_step`.
        state_indices: int32 or int64 `[B]`, the slot of each sequence, or -1; see `bmru_step`.

    Returns:
        `h [B, D]` and the state after the step `[B, D]`, equal to `leaky_integrator` with T = 1; with `state_indices`
        the second is `state`, updated in place.

    Raises:
        TypeError, ValueError, RuntimeError: as `leaky_integrator` and `bmru_step`.

    Example::

        >>> h, state = mk.leaky_integrator_step(torch.randn(8, 64), torch.full((64,), 0.9), torch.zeros(8, 64))
        >>> h.shape
        torch.Size([8, 64])
    """
    return step(CELL, (input, decay), (), state, state_indices)
