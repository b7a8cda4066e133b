"""Sequence parallelism over torch.distributed: each rank has one contiguous segment of time.

For every unit but Aaren and RWKV-4, a segment acts on the state of each channel as one affine map, `s -> a s + b`.
Ranks exchange these maps, which are two numbers per sequence and channel. Each rank composes the maps of the segments
before its own and scans its segment from the resulting state. The backward pass composes the adjoint maps in the other
direction. Every rank composes in the same order, so results are the same from run to run. Segments of the softmax
recurrence exchange maps of another kind: the state that a segment makes from an empty one, and the sums of its decays.

Where a composed state leaves the range of its dtype, ranks scan their segments again, one after another, each from the
state that left the segment before. A convolution gets the steps before its segment from the ranks to its left.

`mru_kernels` imports this package when it is first used.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..define import DefinedCell
from ..nn.wrappers import unwrapped
from .modules import SPLIT, SequenceParallel
from .ops import parallel_op, scans
from .ranks import Group
from .segments import Scan

__all__ = ["SequenceParallel", "sequence_parallel"]


def sequence_parallel(op_or_module: Scan | torch.nn.Module, mesh_or_group: DeviceMesh | Group | None = None) -> Any:
    """An op or a module whose time axis is split into one segment per rank.

    Args:
        op_or_module: the scan of a cell, such as `bmru` or one that `define_cell` made, `softmax_recurrence`, `wkv`, or
            a module of this package: one with the interface of `torch.nn.GRU`, such as `BMRU`, a `DelayConv`, an
            `RWKV4TimeMix`, `RWKV4ChannelMix` or `RWKV4`, an `MRUBlock`, or an `MRUNetwork` without `pool`. The units of
            a block are of the first kind or "rwkv4". `torch.compile` or DistributedDataParallel may wrap the module.
        mesh_or_group: the ranks, in the order of their segments: a process group, a one-dimensional DeviceMesh, or None
            for the default group. Segments may differ in length and may be empty; those of a block, a network or RWKV-4
            have at least one step. Only one thread at a time may call functions of one group.

    Returns:
        For an op, a function of the same arguments. Streams are this rank's segment `[B, T_rank, D]`. All other
        arguments are the same on every rank: `initial_state` is that of the whole sequence, and `cu_seqlens` counts
        from the start of the whole. The function returns this rank's segment of h and the final state of the whole.
        Gradients are those of the sum of the losses of all ranks. Each rank gets partial gradients of the arguments
        that are the same on every rank; sum them over the ranks.

        For a module, a `SequenceParallel` module of the same arguments, except PackedSequence. Its input and output are
        this rank's segment; `hx` and `h_n`, or the state, are those of the whole sequence. Gradients of parameters are
        summed over the ranks, so DistributedDataParallel along the batch needs only its own group. Attributes set on
        it, such as `epsilon`, are set on the module. `copy.deepcopy` shares the process group; pickle raises a
        TypeError.

        Every rank must make the same calls and backward passes in the same order. Ranks compare their calls. If one
        rank raises, all others raise too, and the next call works again. If one rank skips a call or a backward pass,
        all ranks raise from then on; a new process group is needed. A scan allows one backward pass; a second one
        raises, also with `retain_graph=True`. Under `torch.compile` a call runs eagerly, between compiled graphs;
        `fullgraph=True` fails to compile.

    Raises:
        TypeError, ValueError: an argument is not as described; in a call also the errors of the op.
        RuntimeError: torch.distributed is not initialised; another rank raised or makes another call, which the message
            names; another thread is in a call of the group; a second backward pass; errors of the process group, for
            instance after its timeout.

    Example::

        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # or by torchrun
        >>> unit = mk.distributed.sequence_parallel(mk.BMRU(3, 8))
        >>> output, h_n = unit(torch.randn(2, 10, 3))  # this rank's segment of the input
        >>> output.shape, h_n.shape
        (torch.Size([2, 10, 8]), torch.Size([1, 2, 8]))
        >>> dist.destroy_process_group()
    """
    group = _group(mesh_or_group)
    if isinstance(op_or_module, torch.nn.Module) and isinstance(unwrapped(op_or_module), SPLIT):
        return SequenceParallel(op_or_module, group)
    if not isinstance(op_or_module, DefinedCell) and op_or_module not in scans():
        names = ", ".join(op.__name__ for op in scans())
        raise TypeError(
            f"op_or_module: expected one of {names}, a defined cell or a recurrent module, got {op_or_module!r}"
        )
    return parallel_op(cast(Scan, op_or_module), group)


def _group(mesh_or_group: DeviceMesh | Group | None) -> Group:
    if not dist.is_available():
        raise RuntimeError("mesh_or_group: expected a torch build with torch.distributed, and this one has none")
    if not dist.is_initialized():
        raise RuntimeError("mesh_or_group: expected torch.distributed to be initialised, and it is not")
    if mesh_or_group is None:
        return dist.distributed_c10d._get_default_group()
    if isinstance(mesh_or_group, DeviceMesh):
        if mesh_or_group.ndim != 1:
            raise ValueError(f"mesh_or_group: expected a mesh of one dimension, got {mesh_or_group.ndim}")
        return mesh_or_group.get_group()
    if not isinstance(mesh_or_group, Group):
        kind = type(mesh_or_group).__name__
        raise TypeError(f"mesh_or_group: expected a process group, a DeviceMesh or None, got {kind}")
    return mesh_or_group
