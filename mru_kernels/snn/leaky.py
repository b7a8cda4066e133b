"""`Leaky` and `Lapicque` of snnTorch, on whole sequences: neurons whose state is the membrane."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..cells.lif import lif
from ..nn.arguments import constructor
from .neuron import Neuron


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
    Gradients treat reset_t as a constant.

    Args:
        beta: the decay, a number or a tensor that broadcasts with the features. It is clamped in each call.
        threshold: likewise.
        spike_grad: a surrogate, by name ("atan", "fast_sigmoid", "sigmoid", "triangle", "straight_through"), or what
            `atan`, `fast_sigmoid`, `sigmoid` or `straight_through_estimator` of `snntorch.surrogate` returns.
        slope: the scale k of a surrogate given by name, see `mk.lif`. None is snnTorch's default: 25 for
            "fast_sigmoid" and "sigmoid", else 1. `atan(alpha)` has the scale alpha / 2.
        surrogate_disable: whether spikes have no gradient.
        learn_beta, learn_threshold, learn_graded_spikes_factor: whether the value is a parameter instead of a buffer.
        reset_mechanism: "subtract", "zero" or "none".
        graded_spikes_factor: the size of a spike.
        output: without effect; a call always returns the state.
        init_hidden, inhibition, state_quant, reset_delay: only their defaults work; the error says why.

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
        init_hidden, inhibition, state_quant: only their defaults work.

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
            exponent = -self.time_step / (R * C)
            beta = torch.exp(torch.ones(1, device=exponent.device) * exponent)
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
