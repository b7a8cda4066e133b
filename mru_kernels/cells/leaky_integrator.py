"""The leaky integrator: the example of a cell, whose four files are the ones to copy (docs/adding-a-cell.md)."""

from __future__ import annotations

from torch import Tensor

from .. import backends, ops
from .call import call, step


def _step(gates, s, p):
    input, decay = gates
    return decay * s + input


def _output(x, s):
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
    chunk_size: int | None = backends.CHUNK,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
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
        chunk_size: steps between two checkpoints, the states that the forward pass saves for the backward pass, which
            recomputes the states between them: a multiple of 16 that the backend supports. With None the forward pass
            saves no state, and the backward pass first scans the whole again.
        backend: None chooses; a name (see `available_backends`) runs or raises.

    Returns:
        `h [B, T, D]` in the input's dtype, and the final state `[B, D]` (`[N, D]`): the raw state s, float64 for
        float64 streams, else float32. Layouts are those of `bmru`.

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
        CELL, (input, decay), (), initial_state, reverse=reverse, cu_seqlens=cu_seqlens, chunk_size=chunk_size,
        backend=backend,
    )  # fmt: skip


def leaky_integrator_step(input: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One step of `leaky_integrator`, for streaming inference.

    Args:
        input: `[B, D]`.
        decay: `[B, D]` or `[D]`.
        state: `[B, D]`, the raw state before the step.

    Returns:
        `h [B, D]` and the state after the step `[B, D]`, equal to `leaky_integrator` with T = 1.

    Raises:
        TypeError, ValueError: as `leaky_integrator`.
        RuntimeError: grad mode is on and an input requires grad.

    Example::

        >>> h, state = mk.leaky_integrator_step(torch.randn(8, 64), torch.full((64,), 0.9), torch.zeros(8, 64))
        >>> h.shape
        torch.Size([8, 64])
    """
    return step(CELL, (input, decay), (), state)
