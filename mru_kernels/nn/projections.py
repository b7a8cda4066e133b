"""Units whose projections are modules, for the tools of quantisation that replace `torch.nn.Linear`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .linear import LRU
from .parameters import UnitParameters

NAME = "projection"  # the module of layer k is `projection_l{k}`, or `projection_l{k}_reverse`
RENAMED = {"weight_ih": "weight", "bias_ih": "bias"}


def quantizable(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of a module in which the projection of every unit is a `torch.nn.Linear`, which quantisation tools find.

    torchao and `torch.ao.quantization` replace the `Linear`s of a model, or their weights. The projections of the units
    of this package are parameters, which such tools do not see. In the copy, layer k of a unit has the submodule
    `projection_l{k}`, which computes all gates by one matrix product. The copy has the outputs of `module` and the same
    `state_dict`, so each loads that of the other; a tool may change the copy's. The names in `named_parameters()`
    differ. With `bias=False` the biases of the other gates stay parameters of the unit, added after the product.

    The maps of an LRU stay parameters, because its first one has a factor for each channel.

    Args:
        module: a module that contains units of this package; it stays as it is.

    Raises:
        TypeError: `module` is not a module.
        ValueError: `module` has no unit, or a unit that has a projection module or parametrized parameters already.

    Example::

        >>> network = mk.MRUNetwork(3, 2, width=8, num_blocks=1).eval()
        >>> copied = mk.quantizable(network)
        >>> copied.blocks[0].units[0].projection_l0
        Linear(in_features=8, out_features=16, bias=True)
        >>> x = torch.randn(4, 10, 3)
        >>> torch.equal(copied(x)[0], network(x)[0]), copied.state_dict().keys() == network.state_dict().keys()
        (True, True)
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    units = list(_units(module))
    if not units:
        raise ValueError(f"module: expected a module with units whose projection can be a Linear, got {module}")
    for unit in units:
        missing = [full for names in unit._names_by_scan for _, full in names if full not in unit._parameters]
        if missing:
            raise ValueError(f"module: expected units with plain parameters, got one without {', '.join(missing)}")
    result = copy.deepcopy(module)
    for unit in _units(result):
        _use_modules(unit)
    return result


def _units(module: torch.nn.Module) -> Iterator[UnitParameters]:
    return (m for m in module.modules() if isinstance(m, UnitParameters) and not isinstance(m, LRU))


def _use_modules(unit: UnitParameters) -> None:
    """Move the projections of a unit into modules."""
    moved = ["weight_ih", *(["bias_ih"] if "bias_ih" in unit._names and not unit._gates_without_bias else [])]
    for (_, suffix), names in zip(unit._scans(), unit._names_by_scan, strict=True):
        weight = unit._parameters["weight_ih" + suffix]
        assert weight is not None
        rows, features = weight.shape
        linear = torch.nn.Linear(features, rows, bias="bias_ih" in moved, device="meta")
        for name in moved:
            linear.register_parameter(RENAMED[name], unit._parameters.pop(name + suffix))
        linear.train(unit.training)
        unit.add_module(NAME + suffix, linear)
        names[:] = [(NAME, NAME + suffix), *((name, full) for name, full in names if name not in moved)]
    unit.register_state_dict_post_hook(_rename_saved)
    unit.register_load_state_dict_pre_hook(_rename_loaded)


def _rename_saved(unit: UnitParameters, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    for own, in_module in _renamed(unit, prefix):
        if isinstance(state_dict.get(in_module), Tensor):
            state_dict[own] = state_dict.pop(in_module)


def _rename_loaded(unit: UnitParameters, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for own, in_module in _renamed(unit, prefix):
        if own in state_dict and own.removeprefix(prefix) not in unit._parameters:
            state_dict[in_module] = state_dict.pop(own)


def _renamed(unit: UnitParameters, prefix: str) -> Iterator[tuple[str, str]]:
    """The names of a unit's weights and biases in the `state_dict`, and those that they have in modules."""
    for _, suffix in unit._scans():
        for own, in_module in RENAMED.items():
            yield f"{prefix}{own}{suffix}", f"{prefix}{NAME}{suffix}.{in_module}"
