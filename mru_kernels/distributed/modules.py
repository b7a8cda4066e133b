"""Sequence-parallel modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.func import functional_call

from ..nn import RWKV4, DelayConv, MRUBase, MRUBlock, MRUNetwork, RWKV4ChannelMix, RWKV4TimeMix
from ..nn.wrappers import unwrapped
from .halo import halo
from .ranks import NOT_COMPILED, CollectiveCall, Group, Ranks, describe
from .segments import Scan, scan_over_ranks

_RWKV4 = (RWKV4TimeMix, RWKV4ChannelMix, RWKV4)  # modules without resets
SPLIT = (MRUBase, DelayConv, MRUBlock, MRUNetwork, *_RWKV4)  # modules that `sequence_parallel` takes


def exchanges(module: torch.nn.Module) -> int:
    """The number of scans and convolutions of a call. Raise unless all can be split over ranks."""
    if isinstance(module, MRUNetwork):
        if module.pool is not None:
            raise ValueError(f"pool: expected None for a network over several ranks, got {module.pool!r}")
        return sum(map(exchanges, module.blocks))
    if isinstance(module, MRUBlock):
        return (module.conv is not None) + sum(map(exchanges, module.units))
    if isinstance(module, RWKV4):
        return sum(exchanges(m) for m in module.modules() if isinstance(m, (RWKV4TimeMix, RWKV4ChannelMix)))
    if isinstance(module, RWKV4TimeMix):
        return 2
    if isinstance(module, (DelayConv, RWKV4ChannelMix)):
        return 1
    if not isinstance(module, MRUBase):
        raise TypeError(f"units: expected units of one scan over several ranks, got {type(module).__name__}")
    return module.num_layers * module.num_directions


class SequenceParallel(torch.nn.Module):
    """A recurrent module whose time is split over ranks: see `sequence_parallel`, which makes it.

    Attributes:
        module: the wrapped module. Its attributes, such as `epsilon`, can be read and set on this module.

    Example::

        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> unit = mk.distributed.sequence_parallel(mk.BMRU(3, 8))
        >>> unit.epsilon = 0.5
        >>> unit.module.epsilon
        0.5
        >>> dist.destroy_process_group()
    """

    def __init__(self, module: torch.nn.Module, group: Group) -> None:
        super().__init__()
        exchanges(unwrapped(module))
        self._ranks = Ranks(group)
        self.module = module

    def forward(self, input: Tensor, hx: Any = None, *, resets: Tensor | None = None) -> tuple[Tensor, Any]:
        """Run the module on this rank's segment of the input, and of the mask `resets`.

        Args:
            hx: the state of the whole sequence; for a DelayConv, block or network its tuple of tensors.

        Returns:
            This rank's segment of the output, and the final states of the whole sequence.
        """
        return self._eager(input, hx, resets)

    @torch.compiler.disable(reason=NOT_COMPILED)
    def _eager(self, input: Tensor, hx: Any, resets: Tensor | None) -> tuple[Tensor, Any]:
        inner: Any = unwrapped(self.module)
        is_unit = isinstance(inner, MRUBase)
        with CollectiveCall(self._ranks, scans=exchanges(inner)) as call:
            if not isinstance(input, Tensor):
                raise TypeError(f"input: expected a tensor, got {type(input).__name__}")
            if (
                resets is not None and is_unit and inner.bidirectional
            ):  # its second direction needs the reset that follows
                raise ValueError("resets: expected None for a bidirectional module over several ranks, got a mask")
            if resets is not None and isinstance(inner, _RWKV4):
                raise ValueError(f"resets: expected None for an {type(inner).__name__}, got a mask")
            name = f"{type(inner).__name__}({inner.extra_repr()}), hx {describe(hx)}, resets {resets is not None}"
            options = {} if resets is None else {"resets": resets}
            parallel = _ParallelScans(call, name, sums=is_unit)
            if is_unit:
                return self.module(input, hx, _parallel=parallel, **options)
            parameters = dict(self.module.named_parameters())
            from torch.distributed.tensor import DTensor  # not in every build of torch

            if any(isinstance(p, DTensor) for p in parameters.values()):
                raise ValueError("module: expected no fully_shard inside sequence_parallel; wrap the result in it")
            (parameters,) = parallel.summed([parameters])
            return functional_call(self.module, parameters, (input, hx), {"_parallel": parallel, **options})

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == "module":
                raise
            value = getattr(unwrapped(self.module), name)
            if callable(value):  # a method of the module would run on this rank's segment alone
                raise
            return value

    def __setattr__(self, name: str, value: Any) -> None:
        module = self.__dict__.get("_modules", {}).get("module")
        own = module is None or name.startswith("_") or name in self.__dict__ or hasattr(type(self), name)
        if own or not hasattr(unwrapped(module), name):
            super().__setattr__(name, value)
        else:
            setattr(unwrapped(module), name, value)


class _ParallelScans:
    """The argument `_parallel` of a module's forward pass, which reads parameters and runs scans through it.

    `sums` is whether the gradients of a unit's parameters are summed over the ranks. A network's are summed as a whole.
    """

    def __init__(self, call: CollectiveCall, name: str, sums: bool) -> None:
        self._call = call
        self._name = name
        self._sums = sums

    def parameters(self, read: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """The parameters of a unit, as its scans read them."""
        return self.summed(read) if self._sums else read

    @torch.compiler.disable(reason=NOT_COMPILED)
    def summed(self, read: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """The same parameters; their gradients are summed over the ranks."""
        if not torch.is_grad_enabled():
            return read
        if any("projection" in p for p in read):
            raise TypeError("module: expected a unit with its own parameters, to train it, got one of `quantizable`")
        summed = iter(_SummedGradients.apply(self._call.ranks.group, *(t for p in read for t in p.values())))
        return [{name: next(summed) for name in p} for p in read]

    @torch.compiler.disable(reason=NOT_COMPILED)
    def scan(
        self, unit: Scan, gates: Tensor, initial_state: Tensor | None, *, reverse: bool, cu_seqlens: None,
        chunk_size: int | None, resets: Tensor | None = None, reset_state: Tensor | None = None, **others: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`unit`, which is a module's `_scan`, over the segments of all ranks.

        `others` are further streams `[B, T_rank, D]` and inputs per channel `[D]`.
        """
        if reset_state is not None:
            others["reset_state"] = reset_state

        def scan(inputs: Sequence[Tensor], state: Tensor | None, _offsets: None) -> tuple[Tensor, Tensor]:
            options: dict[str, Any] = dict(zip(others, inputs[1:], strict=True))
            if resets is not None:
                options["resets"] = resets[:, : inputs[0].shape[1]]
            return unit(inputs[0], state, reverse=reverse, cu_seqlens=None, chunk_size=chunk_size, **options)

        state = describe(initial_state)
        what = f"{self._name}, gates {describe(gates)}, initial_state {state}, reverse {reverse}"
        inputs = [gates, *others.values()]
        return scan_over_ranks(self._call, what, scan, inputs, initial_state, None, reverse)

    @torch.compiler.disable(reason=NOT_COMPILED)
    def halo(self, input: Tensor, past: Tensor, resets: Tensor | None) -> tuple[Tensor, Tensor]:
        """The steps before this rank's segment of a convolution, and its last steps of the whole sequence."""
        return halo(self._call, self._name, input, past, resets)


class _SummedGradients(torch.autograd.Function):
    """The identity on tensors that are the same on every rank; it sums their gradients over the ranks."""

    @staticmethod
    def forward(ctx, group: Group, *tensors: Tensor):
        ctx.group = group
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        summed = [grad.clone(memory_format=torch.contiguous_format) for grad in grads]
        for grad in summed:
            dist.all_reduce(grad, group=ctx.group)
        return None, *summed
