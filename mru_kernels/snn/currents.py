"""`Synaptic` and `Alpha` of snnTorch, on whole sequences: neurons with synaptic currents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..cells.lif import lif
from ..nn.arguments import constructor
from ..scalars import has_value
from ..synaptic import leaky, synaptic
from .neuron import Neuron


class Synaptic(Neuron):
    """`snntorch.Synaptic`: a leaky integrate-and-fire neuron with a synaptic current, on whole sequences.

    ::

        syn_t = clamp(alpha, 0, 1) syn_{t-1} + input_t
        mem_t = clamp(beta, 0, 1) mem_{t-1} + syn_t - threshold reset_t         reset_t = mem_{t-1} > threshold
        spk_t = mem_t > threshold

    With "zero" the membrane of a neuron that has spiked is 0 at the next step, whatever its current.

    Args:
        alpha: the decay of the current, a number or a tensor that broadcasts with the features.
        learn_alpha: whether alpha is a parameter instead of a buffer.
        beta, threshold, spike_grad, slope, surrogate_disable, learn_beta, learn_threshold, reset_mechanism, output: as
            for `Leaky`.
        init_hidden, inhibition, state_quant, reset_delay: only their defaults work.

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
        """Run a whole sequence; see `Leaky.forward`. Currents and membranes are returned the same way."""
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

    The resets "zero", which is snnTorch's default, and "subtract" act on the currents. No kernel here does that.

    Args:
        alpha, beta: the decays, 0 < beta < alpha < 1: numbers or tensors that broadcast with the features.
        reset_mechanism: only "none".
        learn_alpha, threshold, spike_grad, slope, surrogate_disable, learn_beta, learn_threshold, output: as for
            `Synaptic`.
        init_hidden, inhibition, state_quant: only their defaults work.

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
        """Run a whole sequence; see `Leaky.forward`. Currents and membranes are returned the same way."""
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
