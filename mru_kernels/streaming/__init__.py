"""Sequences that arrive in chunks of time. Only the state, and traces on request, are kept between chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..nn import MemoryCache, MRUBase, MRUBlock, MRUNetwork
from ..nn.network import check_one_direction
from ..nn.wrappers import unwrapped

__all__ = ["Stream", "stream"]

State = Tensor | tuple[Tensor, ...]


class Stream:
    """A module and the state of the sequences that it reads; `stream` checks the module and makes it.

    Attributes:
        module: the module.
        state: the state as the module returns it, or None before the first chunk. It may be saved, and set again here
            or in another process, on another device or backend. The next chunk then continues from it.
        traces: with `gradient="traces"`, the traces by name, or None before the first chunk. They are saved and set
            with the state. A state that is set without traces is a constant.

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

    @property
    def traces(self) -> dict[str, Tensor] | None:
        return None

    @traces.setter
    def traces(self, value: dict[str, Tensor] | None) -> None:
        if value is not None:
            raise ValueError('traces: expected None, got traces; only stream(module, gradient="traces") takes them')

    def __call__(self, chunk: Tensor, resets: Tensor | None = None) -> Tensor:
        """The module's output for the next chunk of time, which may have any length. The new state is kept.

        Args:
            chunk: the module's input.
            resets: bool `[B]`, the sequences that end before this chunk. New ones take their places, with the initial
                states of the module and no past. For a chunk without a batch it has no dimensions.

        Raises:
            TypeError, ValueError: as the module, and for `resets` and traces that do not fit; the message names them.
        """
        state = self.state if resets is None else self._restarted(resets)
        output, state = self.module(chunk, state)
        self._keep(state)
        return output

    def reset(self) -> None:
        """Drop the state and the traces. The next chunk starts new sequences."""
        self.state = None

    def _keep(self, state: State) -> None:
        self.state = state.detach() if isinstance(state, Tensor) else tuple(t.detach() for t in state)

    def _restarted(self, resets: Tensor) -> State | None:
        """The state in which the sequences of `resets` begin anew."""
        if not isinstance(resets, Tensor) or resets.dtype != torch.bool:
            came = resets.dtype if isinstance(resets, Tensor) else type(resets).__name__
            raise TypeError(f"resets: expected a bool tensor, got {came}")
        if any(isinstance(part, MemoryCache) for part in self.module.modules()):
            raise ValueError("resets: expected None for a MemoryCache, whose sequences count their steps together")
        if self.state is None:
            return None
        layers = isinstance(self.state, Tensor)  # stacked
        tensors = list(self.state)
        batch = tensors[0].shape[:-1] if layers else tensors[0].shape[:1]
        if resets.shape != batch:
            raise ValueError(f"resets: expected shape {list(batch)} [batch], got {list(resets.shape)}")
        if resets.device != tensors[0].device:
            raise ValueError(f"resets: expected the state's device {tensors[0].device}, got {resets.device}")
        after = []
        for t, start in zip(tensors, _starts(unwrapped(self.module)), strict=True):
            new = t.new_zeros(()) if start is None else start.to(t.dtype)
            after.append(torch.where(resets.reshape(*batch, *[1] * (t.dim() - len(batch))), new, t))
        return torch.stack(after) if layers else tuple(after)


def _starts(module: torch.nn.Module) -> list[Tensor | None]:
    """The state `[D]` in which a new sequence begins, for each tensor of the module's state; None for zeros."""
    if isinstance(module, MRUNetwork):
        return [start for block in module.blocks for start in _starts(block)]
    if isinstance(module, MRUBlock):
        return [None] * (module.conv is not None) + [start for unit in module.units for start in _starts(unit)]
    if isinstance(module, MRUBase) and module.learn_initial_state:
        return [module._learned_state(p) for p in module._parameters_by_scan()]
    return [None] * getattr(module, "num_layers", 1)


def stream(module: torch.nn.Module, gradient: str | None = None) -> Stream:
    """Feed sequences to a module chunk by chunk, in memory that does not grow with time.

    The outputs equal those of one pass over the whole sequence where the gates are equal. A matrix product over fewer
    steps may round differently, and may flip a gate whose inputs are nearly tied.

    Without `gradient`, no gradient passes from a chunk to the chunks before it. A backward pass after every chunk is
    truncated back-propagation through time, with the exact state carried over.

    With `gradient="traces"` the backward pass of a chunk also adds what the state at its start gives the parameters of
    each recurrent layer. The gradients of all chunks then sum to those of one pass over the whole sequence, at a memory
    of `B D (gates (features + 1) + vectors)` numbers a layer:

    - exactly for the recurrent parameters of the last recurrent layer, also of units in one block, and for all above;
    - for those of the layers below, without the paths that cross the start of a chunk in the state of a layer above: in
      two layers of `MinGRU` and chunks of 8 steps, the gradient of the lower layer has a cosine of 0.72 with that of
      the whole sequence, and of 0.23 without traces (`python -m bench online`);
    - for all below the first projection, such as an embedding, within the chunk only, as without traces.

    Recurrent parameters are all that the state depends on: weight, bias, thresholds, decays and learned initial states
    of a unit. After a step of an optimiser, a trace still contains the derivatives at the older parameters. Chunks
    under `no_grad` advance the traces too. A unit of your own needs a `_scan` in which no channel's state depends on
    another channel.

    Args:
        module: a recurrent module of one direction, an `MRUBlock` or an `MRUNetwork`. `torch.compile` or
            `DistributedDataParallel` may wrap it: pass the wrapper, so that its hooks run at every chunk.
        gradient: None, or "traces" for gradients of the whole past.

    Returns:
        A `Stream`, called as `output = feed(chunk, resets=None)`. `feed.state` is the state after the last chunk, and
        `feed.traces` has the traces; `feed.reset()` drops both.

    Raises:
        TypeError: the module is of another kind. With traces also: a block contains a unit of another package, such as
            `torch.nn.GRU`, whose channels read each other's states.
        ValueError: the module needs the whole sequence, because it is bidirectional or pools by the mean over time;
            `gradient` is neither None nor "traces". With traces also: `torch.compile` compiles the module.

    Example::

        >>> feed = mk.stream(mk.MRUNetwork(3, 5, width=8, num_blocks=2))
        >>> for chunk in torch.randn(2, 100, 3).split(40, dim=1):
        ...     print(tuple(feed(chunk).shape))
        (2, 40, 5)
        (2, 40, 5)
        (2, 20, 5)
        >>> feed = mk.stream(mk.CMRU(3, 8), gradient="traces")
        >>> for chunk in torch.randn(2, 100, 3).split(10, dim=1):
        ...     feed(chunk).square().mean().backward()  # adds to the gradients of all 100 steps
        >>> feed.traces["weight_ih_l0"].shape
        torch.Size([2, 16, 3])
    """
    inner = check_one_direction("module", module)
    if isinstance(inner, MRUNetwork) and inner.pool == "mean":
        raise ValueError('module: expected no pool or pool="last", got pool="mean", which needs every step at once')
    if gradient is None:
        return Stream(module)
    if gradient != "traces":
        raise ValueError(f'gradient: expected None or "traces", got {gradient!r}')
    from .traced import TracedStream  # imports torch's compiler, which takes seconds

    return TracedStream(module)
