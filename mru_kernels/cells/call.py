"""What the public functions of all cells have in common: autocast, checks, and the way to `ops.scan`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from .. import backends, checks, ops


def call(
    cell: ops.Cell,
    inputs: Mapping[str, Tensor],
    initial_state: Tensor | None,
    *,
    epsilon: float | Tensor = 0.0,
    alpha: Tensor | None = None,
    surrogate_scale: float = 1.0,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = backends.CHUNK,
    backend: str | None = None,
    packed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Run `cell` on its inputs, which come by name and in the cell's order.

    An eager call goes to the kernels at once, which refuse what they cannot take. Only then is it examined here, to say
    it in the caller's terms: on a short scan these checks would cost as much as the scan.
    """
    first_to_kernels = cu_seqlens is None and not (torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled())
    if not first_to_kernels:
        inputs, alpha, initial_state = _autocast(inputs, alpha, initial_state)
        _check(cell, inputs, initial_state, alpha, cu_seqlens, packed)
    try:
        streams: list[Tensor] = []
        channel: list[Tensor] = []
        for name, value in inputs.items():
            (channel if _is_per_channel(cell, name, value) else streams).append(value)
        return ops.scan(
            cell, streams, channel, alpha, initial_state, cu_seqlens, checks.epsilon(epsilon),
            checks.surrogate_scale(surrogate_scale), checks.flag("reverse", reverse), packed, chunk_size, backend,
        )  # fmt: skip
    except Exception:
        if first_to_kernels:
            try:
                _check(cell, inputs, initial_state, alpha, cu_seqlens, packed)
            except (TypeError, ValueError) as reason:
                raise reason from None
        raise


def _check(cell, inputs, initial_state, alpha, cu_seqlens, packed) -> None:
    """Raise what names the argument that is not as it must be."""
    channel = {name: value for name, value in inputs.items() if _is_per_channel(cell, name, value)}
    streams = {name: value for name, value in inputs.items() if name not in channel}
    checks.arguments(streams, channel, alpha, initial_state, cu_seqlens, packed, cell.dtypes)
    if cu_seqlens is not None:
        checks.offsets(cu_seqlens, next(iter(inputs.values())).shape[1])


def _is_per_channel(cell: ops.Cell, name: str, value: Tensor) -> bool:
    return name in cell.vectors or (name in cell.either and isinstance(value, Tensor) and value.dim() == 1)


def _autocast(
    inputs: Mapping[str, Tensor], alpha: Tensor | None, initial_state: Tensor | None
) -> tuple[Mapping[str, Tensor], Tensor | None, Tensor | None]:
    """Cast the floating streams to the autocast dtype, so that different ones may meet; float64 stays.

    Other tensors in a half precision that is not the autocast dtype become float32.
    """
    first = next(iter(inputs.values()))
    dtype = checks.autocast_dtype(first.device) if isinstance(first, Tensor) else None
    if dtype is None:
        return inputs, alpha, initial_state

    def stream(t):
        return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t

    def other(t):
        return t.float() if isinstance(t, Tensor) and t.dtype in checks.HALF_DTYPES and t.dtype != dtype else t

    cast = {name: stream(t) if isinstance(t, Tensor) and t.dim() != 1 else other(t) for name, t in inputs.items()}
    return cast, other(alpha), other(initial_state)


def _is_plain() -> bool:
    """Whether a call runs at once, on its tensors as they are."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._is_any_autocast_enabled()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def step(
    cell: ops.Cell,
    inputs: Mapping[str, Tensor],
    state: Tensor,
    *,
    epsilon: float | Tensor = 0.0,
    alpha: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`call` on a single step: streams are `[B, D]`, and so are the results. There is no gradient."""
    if torch.is_grad_enabled():
        for name, value in (*inputs.items(), ("state", state), ("alpha", alpha)):
            if isinstance(value, Tensor) and value.requires_grad:
                raise RuntimeError(
                    f"{cell.name}_step: {name} requires grad, but the step has no gradient; use {cell.name} with T = 1,"
                    " or no_grad"
                )

    def as_scan() -> dict[str, Tensor]:
        return {
            name: value if _is_per_channel(cell, name, value) else value.unsqueeze(1) for name, value in inputs.items()
        }

    refused = None
    try:
        if _is_plain() and not isinstance(epsilon, FakeTensor):
            number = epsilon if isinstance(epsilon, float) else checks.epsilon_value(epsilon)
            return ops.step(cell, list(inputs.values()), state, alpha, number)
        if isinstance(state, Tensor):  # None would be zeros
            h, after = call(cell, as_scan(), state, epsilon=epsilon, alpha=alpha)
            return h.squeeze(1), after
    except Exception as error:
        refused = error
    (first_name, first), *others = inputs.items()
    checks.tensor(first_name, first, 2, "[batch, channels]")
    for name, value in (("state", state), *others):
        if not _is_per_channel(cell, name, value):
            checks.like(name, value, first, first.shape, "[batch, channels]")
    _check(cell, as_scan(), state, alpha, None, 0)
    checks.epsilon(epsilon)
    raise refused
