"""Training in blocks of time. A block saves only its input and initial states; the backward pass runs it again."""

from __future__ import annotations

import functools
import weakref
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from . import checks
from . import torch_private as private
from .nn import MRUBase, MRUNetwork, WriteOrHold
from .nn.arguments import check_sizes
from .nn.network import check_one_direction
from .nn.wrappers import fx_node, unwrapped

__all__ = ["Blocked", "blocked"]


class Blocked(torch.nn.Module):
    """A module that runs in blocks of time; `blocked` checks the arguments and makes it.

    Attributes:
        network: the module that runs on each block. Names of parameters in `state_dict` begin with `network.`.
        steps, inner, offload: the arguments of `blocked`.

    Example::

        >>> run = mk.blocked(mk.MRUNetwork(3, 5, width=8, num_blocks=2), steps=16)
        >>> output, state = run(torch.randn(2, 100, 3))
        >>> output.shape, len(state)
        (torch.Size([2, 100, 5]), 2)
    """

    def __init__(self, network: torch.nn.Module, steps: int, inner: int | None, offload: bool) -> None:
        super().__init__()
        self.network = network
        self.steps = steps
        self.inner = inner
        self.offload = offload

    def forward(self, input: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """The output and the final state of `network(input, state)`, computed block by block.

        Args:
            input: the input of `network`, such as `[B, T, E]`, in a dtype that `network` accepts.
            state: the state of `network`, or None.

        Raises:
            TypeError, ValueError: as `network`, and for an `input` that is not a tensor or has no time; the message
                names the argument.
        """
        if isinstance(input, Proxy):
            return fx_node(self, input, state)
        if not torch.compiler.is_compiling() and private.is_tracing():
            raise RuntimeError("blocked: torch.jit.trace cannot record a run of blocks; trace the network itself")
        if not isinstance(input, Tensor):
            raise TypeError(f"input: expected a tensor, got {type(input).__name__}")
        checks.dense("input", input, "padding")
        if input.dim() < 2:
            raise ValueError(f"input: expected at least 2 dimensions, got shape {list(input.shape)}")
        module = unwrapped(self.network)
        without_batch = isinstance(module, MRUBase) and input.dim() == 2
        time = 0 if without_batch or not getattr(module, "batch_first", True) else 1
        sizes = (self.steps,) if self.inner is None else (self.steps, self.inner)
        return self._run(sizes, time, self.offload, input, state)

    def _run(self, sizes: tuple[int, ...], time: int, offload: bool, input: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Cut the dimension `time` into blocks of `sizes[0]` steps, and cut each into blocks of the other sizes."""
        if not sizes:
            return self.network(input, state)
        blocks, outputs, host = input.split(sizes[0], time), [], None
        # A compiled graph takes epsilon as an input, so both runs of a block use the same epsilon.
        options: Any = {} if torch.compiler.is_compiling() else {"context_fn": self._contexts}
        for block in blocks:
            # The hooks see only tensors that are arguments themselves, so the tuple of states is flattened.
            several = isinstance(state, (tuple, list))
            again = functools.partial(self._block, sizes[1:], time, several)
            arguments: list[Any] = [block, *(state if several else (state,))]
            hooks: Any = nullcontext()
            if offload:
                # Copies are contiguous. With other strides in the second run torch could choose other kernels.
                arguments = [a.contiguous() if isinstance(a, Tensor) else a for a in arguments]
                host = _HostCopies(host)
                hooks = torch.autograd.graph.saved_tensors_hooks(host.pack, host.unpack)
            with hooks:
                output, state = checkpoint(again, *arguments, use_reentrant=False, **options)
            outputs.append(output)
        pool = getattr(unwrapped(self.network), "pool", None)
        if pool == "last":
            return outputs[-1], state
        if pool == "mean":  # the head is linear, so the head of the mean is the mean of the blocks' outputs
            shares = [block.shape[time] / input.shape[time] for block in blocks]
            return sum(share * output for share, output in zip(shares, outputs, strict=True)), state
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, time)), state

    def _block(self, sizes: tuple[int, ...], time: int, several: bool, input: Tensor, *state: Any) -> Any:
        return self._run(sizes, time, False, input, state if several else state[0])

    def _contexts(self) -> tuple[Any, Any]:
        """Contexts for the first run of a block and for later runs, which use the epsilon of the first."""
        return nullcontext(), _Epsilons([m for m in self.network.modules() if isinstance(m, WriteOrHold)])

    def extra_repr(self) -> str:
        return f"steps={self.steps}, inner={self.inner}, offload={self.offload}"


class _Epsilons:
    """A context that gives units the epsilons of the time when it was created. It may be entered repeatedly."""

    def __init__(self, units: list[WriteOrHold]) -> None:
        self._of_call = [(unit, unit._epsilon) for unit in units]
        self._of_now: list[Tensor] = []

    def __enter__(self) -> None:
        self._of_now = [unit._epsilon for unit, _ in self._of_call]
        for unit, value in self._of_call:
            unit._epsilon = value

    def __exit__(self, *error: object) -> None:
        for (unit, _), value in zip(self._of_call, self._of_now, strict=True):
            unit._epsilon = value


class _HostCopies:
    """The saved tensors of one block, in host memory.

    For CUDA tensors the memory is pinned and a side stream copies. Reading a block also starts the copies of the block
    before it, which the backward pass reads next.
    """

    def __init__(self, before: _HostCopies | None) -> None:
        self._before = weakref.ref(before) if before is not None else lambda: None
        self._saved: list[tuple[Tensor, torch.device]] = []
        self._fetched: dict[int, Tensor] = {}
        self._ready: dict[torch.device, torch.cuda.Event] = {}

    @torch.no_grad()
    def pack(self, tensor: Tensor) -> int:
        if tensor.device.type == "cuda":
            side = _side_stream(tensor.device)
            side.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(side):
                host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
                host.copy_(tensor, non_blocking=True)
            tensor.record_stream(side)  # the allocator may reuse its memory only after the copy
        else:
            host = tensor.clone() if tensor.is_meta else tensor.to("cpu", copy=True)  # a meta tensor has no values
        self._saved.append((host, tensor.device))
        return len(self._saved) - 1

    @torch.no_grad()
    def unpack(self, index: int) -> Tensor:
        if index not in self._fetched:
            self._fetch()
        tensor = self._fetched.pop(index)
        if tensor.device.type == "cuda":
            current = torch.cuda.current_stream(tensor.device)
            current.wait_event(self._ready[tensor.device])
            tensor.record_stream(current)
        before = self._before()
        if before is not None and not before._fetched:
            before._fetch()
        return tensor

    def _fetch(self) -> None:
        for index, (host, device) in enumerate(self._saved):
            if device.type == "cuda":
                with torch.cuda.stream(_side_stream(device)):
                    self._fetched[index] = host.to(device, non_blocking=True)
                    self._ready[device] = torch.cuda.current_stream(device).record_event()
            else:
                self._fetched[index] = host.to(device)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def blocked(network: torch.nn.Module, steps: int, *, inner: int | None = None, offload: bool = False) -> Blocked:
    """Run a module in blocks of time and again in the backward pass, to train on long sequences in little memory.

    Between the passes a block keeps only its input and its initial states. The backward pass goes through the blocks
    from the last to the first. It runs each again, and passes the gradient of its initial states to the block before.
    Results and gradients are those of `network(input, state)`, except that a matrix product over fewer steps may round
    differently, and may flip a gate whose inputs are nearly tied.

    Let T be the number of steps, s the bytes of the states after one step, and a the bytes that the backward pass of
    one step needs. Beyond its input and output a call needs:

        call                                peak on the device      bytes on the host   steps forward
        network                             T a                     0                   T
        steps=C                             (T/C) s + C a           0                   2 T
        steps=C, offload=True               s + C a                 (T/C) s             2 T
        steps=C1, inner=C2                  (T/C1 + C1/C2) s + C2 a 0                   3 T
        steps=C1, inner=C2, offload=True    (1 + C1/C2) s + C2 a    (T/C1) s            3 T

    Offloading also moves the inputs of the blocks to the host. The second row is least at C = sqrt(T s / a). Torch also
    keeps the autograd graph of every innermost block, without its tensors: about 50 KiB of host memory for each
    `MRUBlock`. So `inner` helps if device memory is scarcer than host memory. In the modes gated and sparse the state
    of a `MemoryCache` grows with time, so the initial states of all blocks grow with the square of T / C.

    Args:
        network: an `MRUNetwork`, an `MRUBlock`, a `MemoryCache`, a `MesaNet`, a part of RWKV-4 or a recurrent module
            of one direction. `torch.compile` may wrap it. DistributedDataParallel may wrap the result.
        steps: number of steps of a block, at least 1. It need not divide T.
        inner: number of steps of the blocks inside a block, less than `steps`; None for one level of blocks.
        offload: whether to keep the saved inputs and states of blocks in host memory. For CUDA tensors the memory is
            pinned and a side stream copies. CPU tensors are copied too. Not yet run on a GPU.

    Returns:
        A `Blocked` module, called as `output, state = run(input, state=None)`. Arguments and results are those of
        `network`, without `PackedSequence`. Gradients also pass through the states. When a block runs again, dropout
        draws the same numbers and epsilon has the value of the call.

    Raises:
        TypeError, ValueError: an argument is not as described, or the module is bidirectional; the message names it.

    Example::

        >>> network = mk.MRUNetwork(3, 5, width=8, num_blocks=2, pool="last")
        >>> run = mk.blocked(network, steps=64, inner=16)
        >>> output, state = run(torch.randn(2, 1000, 3))
        >>> output.square().mean().backward()
        >>> output.shape
        torch.Size([2, 5])
    """
    module = check_one_direction("network", network)
    if any(isinstance(m, DistributedDataParallel) for m in network.modules()):
        raise ValueError("network: expected no DistributedDataParallel inside, got one; wrap the result instead")
    if isinstance(module, MRUNetwork) and module.pool == "mean" and not isinstance(module.head, torch.nn.Linear):
        raise ValueError(f'network: expected a Linear head with pool="mean", got {type(module.head).__name__}')
    check_sizes(steps=steps)
    if inner is not None:
        check_sizes(inner=inner)
        if inner >= steps:
            raise ValueError(f"inner: expected fewer than steps={steps}, got {inner}")
    return Blocked(network, steps, inner, checks.flag("offload", offload))
