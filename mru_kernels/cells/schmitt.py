"""The first-quadrant bistable memory recurrent unit, a Schmitt trigger (arXiv 2605.15216)."""

from __future__ import annotations

from torch import Tensor

from .. import backends, ops
from .call import call, step

CELL = ops.add_cell(ops.Cell(name="schmitt", inputs=(3, 3), vectors=("low", "high"), event_inputs=3))


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
    chunk_size: int | None = backends.CHUNK,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan a first-quadrant bistable memory recurrent unit over time (arXiv 2605.15216).

    Each channel is a Schmitt trigger: it writes 1 where its candidate reaches `high`, 0 where it is below `low`, and
    holds between them::

        L_t = H(candidate_t - low)    U_t = H(candidate_t - high)    hold_t = L_t (1 - U_t)
        s_t = hold_t s_{t-1} + (1 - hold_t) (U_t + epsilon s_{t-1})
        h_t = alpha s_t

    In the backward pass the derivative of H is the arctangent surrogate `k / (1 + (pi k x)^2)`.

    Args:
        candidate: `[B, T, D]`; float32, float64, bfloat16 or float16. Any strides on B and T are read in place.
        low, high: `[D]`, in the candidate's dtype or float32. Usually `high >= low`; the formulas hold where not.
        initial_state: `[B, D]` (`[N, D]` with `cu_seqlens`), the state before the first step scanned, in the
            candidate's or the state dtype; zeros if None.
        epsilon: in [0, 1]; a float, or a 0-dim CPU tensor, which torch.compile does not specialise on.
        alpha: `[D]`, scale of the output; ones if None.
        surrogate_scale: k > 0 of the surrogate derivative, any finite value. Gradients out of range become infinite
            or 0.
        reverse: scan from the last step to the first.
        cu_seqlens: int32 or int64 `[N + 1]`, offsets of N sequences packed along T of streams with B = 1.
        chunk_size: steps between the states that the forward pass saves for the backward pass, which scans each chunk
            again: a multiple of 16 that the backend takes. None saves no state, and the backward pass first scans the
            whole again.
        backend: None chooses; a name (see `available_backends`) runs or raises.

    Returns:
        `h [B, T, D]` in the candidate's dtype, and the final state `[B, D]` (`[N, D]`): the raw state s, float64 for
        float64 streams, else float32. Under autocast floating streams are cast to the autocast dtype. `h` is dense
        with unit stride on D, whatever the candidate's strides: as `[T, B, D]` in memory where the candidate has unit
        stride on D and a larger stride over T than over B, else contiguous. The gradient of each stream has the same
        layout rule.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        RuntimeError: the backend cannot run this call; a second or forward-mode derivative is taken.
    """
    return call(
        CELL, {"candidate": candidate, "low": low, "high": high}, initial_state, epsilon=epsilon, alpha=alpha,
        surrogate_scale=surrogate_scale, reverse=reverse, cu_seqlens=cu_seqlens, chunk_size=chunk_size, backend=backend,
    )  # fmt: skip


def schmitt_step(
    candidate: Tensor,
    low: Tensor,
    high: Tensor,
    state: Tensor,
    *,
    epsilon: float | Tensor = 0.0,
    alpha: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of `schmitt`, for streaming inference.

    Args:
        candidate: `[B, D]`.
        state: `[B, D]`, the raw state before the step.
        low, high, epsilon, alpha: as for `schmitt`.

    Returns:
        `h [B, D]` and the state after the step `[B, D]`, equal to `schmitt` with T = 1.

    Raises:
        TypeError, ValueError: as `schmitt`.
        RuntimeError: grad mode is on and an input requires grad.
    """
    return step(CELL, {"candidate": candidate, "low": low, "high": high}, state, epsilon=epsilon, alpha=alpha)
