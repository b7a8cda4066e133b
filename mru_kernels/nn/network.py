"""Residual networks of recurrent units, for instance bistable units for long memory with linear units for transients.

`MRUBlock` is a recurrent mixer and an MLP, each on a pre-normalised residual branch. `MRUNetwork` is an input map,
blocks and a head. Both process whole sequences, chunks of sequences, and single steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from .. import checks, ops
from .arguments import (
    check_choice,
    check_input_dtype,
    check_resets,
    check_sizes,
    check_state,
    constructor,
)
from .base import MRUBase
from .block import SEVERAL_STATES, MRUBlock, State, Units, WithUnits, check_shape, dtype_of
from .delays import DelayConv
from .memory_cache import MemoryCache
from .rwkv import RWKV4Unit
from .wrappers import fx_node, unwrapped


class MRUNetwork(WithUnits):
    """An input map, residual blocks of recurrent units, and a head.

    Args:
        input_size: number of features of the input; with `tokens`, number of tokens.
        output_size: number of features of the output.
        width: number of features of the residual stream.
        num_blocks: number of `MRUBlock`s.
        units, hidden_size, combine, conv_size, delay, mlp_size, mlp, cache, dropout: arguments of every `MRUBlock`.
        tokens: whether the input is token numbers, which an embedding maps, or features, which a linear map maps.
        pool: None for an output at every step, "last" for one output at the last step, "mean" for one output of the
            mean over all steps of a call.
        device, dtype: of the parameters; the units restrict the dtype.

    Call:
        `output, state = network(input, state=None, resets=None)`

        input: `[B, T, input_size]`, or int64 `[B, T]` with `tokens`; T >= 1.
        output: `[B, T, output_size]`, or `[B, output_size]` with `pool`.
        resets: as for `MRUBlock`. A mean over time includes all episodes.
        state: a tuple with the states of all blocks in turn; each tensor has the batch first. A call with the returned
            state continues the sequences. Detach its tensors to cut the gradient.

        `output, state = network.step(input, state=None, resets=None)` runs one step.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Example::

        >>> network = mk.MRUNetwork(3, 5, width=8, num_blocks=2, units=("bmru", "lru"))
        >>> output, state = network(torch.randn(2, 10, 3))
        >>> output.shape, len(state)
        (torch.Size([2, 10, 5]), 4)
        >>> output, state = network.step(torch.randn(2, 3), state)
        >>> output.shape
        torch.Size([2, 5])
    """

    @constructor
    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        width: int,
        num_blocks: int,
        units: Units = "bmru",
        hidden_size: int | None = None,
        combine: str = "sum",
        conv_size: int = 0,
        delay: Mapping[str, Any] | None = None,
        mlp_size: int | None = None,
        mlp: str = "glu",
        cache: Mapping[str, Any] | None = None,
        dropout: float = 0.0,
        tokens: bool = False,
        pool: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(input_size=input_size, output_size=output_size, width=width, num_blocks=num_blocks)
        check_choice("pool", pool, (None, "last", "mean"))
        self.input_size = input_size
        self.tokens = tokens
        self.pool = pool
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.input_map: torch.nn.Module = (torch.nn.Embedding if tokens else torch.nn.Linear)(
            input_size, width, **where
        )
        blocks = [
            MRUBlock(
                width, units, hidden_size=hidden_size, combine=combine, conv_size=conv_size, delay=delay,
                mlp_size=mlp_size, mlp=mlp, cache=cache, dropout=dropout, **where,
            )
            for _ in range(num_blocks)
        ]  # fmt: skip
        for layer, block in enumerate(blocks):
            for unit in block.units:
                if isinstance(unit, RWKV4Unit):
                    unit.place(layer, num_blocks)
        self.blocks = torch.nn.ModuleList(blocks)
        self._num_states = [block.num_states for block in blocks]
        self.norm = torch.nn.RMSNorm(width, **where)
        self.head = torch.nn.Linear(width, output_size, **where)

    def forward(
        self, input: Tensor, state: State | None = None, *, resets: Tensor | None = None, _one_step: bool = False,
        _parallel: Any = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
        """Run the network; the class describes the arguments, results and errors. With `_one_step`, those of `step`."""
        if isinstance(input, Proxy):
            return fx_node(self, input, state, resets)
        if not _one_step:
            self._check_shape(input, 2)
        dtype = dtype_of(self.norm)
        if not self.tokens:
            check_input_dtype(input, dtype)
        if state is not None:
            check_state(state, sum(self._num_states))
        x = self.input_map(input).to(dtype)  # also under autocast the residual stream keeps full precision
        after: tuple[Tensor, ...] = ()
        for block, count in zip(self.blocks, self._num_states, strict=True):
            first = len(after)
            own = None if state is None else state[first : first + count]
            x, states = block(x, own, resets=resets, _one_step=_one_step, _parallel=_parallel)
            after += states
        if self.pool == "last" and not _one_step:
            x = x[:, -1]
        x = self.norm(x)
        if self.pool == "mean":
            x = x.mean(1)
        return self.head(x), after

    @torch.no_grad()
    def step(
        self,
        input: Tensor,
        state: State | None = None,
        *,
        resets: Tensor | None = None,
        state_indices: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One step of `forward`, for streaming inference, without gradients.

        `torch.compile(network.step, fullgraph=True)` makes one graph of all steps with a state, another of one without.

        Args:
            input: `[B, input_size]`, or int64 `[B]` with `tokens`.
            state: as for `forward`. With `state_indices` its tensors have slots for the states of many sequences:
                `[slots, ...]` instead of `[B, ...]`.
            resets: bool `[B]`, true for sequences that begin anew with this step.
            state_indices: int32 or int64 `[B]`, the slot of each sequence, all different; -1 skips the sequence.

        Returns:
            The output `[B, output_size]` and the state after the step. With `state_indices` these are the tensors of
            `state`: their slots are updated in place. The output of a skipped sequence has no meaning.

        Raises:
            RuntimeError: `pool` is "mean", or `state_indices` are given and a block has a `MemoryCache`, for which all
                sequences have the same number of steps.
            TypeError, ValueError: as `forward`, and as `mru_kernels.bmru_step` for `state_indices`.

        Example::

            >>> network = mk.MRUNetwork(3, 5, width=8, num_blocks=1, units=("bmru", "lru"), conv_size=4)
            >>> _, state = network(torch.randn(2, 10, 3))  # two sequences begin
            >>> slots = tuple(t.new_zeros(100, *t.shape[1:]) for t in state)
            >>> indices = torch.tensor([7, 3])
            >>> for slot, t in zip(slots, state):
            ...     slot[indices] = t.detach()
            >>> output, slots = network.step(torch.randn(2, 3), slots, state_indices=indices)
            >>> output.shape, [tuple(t.shape) for t in slots]
            (torch.Size([2, 5]), [(100, 8, 3), (100, 8), (100, 8)])
        """
        if self.pool == "mean":
            raise RuntimeError('step: the mean over all steps, pool="mean", is not known after one')
        self._check_shape(input, 1)
        check_resets(resets, input if input.dim() == 2 else input.unsqueeze(-1), "[batch]")

        def run(before: State | None) -> tuple[Tensor, tuple[Tensor, ...]]:
            return self(input, before, resets=resets, _one_step=True)

        if state_indices is None:
            return run(state)
        slots = self._slots(state, state_indices, input)
        return ops.slots.step(run, slots, state_indices), slots

    def _slots(self, state: State | None, state_indices: Tensor, input: Tensor) -> tuple[Tensor, ...]:
        """The tensors `[slots, ...]` of a state in slots, checked; each block checks what they contain."""
        if any(isinstance(module, MemoryCache) for module in self.modules()):
            raise RuntimeError(
                "state_indices: expected None with a MemoryCache, for which all sequences have the same number of steps"
            )
        check_state(state, sum(self._num_states))
        slots = tuple(state)  # type: ignore[arg-type]
        for i, t in enumerate(slots):
            if t.dim() == 0 or t.shape[0] != slots[0].shape[0]:
                raise ValueError(f"state: expected [{len(slots[0])}, ...] for tensor {i}, got {list(t.shape)}")
        checks.slot_indices(state_indices, input)
        return slots

    def _check_shape(self, input: Tensor, ranks: int) -> None:
        if not self.tokens:
            check_shape(input, self.input_size, "input_size", ranks + 1)
        elif not isinstance(input, Tensor) or input.dtype != torch.int64:
            came = f"a {input.dtype} tensor" if isinstance(input, Tensor) else type(input).__name__
            raise TypeError(f"input: expected token numbers, an int64 tensor, got {came}")
        elif input.dim() != ranks or 0 in input.shape[1:]:
            expected = "[batch, time >= 1]" if ranks == 2 else "[batch]"
            raise ValueError(f"input: expected shape {expected}, got {list(input.shape)}")


def check_one_direction(name: str, module: object) -> torch.nn.Module:
    """The module inside its wrappers. Raise unless it is a module of this package with one direction of time."""
    inner = unwrapped(module) if isinstance(module, torch.nn.Module) else module
    if not isinstance(inner, (MRUBase, DelayConv, *SEVERAL_STATES, MRUBlock, MRUNetwork)):
        kind = type(inner).__name__
        raise TypeError(f"{name}: expected a recurrent module, MRUBlock or MRUNetwork of this package, got {kind}")
    if isinstance(inner, MRUBase) and inner.bidirectional:
        raise ValueError(
            f"{name}: expected one direction, got a bidirectional one, whose second starts at the last step"
        )
    return inner
