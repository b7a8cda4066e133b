"""`Leaky`, `Lapicque`, `Synaptic` and `Alpha` of snnTorch, on whole sequences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import checks
from ..cells.lif import lif
from ..nn.arguments import check_choice, constructor
from ..scalars import has_value
from ..synaptic import leaky, synaptic
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
        tensor = torch.as_tensor(value)
        if checks.flag(f"learn_{name}", learned):
            tensor = tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())
            self.register_parameter(name, torch.nn.Parameter(tensor))
        else:
            self.register_buffer(name, tensor)
        self._note_ones(name)

    def _note_ones(self, *names: str) -> None:
        """Note which buffers are 1. A call that looked at them would wait for a GPU."""
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
        """A call: checks, layouts, and what follows the scan."""
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


class OneState(Neuron):
    """A neuron whose state is its membrane."""

    def forward(self, input_: Tensor, mem: Tensor | None = None, *, membrane: bool = True) -> tuple[Tensor, Tensor]:
        """Run a whole sequence.

        Args:
            input_: the current, `[T, B, ...]` with any shape of features; float32, float64, bfloat16 or float16.
            mem: the membrane before the first step, `[B, ...]`; None for zeros.
            membrane: whether to return the membranes of all steps. Without them a call writes less memory.

        Returns:
            The spikes `[T, B, ...]`, and the membranes `[T, B, ...]` or with `membrane=False` the last one, `[B, ...]`.

        Raises:
            TypeError, ValueError: an argument is not as described; the message names it.
        """
        return self._run(input_, {"mem": mem}, membrane)  # type: ignore[return-value]

    def step(self, input_: Tensor, mem: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One step of a call without gradients, for streaming inference.

        Args:
            input_: the current, `[B, ...]`.
            mem: the membrane before the step, `[B, ...]`; None for zeros.

        Returns:
            The spikes and the membrane after the step, `[B, ...]`.

        Raises:
            TypeError, ValueError: as a call.
        """
        return self._run_step(input_, mem)  # type: ignore[return-value]

    def reset_mem(self) -> None:
        """The membrane before a sequence, for scripts that ask for it: None, which a call takes as zeros."""

    def _lif(
        self, current: Tensor, beta: Tensor, state: Tensor | None, features: torch.Size, membrane: bool
    ) -> tuple[Tensor, ...]:
        threshold = self._vector("threshold", features, current.dtype)
        result, final = lif(current, beta, threshold, state, membrane=membrane, **self._spiking())
        return result if membrane else (result, final)


class Leaky(OneState):
    """`snntorch.Leaky`: a leaky integrate-and-fire neuron, on whole sequences.

    ::

        mem_t = clamp(beta, 0, 1) mem_{t-1} + input_t - threshold reset_t        reset_t = mem_{t-1} > threshold
        spk_t = mem_t > threshold

    With "zero" a neuron that has spiked starts at 0 before the input of the next step; with "none" nothing is reset.
    No gradient passes through the reset.

    Args:
        beta: the decay, a number or a tensor that broadcasts with the features. It is clamped in each call.
        threshold: likewise.
        spike_grad: a surrogate, by name ("atan", "fast_sigmoid", "sigmoid", "triangle", "straight_through"), or what
            `atan`, `fast_sigmoid`, `sigmoid` or `straight_through_estimator` of `snntorch.surrogate` returns.
        slope: the scale k of a surrogate by name, see `mk.lif`. For None it is snnTorch's default: 25 for
            "fast_sigmoid" and "sigmoid", else 1. `atan(alpha)` has the scale alpha / 2.
        surrogate_disable: whether spikes have no gradient.
        learn_beta, learn_threshold, learn_graded_spikes_factor: whether the value is a parameter, or a buffer.
        reset_mechanism: "subtract", "zero" or "none".
        graded_spikes_factor: the size of a spike.
        output: without effect; a call always returns the state.
        init_hidden, inhibition, state_quant, reset_delay: only their defaults; the error says why.

    Call:
        `spk, mem = neuron(input_, mem=None, membrane=True)`, see `forward`.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Example::

        >>> lif = mk.snn.Leaky(beta=0.9, spike_grad="fast_sigmoid", learn_beta=True)
        >>> spk, mem = lif(torch.randn(25, 8, 16, 5, 5))
        >>> spk.shape, mem.shape
        (torch.Size([25, 8, 16, 5, 5]), torch.Size([25, 8, 16, 5, 5]))
        >>> spk, mem = lif.step(torch.randn(8, 16, 5, 5), mem[-1])
        >>> mem.shape
        torch.Size([8, 16, 5, 5])
    """

    resets = {"subtract": "subtract", "zero": "zero", "none": "none"}

    @constructor
    def __init__(
        self,
        beta: float | Tensor,
        threshold: float | Tensor = 1.0,
        spike_grad: str | Callable | None = None,
        surrogate_disable: bool = False,
        init_hidden: bool = False,
        inhibition: bool = False,
        learn_beta: bool = False,
        learn_threshold: bool = False,
        reset_mechanism: str = "subtract",
        state_quant: Any = False,
        output: bool = False,
        graded_spikes_factor: float | Tensor = 1.0,
        learn_graded_spikes_factor: bool = False,
        reset_delay: bool = True,
        *,
        slope: float | None = None,
    ) -> None:
        super().__init__(
            threshold=threshold, spike_grad=spike_grad, slope=slope, surrogate_disable=surrogate_disable,
            learn_threshold=learn_threshold, reset_mechanism=reset_mechanism, graded_spikes_factor=graded_spikes_factor,
            learn_graded_spikes_factor=learn_graded_spikes_factor, init_hidden=init_hidden, inhibition=inhibition,
            state_quant=state_quant, reset_delay=reset_delay,
        )  # fmt: skip
        self._own("beta", beta, learn_beta)

    init_leaky = OneState.reset_mem

    def _scan(self, current, states, features, membrane):
        return self._lif(current, self._decay("beta", features, current.dtype), states[0], features, membrane)


class Lapicque(OneState):
    """`snntorch.Lapicque`: an integrate-and-fire neuron with resistance and capacitance, on whole sequences.

    ::

        decay = 1 - time_step / (R C)
        mem_t = decay mem_{t-1} + input_t R (1 / (R C)) time_step - threshold reset_t
        spk_t = mem_t > threshold

    Given beta, C is `time_step / (R log(1 / beta))`, as in snnTorch: the decay is 1 + log beta and not beta. With
    "zero" the membrane of a neuron that has spiked is 0 at the next step, and the input of that step is lost.

    Args:
        beta, R, C: beta; beta and R; beta and C; or R and C.
        time_step: the length of a step.
        learn_beta: only False, because beta enters a call through C.
        threshold, spike_grad, slope, surrogate_disable, learn_threshold, reset_mechanism, output: as for `Leaky`.
        init_hidden, inhibition, state_quant: only their defaults.

    Call:
        `spk, mem = neuron(input_, mem=None, membrane=True)`, see `forward`.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Example::

        >>> lif = mk.snn.Lapicque(R=5.1, C=5e-3, time_step=1e-3)
        >>> spk, mem = lif(torch.randn(100, 8, 64))
        >>> spk.shape
        torch.Size([100, 8, 64])
    """

    resets = {"subtract": "subtract", "zero": "zero_input", "none": "none"}
    time_step: Tensor
    R: Tensor
    C: Tensor

    @constructor
    def __init__(
        self,
        beta: float | Tensor | None = None,
        R: float | Tensor | None = None,  # noqa: N803
        C: float | Tensor | None = None,  # noqa: N803
        time_step: float = 1,
        threshold: float | Tensor = 1.0,
        spike_grad: str | Callable | None = None,
        surrogate_disable: bool = False,
        init_hidden: bool = False,
        inhibition: bool = False,
        learn_beta: bool = False,
        learn_threshold: bool = False,
        reset_mechanism: str = "subtract",
        state_quant: Any = False,
        output: bool = False,
        *,
        slope: float | None = None,
    ) -> None:
        super().__init__(
            threshold=threshold, spike_grad=spike_grad, slope=slope, surrogate_disable=surrogate_disable,
            learn_threshold=learn_threshold, reset_mechanism=reset_mechanism, init_hidden=init_hidden,
            inhibition=inhibition, state_quant=state_quant,
        )  # fmt: skip
        if learn_beta:
            raise ValueError(f"learn_beta: expected False, got {learn_beta!r}; beta enters a call through C")
        self._own("time_step", time_step)
        self._resist(*(None if value is False else value for value in (beta, R, C)))

    def _resist(self, beta: Any, R: Any, C: Any) -> None:  # noqa: N803
        """Make beta, R and C of those that are given, in snnTorch's order of operations."""
        missing = [name for name, value in {"beta": beta, "R": R, "C": C}.items() if value is None]
        if missing not in (["beta"], ["R"], ["C"], ["R", "C"]):
            given = [name for name in ("beta", "R", "C") if name not in missing]
            raise ValueError(f"beta, R, C: expected beta, or two of the three, got {' and '.join(given) or 'none'}")
        if beta is None:
            beta = torch.exp(torch.ones(1) * (-self.time_step / (R * C)))
        self._own("beta", beta)
        if missing == ["R", "C"]:
            R = 1  # noqa: N806
        rate = torch.log(1 / self.beta)
        if "C" in missing:
            C = self.time_step / (R * rate)  # noqa: N806
        elif R is None:
            R = self.time_step / (C * rate)  # noqa: N806
        self._own("R", R)
        self._own("C", C)

    init_lapicque = OneState.reset_mem

    def _scan(self, current, states, features, membrane):
        dtype, time_constant = current.dtype, self.R * self.C
        factors = [getattr(self, name) for name in ("R", "time_step") if name not in self._ones]
        factors.insert(0 if "R" in self._ones else 1, 1 / time_constant)  # each product rounds in snnTorch's order
        for factor in factors:
            current = (current * self._vector("R, C", features, dtype, factor)).to(dtype)
        decay = self._vector("R, C", features, dtype, 1 - self.time_step / time_constant)
        return self._lif(current, decay, states[0], features, membrane)


class Synaptic(Neuron):
    """`snntorch.Synaptic`: a leaky integrate-and-fire neuron with a synaptic current, on whole sequences.

    ::

        syn_t = clamp(alpha, 0, 1) syn_{t-1} + input_t
        mem_t = clamp(beta, 0, 1) mem_{t-1} + syn_t - threshold reset_t         reset_t = mem_{t-1} > threshold
        spk_t = mem_t > threshold

    With "zero" the membrane of a neuron that has spiked is 0 at the next step, whatever its current.

    Args:
        alpha: the decay of the current, a number or a tensor that broadcasts with the features.
        learn_alpha: whether alpha is a parameter, or a buffer.
        beta, threshold, spike_grad, slope, surrogate_disable, learn_beta, learn_threshold, reset_mechanism, output: as
            for `Leaky`.
        init_hidden, inhibition, state_quant, reset_delay: only their defaults.

    Call:
        `spk, syn, mem = neuron(input_, syn=None, mem=None, membrane=True)`, as `Leaky.forward` with two states.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Example::

        >>> neuron = mk.snn.Synaptic(alpha=0.8, beta=torch.rand(64), learn_beta=True)
        >>> spk, syn, mem = neuron(torch.randn(100, 8, 64))
        >>> spk.shape, syn.shape, mem.shape
        (torch.Size([100, 8, 64]), torch.Size([100, 8, 64]), torch.Size([100, 8, 64]))
    """

    resets = {"subtract": "subtract", "zero": "zero_input", "none": "none"}
    constants = ("alpha", "beta")
    alpha: Tensor

    @constructor
    def __init__(
        self,
        alpha: float | Tensor,
        beta: float | Tensor,
        threshold: float | Tensor = 1.0,
        spike_grad: str | Callable | None = None,
        surrogate_disable: bool = False,
        init_hidden: bool = False,
        inhibition: bool = False,
        learn_alpha: bool = False,
        learn_beta: bool = False,
        learn_threshold: bool = False,
        reset_mechanism: str = "subtract",
        state_quant: Any = False,
        output: bool = False,
        reset_delay: bool = True,
        *,
        slope: float | None = None,
    ) -> None:
        super().__init__(
            threshold=threshold, spike_grad=spike_grad, slope=slope, surrogate_disable=surrogate_disable,
            learn_threshold=learn_threshold, reset_mechanism=reset_mechanism, init_hidden=init_hidden,
            inhibition=inhibition, state_quant=state_quant, reset_delay=reset_delay,
        )  # fmt: skip
        self._own("beta", beta, learn_beta)
        self._own("alpha", alpha, learn_alpha)

    def forward(
        self, input_: Tensor, syn: Tensor | None = None, mem: Tensor | None = None, *, membrane: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run a whole sequence; see `Leaky.forward`. Currents and membranes are returned alike."""
        return self._run(input_, {"syn": syn, "mem": mem}, membrane)  # type: ignore[return-value]

    def step(
        self, input_: Tensor, syn: Tensor | None = None, mem: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step of a call without gradients; see `Leaky.step`."""
        return self._run_step(input_, syn, mem)  # type: ignore[return-value]

    def reset_mem(self) -> tuple[None, None]:
        """The states before a sequence, for scripts that ask for them: None, which a call takes as zeros."""
        return None, None

    init_synaptic = reset_mem

    def _scan(self, current, states, features, membrane):
        alpha, beta = (self._decay(name, features, current.dtype) for name in self.constants)
        threshold = self._vector("threshold", features, current.dtype)
        result, final = synaptic(
            current, alpha, beta, threshold, (states[0], states[1]), membrane=membrane, **self._spiking()
        )
        return result if membrane else (result, *final)


class Alpha(Neuron):
    """`snntorch.Alpha` without a reset: the difference of two leaky currents, on whole sequences.

    ::

        syn_exc_t = alpha syn_exc_{t-1} + input_t        syn_inh_t = beta syn_inh_{t-1} - input_t
        mem_t = tau (syn_exc_t + syn_inh_t)              tau = 1 + log alpha / (log beta - log alpha)
        spk_t = mem_t > threshold

    The resets "zero", which is snnTorch's default, and "subtract" act on the currents in ways that no kernel here has.

    Args:
        alpha, beta: the decays, 0 < beta < alpha < 1: numbers or tensors that broadcast with the features.
        reset_mechanism: only "none".
        learn_alpha, threshold, spike_grad, slope, surrogate_disable, learn_beta, learn_threshold, output: as for
            `Synaptic`.
        init_hidden, inhibition, state_quant: only their defaults.

    Call:
        `spk, syn_exc, syn_inh, mem = neuron(input_, syn_exc=None, syn_inh=None, mem=None, membrane=True)`, as
        `Leaky.forward` with three states. A call does not read `mem`.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Example::

        >>> neuron = mk.snn.Alpha(alpha=0.9, beta=0.8, reset_mechanism="none")
        >>> spk, syn_exc, syn_inh, mem = neuron(torch.randn(100, 8, 64))
        >>> spk.shape, mem.shape
        (torch.Size([100, 8, 64]), torch.Size([100, 8, 64]))
    """

    resets = {"none": "none"}
    constants = ("alpha", "beta")
    alpha: Tensor

    @constructor
    def __init__(
        self,
        alpha: float | Tensor,
        beta: float | Tensor,
        threshold: float | Tensor = 1.0,
        spike_grad: str | Callable | None = None,
        surrogate_disable: bool = False,
        init_hidden: bool = False,
        inhibition: bool = False,
        learn_alpha: bool = False,
        learn_beta: bool = False,
        learn_threshold: bool = False,
        reset_mechanism: str = "zero",
        state_quant: Any = False,
        output: bool = False,
        *,
        slope: float | None = None,
    ) -> None:
        super().__init__(
            threshold=threshold, spike_grad=spike_grad, slope=slope, surrogate_disable=surrogate_disable,
            learn_threshold=learn_threshold, reset_mechanism=reset_mechanism, init_hidden=init_hidden,
            inhibition=inhibition, state_quant=state_quant,
        )  # fmt: skip
        self._own("beta", beta, learn_beta)
        self._own("alpha", alpha, learn_alpha)
        if has_value(self.alpha) and not bool(((self.alpha > self.beta) & (self.beta > 0) & (self.alpha < 1)).all()):
            raise ValueError(f"alpha, beta: expected 0 < beta < alpha < 1, got {alpha} and {beta}")

    def forward(
        self, input_: Tensor, syn_exc: Tensor | None = None, syn_inh: Tensor | None = None, mem: Tensor | None = None,
        *, membrane: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Run a whole sequence; see `Leaky.forward`. Currents and membranes are returned alike."""
        states = {"syn_exc": syn_exc, "syn_inh": syn_inh, "mem": mem}
        return self._run(input_, states, membrane)  # type: ignore[return-value]

    def step(
        self, input_: Tensor, syn_exc: Tensor | None = None, syn_inh: Tensor | None = None, mem: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One step of a call without gradients; see `Leaky.step`."""
        return self._run_step(input_, syn_exc, syn_inh, mem)  # type: ignore[return-value]

    def reset_mem(self) -> tuple[None, None, None]:
        """The states before a sequence, for scripts that ask for them: None, which a call takes as zeros."""
        return None, None, None

    init_alpha = reset_mem

    def _scan(self, current, states, features, membrane):
        dtype = current.dtype
        logs = {name: getattr(self, name).clamp(0, 1).log() for name in self.constants}
        tau = self._vector("alpha, beta", features, dtype, logs["alpha"] / (logs["beta"] - logs["alpha"]) + 1)
        alpha, beta = (self._decay(name, features, dtype) for name in self.constants)
        exc, exc_final = leaky(current, alpha, states[0])
        inh, inh_final = leaky(-current, beta, states[1])
        mem = tau * (exc + inh)
        threshold = self._vector("threshold", features, mem.dtype)
        spikes, mem_final = lif(mem, torch.zeros_like(threshold), threshold, **self._spiking())
        if membrane:
            return tuple(record.to(dtype) for record in (spikes, exc, inh, mem))
        return spikes.to(dtype), exc_final, inh_final, mem_final
