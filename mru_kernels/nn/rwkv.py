"""RWKV-4 (arXiv 2305.13048): time mixing and channel mixing. rwkv_network.py has the network of both,
rwkv_states.py the conversion of states.

Parameters have the names and initial values of the authors' code (BlinkDL/RWKV-LM, RWKV-v4). The paper's appendix E has
other initial values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from .. import backends, checks
from ..softmax import empty_state, wkv
from .arguments import check_input_dtype, check_sizes, check_state, check_state_shapes, constructor
from .base import UNITS
from .wrappers import fx_node


class Mix(torch.nn.Module):
    """What both mixings share: checks, states and calls. Each maps mixtures of a step with the step before."""

    width: int

    def __init__(self, width: int, layer: int, layers: int) -> None:
        super().__init__()
        check_sizes(width=width, layers=layers)
        check_sizes(0, layer=layer)
        if layer >= layers:
            raise ValueError(f"layer: expected an int below layers={layers}, got {layer}")
        self.width, self.layer, self.layers = width, layer, layers

    def extra_repr(self) -> str:
        return f"{self.width}, layer={self.layer}, layers={self.layers}"

    @property
    def num_states(self) -> int:
        """Number of tensors of the state."""
        return len(self._shapes(0))

    def _shapes(self, batch: int) -> list[tuple[int, ...]]:
        return [(batch, self.width)]

    def _starts(self) -> list[Tensor | None]:
        """The initial state of a new sequence for each tensor of the state; None for zeros."""
        return [None]

    def _ramp(self, power: float) -> Tensor:
        """(i / width)^power for each channel i."""
        return (torch.arange(self.width, device="cpu") / self.width) ** power

    def _check(self, input: Tensor, state: Sequence[Tensor] | None) -> list[Any]:
        """The tensors of the state, or None for each. All arguments of a call are checked."""
        checks.tensor("input", input, 3, "[batch, time, width]")
        if input.shape[2] != self.width or input.shape[1] == 0:
            expected = f"[batch, time >= 1, width={self.width}]"
            raise ValueError(f"input: expected shape {expected}, got {list(input.shape)}")
        dtype = next(self.get_submodule("key").parameters()).dtype  # not a Parameter within `functional_call`
        check_input_dtype(input, dtype)
        if state is None:
            return [None] * self.num_states
        check_state(state, self.num_states)
        check_state_shapes(state, self._shapes(len(input)), input.device)
        wide = checks.state_dtype(input.dtype)
        for i, (tensor, wanted) in enumerate(zip(state, (input.dtype, wide), strict=False)):
            if tensor.dtype != wanted:
                raise TypeError(f"state: expected dtype {wanted} for tensor {i}, got {tensor.dtype}")
        return list(state)

    @torch.no_grad()
    def step(self, input: Tensor, state: Sequence[Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One step of `forward`, for streaming inference, without gradients.

        Args:
            input: `[B, width]`.
            state: as for `forward`.

        Returns:
            The output `[B, width]` and the state after the step.

        Raises:
            TypeError, ValueError: as `forward`.
        """
        checks.tensor("input", input, 2, "[batch, width]")
        output, after = self(input.unsqueeze(1), state)
        return output.squeeze(1), after


def _shifted(x: Tensor, last: Tensor | None, parallel: Any) -> tuple[Tensor, Tensor]:
    """The step before each step of `x [B, T, C]`, and the last step `[B, C]`.

    Before the first step it is `last [B, C]`, or 0. `parallel` is a call of `distributed.SequenceParallel`, or None.
    """
    first, end = x.new_zeros(x.shape[0], 1, x.shape[2]) if last is None else last.unsqueeze(1), x[:, -1:]
    if parallel is not None:
        first, end = parallel.halo(x, first, None)
    return torch.cat([first, x[:, :-1]], 1), end[:, 0].clone()  # a view would keep the input in memory


def _wkv(key: Tensor, state: Tensor | None, *, value: Tensor, decay: Tensor, bonus: Tensor, **options: Any) -> Any:
    return wkv(key, value, decay, bonus, state, **options)


def _mixed(before: Tensor, x: Tensor, share: Tensor) -> Tensor:
    return torch.lerp(before, x, share.to(x.dtype))


def orthogonal(weight: Tensor, gain: float = 1.0) -> None:
    """Draw an orthogonal matrix, larger by sqrt(rows / columns) if it has more rows than columns."""
    rows, columns = weight.shape
    drawn = torch.empty_like(weight, dtype=checks.state_dtype(weight.dtype))
    weight.copy_(torch.nn.init.orthogonal_(drawn, gain * math.sqrt(max(1.0, rows / columns))))


def stream_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of the parameters. TypeError unless streams may have it."""
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if dtype not in checks.STREAM_DTYPES:
        raise TypeError(f"dtype: expected float32, bfloat16, float16 or float64, got {dtype}")
    return dtype


class RWKV4TimeMix(Mix):
    """The time mixing of RWKV-4 (arXiv 2305.13048), which replaces attention.

    With x'_t the step before x_t, zero before the first step, and `mru_kernels.wkv`::

        r_t = receptance (mu_r x_t + (1 - mu_r) x'_t)       k_t, v_t likewise with key, mu_k and value, mu_v
        y_t = output (sigmoid(r_t) * wkv(k, v, decay=-exp(time_decay), bonus=time_first)_t)

    Parameters: `key`, `value`, `receptance` and `output`, maps `[width, width]` without biases; `time_mix_k`,
    `time_mix_v`, `time_mix_r`, `time_decay` and `time_first`, `[width]`. The last two are created in float32 where
    `dtype` is a half precision; `Module.to` casts them like all others.

    Initial values, for channel i of C, with l = `layer` and L = `layers`, are those of the authors' code::

        time_decay  -5 + 8 (i / (C - 1))^(0.7 + 1.3 l / (L - 1))        time_first  log 0.3 + ((i + 1) mod 3 - 1) / 2
        mu_k        (i / C)^(1 - l / L)      mu_v = mu_k + 0.3 l / (L - 1)      mu_r  (i / C)^((1 - l / L) / 2)

    `key`, `receptance` and `output` are zero and `value` is orthogonal. So the output is zero at first, and only
    `output` has a gradient in the first step of training.

    Args:
        width: number of channels C.
        layer, layers: number of this layer, from 0, and of all layers. Only the initial values depend on them.
        chunk_size: as for `mru_kernels.wkv`.
        device, dtype: of the parameters; float32, float64, bfloat16 or float16.

    Call:
        `output, state = module(input, state=None)`

        input, output: `[B, T, width]`, T >= 1.
        state: the last input `[B, width]` in the dtype of the input, and the state of `wkv`, `[B, 3 width]`, float32 or
            float64. A call with the returned state continues the sequences. None begins new ones.
            `wkv_state_from_sums` and `wkv_sums_from_state` convert the second from and to the sums of public code.

        `step(input, state=None)` runs one step, for streaming.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Example::

        >>> mixing = mk.RWKV4TimeMix(8, layer=0, layers=2)
        >>> output, state = mixing(torch.randn(2, 10, 8))
        >>> output.shape, [tuple(t.shape) for t in state]
        (torch.Size([2, 10, 8]), [(2, 8), (2, 24)])
    """

    @constructor
    def __init__(
        self,
        width: int,
        layer: int = 0,
        layers: int = 1,
        *,
        chunk_size: int | None = backends.CHUNK,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(width, layer, layers)
        self.chunk_size = checks.chunk_size(chunk_size)
        where: dict[str, Any] = {"device": device, "dtype": stream_dtype(dtype)}
        self.key = torch.nn.Linear(width, width, bias=False, **where)
        self.value = torch.nn.Linear(width, width, bias=False, **where)
        self.receptance = torch.nn.Linear(width, width, bias=False, **where)
        self.output = torch.nn.Linear(width, width, bias=False, **where)
        self.time_mix_k = torch.nn.Parameter(torch.empty(width, **where))
        self.time_mix_v = torch.nn.Parameter(torch.empty(width, **where))
        self.time_mix_r = torch.nn.Parameter(torch.empty(width, **where))
        where["dtype"] = checks.state_dtype(where["dtype"])
        self.time_decay = torch.nn.Parameter(torch.empty(width, **where))
        self.time_first = torch.nn.Parameter(torch.empty(width, **where))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set all parameters as the class describes."""
        depth = self.layer / max(1, self.layers - 1)
        fades = 1.0 - self.layer / self.layers
        channel = torch.arange(self.width, device="cpu")
        speed = channel / max(1, self.width - 1)
        self.time_decay.copy_(-5.0 + 8.0 * speed ** (0.7 + 1.3 * depth))
        self.time_first.copy_(math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1))
        self.time_mix_k.copy_(self._ramp(fades))
        self.time_mix_v.copy_(self._ramp(fades) + 0.3 * depth)
        self.time_mix_r.copy_(self._ramp(0.5 * fades))
        for part in (self.key, self.receptance, self.output):
            part.weight.zero_()
        orthogonal(self.value.weight)

    def forward(
        self, input: Tensor, state: Sequence[Tensor] | None = None, *, _parallel: Any = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run the mixing; the class describes the arguments, results and errors."""
        if isinstance(input, Proxy):
            return fx_node(self, input, state, None)
        last, past = self._check(input, state)
        before, end = _shifted(input, last, _parallel)
        k = self.key(_mixed(before, input, self.time_mix_k))
        v = self.value(_mixed(before, input, self.time_mix_v))
        r = self.receptance(_mixed(before, input, self.time_mix_r))
        wide = checks.state_dtype(k.dtype)
        decay, bonus = -self.time_decay.to(wide).exp(), self.time_first.to(wide)
        scan = _wkv if _parallel is None else partial(_parallel.scan, _wkv)
        options = {"reverse": False, "cu_seqlens": None, "chunk_size": self.chunk_size}
        y, past = scan(k, past, value=v, decay=decay, bonus=bonus, **options)
        return self.output(r.sigmoid() * y), (end, past)

    def _shapes(self, batch: int) -> list[tuple[int, ...]]:
        return [(batch, self.width), (batch, 3 * self.width)]

    def _starts(self) -> list[Tensor | None]:
        return [None, empty_state(self.time_first, 1, self.width, self.width)[0]]


class RWKV4ChannelMix(Mix):
    """The channel mixing of RWKV-4 (arXiv 2305.13048), which replaces the MLP of a block.

    With x'_t the step before x_t, zero before the first step::

        k_t = key (mu_k x_t + (1 - mu_k) x'_t)      r_t = receptance (mu_r x_t + (1 - mu_r) x'_t)
        y_t = sigmoid(r_t) * value (relu(k_t)^2)

    Parameters: `key` `[hidden_size, width]`, `receptance` `[width, width]` and `value` `[width, hidden_size]`, maps
    without biases; `time_mix_k` and `time_mix_r`, `[width]`. Initially these two are (i / C)^(1 - l / L) for channel i
    of C, with l = `layer` and L = `layers`; `receptance` and `value` are zero; `key` is orthogonal with the gain
    sqrt(max(1, rows / columns)), as in the authors' code.

    Args:
        width: number of channels C.
        layer, layers: number of this layer, from 0, and of all layers. Only the initial values depend on them.
        hidden_size: number of hidden channels; 4 `width` if None.
        device, dtype: of the parameters; float32, float64, bfloat16 or float16.

    Call:
        `output, state = module(input, state=None)`

        input, output: `[B, T, width]`, T >= 1.
        state: a tuple with the last input `[B, width]`; None for zeros.

        `step(input, state=None)` runs one step, for streaming.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Example::

        >>> mixing = mk.RWKV4ChannelMix(8, layer=0, layers=2)
        >>> output, state = mixing(torch.randn(2, 10, 8))
        >>> output.shape, [tuple(t.shape) for t in state]
        (torch.Size([2, 10, 8]), [(2, 8)])
    """

    @constructor
    def __init__(
        self,
        width: int,
        layer: int = 0,
        layers: int = 1,
        *,
        hidden_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(width, layer, layers)
        self.hidden_size = 4 * width if hidden_size is None else hidden_size
        check_sizes(hidden_size=self.hidden_size)
        where: dict[str, Any] = {"device": device, "dtype": stream_dtype(dtype)}
        self.key = torch.nn.Linear(width, self.hidden_size, bias=False, **where)
        self.receptance = torch.nn.Linear(width, width, bias=False, **where)
        self.value = torch.nn.Linear(self.hidden_size, width, bias=False, **where)
        self.time_mix_k = torch.nn.Parameter(torch.empty(width, **where))
        self.time_mix_r = torch.nn.Parameter(torch.empty(width, **where))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set all parameters as the class describes."""
        for share in (self.time_mix_k, self.time_mix_r):
            share.copy_(self._ramp(1.0 - self.layer / self.layers))
        for part in (self.receptance, self.value):
            part.weight.zero_()
        orthogonal(self.key.weight)

    def forward(
        self, input: Tensor, state: Sequence[Tensor] | None = None, *, _parallel: Any = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run the mixing; the class describes the arguments, results and errors."""
        if isinstance(input, Proxy):
            return fx_node(self, input, state, None)
        (last,) = self._check(input, state)
        before, end = _shifted(input, last, _parallel)
        k = self.key(_mixed(before, input, self.time_mix_k))
        r = self.receptance(_mixed(before, input, self.time_mix_r))
        return r.sigmoid() * self.value(k.relu().square()), (end,)


class RWKV4Unit(RWKV4TimeMix):
    """`RWKV4TimeMix` as the unit "rwkv4" of `MRUBlock` and `MRUNetwork`. A network sets `layer` and `layers`."""

    @constructor
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        layer: int = 0,
        layers: int = 1,
        batch_first: bool = True,
        chunk_size: int | None = backends.CHUNK,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if hidden_size != input_size:
            raise ValueError(f"hidden_size: expected the width {input_size} with the unit 'rwkv4', got {hidden_size}")
        if not batch_first:
            raise ValueError("batch_first: expected True with the unit 'rwkv4', got False")
        super().__init__(input_size, layer, layers, chunk_size=chunk_size, device=device, dtype=dtype)

    def place(self, layer: int, layers: int) -> None:
        """Set the number of this layer and of all layers, and the initial values for them."""
        self.layer, self.layers = layer, layers
        self.reset_parameters()


UNITS["rwkv4"] = RWKV4Unit
