"""Modules inside the wrappers of torch, and modules as nodes of `torch.fx`."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Proxy
from torch.nn.parallel import DistributedDataParallel


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The module inside any nesting of `torch.compile` and DistributedDataParallel; any other module unchanged.

    Use it to inspect a module, not to call it: the wrapper's hooks synchronise gradients, so calls must go through it.
    """
    compiled = getattr(module, "_orig_mod", None)  # of OptimizedModule, whose own file takes long to import
    if isinstance(compiled, torch.nn.Module):
        return unwrapped(compiled)
    return unwrapped(module.module) if isinstance(module, DistributedDataParallel) else module


def fx_node(module: torch.nn.Module, input: Proxy, state: object, resets: object = None) -> Any:
    """Record a call under `torch.fx.symbolic_trace` as one node, like the call of a module of torch.nn."""
    tracer: Any = input.tracer
    path = tracer.path_of_module(module)
    if not path:
        kind = type(module).__name__
        raise TypeError(f"input: expected a tensor, got a Proxy; for torch.fx {kind} is one node of a larger module")
    return tracer.create_proxy("call_module", path, (input, state), {} if resets is None else {"resets": resets})
