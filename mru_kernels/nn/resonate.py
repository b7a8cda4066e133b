"""PRF: layers of parallel resonate-and-fire neurons."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import backends, checks
from ..cells.resonate import resonate, resonate_step
from .arguments import check_number, constructor
from .base import MRUBase


class PRF(MRUBase, names=("prf",)):
    """Layers of parallel resonate-and-fire neurons (arXiv 2410.03530), used like `torch.nn.GRU`.

    For each step, with per-channel dt and theta::

        a = exp(dt (-1 / tau + i theta))
        u_t = a u_{t-1} + dt (W x_t + b)
        h_t = H(Re u_t - threshold)

    The output is spikes, 0 or 1. A spike does not reset the state, so time is scanned in parallel. The derivative of H
    is replaced by 1 / (1 + (pi v)^2). All parameters are real. Layer k has these, with the suffix `_reverse` for its
    second direction:

        weight_ih_l{k}      [D, input_size or directions * D], W
        bias_ih_l{k}        [D], b, unless `bias` is False
        log_dt_l{k}, theta_log_l{k}     [D]: the logarithms of dt and theta
        alpha_l{k}          [D], with `amplitude`: the output is alpha h_t
        initial_state_l{k}  [D, 2], real and imaginary part, unless `learn_initial_state` is False

    Initially dt is log-uniform from dt_min to dt_max, theta is uniform in (0, 2 pi), alpha is 1 and learned initial
    states are zero. The authors train dt and theta with a learning rate of 1e-3 and no weight decay.

    `hx` and `h_n` are complex64, or complex128 for float64. All other arguments, calls and errors are those of `BMRU`,
    without `epsilon` and `surrogate_scale`.

    Args:
        tau: time constant of the decay, positive. A state decays with a time scale of tau / dt steps.
        dt_min, dt_max: range of the initial dt, 0 < dt_min <= dt_max.
        threshold: the threshold of all neurons. It is not trained.
        amplitude: whether the output has a trained factor per channel.

    Example::

        >>> unit = mk.PRF(3, 8)
        >>> output, h_n = unit(torch.randn(4, 10, 3))
        >>> output.shape, h_n.shape, h_n.dtype
        (torch.Size([4, 10, 8]), torch.Size([1, 4, 8]), torch.complex64)
    """

    gates = {"current": None}
    per_channel = {"log_dt": 0.0, "theta_log": 0.0}
    has_traces = False

    @constructor
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        tau: float = 2.0,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        threshold: float = 1.0,
        amplitude: bool = False,
        bias: bool = True,
        batch_first: bool = True,
        dropout: float = 0.0,
        bidirectional: bool = False,
        learn_initial_state: bool = True,
        chunk_size: int | None = backends.CHUNK,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        least = torch.finfo(torch.float32).tiny
        self.tau = check_number("tau", tau, least, math.inf)
        self.dt_max = check_number("dt_max", dt_max, least, math.inf)
        self.dt_min = check_number("dt_min", dt_min, least, self.dt_max)
        self.threshold = check_number("threshold", threshold, -math.inf, math.inf)
        self.amplitude = checks.flag("amplitude", amplitude)
        super().__init__(
            input_size, hidden_size, num_layers, bias=bias, batch_first=batch_first, dropout=dropout,
            bidirectional=bidirectional, learn_initial_state=learn_initial_state, chunk_size=chunk_size, device=device,
            dtype=dtype,
        )  # fmt: skip

    def _shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        shapes = super()._shapes(width)
        if self.amplitude:
            shapes["alpha"] = (self.hidden_size,)
        if self.learn_initial_state:
            shapes["initial_state"] = (self.hidden_size, 2)
        return shapes

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters as the class describes."""
        super().reset_parameters()
        for _, suffix in self._scans():
            p = {name: getattr(self, name + suffix) for name in self._names}
            p["log_dt"].uniform_(math.log(self.dt_min), math.log(self.dt_max))
            tiny = torch.finfo(p["theta_log"].dtype).tiny
            p["theta_log"].uniform_(0.0, 2 * math.pi).clamp_(min=tiny).log_()
            if self.amplitude:
                p["alpha"].fill_(1.0)

    def _vectors(self, p: dict[str, Tensor]) -> dict[str, Tensor]:
        dtype = checks.state_dtype(p["log_dt"].dtype)
        # An error in the decay a is amplified by 1 / (1 - |a|), so it is computed in float64.
        dt = p["log_dt"].double().exp()
        decay = torch.polar((-dt / self.tau).exp(), dt * p["theta_log"].double().exp())
        gain = dt.to(dtype)
        return {
            "decay": decay.to(checks.complex_dtype(dtype)),
            "gain": gain,
            "threshold": torch.full_like(gain, self.threshold),
        }

    def _scan(self, gates, initial_state, **options):
        return resonate(gates, initial_state=initial_state, **options)

    def _step(self, gates, state, state_indices, **per_channel):
        return resonate_step(gates, state=state, state_indices=state_indices, **per_channel)

    def _output(self, h: Tensor, x: Tensor, p: dict[str, Tensor]) -> Tensor:
        return h * p["alpha"].to(h.dtype) if self.amplitude else h

    def _learned_state(self, p: dict[str, Tensor]) -> Tensor:
        state = p["initial_state"]
        return torch.view_as_complex(state.to(checks.state_dtype(state.dtype)))

    def _state_dtypes(self, stream: torch.dtype) -> tuple[torch.dtype, ...]:
        return (checks.complex_dtype(checks.state_dtype(stream)),)

    def extra_repr(self) -> str:
        own = {"tau": self.tau, "dt_min": self.dt_min, "dt_max": self.dt_max, "threshold": self.threshold}
        words = [f"{name}={value:g}" for name, value in own.items()] + ["amplitude=True"] * self.amplitude
        return ", ".join([super().extra_repr(), *words])
