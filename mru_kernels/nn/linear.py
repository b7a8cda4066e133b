"""The linear recurrent units: minGRU, minLSTM and the LRU."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..cells.linear_recurrence import linear_recurrence, linear_recurrence_step
from ..cells.min_gru import min_gru_packed, min_gru_packed_step
from ..cells.min_lstm import min_lstm_packed, min_lstm_packed_step
from .arguments import check_number, constructor
from .base import MRUBase


class MinGRU(MRUBase, names=("min_gru",)):
    """Layers of minimal gated recurrent units (arXiv 2410.01201), used like `torch.nn.GRU`.

    For each step, with g(x) = x + 1/2 for x >= 0, else sigmoid(x), which is positive::

        candidate_t = W_c x_t + b_c        update_t = W_z x_t + b_z
        z_t = sigmoid(update_t)
        h_t = (1 - z_t) h_{t-1} + z_t g(candidate_t)

    W_c, W_z `[D, features]` and b_c, b_z `[D]` are trained. Initial states are zero, whether they are learned or not.
    The scan is `mru_kernels.min_gru`, which computes the gates in the state dtype: float32 for half precision.

    Arguments, calls and errors are those of `BMRU`, without `epsilon` and `surrogate_scale`. `bias=False` removes b_c
    only.

    Args:
        max_time_scale: in steps, at least 2. Without an input a state decays with the time scale 1 / z_t. The initial
            b_z draw it uniformly from [2, max_time_scale] (chrono initialisation, arXiv 1804.11188). At 2 every b_z is
            0 and a state halves in one step. For a long memory give the number of steps to remember.

    Example::

        >>> unit = mk.MinGRU(3, 8, max_time_scale=100.0)
        >>> output, h_n = unit(torch.randn(4, 10, 3))
        >>> output.shape, h_n.shape
        (torch.Size([4, 10, 8]), torch.Size([1, 4, 8]))
    """

    gates = {"candidate": None, "update": 0.0}

    @constructor
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        max_time_scale: float = 2.0,
        bias: bool = True,
        batch_first: bool = True,
        dropout: float = 0.0,
        bidirectional: bool = False,
        learn_initial_state: bool = True,
        chunk_size: int | None = backends.CHUNK,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.max_time_scale = check_number("max_time_scale", max_time_scale, 2.0, math.inf)
        super().__init__(
            input_size, hidden_size, num_layers, bias=bias, batch_first=batch_first, dropout=dropout,
            bidirectional=bidirectional, learn_initial_state=learn_initial_state, chunk_size=chunk_size, device=device,
            dtype=dtype,
        )  # fmt: skip

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw projections as in `nn.Linear`, gate biases from the time scales; set initial states to zero."""
        super().reset_parameters()
        for _, suffix in self._scans():
            biases = self._biases(suffix)
            odds = torch.empty_like(biases["update"]).uniform_(1.0, self.max_time_scale - 1.0)  # decay / (1 - decay)
            biases["update"].copy_(-odds.log())
            if "forget" in biases:
                biases["forget"].copy_(odds.log())

    def _scan(self, gates, initial_state, **options):
        return min_gru_packed(gates, initial_state, **options)

    def _step(self, gates, state, state_indices, **per_channel):
        return min_gru_packed_step(gates, state, state_indices)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, max_time_scale={self.max_time_scale:g}"


class MinLSTM(MinGRU, names=("min_lstm",)):
    """Layers of minimal LSTM units with normalised gates (arXiv 2410.01201), used like `torch.nn.GRU`.

    For each step, with g as in `MinGRU`::

        candidate_t = W_c x_t + b_c        update_t = W_i x_t + b_i        forget_t = W_f x_t + b_f
        i_t = sigmoid(update_t)            f_t = sigmoid(forget_t)
        h_t = f_t / (f_t + i_t) h_{t-1} + i_t / (f_t + i_t) g(candidate_t)

    The scan is `mru_kernels.min_lstm`, which is accurate also where a gate is near 0. Initially b_f = -b_i, which gives
    the time scales described in `MinGRU`. All arguments, calls and errors are those of `MinGRU`.

    Example::

        >>> output, h_n = mk.MinLSTM(3, 8)(torch.randn(4, 10, 3))
        >>> output.shape, h_n.shape
        (torch.Size([4, 10, 8]), torch.Size([1, 4, 8]))
    """

    gates = {"candidate": None, "update": 0.0, "forget": 0.0}

    def _scan(self, gates, initial_state, **options):
        return min_lstm_packed(gates, initial_state, **options)

    def _step(self, gates, state, state_indices, **per_channel):
        return min_lstm_packed_step(gates, state, state_indices)


class LRU(MRUBase, names=("lru",)):
    """Layers of linear recurrent units (arXiv 2303.06349) with D complex states, used like `torch.nn.GRU`.

    For each step, with complex matrices B and C and per-channel nu, theta and gamma::

        a = exp(-exp(nu) + i exp(theta))
        s_t = a s_{t-1} + exp(gamma) B x_t
        y_t = Re(C s_t) + D x_t

    D is a vector where the layer's input has `hidden_size` features, else a matrix. The unit has no biases and no
    activations, so a stack of layers is linear; `MRUNetwork` puts gates between them.

    All parameters are real, so optimisers, moves and casts need no complex numbers. Parameters of layer k, with the
    suffix `_reverse` for its second direction:

        weight_ih_l{k}      [2 D, input_size or directions * D], B: real and imaginary parts of the rows, interleaved
        weight_ho_l{k}      [D, 2 D], C: real and negative imaginary parts of the columns, interleaved
        skip_l{k}           D: [D], or [D, input_size or directions * D]
        nu_log_l{k}, theta_log_l{k}, gamma_log_l{k}     [D]: nu, theta, gamma
        initial_state_l{k}  [D, 2], real and imaginary part, unless `learn_initial_state` is False

    Initially a is uniform in the ring r_min <= |a| <= r_max with a phase in [0, max_phase], and gamma is
    log sqrt(1 - |a|^2). B, C and D are normal. The variance of each part is 1 / (2 features) for B and 1 / D for C.
    That of D is 1 for a vector and 1 / features for a matrix. Learned initial states are zero.

    The output is real; `hx` and `h_n` are complex64, or complex128 for float64. Under autocast only the matrix
    products run in half precision. Parameters in half precision are a TypeError, because complex states have no such
    dtype. Under FSDP2 give the LRU a policy of its own, without a half-precision `param_dtype`.

    All other arguments, calls and errors are those of `BMRU`, without `bias`, `epsilon` and `surrogate_scale`.

    Args:
        r_min, r_max: 0 <= r_min <= r_max <= 1. A state decays with the time scale 1 / (1 - |a|) steps; for a long
            memory set r_min close to 1.
        max_phase: in radians. On long sequences a small value prevents states that rotate too fast.

    Example::

        >>> unit = mk.LRU(3, 8, r_min=0.9, max_phase=0.1)
        >>> output, h_n = unit(torch.randn(4, 10, 3))
        >>> output.shape, h_n.shape, h_n.dtype
        (torch.Size([4, 10, 8]), torch.Size([1, 4, 8]), torch.complex64)
    """

    gates = {"real": None, "imaginary": None}
    per_channel = {"nu_log": 0.0, "theta_log": 0.0}
    dtypes = (torch.float32, torch.float64)

    @constructor
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
        batch_first: bool = True,
        dropout: float = 0.0,
        bidirectional: bool = False,
        learn_initial_state: bool = True,
        chunk_size: int | None = backends.CHUNK,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.r_max = check_number("r_max", r_max, 0.0, 1.0)
        self.r_min = check_number("r_min", r_min, 0.0, self.r_max)
        self.max_phase = check_number("max_phase", max_phase, 0.0, math.inf)
        super().__init__(
            input_size, hidden_size, num_layers, bias=False, batch_first=batch_first, dropout=dropout,
            bidirectional=bidirectional, learn_initial_state=learn_initial_state, chunk_size=chunk_size, device=device,
            dtype=dtype,
        )  # fmt: skip

    def _shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        channels = self.hidden_size
        shapes = super()._shapes(width) | {
            "gamma_log": (channels,),
            "weight_ho": (channels, 2 * channels),
            "skip": (channels,) if width == channels else (channels, width),
        }
        if self.learn_initial_state:
            shapes["initial_state"] = (channels, 2)
        return shapes

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters as the class describes."""
        super().reset_parameters()
        for _, suffix in self._scans():
            p = {name: getattr(self, name + suffix) for name in self._names}
            features = p["weight_ih"].shape[1]
            tiny, almost_one = torch.finfo(p["nu_log"].dtype).tiny, 1.0 - torch.finfo(p["nu_log"].dtype).eps
            squared_modulus = p["nu_log"].uniform_(self.r_min**2, self.r_max**2).clamp_(tiny, almost_one)
            squared_modulus.log_().mul_(-0.5).log_()  # in place: it becomes nu_log
            p["theta_log"].uniform_(0.0, self.max_phase).clamp_(min=tiny).log_()
            p["gamma_log"].copy_(torch.expm1(-2.0 * p["nu_log"].exp()).neg_().log_().mul_(0.5))
            p["weight_ih"].normal_(std=(2 * features) ** -0.5)
            p["weight_ho"].normal_(std=self.hidden_size**-0.5)
            p["skip"].normal_(std=1.0 if p["skip"].dim() == 1 else features**-0.5)

    def _project(self, x: Tensor, p: dict[str, Tensor]) -> Tensor:
        product = super()._project(x, p)
        return product.to(p["weight_ih"].dtype)  # autocast computes it in half precision, which no complex dtype has

    def _gate_weights(self, p: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        return p["gamma_log"].exp().repeat_interleave(2).unsqueeze(1) * p["weight_ih"], None

    def _vectors(self, p: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"decay": torch.polar(p["nu_log"].exp().neg().exp(), p["theta_log"].exp())}

    def _update(self, gates: Tensor) -> Tensor:
        return torch.view_as_complex(gates.unflatten(-1, (self.hidden_size, 2)))

    def _scan(self, gates, initial_state, **options):
        return linear_recurrence(options.pop("decay"), self._update(gates), initial_state, **options)

    def _step(self, gates, state, state_indices, **per_channel):
        return linear_recurrence_step(per_channel["decay"], self._update(gates), state, state_indices=state_indices)

    def _output(self, h: Tensor, x: Tensor, p: dict[str, Tensor]) -> Tensor:
        y = F.linear(torch.view_as_real(h).flatten(-2), p["weight_ho"])
        skip = p["skip"]
        skipped = skip * x if skip.dim() == 1 else F.linear(x, skip)
        return y + skipped.to(y.dtype)  # autocast casts `linear`, but not the product with a vector

    def _learned_state(self, p: dict[str, Tensor]) -> Tensor:
        return torch.view_as_complex(p["initial_state"])

    def _state_dtypes(self, stream: torch.dtype) -> tuple[torch.dtype, ...]:
        return (torch.complex128 if stream == torch.float64 else torch.complex64,)

    def extra_repr(self) -> str:
        options = super().extra_repr().replace(", bias=False", "")  # not an argument of this class
        return f"{options}, r_min={self.r_min:g}, r_max={self.r_max:g}, max_phase={self.max_phase:g}"
