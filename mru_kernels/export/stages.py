"""What `export.c` and `export.nir` share: checks of modules, and the stages of a Sequential."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.nn.utils import parametrize


def kind(module: torch.nn.Module) -> type:
    """The class of a module; a parametrization has changed it."""
    return parametrize.type_before_parametrizations(module)


def check_kind(what: str, module: torch.nn.Module, allowed: Sequence[type], hint: str = "") -> None:
    """Raise unless the class is one of these. A subclass is not, since it may compute something else."""
    if kind(module) not in allowed:
        *names, last = (cls.__name__ for cls in allowed)
        raise TypeError(
            f"module: expected {what} of class {', '.join(names)} or {last}, got {kind(module).__name__}{hint}"
        )


def check_direction(unit: Any) -> None:
    if unit.bidirectional:
        raise ValueError(f"module: expected one direction, got a bidirectional {kind(unit).__name__}")


def check_parameters(module: torch.nn.Module) -> None:
    """Raise unless all parameters are finite float32."""
    for prefix, child in module.named_modules():
        computed = child.parametrizations if parametrize.is_parametrized(child) else {}
        if isinstance(child, parametrize.ParametrizationList):
            continue
        for own in [*child._parameters, *computed]:
            name, parameter = f"{prefix}.{own}".lstrip("."), getattr(child, own)
            if parameter is None:
                continue
            if parameter.dtype != torch.float32:
                raise TypeError(f"module: expected float32 parameters, got {parameter.dtype} {name}")
            if parameter.is_meta:
                raise ValueError(f"module: expected parameters with values, got {name} on the meta device")
            if not parameter.isfinite().all():
                raise ValueError(f"module: expected finite parameters, got {name} with nan or inf")


def stage_sizes(stages: Iterable[Any]) -> list[tuple[int, int]]:
    """The numbers of input and output features of stages that are units, `Linear` or `ReLU`."""
    sizes: list[tuple[int, int]] = []
    for i, stage in enumerate(stages):
        if isinstance(stage, torch.nn.ReLU):
            if not sizes:
                raise ValueError("module: expected a Sequential that begins with a Linear or a unit, got a ReLU")
            sizes.append((sizes[-1][1], sizes[-1][1]))
            continue
        linear = isinstance(stage, torch.nn.Linear)
        inputs, outputs = (stage.in_features, stage.out_features) if linear else (stage.input_size, stage.hidden_size)
        if sizes and sizes[-1][1] != inputs:
            raise ValueError(f"module: expected stage {i} to read {sizes[-1][1]} features, got {inputs}")
        sizes.append((inputs, outputs))
    if not sizes:
        raise ValueError("module: expected a Sequential with stages, got an empty one")
    return sizes
