"""Sequences that arrive in chunks of time. Only the state, and on request traces, are kept between chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..nn import RWKV4, MemoryCache, MesaNet, MRUBase, MRUBlock, MRUNetwork, RWKV4ChannelMix, RWKV4TimeMix
from ..nn.block import WITHOUT_RESETS
from ..nn.network import check_one_direction
from ..nn.wrappers import unwrapped

__all__ = ["Stream", "stream"]

State = Tensor | tuple[Tensor, ...]


class Stream:
    """A module and the state of the sequences that it reads; `stream` checks the module and makes it.

    Attributes:
        module: the module.
        state: the state as the module returns it, or None before the first chunk. It may be saved and set again, also
            in another process, on another device or backend. The next chunk then continues from it.
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
            resets: bool `[B]`, true for sequences that end before this chunk; new sequences take their places, with the
                initial states of the module. Or `[B, T]`, true where a new sequence begins within the chunk, in the
                layout of the chunk's first two dimensions. For a chunk without a batch `[]` or `[T]`.

        Returns:
            The output of the module, such as `[B, T, D]`.

        Raises:
            TypeError, ValueError: as the module, and for `resets` and traces that do not fit; the message names them.
                Modules with a `MemoryCache` do not accept `resets`, and those with a `MesaNet` or a part of RWKV-4
                only `[B]`.
            RuntimeError: with traces, under inference mode or activation checkpointing.
        """
        resets, within = self._split(chunk, resets)
        state = self.state if resets is None else self._restarted(resets)
        output, state = self.module(chunk, state, **within)
        self._keep(state)
        return output

    def reset(self) -> None:
        """Drop the state and the traces. The next chunk starts new sequences."""
        self.state = None

    def _split(self, chunk: Tensor, resets: Tensor | None) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The sequences that end before the chunk, or None, and the argument of the module for resets within it."""
        if resets is not None and any(isinstance(part, MemoryCache) for part in self.module.modules()):
            raise ValueError("resets: expected None for a MemoryCache, whose sequences count their steps together")
        inner = unwrapped(self.module)
        dims = 2 if isinstance(inner, RWKV4) or (isinstance(inner, MRUNetwork) and inner.tokens) else 3
        if not (isinstance(resets, Tensor) and isinstance(chunk, Tensor)):
            return resets, {}
        is_within = resets.dim() == chunk.dim() - (dims - 2)
        part = next((part for part in self.module.modules() if isinstance(part, WITHOUT_RESETS)), None)
        if is_within and part is not None:
            raise ValueError(f"resets: expected shape [batch] for a {type(part).__name__}, got {list(resets.shape)}")
        return (None, {"resets": resets}) if is_within else (resets, {})

    def _keep(self, state: State) -> None:
        self.state = state.detach() if isinstance(state, Tensor) else tuple(t.detach() for t in state)

    def _restarted(self, resets: Tensor) -> State | None:
        """The state, with the initial state for the sequences of `resets`."""
        if not isinstance(resets, Tensor) or resets.dtype != torch.bool:
            came = resets.dtype if isinstance(resets, Tensor) else type(resets).__name__
            raise TypeError(f"resets: expected a bool tensor, got {came}")
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
    """The initial state `[D]` of a new sequence for each tensor of the module's state; None for zeros."""
    if isinstance(module, MRUNetwork):
        return [start for block in module.blocks for start in _starts(block)]
    if isinstance(module, MRUBlock):
        return [None] * (module.conv is not None) + [start for unit in module.units for start in _starts(unit)]
    if isinstance(module, MRUBase):
        return [module._start(p) for p in module._parameters_by_scan()]
    if isinstance(module, (RWKV4, RWKV4ChannelMix, RWKV4TimeMix)):
        return module._starts()
    if isinstance(module, MesaNet):
        return [None] * module.num_states
    return [None] * getattr(module, "num_layers", 1)


def stream(module: torch.nn.Module, gradient: str | None = None) -> Stream:
    """Feed sequences to a module chunk by chunk, in memory that does not grow with time.

    Only the state of a `MemoryCache` in the modes gated and sparse grows.

    Outputs are those of one pass over the whole sequence, except that a matrix product over fewer steps may round
    differently, and may flip a gate whose inputs are nearly tied.

    Without `gradient`, no gradient passes from a chunk to the chunks before it. A backward pass after every chunk is
    truncated back-propagation through time, with the exact state carried over.

    With `gradient="traces"` the backward pass of a chunk also adds the gradient of the steps before the chunk, by
    real-time recurrent learning in chunks (HYPR, arXiv 2506.14464). The recurrent parameters are those that the state
    depends on: weight, bias, thresholds, decays and learned initial states of a unit. The gradients of all chunks sum
    to these:

    - For the recurrent parameters of the last recurrent layer, or of all units in the last block, and for all later
      parameters: the exact gradient of the whole sequence.
    - For the recurrent parameters of lower layers: that gradient, without the paths that cross the start of a chunk in
      the state of a higher layer. In two layers of `MinGRU` with chunks of 8 steps, the gradient of the lower layer has
      a cosine of 0.72 with that of the whole sequence, and of 0.23 without traces (`python -m bench online`).
    - For parameters before the weight of a unit, such as an embedding: the gradient within the chunks, as without
      traces.

    Traces take `B D (gates (features + 1) + k)` numbers a layer in the dtype of the state, where k counts the learned
    initial state and the per-channel inputs of the recurrence. After an optimiser step a trace still contains
    derivatives at the older parameters. Chunks under `no_grad` advance the traces too. Your own unit can have traces if
    in its `_scan` no channel's state depends on another channel.

    Args:
        module: a recurrent module of one direction, a `MemoryCache`, a `MesaNet`, a part of RWKV-4, an `MRUBlock` or
            an `MRUNetwork`. `torch.compile` or `DistributedDataParallel` may wrap it: pass the wrapper, so that its
            hooks run at every chunk.
        gradient: None, or "traces" to add the gradient of earlier chunks.

    Returns:
        A `Stream`, called as `output = feed(chunk, resets=None)`. `feed.state` is the state after the last chunk, and
        `feed.traces` has the traces; `feed.reset()` drops both.

    Raises:
        TypeError: the module is of another kind. With traces also: it contains a module that has none, such as a
            `MemoryCache`, an `Aaren` or a `PRF`, or a block contains a unit of another package, such as `torch.nn.GRU`,
            whose channels read each other's states.
        ValueError: the module is bidirectional or pools by the mean over time, so it needs the whole sequence; or
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
