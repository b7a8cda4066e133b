"""The surrogate derivatives of snnTorch, by the names and scales of `mru_kernels.lif`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

from ..nn.arguments import check_choice

#: The default slope of each surrogate, as in snnTorch's functions.
SLOPES = {"atan": 1.0, "fast_sigmoid": 25.0, "sigmoid": 25.0, "triangle": 1.0, "straight_through": 1.0}

#: By the name of snnTorch's function: the surrogate, the argument that scales it, and k where this argument is 1.
_OF_SNNTORCH = {
    "atan": ("atan", "alpha", 0.5),
    "fast_sigmoid": ("fast_sigmoid", "slope", 1.0),
    "sigmoid": ("sigmoid", "slope", 1.0),
    "straight_through_estimator": ("straight_through", None, 1.0),
}


def surrogate(spike_grad: str | Callable | None, slope: float | None) -> tuple[str, float]:
    """The name and the scale of a surrogate, from a name or a function of `snntorch.surrogate`; None for "atan"."""
    if spike_grad is None:
        spike_grad = "atan"
    if isinstance(spike_grad, str):
        check_choice("spike_grad", spike_grad, tuple(SLOPES))
        return spike_grad, SLOPES[spike_grad] if slope is None else _slope("slope", slope)
    if not callable(spike_grad):
        kind = type(spike_grad).__name__
        raise TypeError(f"spike_grad: expected a name, a function of snntorch.surrogate or None, got {kind}")
    maker = getattr(spike_grad, "__qualname__", type(spike_grad).__name__).partition(".")[0]
    if getattr(spike_grad, "__module__", None) != "snntorch.surrogate" or maker not in _OF_SNNTORCH:
        raise ValueError(
            f"spike_grad: expected one of {', '.join(SLOPES)}, or {', '.join(_OF_SNNTORCH)} of snntorch.surrogate,"
            f" got {maker}"
        )
    if slope is not None:
        raise ValueError(f"slope: expected None with a function of snntorch.surrogate, which has its own, got {slope}")
    name, argument, factor = _OF_SNNTORCH[maker]
    given = 1.0 if argument is None else inspect.getclosurevars(spike_grad).nonlocals[argument]
    return name, factor * _slope(f"spike_grad, {argument}", given)


def _slope(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name}: expected a positive finite number, got {value}")
    return float(value)
