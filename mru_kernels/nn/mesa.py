"""MesaNet's layer as a module (arXiv 2506.05233)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy

from .. import checks
from .. import torch_private as private
from ..mesa import mesa
from ..mesa_checks import MOST_DIRECT, SOLVERS, check_backend
from .arguments import (
    check_choice,
    check_input_dtype,
    check_number,
    check_sizes,
    check_state,
    check_state_shapes,
    constructor,
)
from .base import UNITS
from .wrappers import fx_node

LEAST_REGULARIZER = 0.25
REPEATED = 0.9975  # the largest forget gate of a step with beta = 1


class MesaNet(torch.nn.Module):
    """A layer that solves a regularised least-squares problem over the past at every step (MesaNet, arXiv 2506.05233).

    Per head, with K = `key_size`, V = `value_size` and `mru_kernels.mesa`::

        q_t, k_t = SiLU(causal depthwise convolution of W_qk x), divided by their lengths       [K] each
        v_t = W_v x_t                                                                           [V]
        beta_t = sigmoid(W_beta x_t + b_beta)
        gamma_t = sigmoid(W_gamma x_t + b_gamma) (1 - (1 - 0.9975) beta_t^2)                    forget gate
        regularizer = 0.25 + softplus(l)                                                        [K], initially 1
        y_t = W_o concatenated RMSNorm(mesa(q, k, v, log gamma, beta, regularizer))

    The factor of gamma bounds the state when one token repeats. Initially the biases of gamma spread the time scales
    1 / (1 - sigmoid(b_gamma)) over the heads, from 16 to 1,024 steps on a logarithmic scale.

    Args:
        input_size: number of features E.
        hidden_size: number of features D of the output.
        heads: number of heads.
        key_size, value_size: sizes per head; None for `hidden_size / heads`, rounded up.
        conv_size: number of steps that the convolution reads, including the current step; 0 for no convolution.
        steps, tolerance, solver, chunk_size, backend: as for `mru_kernels.mesa`.
        batch_first: whether input and output are `[B, T, E]` and `[B, T, D]` or have time first.
        device, dtype: of the parameters; float32, float64, bfloat16 or float16.

    Call:
        `output, state = module(input, state=None)`

        input: `[B, T, E]`, T >= 1.
        output: `[B, T, D]`.
        state: a tuple of tensors, each with the batch first: kk `[B, heads, K, K]` and kv `[B, heads, K, V]`, float32
            or float64, and with a convolution its last inputs `[B, 2 heads K, conv_size - 1]`. A call with the returned
            state continues the sequences. None stands for zeros.

        `step(input, state=None)` runs one step, for streaming.

    Attributes:
        taken: iterations that every step of the last call took, int64 `[B, T, heads]`; None before the first call and
            of a compiled call or one under vmap.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Example::

        >>> layer = mk.MesaNet(8, 12, heads=2, tolerance=1e-4)
        >>> output, state = layer(torch.randn(2, 10, 8))
        >>> output.shape, [tuple(t.shape) for t in state]
        (torch.Size([2, 10, 12]), [(2, 2, 6, 6), (2, 2, 6, 6), (2, 24, 3)])
        >>> layer.taken.shape
        torch.Size([2, 10, 2])
    """

    @constructor
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        heads: int = 1,
        key_size: int | None = None,
        value_size: int | None = None,
        conv_size: int = 4,
        steps: int = 30,
        tolerance: float = 0.0,
        solver: str = "cg",
        chunk_size: int = 64,
        backend: str | None = None,
        batch_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(input_size=input_size, hidden_size=hidden_size, heads=heads, steps=steps, chunk_size=chunk_size)
        key_size = -(-hidden_size // heads) if key_size is None else key_size
        value_size = -(-hidden_size // heads) if value_size is None else value_size
        check_sizes(key_size=key_size, value_size=value_size)
        check_sizes(0, conv_size=conv_size)
        check_choice("solver", solver, SOLVERS)
        check_backend(backend)
        if solver == "direct" and key_size > MOST_DIRECT:
            raise ValueError(f'key_size: expected at most {MOST_DIRECT} with solver="direct", got {key_size}')
        if dtype is not None and dtype not in checks.STREAM_DTYPES:
            raise TypeError(f"dtype: expected float32, bfloat16, float16 or float64, got {dtype}")
        self.input_size, self.hidden_size, self.heads = input_size, hidden_size, heads
        self.key_size, self.value_size, self.conv_size = key_size, value_size, conv_size
        self.steps, self.solver, self.chunk_size, self.backend = steps, solver, chunk_size, backend
        self.tolerance = check_number("tolerance", tolerance, 0.0, 0.5)
        self.batch_first = checks.flag("batch_first", batch_first)
        self.taken: Tensor | None = None
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        keys = 2 * heads * key_size
        self.keys = torch.nn.Linear(input_size, keys, bias=False, **where)
        self.values = torch.nn.Linear(input_size, heads * value_size, bias=False, **where)
        self.gates = torch.nn.Linear(input_size, 2 * heads, **where)
        self.conv = torch.nn.Conv1d(keys, keys, conv_size, groups=keys, bias=False, **where) if conv_size else None
        self.regularizer = torch.nn.Parameter(torch.empty(heads, key_size, **where))
        self.norm = torch.nn.RMSNorm(value_size, eps=1e-6, **where)
        self.out = torch.nn.Linear(heads * value_size, hidden_size, bias=False, **where)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw maps and the convolution as in torch.nn; set the other parameters as the class describes."""
        for part in (self.keys, self.values, self.gates, self.conv, self.norm, self.out):
            if part is not None:
                part.reset_parameters()
        scales = torch.logspace(math.log10(16), math.log10(1024), self.heads, device="cpu")
        self.gates.bias.copy_(torch.cat([torch.zeros_like(scales), (scales - 1).log()]))
        self.regularizer.fill_(math.log(math.expm1(1 - LEAST_REGULARIZER)))

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, heads={self.heads}, solver={self.solver!r}, steps={self.steps}"

    @property
    def num_states(self) -> int:
        """Number of tensors of the state."""
        return 2 + (self.conv is not None)

    def forward(self, input: Tensor, state: Sequence[Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run the layer; the class describes the arguments, results and errors."""
        if isinstance(input, Proxy):
            return fx_node(self, input, state)
        parameter = self.regularizer  # read once, since a parametrization computes it
        dtype = parameter.dtype
        self._check_input(input, dtype)
        x = input if self.batch_first else input.transpose(0, 1)
        past, before = self._given(state, x, dtype)
        mixed = self.keys(x)
        after: tuple[Tensor, ...] = ()
        if self.conv is not None:
            mixed, last = self._convolved(mixed, past)
            after = (last,)
        # autocast computes lengths in float32
        keys = F.normalize(mixed.unflatten(-1, (2, self.heads, self.key_size)), dim=-1).to(mixed.dtype)
        q, k = keys[:, :, 0], keys[:, :, 1]
        v = self.values(x).unflatten(-1, (self.heads, self.value_size)).to(q.dtype)
        wide = checks.state_dtype(q.dtype)
        beta, gamma = self.gates(x).to(wide).unflatten(-1, (2, self.heads)).unbind(2)
        beta = beta.sigmoid()
        decay = F.logsigmoid(gamma) + torch.log1p(-(1 - REPEATED) * beta.square())
        regularizer = LEAST_REGULARIZER + F.softplus(parameter.to(wide))
        options: dict[str, Any] = {
            name: getattr(self, name) for name in ("steps", "tolerance", "solver", "chunk_size", "backend")
        }
        read, states, taken = mesa(q, k, v, decay, beta, regularizer, before, **options)
        if not torch.compiler.is_compiling():
            self.taken = None if private.is_wrapped(taken) else taken
        y = self.out(self.norm(read.to(dtype)).flatten(-2))
        return (y if self.batch_first else y.transpose(0, 1)), (*states, *after)

    @torch.no_grad()
    def step(self, input: Tensor, state: Sequence[Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One step of `forward`, for streaming inference, without gradients.

        Args:
            input: `[B, E]`.
            state: as for `forward`.

        Returns:
            The output `[B, D]` and the state after the step.

        Raises:
            TypeError, ValueError: as `forward`.
        """
        checks.tensor("input", input, 2, "[batch, features]")
        time = 1 if self.batch_first else 0
        output, after = self(input.unsqueeze(time), state)
        return output.squeeze(time), after

    def _convolved(self, mixed: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """SiLU of the convolution `[B, T, 2 heads K]`, and its last inputs."""
        assert self.conv is not None
        time_last = mixed.transpose(1, 2)
        if past is None:
            past = time_last.new_zeros(*time_last.shape[:2], self.conv_size - 1)
        elif past.dtype != mixed.dtype:
            raise TypeError(f"state: expected dtype {mixed.dtype} for tensor 2, got {past.dtype}")
        padded = torch.cat([past, time_last], -1)
        last = padded[..., padded.shape[2] - self.conv_size + 1 :].clone()  # a view would keep `padded` in memory
        return F.silu(self.conv(padded)).transpose(1, 2), last

    def _check_input(self, input: Tensor, dtype: torch.dtype) -> None:
        checks.tensor("input", input, 3, "[batch, time, features]" if self.batch_first else "[time, batch, features]")
        if input.shape[2] != self.input_size:
            raise ValueError(f"input: expected {self.input_size} features, got {input.shape[2]}")
        if input.shape[1 if self.batch_first else 0] == 0:
            raise ValueError(f"input: expected at least one step, got shape {list(input.shape)}")
        check_input_dtype(input, dtype)

    def _given(
        self, state: Sequence[Tensor] | None, x: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
        """The past of the convolution and the states of `mesa`, checked. `dtype` is that of the parameters."""
        if state is None:
            return None, None
        check_state(state, self.num_states)
        heads, key = self.heads, self.key_size
        shapes: list[tuple[int, ...]] = [(len(x), heads, key, key), (len(x), heads, key, self.value_size)]
        if self.conv is not None:
            shapes.append((len(x), 2 * heads * key, self.conv_size - 1))
        check_state_shapes(state, shapes, x.device)
        wide = checks.state_dtype(dtype)
        for i in (0, 1):
            if state[i].dtype != wide:
                raise TypeError(f"state: expected dtype {wide} for tensor {i}, got {state[i].dtype}")
        return (None if self.conv is None else state[2]), (state[0], state[1])


UNITS["mesa"] = MesaNet
