"""Converts models of snnTorch to the neurons of this package."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch

from .currents import Alpha, Synaptic
from .leaky import Lapicque, Leaky
from .neuron import Neuron

_NEURONS: dict[str, type[Neuron]] = {cls.__name__: cls for cls in (Leaky, Lapicque, Synaptic, Alpha)}
_RESETS = {"_base_sub": "subtract", "_base_zero": "zero", "_base_int": "none"}  # by the method of a neuron of snnTorch


def from_snntorch(module: torch.nn.Module) -> Any:
    """A copy of a neuron or model of snnTorch, with the neurons of `mru_kernels.snn`.

    All neurons of the model become those of this package, with the same values, names and options; the rest is copied.
    A model loses its loop over time: its layers read whole sequences `[T, B, ...]`, as each neuron does.

    Args:
        module: a neuron of `snntorch`, or a module that contains some; it stays as it is.

    Returns:
        The copy. Its `state_dict` is that of `module`.

    Raises:
        TypeError: `module` is not a module, or contains a neuron of snnTorch other than Leaky, Lapicque, Synaptic and
            Alpha.
        ValueError: `module` contains no neuron of snnTorch, or one with an option that has no counterpart; the message
            names the neuron and the option.

    Example::

        >>> import snntorch
        >>> lif = mk.snn.from_snntorch(snntorch.Leaky(beta=0.9, learn_beta=True))
        >>> spk, mem = lif(torch.randn(100, 8, 64))
        >>> spk.shape
        torch.Size([100, 8, 64])
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    theirs = {path: part for path, part in module.named_modules() if _is_neuron(part)}
    if not theirs:
        raise ValueError(f"module: expected a neuron of snnTorch or a module that contains one, got {module}")
    copies: dict[int, Any] = {id(neuron): _converted(path, neuron) for path, neuron in theirs.items()}
    return copy.deepcopy(module, copies)


def _is_neuron(module: torch.nn.Module) -> bool:
    """Whether a module is a neuron of snnTorch, which this package does not import."""
    return any(cls.__name__ == "SpikingNeuron" and _is_theirs(cls) for cls in type(module).__mro__)


def _is_theirs(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "snntorch"


def _converted(path: str, theirs: Any) -> Neuron:
    place = f"module.{path}" if path else "module"
    kind = type(theirs).__name__
    if kind not in _NEURONS or not _is_theirs(type(theirs)):
        raise TypeError(f"{place}: expected one of {', '.join(_NEURONS)} of snnTorch, got {kind}")
    reset = _RESETS[theirs.state_function.__name__]
    if reset != theirs.reset_mechanism:
        raise ValueError(
            f"{place}: reset_mechanism: expected {reset!r}, by which the neuron was made and which it computes, got"
            f" {theirs.reset_mechanism!r}, set later"
        )
    values = theirs.state_dict(keep_vars=True)
    names = inspect.signature(_NEURONS[kind]).parameters
    options = {name: getattr(theirs, name) for name in names if hasattr(theirs, name) and name not in ("R", "C")}
    if theirs.surrogate_disable:
        del options["spike_grad"]
    parameters = [f"learn_{name}" for name, value in values.items() if isinstance(value, torch.nn.Parameter)]
    make: Any = _NEURONS[kind]
    try:
        neuron = make(**options, **dict.fromkeys(parameters, True))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{place}: {error}") from None
    for name, value in values.items():
        own = value.detach().clone()
        if isinstance(value, torch.nn.Parameter):
            neuron.register_parameter(name, torch.nn.Parameter(own, value.requires_grad))
        else:
            neuron.register_buffer(name, own)
    neuron._read()
    return neuron.train(theirs.training)
