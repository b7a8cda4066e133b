"""The bistable memory recurrent unit and its cumulative form (arXiv 2601.09495, arXiv 2605.11855)."""

from __future__ import annotations

from torch import Tensor

from .. import backends, ops
from ..scalars import EPSILON, SURROGATE_SCALE
from . import write_or_hold
from .call import call, step


def _gates(x, p):
    candidate, threshold, amplitude, _alpha = x
    z = write_or_hold.unit_step(candidate.abs(), threshold.abs(), p[1])
    v = write_or_hold.sign(candidate, p[1])
    return write_or_hold.gates(z, v if amplitude is None else amplitude * v, x)


CELL = ops.add_cell(
    ops.Cell(
        name="bmru",
        inputs=(
            ops.Input("candidate"),
            ops.Input("threshold", "either"),
            ops.Input("amplitude", optional=True),
            ops.Input("alpha", "channel", optional=True),
        ),
        scalars=(EPSILON, SURROGATE_SCALE),
        codes=True,
        without_codes=("amplitude",),
        plain=ops.Plain(write_or_hold.step, _gates, write_or_hold.output),
    )
)


def bmru(
    candidate: Tensor,
    threshold: Tensor,
    initial_state: Tensor | None = None,
    *,
    epsilon: float | Tensor = 0.0,
    alpha: Tensor | None = None,
    amplitude: Tensor | None = None,
    surrogate_scale: float = 1.0,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: Tensor | None = None,
    chunk_size: int | None = backends.CHUNK,
    return_boundaries: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Scan a bistable memory recurrent unit over time.

    Each channel writes at the steps where its candidate reaches its threshold, and keeps its state at the others::

        z_t = H(|candidate_t| - |threshold_t|)
        s_t = z_t (amplitude_t sgn(candidate_t) + epsilon s_{t-1}) + (1 - z_t) s_{t-1}
        h_t = alpha s_t

    With `epsilon` 0 this is the BMRU (arXiv 2601.09495), with 1 the CMRU (arXiv 2605.11855). In gradients and in
    forward mode the derivatives of H and sgn are the arctangent surrogates of those papers, `k / (1 + (pi k x)^2)` and
    twice that. `epsilon` has no derivative.

    Args:
        candidate: `[B, T, D]`; float32, float64, bfloat16 or float16. Strides over B and T may be any.
        threshold: `[B, T, D]` in the candidate's dtype, or `[D]`, then also in float32.
        initial_state: `[B, D]` (`[N, D]` with `cu_seqlens`), the state before the first step scanned, in the
            candidate's or the state dtype; zeros if None.
        epsilon: the share of the old state that a write keeps, in [0, 1]; a float, or a 0-dim CPU tensor, on which
            torch.compile does not specialise.
        alpha: `[D]`, scale of the output; ones if None.
        amplitude: `[B, T, D]`, magnitude of the written values; ones if None.
        surrogate_scale: k > 0 of the surrogate derivatives, any finite value. Gradients out of range become infinite
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

        >>> candidate, threshold = torch.randn(2, 8, 100, 64).unbind()
        >>> h, state = mk.bmru(candidate, threshold)
        >>> h.shape, state.shape
        (torch.Size([8, 100, 64]), torch.Size([8, 64]))
    """
    return call(
        CELL, (candidate, threshold, amplitude, alpha), (epsilon, surrogate_scale), initial_state, reverse=reverse,
        cu_seqlens=cu_seqlens, resets=resets, reset_state=reset_state, chunk_size=chunk_size,
        return_boundaries=return_boundaries, backend=backend,
    )  # fmt: skip


_TWO_GATES, _THREE_GATES = CELL.mask("candidate", "threshold"), CELL.mask("candidate", "threshold", "amplitude")


def bmru_packed(
    gates: Tensor,
    initial_state: Tensor | None = None,
    *,
    epsilon: float | Tensor = 0.0,
    alpha: Tensor | None = None,
    amplitude: bool = False,
    surrogate_scale: float = 1.0,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: Tensor | None = None,
    chunk_size: int | None = backends.CHUNK,
    return_boundaries: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """`bmru` on streams that lie side by side, as one projection leaves them; its gradient is one tensor too.

    Args:
        gates: `[B, T, k D]`: candidate, threshold and, if `amplitude` is true, amplitude; k = 2 or 3.

    The other arguments, results and errors are those of `bmru`.
    """
    return call(
        CELL, (gates, None, None, alpha), (epsilon, surrogate_scale), initial_state, reverse=reverse,
        cu_seqlens=cu_seqlens, resets=resets, reset_state=reset_state, chunk_size=chunk_size,
        return_boundaries=return_boundaries, backend=backend,
        packed=_THREE_GATES if amplitude else _TWO_GATES,
    )  # fmt: skip


def bmru_step(
    candidate: Tensor,
    threshold: Tensor,
    state: Tensor,
    *,
    epsilon: float | Tensor = 0.0,
    alpha: Tensor | None = None,
    amplitude: Tensor | None = None,
    state_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of `bmru`, for streaming inference.

    Args:
        candidate, threshold, amplitude: `[B, D]`; threshold also `[D]`.
        state: `[B, D]`, the raw state before the step. With `state_indices` it has slots for the states of many
            sequences: `[slots, D]`, contiguous, in the state dtype (float64 for float64 streams, else float32).
        epsilon, alpha: as for `bmru`.
        state_indices: int32 or int64 `[B]`, the slot of each sequence, all different; -1 skips the sequence.

    Returns:
        `h [B, D]` and the state after the step `[B, D]`, equal to `bmru` with T = 1. With `state_indices` the second
        is `state` itself: the slots are updated in place, all others stay as they are. h of a skipped sequence is 0.

    Raises:
        TypeError, ValueError: as `bmru`. On the CPU also if a slot does not exist or occurs twice; then no slot has
            changed. On a device nothing reads the indices before the kernel: it skips sequences without an existing
            slot, and of two sequences with the same slot either leaves its state.
        RuntimeError: grad mode is on and an input requires grad; `state_indices` under a transform of torch.func or
            torch.jit.trace.

    Example::

        >>> state = torch.zeros(8, 64)
        >>> h, state = mk.bmru_step(torch.randn(8, 64), torch.ones(64), state)
        >>> h.shape
        torch.Size([8, 64])
        >>> slots = torch.zeros(100, 64)  # of 100 sequences, two make a step
        >>> h, slots = mk.bmru_step(torch.randn(2, 64), torch.ones(64), slots, state_indices=torch.tensor([7, 3]))
        >>> h.shape, slots.shape
        (torch.Size([2, 64]), torch.Size([100, 64]))
    """
    return step(CELL, (candidate, threshold, amplitude, alpha), (epsilon, 1.0), state, state_indices)


def bmru_packed_step(
    gates: Tensor,
    state: Tensor,
    state_indices: Tensor | None = None,
    *,
    epsilon: float | Tensor = 0.0,
    alpha: Tensor | None = None,
    amplitude: bool = False,
) -> tuple[Tensor, Tensor]:
    """`bmru_step` on streams that lie side by side in `gates [B, k D]`, as for `bmru_packed`."""
    packed = _THREE_GATES if amplitude else _TWO_GATES
    return step(CELL, (gates, None, None, alpha), (epsilon, 1.0), state, state_indices, packed)
