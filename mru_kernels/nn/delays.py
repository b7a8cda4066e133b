"""A layer of learned delays, and causal convolutions in which a step reads no step before its own episode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy
from torch.utils.checkpoint import checkpoint

from .. import checks
from .. import torch_private as private
from ..delays import after_past, check_sigma, compute_dtype, convolve, delay_kernel, past_or_zeros
from .arguments import check_input_dtype, check_resets, check_sizes, check_state, check_state_shapes, constructor
from .wrappers import fx_node

_GROUP = 16  # taps between two checkpoints: the backward pass recomputes the masked inputs of one group at a time


class DelayConv(torch.nn.Module):
    """A causal depthwise convolution with learned delays, the input layer of mGRADE (arXiv 2507.01829).

    It is `delay_conv` with parameters: each channel adds its inputs of `count` learned delays, each times a weight.
    Initially the delays are j taps / count, and the weights are normal with standard deviation count^-0.5, cut at two
    standard deviations. The gradient of a delay comes from inputs within about 3 sigma, so a small sigma moves a delay
    in small steps only.

    Args:
        channels: number of channels D.
        taps: number of steps that an output reads, including its own.
        count: number of delays of a channel.
        sigma: the width of a delay, in steps.
        learn_sigma: whether sigma is a parameter `[D, count]`, initially `sigma`, or a constant.
        device, dtype: of the parameters. A position in half precision is coarse; float32 parameters take half-precision
            inputs under autocast.

    Call:
        `output, state = module(input, state=None, resets=None)`

        input, output: `[B, T, D]`.
        state: a tuple of one tensor, the last taps - 1 inputs `[B, taps - 1, D]`, oldest first. None stands for zeros.
        resets: bool `[B, T]` or None, true where a new episode begins. There the layer reads no earlier step. Such a
            call makes one pass over the input for each tap.

        `step(input, state=None, resets=None)` runs one step, for streaming. `clamp_positions()` moves positions that
        have left [0, taps - 1] back; call it after each step of the optimiser.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Example::

        >>> module = mk.DelayConv(3, taps=64)
        >>> output, state = module(torch.randn(2, 100, 3))
        >>> output.shape, [tuple(t.shape) for t in state]
        (torch.Size([2, 100, 3]), [(2, 63, 3)])
        >>> module.position[0]
        tensor([ 0.,  8., 16., 24., 32., 40., 48., 56.], grad_fn=<SelectBackward0>)
    """

    @constructor
    def __init__(
        self,
        channels: int,
        taps: int,
        count: int = 8,
        sigma: float = 0.7,
        learn_sigma: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(channels=channels, taps=taps, count=count)
        if isinstance(sigma, bool) or not isinstance(sigma, (int, float)):
            raise TypeError(f"sigma: expected a float, got {type(sigma).__name__}")
        check_sigma(sigma)
        checks.flag("learn_sigma", learn_sigma)
        self.channels = channels
        self.taps = taps
        self.count = count
        self.initial_sigma = float(sigma)
        self.weight = torch.nn.Parameter(torch.empty(channels, count, device=device, dtype=dtype))
        self.position = torch.nn.Parameter(torch.empty_like(self.weight))
        self.sigma = torch.nn.Parameter(torch.empty_like(self.weight)) if learn_sigma else self.initial_sigma
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights, and set the delays and sigma, as the class describes."""
        std = self.count**-0.5
        if not private.is_fake(self.weight):  # it reads values
            torch.nn.init.trunc_normal_(self.weight, std=std, a=-2.0 * std, b=2.0 * std)
        delays = torch.arange(self.count, device=self.weight.device) * (self.taps / self.count)
        self.position.copy_(delays.expand_as(self.position))
        self.clamp_positions()
        if isinstance(self.sigma, Tensor):
            self.sigma.fill_(self.initial_sigma)

    @torch.no_grad()
    def clamp_positions(self) -> None:
        """Move positions outside [0, taps - 1] to its nearest end, in place."""
        self.position.clamp_(0.0, self.taps - 1.0)

    def extra_repr(self) -> str:
        learned = ", learn_sigma=True" * isinstance(self.sigma, Tensor)
        return f"{self.channels}, taps={self.taps}, count={self.count}, sigma={self.initial_sigma}{learned}"

    def forward(
        self, input: Tensor, state: Sequence[Tensor] | None = None, *, resets: Tensor | None = None,
        _parallel: Any = None,
    ) -> tuple[Tensor, tuple[Tensor]]:  # fmt: skip
        """Convolve; the class describes the arguments, results and errors."""
        if isinstance(input, Proxy):
            return fx_node(self, input, state, resets)
        checks.tensor("input", input, 3, "[batch, time, channels]")
        if input.shape[2] != self.channels:
            raise ValueError(f"input: expected {self.channels} channels, got shape {list(input.shape)}")
        weight = self.weight
        check_input_dtype(input, weight.dtype)
        check_resets(resets, input, "[batch, time]")
        past = None
        if state is not None:
            check_state(state, 1)
            (past,) = state
            check_state_shapes(state, [(input.shape[0], self.taps - 1, self.channels)], input.device)
            if past.dtype != input.dtype:
                raise TypeError(f"state: expected dtype {input.dtype} for tensor 0, got {past.dtype}")
        past, after = past_or_zeros(past, input, self.taps), None
        if _parallel is not None:
            past, after = _parallel.halo(input, past, resets)
        kernel = delay_kernel(weight, self.position, self.sigma, self.taps)
        padded = after_past(past, input)
        if resets is None or not input.shape[1]:
            return convolve(padded, kernel), (padded[:, input.shape[1] :].clone() if after is None else after,)
        dtype = compute_dtype(padded)
        exact = padded.to(checks.state_dtype(dtype)).transpose(1, 2)  # a sum of many taps in half precision is coarse
        output, last = convolved_in_episodes(exact, kernel.to(exact.dtype).flip(1), resets)
        if after is None:
            after = last.transpose(1, 2).to(padded.dtype).contiguous()
        return output.transpose(1, 2).to(dtype), (after,)

    @torch.no_grad()
    def step(
        self, input: Tensor, state: Sequence[Tensor] | None = None, *, resets: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor]]:
        """One step of `forward`, for streaming inference, without gradients.

        Args:
            input: `[B, D]`.
            state: as for `forward`.
            resets: bool `[B]`, true for sequences that begin anew with this step.

        Returns:
            The output `[B, D]` and the state after the step.

        Raises:
            TypeError, ValueError: as `forward`.
        """
        checks.tensor("input", input, 2, "[batch, channels]")
        check_resets(resets, input, "[batch]")
        output, after = self(input.unsqueeze(1), state, resets=None if resets is None else resets.unsqueeze(1))
        return output.squeeze(1), after


def convolved_in_episodes(padded: Tensor, weight: Tensor, resets: Tensor) -> tuple[Tensor, Tensor]:
    """A causal depthwise convolution in which a step reads no step before its own episode.

    Args:
        padded: `[B, D, K - 1 + T]`, K - 1 past steps and the T steps of the call, for K taps.
        weight: `[D, K]`; the last tap is that of the current step.
        resets: `[B, T]`, true where an episode begins.

    Returns:
        The convolution `[B, D, T]`, and the last K - 1 steps, with zeros for those before the last episode.
    """
    taps, time = weight.shape[1], resets.shape[1]
    episode = F.pad(resets.cumsum(1), (taps - 1, 0))  # past steps belong to the first one
    if taps <= _GROUP or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        convolved = _over_taps(padded, weight, episode, 0, taps)
    else:
        convolved = torch.zeros_like(padded[..., taps - 1 :])
        for first in range(0, taps, _GROUP):
            part = (padded, weight, episode, first, min(first + _GROUP, taps))
            convolved = convolved + checkpoint(_over_taps, *part, use_reentrant=False, preserve_rng_state=False)
    is_last = (episode[:, time:] == episode[:, -1:]).unsqueeze(1)
    return convolved, torch.where(is_last, padded[..., time:], 0)


def _over_taps(padded: Tensor, weight: Tensor, episode: Tensor, first: int, end: int) -> Tensor:
    """The part of `convolved_in_episodes` of the taps from `first` to before `end`."""
    past = weight.shape[1] - 1
    time = episode.shape[1] - past
    own = episode[:, past:]
    convolved = torch.zeros_like(padded[..., past:])
    for tap in range(first, end):
        is_own = (episode[:, tap : tap + time] == own).unsqueeze(1)
        convolved = convolved + torch.where(is_own, padded[..., tap : tap + time], 0) * weight[:, tap].unsqueeze(-1)
    return convolved
