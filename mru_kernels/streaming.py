"""Sequences that come in chunks, of which only the state is kept."""

from __future__ import annotations

import torch
from torch import Tensor

from .nn import MRUBase, MRUBlock, MRUNetwork, unwrapped

__all__ = ["Stream", "stream"]

State = Tensor | tuple[Tensor, ...]


class Stream:
    """A module and the state of the sequences that it is fed: see `stream`.

    Attributes:
        module: what is fed.
        state: as the module returns it, or None before the first chunk. It may be saved, and set again here or in
            another process, on another device or backend; the next chunk goes on from it.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.state: State | None = None

    def __call__(self, chunk: Tensor) -> Tensor:
        """The module's output for the next chunk of time, of any length; the state is kept."""
        output, state = self.module(chunk, self.state)
        self.state = state.detach() if isinstance(state, Tensor) else tuple(t.detach() for t in state)
        return output

    def reset(self) -> None:
        """Forget the state: the next chunk begins new sequences."""
        self.state = None


def stream(module: torch.nn.Module) -> Stream:
    """Feed a module sequences chunk by chunk, in memory that does not grow with time.

    The outputs are those of one pass over the whole, given the same gates (a matrix product over fewer steps may round
    differently, and where a gate is nearly tied flip it). No gradient passes from a chunk to those before it: with a
    backward pass after every chunk this is truncated back-propagation through time, with the exact state carried over.

    Args:
        module: a recurrent module of one direction, an `MRUBlock` or an `MRUNetwork`. It may be wrapped by
            `torch.compile` or `DistributedDataParallel`: pass the wrapper, which every chunk then goes through, so that
            its hooks run.

    Returns:
        `feed = stream(module)`, to be called as `output = feed(chunk)`; `feed.state` is the state after the last chunk,
        `feed.reset()` forgets it.

    Raises:
        TypeError: the module is of another kind.
        ValueError: the module needs the whole sequence: it is bidirectional, or it pools over time by the mean.
    """
    inner = unwrapped(module) if isinstance(module, torch.nn.Module) else module
    if not isinstance(inner, (MRUBase, MRUBlock, MRUNetwork)):
        kind = type(inner).__name__
        raise TypeError(f"module: expected a recurrent module, MRUBlock or MRUNetwork of this package, got {kind}")
    if isinstance(inner, MRUBase) and inner.bidirectional:
        raise ValueError(
            "module: expected one direction, got a bidirectional one, whose second starts at the last step"
        )
    if isinstance(inner, MRUNetwork) and inner.pool == "mean":
        raise ValueError('module: expected no pool or pool="last", got pool="mean", which needs every step at once')
    return Stream(module)
