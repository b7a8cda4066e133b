"""The private names of torch that the package uses, in one place: tests/test_torch_private.py calls each.

A torch release that drops one fails here, by name. Most of them make calls cheap: the dispatcher's own route to an
autograd kernel takes longer than a short scan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch._higher_order_ops.scan import scan_op
from torch._subclasses.fake_tensor import FakeTensor, is_fake
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction as SingleLevelFunction
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _disable_current_modes as disable_modes
from torch.utils._pytree import tree_leaves

__all__ = [
    "FAKE_MODE",
    "BelowAutograd",
    "DisableFunctorch",
    "DisableTorchFunction",
    "EnableTorchFunction",
    "FakeTensor",
    "NoGrad",
    "OpOverload",
    "SingleLevelFunction",
    "add_batch_dim",
    "any_autocast",
    "assume_constant_result",
    "direct_apply",
    "disable_modes",
    "dispatch_mode",
    "enable_forward_gradients",
    "enable_single_level_autograd_function",
    "has_hooks",
    "has_kernel",
    "has_tangent",
    "has_tangent_below_python",
    "in_forward_mode",
    "is_batched",
    "is_fake",
    "is_legacy_batched",
    "is_tracing",
    "is_wrapped",
    "may_have_tangents",
    "modes_active",
    "primals",
    "remove_batch_dim",
    "scan_op",
    "transforms_active",
    "tree_leaves",
    "unwrapped_tensor",
    "without_modes",
]

OpOverload = torch._ops.OpOverload

#: A context in which ops run their kernels below autograd.
BelowAutograd = torch._C._AutoDispatchBelowAutograd
#: Whether `torch.jit.trace` records.
is_tracing = torch._C._is_tracing
#: Whether a transform of torch.func is active.
transforms_active = torch._C._are_functorch_transforms_active
any_autocast = torch._C._is_any_autocast_enabled
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key

# Tensors that torch.func wraps, and batched ones among them; those of `is_grads_batched=True` are of the older vmap.
is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
is_batched = torch._C._functorch.is_batchedtensor
unwrapped_tensor = torch._C._functorch.get_unwrapped
is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor
remove_batch_dim = torch._remove_batch_dim
add_batch_dim = torch._add_batch_dim

# Modes: a tensor that outlives them is made without any.
DisableTorchFunction = torch._C.DisableTorchFunction
EnableTorchFunction = torch._C._EnableTorchFunction  # inside the one above
DisableFunctorch = torch._C._DisableFuncTorch
modes_active = torch._C._len_torch_dispatch_stack
dispatch_mode = torch._C._get_dispatch_mode
FAKE_MODE = torch._C._TorchDispatchModeKey.FAKE

#: A context that turns forward-mode gradients on or off.
enable_forward_gradients = forward_ad._set_fwd_grad_enabled


@contextmanager
def without_modes() -> Iterator[None]:
    """A context for tensors that outlive it: no mode makes them fake or inference tensors, no transform wraps them."""
    with DisableTorchFunction(), disable_modes(), DisableFunctorch(), torch.inference_mode(False):
        yield


class NoGrad:
    """`torch.no_grad()` for code that runs with gradients, without what makes it as long as a short step."""

    def __enter__(self) -> None:
        torch._C._set_grad_enabled(False)

    def __exit__(self, *_: object) -> None:
        torch._C._set_grad_enabled(True)


def direct_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` where no transform of torch.func is active, without 5 us of Python code for transforms."""
    direct = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def apply(*arguments: Any) -> Any:
        for argument in arguments:
            if isinstance(argument, torch.Tensor) and is_wrapped(argument):  # by a transform that has ended
                return function.apply(*arguments)
        return direct(*arguments)

    return apply


def in_forward_mode() -> bool:
    """Whether a level of forward-mode differentiation is entered."""
    return forward_ad._current_level >= 0


def may_have_tangents() -> bool:
    """Whether forward mode may be on. Code that is being compiled enters it below Python, where nothing tells."""
    return in_forward_mode() or transforms_active() or modes_active() > 0


def has_tangent(t: torch.Tensor) -> bool:
    """Whether `t` has a tangent at the current level of forward-mode differentiation."""
    return in_forward_mode() and forward_ad.unpack_dual(t).tangent is not None


def has_tangent_below_python(t: torch.Tensor | None) -> bool:
    """`has_tangent` in the autograd kernel of an op, also in code that is being compiled."""
    return t is not None and torch._VF._unpack_dual(t, level=0)[1] is not None


def primals(ctx) -> list[Any]:
    """The tensors that the jvp of a Function was given by `save_for_forward`, without their tangents.

    Torch turns forward mode off in a jvp, also for the levels around this one. With these tensors it may be on.
    """
    return [None if t is None else torch._VF._unpack_dual(t, level=0)[0] for t in ctx.saved_tensors]


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether a call of `module` runs hooks: its own or those of all modules."""
    forward = module._forward_pre_hooks or module._forward_hooks
    return bool(forward or module._backward_pre_hooks or module._backward_hooks or _has_any_global_hook())


def assume_constant_result(function: Callable) -> Callable:
    """What `torch.compiler.assume_constant_result` does, without its import of the compiler, which takes seconds."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
