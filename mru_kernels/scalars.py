"""The scalars of cells: their names, the ranges of their values, and how a call takes them.

A scheduled scalar, which may change between calls, comes to an op as a 0-dim float64 tensor on the CPU: torch.compile
specialises on a float, and compiles again for every new value.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import torch_private as private

_MOST_KNOWN = 1024  # tensors that a scalar keeps for values that it has met


@dataclass(frozen=True)
class Scalar:
    """A scalar argument.

    Attributes:
        name: of the argument.
        least, most: the range of its values, ends included.
        scheduled: whether it may change between calls; then it may be given as a 0-dim tensor.
    """

    name: str
    least: float
    most: float
    scheduled: bool = False
    _known: dict[float, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def check(self, value: float) -> None:
        """Raise ValueError unless `value` is in the range."""
        if not self.least <= value <= self.most:
            expected = f"a value in [{self.least:g}, {self.most:g}]"
            if self.most == sys.float_info.max:
                expected = "a positive finite number" if self.least > 0.0 else "a finite number"
            raise ValueError(f"{self.name}: expected {expected}, got {value}")

    def number(self, value: float | Tensor) -> float:
        """`value` as a number, checked. In compiled code the kernel checks the range of a scheduled scalar."""
        if type(value) is float and not self.scheduled:  # the rest takes 0.3 us
            self.check(value)
            return value
        if self.scheduled and isinstance(value, Tensor):
            self._check_tensor(value)
            if torch.compiler.is_compiling():
                return value.item()
            if isinstance(value, private.FakeTensor):
                raise ValueError(f"{self.name}: expected a number, got a fake tensor, which has none")
            if _in_fake_mode():
                with private.disable_modes():
                    value = value.item()
            else:
                value = value.item()
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            expected = "a float or a 0-dim tensor" if self.scheduled else "a float"
            raise TypeError(f"{self.name}: expected {expected}, got {type(value).__name__}")
        if not (self.scheduled and torch.compiler.is_compiling()):
            self.check(value)
        return float(value)

    def tensor(self, value: float | Tensor) -> Tensor:
        """`value` as a 0-dim float64 CPU tensor, its range checked if it is known before the kernel runs."""
        compiling = torch.compiler.is_compiling()
        plain = not (compiling or private.is_tracing()) and private.modes_active() == 0
        if plain and isinstance(value, float):
            known = self._known.get(value)
            if known is not None:
                return known
        if plain and type(value) is Tensor and _is_double(value) and self.least <= value.item() <= self.most:
            return value
        if isinstance(value, Tensor) and (compiling or not has_value(value)):
            self._check_tensor(value)
            return _double(value)
        number = self.number(value)
        if compiling:  # a sum is not specialised on the number, as `torch.full` is
            return torch.zeros((), dtype=torch.float64, device="cpu") + number
        if isinstance(value, Tensor) and (plain or not _in_fake_mode()):
            return _double(value)
        if not plain:  # becomes a constant of the trace, or a fake tensor under a fake mode
            return torch.full((), number, dtype=torch.float64, device="cpu")
        made = _constant(number)
        if len(self._known) < _MOST_KNOWN:
            self._known[number] = made
        return made

    def own(self, value: float | Tensor) -> Tensor:
        """`value` as a new tensor, which a module keeps: a real one whatever mode or transform it is made under."""
        if torch.compiler.is_compiling():
            return self.tensor(value).clone()
        return _constant(self.number(value))

    def _check_tensor(self, value: Tensor) -> None:
        if value.dim() != 0 or value.device.type != "cpu" or not value.is_floating_point():
            came = f"a {value.dtype} tensor of shape {list(value.shape)} on {value.device}"
            raise ValueError(f"{self.name}: expected a float or a 0-dim floating CPU tensor, got {came}")
        if value.requires_grad or (not torch.compiler.is_compiling() and private.has_tangent(value)):
            has = "requires grad" if value.requires_grad else "has a tangent"
            raise ValueError(f"{self.name}: expected a schedule, not a trained parameter; got a tensor that {has}")


#: The share of the old state that a write keeps.
EPSILON = Scalar("epsilon", 0.0, 1.0, scheduled=True)
#: The k of surrogate derivatives.
SURROGATE_SCALE = Scalar("surrogate_scale", sys.float_info.min * sys.float_info.epsilon, sys.float_info.max)


def has_value(t: Tensor) -> bool:
    """Whether `t.item()` has a value: False for meta and fake tensors and for tensors that vmap maps over."""
    while private.is_wrapped(t):
        if private.is_batched(t):
            return False
        t = private.unwrapped_tensor(t)
    return not (t.is_meta or isinstance(t, private.FakeTensor))


def _is_double(t: Tensor) -> bool:
    """Whether `t` is what an op takes, a 0-dim float64 CPU tensor without a gradient. No transform wraps it."""
    is_scalar = t.dtype is torch.float64 and t.dim() == 0 and t.is_cpu
    return is_scalar and not (t.requires_grad or private.is_wrapped(t))


def _double(t: Tensor) -> Tensor:
    return t if t.dtype is torch.float64 else t.to(torch.float64)  # `to` is slow even if there is nothing to do


def _in_fake_mode() -> bool:
    """Whether a FakeTensorMode is active; ops then refuse real tensors."""
    return private.modes_active() > 0 and private.dispatch_mode(private.FAKE_MODE) is not None


def _constant(value: float) -> Tensor:
    """A tensor that outlives what it is made under."""
    with private.without_modes():
        return torch.full((), value, dtype=torch.float64, device="cpu")
