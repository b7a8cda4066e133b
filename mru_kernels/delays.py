"""Convolutions over time with learned delays: `delay_conv`, on torch's own convolution and FFT."""

from __future__ import annotations

import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from . import torch_private as private

#: Up to this number of taps conv1d runs on a CPU, above it the FFT, whose cost does not grow with the taps. In
#: `python -m bench delays` a forward and backward pass takes equally long by both near this number.
DIRECT_TAPS = 256
DIRECT_TAPS_ELSEWHERE = 16  # in float64, for which oneDNN has no conv1d, and on other devices, which are not measured
LEAST_SIGMA = 1e-30  # distances in widths stay finite in float32
_ROUND = 128  # lengths of the FFT are multiples of this, which have small prime factors for common lengths


def delay_conv(
    input: Tensor,
    weight: Tensor,
    position: Tensor,
    sigma: Tensor | float,
    taps: int,
    past: Tensor | None = None,
    *,
    normalised: bool = False,
    reach: float = 6.0,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A causal depthwise convolution whose kernel is a sum of bumps at learned delays (mGRADE, arXiv 2507.01829).

    For channel d::

        y[b, t, d] = sum_{tau < taps} K[d, tau] input[b, t - tau, d]
        K[d, tau] = sum_j weight[d, j] phi((tau - position[d, j]) / sigma[d, j])        phi(u) = exp(-u^2 / 2)

    Position p is a delay of p steps. A bump is 0 farther than `reach` sigma from its position; the default cuts it at
    1.5e-8 of its height. A position may leave [0, taps - 1]; the part of its bump outside the taps is lost.

    Up to 256 taps the convolution is `conv1d`, above by FFT; in float64 and on a GPU from 17 taps on. Half precision is
    convolved in float32. The FFT rounds relative to the largest input of the whole call. A value that is not finite
    makes its channel NaN for `taps` steps.

    Args:
        input: `[B, T, D]`, float32, float64, bfloat16 or float16. Under autocast y has the autocast dtype.
        weight, position: `[D, J]`, the heights and positions of J bumps, in float32 or the input's dtype.
        sigma: the widths, `[D, J]`, positive, or a number of at least 1e-30.
        taps: number of steps that an output reads, including its own.
        past: the inputs before the first step, oldest first, `[B, taps - 1, D]` in the input's dtype; None for zeros.
        normalised: whether to divide every bump by its sum over the taps + 1e-7.
        reach: where a bump ends, in sigma; infinity for never.
        cu_seqlens: for packed sequences, int32 or int64 `[N + 1]`, where each begins, and the total length. Then the
            input is `[1, total, D]` and the past `[N, taps - 1, D]`.

    Returns:
        y `[B, T, D]`, and the past for the next call, `[B, taps - 1, D]` or `[N, taps - 1, D]`.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Example::

        >>> x = torch.randn(2, 10, 3)
        >>> weight, position = torch.ones(3, 1), torch.tensor([[0.0], [2.0], [4.0]])
        >>> y, past = mk.delay_conv(x, weight, position, 0.1, taps=8)
        >>> torch.allclose(y[:, 4:, 2], x[:, :6, 2], atol=1e-5)
        True
    """
    checks.streams({"input": input}, checks.STREAM_DTYPES)
    channels = input.shape[2]
    kernel = delay_kernel(weight, position, sigma, taps, normalised=normalised, reach=reach)
    if kernel.shape[0] != channels:
        raise ValueError(f"weight: expected {channels} channels, as the input has, got {kernel.shape[0]}")
    if kernel.device != input.device:
        raise ValueError(f"weight: expected the input's device {input.device}, got {kernel.device}")
    if weight.dtype not in (torch.float32, input.dtype):
        raise TypeError(f"weight: expected float32 or the input's dtype {input.dtype}, got {weight.dtype}")
    if cu_seqlens is not None:
        checks.cu_seqlens(cu_seqlens, input)
        checks.offsets(cu_seqlens, input.shape[1])
    past = past_or_zeros(past, input, taps, None if cu_seqlens is None else cu_seqlens.shape[0] - 1)
    if cu_seqlens is not None:
        return _packed(input, past, kernel, cu_seqlens)
    padded = after_past(past, input)
    return convolve(padded, kernel), padded[:, input.shape[1] :].clone()  # a view would keep `padded` in memory


def delay_kernel(
    weight: Tensor, position: Tensor, sigma: Tensor | float, taps: int, *, normalised: bool = False, reach: float = 6.0
) -> Tensor:
    """K `[D, taps]` of `delay_conv`, in float32 or float64."""
    if isinstance(taps, bool) or not isinstance(taps, int):
        raise TypeError(f"taps: expected an int, got {type(taps).__name__}")
    if taps < 1:
        raise ValueError(f"taps: expected a positive int, got {taps}")
    if taps > checks.MOST_SIZE:
        raise ValueError(f"taps: expected at most {checks.MOST_SIZE}, got {taps}")
    if isinstance(reach, bool) or not isinstance(reach, (int, float)):
        raise TypeError(f"reach: expected a number, got {type(reach).__name__}")
    if not (0.0 < reach <= sys.float_info.max or reach == math.inf):  # an int may be too large for a float
        raise ValueError(f"reach: expected a positive number, got {reach}")
    checks.flag("normalised", normalised)
    checks.tensor("weight", weight, 2, "[channels, count]")
    if weight.dtype not in checks.STREAM_DTYPES:
        raise TypeError(f"weight: expected a floating dtype, got {weight.dtype}")
    given = {"position": position}
    if isinstance(sigma, Tensor):
        given["sigma"] = sigma
    elif isinstance(sigma, bool) or not isinstance(sigma, (int, float)):
        raise TypeError(f"sigma: expected a tensor or a number, got {type(sigma).__name__}")
    else:
        check_sigma(sigma)
    for name, value in given.items():
        checks.like(name, value, weight, tuple(weight.shape), "[channels, count]")
    dtype = checks.state_dtype(weight.dtype)
    width = sigma.to(dtype).unsqueeze(-1) if isinstance(sigma, Tensor) else sigma
    tau = torch.arange(taps, dtype=dtype, device=weight.device)
    u = (tau - position.to(dtype).unsqueeze(-1)) / width
    phi = (-0.5 * u.square()).exp()
    if reach < math.inf:
        phi = torch.where(u.detach().abs() > reach, 0.0, phi)  # written so that a NaN stays
    if normalised:
        phi = phi / (phi.sum(-1, keepdim=True) + 1e-7)
    return (weight.to(dtype).unsqueeze(-1) * phi).sum(1)


def check_sigma(sigma: float) -> None:
    """Raise unless `sigma` is a width."""
    if not LEAST_SIGMA <= sigma <= sys.float_info.max:
        raise ValueError(f"sigma: expected a finite number of at least {LEAST_SIGMA:g}, got {sigma}")


def past_or_zeros(past: Tensor | None, input: Tensor, taps: int, sequences: int | None = None) -> Tensor:
    """The past of a call, checked; zeros if it is None. `sequences` is the number of packed ones, or None."""
    shape = (input.shape[0] if sequences is None else sequences, taps - 1, input.shape[2])
    if past is None:
        return input.new_zeros(shape)
    checks.tensor("past", past, 3, "[sequences, taps - 1, channels]")
    if past.shape != shape:
        raise ValueError(f"past: expected shape {list(shape)} [sequences, taps - 1, channels], got {list(past.shape)}")
    if past.dtype != input.dtype:
        raise TypeError(f"past: expected the input's dtype {input.dtype}, got {past.dtype}")
    if past.device != input.device:
        raise ValueError(f"past: expected the input's device {input.device}, got {past.device}")
    return past


def after_past(past: Tensor, input: Tensor) -> Tensor:
    """The past and the input, joined along time."""
    with checks.without_autocast(input.device):  # under which `cat` refuses the half precision that is not its own
        return torch.cat([past, input], 1)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the result for an input `x`: the autocast dtype, or that of `x`."""
    return x.dtype if x.dtype == torch.float64 else checks.autocast_dtype(x.device) or x.dtype


def convolve(padded: Tensor, kernel: Tensor) -> Tensor:
    """`[B, taps - 1 + T, D]` with K `[D, taps]`: `[B, T, D]`."""
    taps = kernel.shape[1]
    dtype = compute_dtype(padded)
    if padded.shape[1] < taps or 0 in padded.shape:  # torch's convolution and FFT refuse empty tensors
        return (padded[:, taps - 1 :] * kernel[:, 0]).to(dtype)
    x = padded.transpose(1, 2).to(checks.state_dtype(dtype))
    kernel = kernel.to(x.dtype)
    by_onednn = x.device.type == "cpu" and x.dtype == torch.float32
    any_length = isinstance(padded.shape[1], torch.SymInt)  # the FFT of a recorded graph serves some lengths only
    if taps > (DIRECT_TAPS if by_onednn else DIRECT_TAPS_ELSEWHERE) and not any_length:
        return _by_fft(x, kernel).to(dtype).transpose(1, 2)
    by_hand = by_onednn and not any(map(private.has_tangent, (x, kernel)))
    with checks.without_autocast(x.device):  # it would convolve in half precision
        y = _Direct.apply(x, kernel) if by_hand else _direct(x, kernel)
    return y.to(dtype).transpose(1, 2)


def _direct(x: Tensor, kernel: Tensor) -> Tensor:
    """`[B, D, taps - 1 + T]` with K `[D, taps]`: `[B, D, T]`."""
    return F.conv1d(x, kernel.flip(1).unsqueeze(1), groups=kernel.shape[0])


class _Direct(torch.autograd.Function):
    """`_direct`, with a gradient of K that is several times as fast as that of torch on a CPU."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, kernel):
        return _direct(x, kernel)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, kernel = ctx.saved_tensors
        of_x = of_kernel = None
        past = kernel.shape[1] - 1
        if ctx.needs_input_grad[0]:
            of_x = _direct(F.pad(grad, (past, past)), kernel.flip(1))
        if ctx.needs_input_grad[1]:  # a convolution of every sequence and channel whose kernel is its gradient
            line, kernels = x.reshape(1, -1, x.shape[2]), grad.reshape(-1, 1, grad.shape[2])
            of_kernel = F.conv1d(line, kernels, groups=line.shape[1]).view(*x.shape[:2], -1).sum(0).flip(1)
        return of_x, of_kernel


def _by_fft(x: Tensor, kernel: Tensor) -> Tensor:
    """`[B, D, taps - 1 + T]` with K `[D, taps]`: `[B, D, T]`.

    The FFT would spread a value that is not finite over all steps, also earlier ones. So it reads 0 there, and the
    `taps` steps that read the value become NaN afterwards.
    """
    taps, length = kernel.shape[1], x.shape[2]
    n = (length + _ROUND - 1) // _ROUND * _ROUND  # the circular convolution is wrong in the first taps - 1 steps only
    finite = x.isfinite()
    product = torch.fft.rfft(torch.where(finite, x, 0.0), n) * torch.fft.rfft(kernel.to(x.dtype), n)
    y = torch.fft.irfft(product, n)[..., taps - 1 : length]
    count = F.pad((~finite).cumsum(2), (1, 0))
    return torch.where(count[..., taps:] > count[..., : length - taps + 1], math.nan, y)


def _packed(input: Tensor, past: Tensor, kernel: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Packed sequences on one line of time, on which the past of each stands before it."""
    total, gap = input.shape[1], past.shape[1]
    begin = cu_seqlens.long()
    own = torch.arange(total, device=input.device)
    number = torch.searchsorted(begin[1:], own, right=True)  # of the sequence of each step
    steps = own + (number + 1) * gap
    before = (begin[:-1] + torch.arange(past.shape[0], device=input.device) * gap).unsqueeze(1)
    lags = torch.arange(gap, device=input.device)
    line = input.new_zeros(total + past.shape[0] * gap, input.shape[2])
    with checks.without_autocast(input.device):  # as in `after_past`
        line = line.index_copy(0, steps, input[0]).index_copy(0, (before + lags).flatten(), past.flatten(0, 1))
    y = convolve(F.pad(line, (0, 0, gap, 0)).unsqueeze(0), kernel)[0, steps]
    length = begin.diff().unsqueeze(1)
    return y.unsqueeze(0), line[before + length + lags]
