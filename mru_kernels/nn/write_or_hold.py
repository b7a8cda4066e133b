"""The units that write or hold: bistable, cumulative and first-quadrant memory recurrent units."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends, checks
from ..cells.bmru import bmru_packed, bmru_packed_step
from ..cells.schmitt import schmitt, schmitt_step
from ..scalars import EPSILON, SURROGATE_SCALE
from .arguments import constructor
from .base import MRUBase


class WriteOrHold(MRUBase):
    """Base class of the units with an `epsilon`. At each step a gate decides whether a channel writes or holds.

    A write keeps the share epsilon of the old state. Arguments, calls and errors are those of `BMRU`.

    Example::

        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), mk.CMRU(4, 8))
        >>> [module.epsilon for module in model if isinstance(module, mk.nn.WriteOrHold)]
        [1.0]
    """

    output_only = ("alpha",)

    # `_epsilon` is a 0-dim float64 CPU tensor. No dtype or device move reaches it, so one compilation serves all its
    # values, and no launch waits for a device. It is extra state of the `state_dict` and not a buffer:
    # DistributedDataParallel broadcasts buffers, which NCCL cannot do with CPU tensors, and FSDP moves them. Every
    # assignment makes a new tensor, because a backward pass needs the value of its forward pass.

    @constructor
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        epsilon: float = 0.0,
        bias: bool = True,
        batch_first: bool = True,
        dropout: float = 0.0,
        bidirectional: bool = False,
        learn_initial_state: bool = True,
        chunk_size: int | None = backends.CHUNK,
        surrogate_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            input_size, hidden_size, num_layers, bias=bias, batch_first=batch_first, dropout=dropout,
            bidirectional=bidirectional, learn_initial_state=learn_initial_state, chunk_size=chunk_size, device=device,
            dtype=dtype,
        )  # fmt: skip
        self.epsilon = epsilon
        self.surrogate_scale = SURROGATE_SCALE.number(surrogate_scale)

    @property
    def epsilon(self) -> float:
        """Share of the old state that a write keeps, in [0, 1]. It may be set at any time; see `EpsilonSchedule`.

        A call and its backward pass use the value at the time of the call. Activation checkpointing is the exception:
        it computes the forward pass again, with the value at that time, so set epsilon after the backward pass.
        """
        return EPSILON.number(self._epsilon)

    @epsilon.setter
    def epsilon(self, value: float | Tensor) -> None:
        self._epsilon = EPSILON.own(value)

    def _accumulates(self) -> bool:
        return self.epsilon > 0.0

    def _writes(self, gates: Tensor, **per_channel: Tensor) -> Tensor:
        """The steps at which each channel writes, bool `[B, T, D]`, for the arguments of `_scan`."""
        raise NotImplementedError

    def get_extra_state(self) -> Tensor:
        return self._epsilon  # not a copy: torch.distributed.checkpoint loads into the tensors of a `state_dict`

    def set_extra_state(self, state: float | Tensor) -> None:
        if isinstance(state, Tensor) and not checks.has_value(state):
            self._warn_of_no_value("a tensor without a value")
        else:
            self.epsilon = state.cpu() if isinstance(state, Tensor) else state

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, errors):
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, errors)
        key = prefix + "_extra_state"
        if key not in state_dict:
            if key in missing_keys:
                missing_keys.remove(key)
            self._warn_of_no_value(f"no {key!r}")

    def _warn_of_no_value(self, found: str) -> None:
        warnings.warn(f"epsilon: the state_dict has {found}; it stays {self.epsilon}", stacklevel=3)

    def extra_repr(self) -> str:
        scale = "" if self.surrogate_scale == 1.0 else f", surrogate_scale={self.surrogate_scale}"
        return f"{super().extra_repr()}, epsilon={self.epsilon}{scale}"


class BMRU(WriteOrHold, names=("bmru",)):
    """Layers of bistable memory recurrent units (arXiv 2601.09495), used like `torch.nn.GRU`.

    Unlike `nn.GRU`, `batch_first` is True by default: data `[T, B, features]` needs `batch_first=False`. All arguments
    after `num_layers` are keyword arguments. `hx` and `h_n` are the raw states, not the output of the last step.

    For each step, with the unit step H(0) = 1 and the sign sgn(0) = 1::

        candidate_t = W_c x_t + b_c        threshold_t = W_b x_t + b_b
        z_t = H(|candidate_t| - |threshold_t|)
        s_t = z_t (sgn(candidate_t) + epsilon s_{t-1}) + (1 - z_t) s_{t-1}
        h_t = alpha s_t

    W_c, W_b `[D, features]` and b_c, b_b, alpha `[D]` are trained, for each layer and direction. Initially b_b and
    alpha are 1, W_c, W_b and b_c are drawn as in `nn.Linear`, and learned initial states are -1 or 1.

    Args:
        input_size: number of features of the input.
        hidden_size: number of channels D of each layer and direction.
        num_layers: number of layers. Each reads the output of the layer before it.
        epsilon: in [0, 1]. At 0 the state is the last written value; at 1 the state is the sum of all written values.
            The attribute `epsilon` reads and sets it.
        bias: whether the candidate has a bias. The threshold always has one.
        batch_first: whether batches are `[B, T, *]` (the default, unlike `nn.GRU`) or `[T, B, *]`.
        dropout: probability of dropout on the output of each layer except the last.
        bidirectional: whether each layer also scans backwards in time; the outputs of both directions are concatenated.
        learn_initial_state: whether to train the state before the first step, one for each layer and direction. It is
            zero otherwise.
        chunk_size: the largest number of steps between states saved for the backward pass, or None; see
            `mru_kernels.bmru`.
        surrogate_scale: k > 0 of the surrogate derivatives, `k / (1 + (pi k x)^2)` for H and twice that for sgn.
        device, dtype: of the parameters; float32, float64, bfloat16 or float16.

    Call:
        `output, h_n = module(input, hx=None, resets=None)`, and `output, h_n, boundaries = module(...,
        return_boundaries=True)`

        input: `[B, T, input_size]`, or `[T, B, input_size]` without `batch_first`; `[T, input_size]` without a batch;
            or a `PackedSequence`. It has the module's dtype, except under autocast.
        hx: states before the first step, `[num_layers * directions, B, D]`, or `[num_layers * directions, D]` without a
            batch. Its dtype is that of the input or that of `h_n`. None stands for the learned initial states. Eager
            calls warn where `hx` has half precision and the state accumulates (epsilon > 0, minGRU and minLSTM).
        resets: bool, with the shape of the input without its features, true where a new episode begins. Before that
            step every state becomes the learned initial state, or zero. The second direction starts anew before the
            last step of the episode before. Not with a `PackedSequence`.
        output: h of the last layer, `[B, T, directions * D]`, with the dimensions in the order of the input's.
        boundaries: the states after every `chunk_size` steps in the order of each scan, before a reset there,
            `[num_layers * directions, B, floor((T - 1) / chunk_size), D]`. Not with a `PackedSequence`.
        h_n: final states, with the shape of `hx`. These are the raw states s, without alpha, so that a call with
            `hx=h_n` continues the scan. float64 for a float64 input, else float32.

        `step(input, hx=None, resets=None)` runs one step, for streaming; there `resets` is `[B]`.

    Setting epsilon:
        `module.epsilon = value` acts from the next call on, and `EpsilonSchedule` sets it over the steps of training.
        Under activation checkpointing set it after the backward pass: checkpointing computes the forward pass again,
        with the value at that time, and raises no error.

        The `state_dict` contains epsilon as extra state. To load a `state_dict` without it leaves epsilon unchanged and
        warns. Epsilon is neither a parameter nor a buffer, so tools that copy only these leave it unchanged too::

            averaged.module.epsilon = model.epsilon  # after AveragedModel.update_parameters(model)
            ddp.module.epsilon = value               # DistributedDataParallel: not `ddp.epsilon`
            base.epsilon = value                     # torch.func.stack_module_state: all members use the epsilon of
                                                     # `base`, the module that functional_call runs

    FSDP2:
        In half precision FSDP2 casts `hx` by default. A CMRU that counts one step at a time then stops at 257 in
        bfloat16. `fully_shard(module, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16,
        cast_forward_inputs=False))`, without `output_dtype`, keeps the states in float32; then the caller casts the
        input.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Example::

        >>> unit = mk.BMRU(3, 8, num_layers=2, bidirectional=True)
        >>> output, h_n = unit(torch.randn(4, 10, 3))
        >>> output.shape, h_n.shape
        (torch.Size([4, 10, 16]), torch.Size([4, 4, 8]))
        >>> more, h_n = unit(torch.randn(4, 5, 3), h_n)  # continue from the final states
        >>> more.square().mean().backward()
    """

    gates = {"candidate": None, "threshold": 1.0}
    per_channel = {"alpha": 1.0}
    initial_state_values = (-1.0, 1.0)

    def _writes(self, gates, **per_channel):
        candidate, threshold, *_ = gates.chunk(len(self.gates), -1)
        return candidate.abs() >= threshold.abs()

    def _scan(self, gates, initial_state, **options):
        return bmru_packed(
            gates,
            initial_state,
            epsilon=self._epsilon,
            amplitude="amplitude" in self.gates,
            surrogate_scale=self.surrogate_scale,
            **options,
        )

    def _step(self, gates, state, state_indices, **per_channel):
        return bmru_packed_step(
            gates, state, state_indices, epsilon=self._epsilon, amplitude="amplitude" in self.gates, **per_channel
        )


class CMRU(BMRU, names=("cmru",)):
    """Layers of cumulative memory recurrent units (arXiv 2605.11855): a `BMRU` with epsilon 1 by default.

    All arguments, calls and errors are those of `BMRU`.

    Example::

        >>> unit = mk.CMRU(3, 8)
        >>> output, h_n = unit(torch.randn(4, 10, 3))
        >>> output.shape, h_n.shape, unit.epsilon
        (torch.Size([4, 10, 8]), torch.Size([1, 4, 8]), 1.0)
    """

    @constructor
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        epsilon: float = 1.0,
        bias: bool = True,
        batch_first: bool = True,
        dropout: float = 0.0,
        bidirectional: bool = False,
        learn_initial_state: bool = True,
        chunk_size: int | None = backends.CHUNK,
        surrogate_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            input_size, hidden_size, num_layers, epsilon=epsilon, bias=bias, batch_first=batch_first, dropout=dropout,
            bidirectional=bidirectional, learn_initial_state=learn_initial_state, chunk_size=chunk_size,
            surrogate_scale=surrogate_scale, device=device, dtype=dtype,
        )  # fmt: skip


class AlphaCMRU(CMRU, names=("alpha_cmru",)):
    """Layers of alpha-CMRU (arXiv 2605.11855): a `CMRU` whose written values have an amplitude computed from the input.

    The amplitude replaces alpha, so the levels of the state are not quantised::

        amplitude_t = W_m x_t + b_m
        s_t = z_t (amplitude_t sgn(candidate_t) + epsilon s_{t-1}) + (1 - z_t) s_{t-1}        h_t = s_t

    Initially b_m is 1. All arguments, calls and errors are those of `BMRU`.

    Example::

        >>> output, h_n = mk.AlphaCMRU(3, 8)(torch.randn(4, 10, 3))
        >>> output.shape, h_n.shape
        (torch.Size([4, 10, 8]), torch.Size([1, 4, 8]))
    """

    gates = {"candidate": None, "threshold": 1.0, "amplitude": 1.0}
    per_channel = {}


class FirstQuadrantBMRU(WriteOrHold, names=("first_quadrant_bmru", "schmitt")):
    """Layers of first-quadrant bistable units, Schmitt triggers (arXiv 2605.15216), used like `torch.nn.GRU`.

    For each step, with the unit step H(0) = 1::

        candidate_t = relu(W x_t + b)      high = low + |width|
        L_t = H(candidate_t - low)         U_t = H(candidate_t - high)      hold_t = L_t (1 - U_t)
        s_t = hold_t s_{t-1} + (1 - hold_t) (U_t + epsilon s_{t-1})
        h_t = alpha s_t

    W `[D, features]` and b, low, width, alpha `[D]` are trained. Initially W is drawn as in `nn.Linear` and made
    non-negative, alpha is 1, and learned initial states are 0 or 1. b is 0.5, low 0.15 and width 0.35, each times a
    draw from [0.8, 1.2] per channel.

    All arguments, calls and errors are those of `BMRU`.

    Example::

        >>> output, h_n = mk.FirstQuadrantBMRU(3, 8)(torch.randn(4, 10, 3))
        >>> output.shape, h_n.unique().tolist()
        (torch.Size([4, 10, 8]), [0.0, 1.0])
    """

    gates = {"candidate": None}
    per_channel = {"low": 0.15, "width": 0.35, "alpha": 1.0}
    initial_state_values = (0.0, 1.0)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters as the class describes."""
        super().reset_parameters()
        means = {"low": self.per_channel["low"], "width": self.per_channel["width"]}
        if self.bias:
            means["bias_ih"] = 0.5
        for _, suffix in self._scans():
            getattr(self, "weight_ih" + suffix).abs_()
            for name, mean in means.items():
                getattr(self, name + suffix).uniform_(0.8 * mean, 1.2 * mean)

    def _writes(self, gates, **per_channel):
        candidate, low = F.relu(gates), per_channel["low"]
        return (candidate < low) | (candidate >= low + per_channel["width"].abs())

    def _scan(self, gates, initial_state, **options):
        low = options.pop("low")
        return schmitt(
            F.relu(gates),
            low,
            low + options.pop("width").abs(),
            initial_state,
            epsilon=self._epsilon,
            surrogate_scale=self.surrogate_scale,
            **options,
        )

    def _step(self, gates, state, state_indices, **per_channel):
        low = per_channel.pop("low")
        high = low + per_channel.pop("width").abs()
        return schmitt_step(
            F.relu(gates), low, high, state, epsilon=self._epsilon, state_indices=state_indices, **per_channel
        )
