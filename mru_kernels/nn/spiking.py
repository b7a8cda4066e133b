"""The spiking units."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import backends, checks
from ..cells.lif import RESETS, lif, lif_step
from ..cells.spikes import SURROGATES
from ..scalars import SURROGATE_SCALE
from .arguments import check_choice, check_number, constructor
from .base import MRUBase


class LIF(MRUBase, names=("lif",)):
    """Layers of leaky integrate-and-fire neurons, used like `torch.nn.GRU`.

    For each step, with reset="subtract"::

        current_t = W x_t + b
        U_t = clamp(beta, 0, 1) U_{t-1} + current_t - threshold S_{t-1}
        S_t = H(U_t - threshold)

    The output is the spikes S, 0 or 1; `hx` and `h_n` are the membranes U. W `[D, features]` and b, beta, threshold
    `[D]` are trained, for each layer and direction; `unit.threshold_l0.requires_grad_(False)` fixes one. Learned
    initial states are zero at first. `mru_kernels.lif` describes the resets and the surrogate derivatives.

    The neurons of `mru_kernels.snn` have no weights. They take the arguments of snnTorch, and time is the first
    dimension.

    All other arguments, calls and errors are those of `BMRU`, without `epsilon`. `bias=False` removes b.

    Args:
        beta, threshold: the initial values of all channels; beta in [0, 1].
        reset: "none", "subtract", "subtract_decayed", "zero" or "zero_input".
        tie: whether a membrane equal to the threshold spikes.
        surrogate, surrogate_scale: the derivative of a spike, by name, and its scale.
        detach_reset: whether gradients treat the spikes that reset as constants, or also flow through them.

    Example::

        >>> unit = mk.LIF(3, 8, beta=0.95, reset="zero")
        >>> spikes, h_n = unit(torch.randn(4, 10, 3))
        >>> spikes.shape, h_n.shape
        (torch.Size([4, 10, 8]), torch.Size([1, 4, 8]))
    """

    gates = {"current": None}
    per_channel = {"beta": 0.9, "threshold": 1.0}

    @constructor
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        beta: float = 0.9,
        threshold: float = 1.0,
        reset: str = "subtract",
        tie: bool = False,
        surrogate: str = "atan",
        surrogate_scale: float = 1.0,
        detach_reset: bool = True,
        bias: bool = True,
        batch_first: bool = True,
        dropout: float = 0.0,
        bidirectional: bool = False,
        learn_initial_state: bool = True,
        chunk_size: int | None = backends.CHUNK,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.beta = check_number("beta", beta, 0.0, 1.0)
        self.threshold = check_number("threshold", threshold, -math.inf, math.inf)
        check_choice("reset", reset, RESETS)
        check_choice("surrogate", surrogate, tuple(SURROGATES))
        self.reset, self.surrogate = reset, surrogate
        self.tie, self.detach_reset = checks.flag("tie", tie), checks.flag("detach_reset", detach_reset)
        self.surrogate_scale = SURROGATE_SCALE.number(surrogate_scale)
        super().__init__(
            input_size, hidden_size, num_layers, bias=bias, batch_first=batch_first, dropout=dropout,
            bidirectional=bidirectional, learn_initial_state=learn_initial_state, chunk_size=chunk_size, device=device,
            dtype=dtype,
        )  # fmt: skip

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw projections as in `nn.Linear`; set beta and threshold to their initial values, initial states to 0."""
        super().reset_parameters()
        for _, suffix in self._scans():
            for name in self.per_channel:
                getattr(self, name + suffix).fill_(getattr(self, name))

    def _vectors(self, p: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"beta": p["beta"].clamp(0.0, 1.0), "threshold": p["threshold"]}

    def _scan(self, gates, initial_state, **options):
        return lif(
            gates, options.pop("beta"), options.pop("threshold"), initial_state, reset=self.reset, tie=self.tie,
            surrogate=self.surrogate, surrogate_scale=self.surrogate_scale, detach_reset=self.detach_reset, **options,
        )  # fmt: skip

    def _step(self, gates, state, state_indices, **per_channel):
        options = {"reset": self.reset, "tie": self.tie, "state_indices": state_indices}
        return lif_step(gates, per_channel["beta"], per_channel["threshold"], state, **options)

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), f"beta={self.beta:g}", f"threshold={self.threshold:g}", f"reset={self.reset!r}"]
        defaults = {"tie": False, "surrogate": "atan", "surrogate_scale": 1.0, "detach_reset": True}
        parts += [f"{name}={getattr(self, name)!r}" for name, value in defaults.items() if getattr(self, name) != value]
        return ", ".join(parts)
