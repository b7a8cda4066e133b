"""Sequences that arrive in chunks of time. Only the state is kept between chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from .nn import MRUBase, MRUBlock, MRUNetwork
from .nn.wrappers import unwrapped

__all__ = ["Stream", "stream"]

State = Tensor | tuple[Tensor, ...]


class Stream:
    """A module and the state of the sequences that it reads; `stream` checks the module and makes it.

    Attributes:
        module: the module.
        state: the state as the module returns it, or None before the first chunk. It may be saved, and set again here
            or in another process, on another device or backend. The next chunk then continues from it.

    Example::

        >>> feed = mk.stream(mk.BMRU(3, 8))
        >>> output = feed(torch.randn(2, 100, 3))
        >>> saved = feed.state
        >>> later = mk.stream(feed.module)
        >>> later.state = saved
        >>> later(torch.randn(2, 7, 3)).shape
        torch.Size([2, 7, 8])
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.state: State | None = None

    def __call__(self, chunk: Tensor) -> Tensor:
        """The module's output for the next chunk of time, which may have any length. The new state is kept."""
        output, state = self.module(chunk, self.state)
        self.state = state.detach() if isinstance(state, Tensor) else tuple(t.detach() for t in state)
        return output

    def reset(self) -> None:
        """Drop the state. The next chunk starts new sequences."""
        self.state = None


def stream(module: torch.nn.Module) -> Stream:
    """Feed sequences to a module chunk by chunk, in memory that does not grow with time.

    The outputs equal those of one pass over the whole sequence where the gates are equal. A matrix product over fewer
    steps may round differently, and may flip a gate whose inputs are nearly tied.

    No gradient passes from a chunk to the chunks before it. A backward pass after every chunk is truncated
    back-propagation through time, with the exact state carried over.

    Args:
        module: a recurrent module of one direction, an `MRUBlock` or an `MRUNetwork`. `torch.compile` or
            `DistributedDataParallel` may wrap it: pass the wrapper, so that its hooks run at every chunk.

    Returns:
        A `Stream`, called as `output = feed(chunk)`. `feed.state` is the state after the last chunk; `feed.reset()`
        drops it.

    Raises:
        TypeError: the module is of another kind.
        ValueError: the module needs the whole sequence, because it is bidirectional or pools by the mean over time.

    Example::

        >>> feed = mk.stream(mk.MRUNetwork(3, 5, width=8, num_blocks=2))
        >>> for chunk in torch.randn(2, 100, 3).split(40, dim=1):
        ...     print(tuple(feed(chunk).shape))
        (2, 40, 5)
        (2, 40, 5)
        (2, 20, 5)
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
