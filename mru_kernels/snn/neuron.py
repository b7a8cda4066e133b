"""What the neurons of snnTorch have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import checks
from ..nn.arguments import check_choice
from ..scalars import has_value
from . import surrogates

_NUMBERS = {"subtract": 0, "zero": 1, "none": 2}  # in `reset_mechanism_val`

#: Arguments of snnTorch that have one value here, with the reason.
_FIXED: dict[str, tuple[bool, str]] = {
    "init_hidden": (False, "no state lives in a module; a call takes it as an argument and returns it"),
    "inhibition": (False, "only the neuron with the largest membrane spikes, so the neurons of a layer are coupled"),
    "state_quant": (False, "its function would run at every step"),
    "reset_delay": (
        True, 'its reset takes back that of the step before; mk.lif with reset="subtract_decayed" resets without delay'
    ),
}  # fmt: skip


class Neuron(torch.nn.Module):
    """What the neurons have in common. Each class describes its own arguments."""

    resets: ClassVar[Mapping[str, str]]
    """The resets, by snnTorch's name, with those of `mk.lif`."""
    constants: ClassVar[tuple[str, ...]] = ("beta",)
    """The names of the values that `repr` shows."""

    threshold: Tensor
    graded_spikes_factor: Tensor
    reset_mechanism_val: Tensor
    beta: Tensor

    def __init__(
        self, *, threshold: Any, spike_grad: Any, slope: float | None, surrogate_disable: bool, learn_threshold: bool,
        reset_mechanism: str, graded_spikes_factor: Any = 1.0, learn_graded_spikes_factor: bool = False, **fixed: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in fixed.items():
            expected, reason = _FIXED[name]
            if value is not expected:
                raise ValueError(f"{name}: expected {expected}, got {value!r}; {reason}")
        self.spike_grad, self.slope = surrogates.surrogate(spike_grad, slope)
        self.surrogate_disable = checks.flag("surrogate_disable", surrogate_disable)
        self._ones: set[str] = set()
        self._own("threshold", threshold, learn_threshold)
        self._own("graded_spikes_factor", graded_spikes_factor, learn_graded_spikes_factor)
        self._own("reset_mechanism_val", 0)
        self.reset_mechanism = reset_mechanism

    def _own(self, name: str, value: Any, learned: bool = False) -> None:
        """Make a value, of any shape that broadcasts with the features, a parameter or a buffer."""
        if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
            raise TypeError(f"{name}: expected a float or a tensor, got {type(value).__name__}")
        tensor = value if isinstance(value, Tensor) else torch.tensor(value, device=torch.get_default_device())
        if checks.flag(f"learn_{name}", learned):
            tensor = tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())
            self.register_parameter(name, torch.nn.Parameter(tensor))
        else:
            self.register_buffer(name, tensor)
        self._note_ones(name)

    def _note_ones(self, *names: str) -> None:
        """Note which buffers are 1. If each call read them, it would wait for the GPU."""
        for name in names:
            value = getattr(self, name)
            is_fixed = not isinstance(value, torch.nn.Parameter)
            is_one = is_fixed and has_value(value) and bool((value == 1).all())
            (self._ones.add if is_one else self._ones.discard)(name)

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        super()._load_from_state_dict(*args, **options)
        self._read()

    def _read(self) -> None:
        """Follow the values of the parameters and buffers after a change."""
        self._note_ones(*self._parameters, *self._buffers)
        if has_value(self.reset_mechanism_val):
            number = int(self.reset_mechanism_val)
            self.reset_mechanism = {n: name for name, n in _NUMBERS.items()}.get(number, str(number))

    @property
    def reset_mechanism(self) -> str:
        """The reset. It may be set at any time."""
        return self._reset_mechanism

    @reset_mechanism.setter
    def reset_mechanism(self, name: str) -> None:
        check_choice("reset_mechanism", name, tuple(self.resets))
        self._reset_mechanism = name
        self.reset_mechanism_val.fill_(_NUMBERS[name])

    # ------------------------------------------------------------------------------------------------ calls

    def _run(self, input_: Tensor, states: Mapping[str, Tensor | None], membrane: bool) -> tuple[Tensor, ...]:
        """Check the arguments, scan, and restore the layout `[T, B, ...]`."""
        checks.flag("membrane", membrane)
        _check(input_, states)
        before = [None if state is None else state.flatten(1) for state in states.values()]
        spikes, *after = self._scan(input_.flatten(2).transpose(0, 1), before, input_.shape[2:], membrane)
        spikes = spikes.transpose(0, 1).reshape(input_.shape)
        if self.surrogate_disable:
            spikes = spikes.detach()
        if "graded_spikes_factor" not in self._ones:
            spikes = spikes * self.graded_spikes_factor.to(spikes.dtype)
        if membrane:
            return spikes, *(state.transpose(0, 1).reshape(input_.shape) for state in after)
        return spikes, *(state.reshape(input_.shape[1:]) for state in after)

    @torch.no_grad()
    def _run_step(self, input_: Tensor, *states: Tensor | None) -> tuple[Tensor, ...]:
        if not isinstance(input_, Tensor):
            raise TypeError(f"input_: expected a tensor [batch, ...], got {type(input_).__name__}")
        spikes, *after = self(input_.unsqueeze(0), *states, membrane=False)
        return spikes.squeeze(0), *after

    def _scan(
        self, current: Tensor, states: list[Tensor | None], features: torch.Size, membrane: bool
    ) -> tuple[Tensor, ...]:
        """Spikes `[B, T, D]` and states, `[B, T, D]` or without `membrane` the last `[B, D]`, of a current."""
        raise NotImplementedError

    def _vector(self, name: str, features: torch.Size, dtype: torch.dtype, value: Tensor | None = None) -> Tensor:
        """A value for every neuron, `[D]`: the one of this name, or `value`."""
        value = getattr(self, name) if value is None else value
        if value.dim() == 0 or value.dtype not in (torch.float32, torch.float64):
            value = value.to(checks.state_dtype(dtype))
        try:
            return value.expand(features).flatten()
        except RuntimeError:
            raise ValueError(
                f"{name}: expected one value or a shape that broadcasts to the features {list(features)}, got"
                f" {list(value.shape)}"
            ) from None

    def _decay(self, name: str, features: torch.Size, dtype: torch.dtype) -> Tensor:
        return self._vector(name, features, dtype, getattr(self, name).clamp(0, 1))

    def _spiking(self) -> dict[str, Any]:
        """The options of `lif` for this neuron."""
        reset = self.resets[self.reset_mechanism]
        return {"reset": reset, "surrogate": self.spike_grad, "surrogate_scale": self.slope}

    def extra_repr(self) -> str:
        values = [f"{name}={_brief(getattr(self, name))}" for name in (*self.constants, "threshold")]
        return ", ".join([*values, f"spike_grad={self.spike_grad!r}", f"reset_mechanism={self.reset_mechanism!r}"])


def _check(input_: object, states: Mapping[str, Any]) -> None:
    """Raise unless `input_` is a sequence, and each state has the shape of one of its steps."""
    if not isinstance(input_, Tensor):
        raise TypeError(f"input_: expected a tensor [time, batch, ...], got {type(input_).__name__}")
    if input_.dim() < 3:
        raise ValueError(f"input_: expected [time, batch, ...] with features, got shape {list(input_.shape)}")
    for name, state in states.items():
        if state is None:
            continue
        if not isinstance(state, Tensor):
            raise TypeError(f"{name}: expected a tensor or None, got {type(state).__name__}")
        if state.shape != input_.shape[1:]:
            expected = f"{list(input_.shape[1:])} [batch, ...], the state before a sequence"
            raise ValueError(f"{name}: expected shape {expected}, got {list(state.shape)}")


def _brief(value: Tensor) -> str:
    return f"{value.item():g}" if value.numel() == 1 and has_value(value) else f"{list(value.shape)}"
