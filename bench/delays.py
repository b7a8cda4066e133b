"""Forms of the convolution of `mk.delay_conv`, each with the making of its kernel: `python -m bench delays`.

The forms are conv1d with the gradient of `mk.delay_conv`, conv1d with torch's own gradient, the FFT, and a sparse form.
The sparse form reads the taps within 6 sigma of a delay only, by one gather for each. Only its cost depends on the
number of delays.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from mru_kernels import delays

from . import allocator, cli, records, timing

SIGMA = 0.7
SECONDS = 0.4  # for each form and pass
REACH = math.ceil(6.0 * SIGMA)  # taps on either side of a delay
DENSE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "conv1d": delays._Direct.apply,
    "conv1d, torch's gradient": delays._direct,
    "FFT": delays._by_fft,
}


def dense(form: str, taps: int, padded: Tensor, weight: Tensor, position: Tensor) -> Tensor:
    """`[B, taps - 1 + T, D]`, with weight and position `[D, J]`: `[B, T, D]`."""
    kernel = delays.delay_kernel(weight, position, SIGMA, taps)
    return DENSE[form](padded.transpose(1, 2), kernel).transpose(1, 2)


def sparse(taps: int, padded: Tensor, weight: Tensor, position: Tensor) -> Tensor:
    """As `dense`, from the taps near each delay only."""
    tap = position.detach().round().long().unsqueeze(-1) + torch.arange(-REACH, REACH + 1, device=padded.device)
    bump = (-0.5 * ((tap - position.unsqueeze(-1)) / SIGMA).square()).exp() * weight.unsqueeze(-1)
    bump = torch.where((tap >= 0) & (tap < taps), bump, 0.0).flatten(1)
    tap = tap.clamp(0, taps - 1).flatten(1)
    time = padded.shape[1] - taps + 1
    step = torch.arange(taps - 1, taps - 1 + time, device=padded.device).unsqueeze(1)
    output = torch.zeros_like(padded[:, :time])
    for m in range(tap.shape[1]):
        output = output + bump[:, m] * padded.gather(1, (step - tap[:, m]).expand_as(output))
    return output


def inputs(batch: int, time: int, channels: int, taps: int, count: int, device: torch.device) -> list[Tensor]:
    """Padded input, weights and positions, with gradients, in float32."""
    torch.manual_seed(0)
    drawn = torch.randn(batch, taps - 1 + time, channels), torch.randn(channels, count)
    return [t.to(device).requires_grad_() for t in (*drawn, (taps - 1) * torch.rand(channels, count))]


def both_passes(run: Callable[..., Tensor], leaves: Sequence[Tensor]) -> None:
    torch.autograd.grad(run(*leaves).sum(), leaves)


def forms(shape: tuple[int, int, int], taps: int, counts: Sequence[int], device: torch.device):
    """The call of each form, and its arguments."""
    leaves = {count: inputs(*shape, taps, count, device) for count in counts}
    most = leaves[max(counts)]
    found = {form: (partial(dense, form, taps), most) for form in DENSE}
    return found | {f"sparse, {count} a channel": (partial(sparse, taps), leaves[count]) for count in counts}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=cli.prog("delays"), description=__doc__)
    parser.add_argument("--shape", type=cli.shape, default=(4, 1024, 64), metavar="B,T,D")
    parser.add_argument("--taps", type=cli.positive, nargs="+", default=[16, 64, 128, 256, 512])
    parser.add_argument("--count", type=cli.positive, nargs="+", default=[1, 8], help="delays of a channel")
    parser.add_argument("--device", default="cpu", type=cli.device)
    arguments = parser.parse_args(argv)
    rows = [("taps", "form", "forward, ms", "spread", "with backward, ms", "spread")]
    for taps in arguments.taps:
        subjects: dict[tuple[str, str], Callable[[], object]] = {}
        found = forms(arguments.shape, taps, arguments.count, arguments.device)
        for form, (run, leaves) in found.items():
            subjects[form, "forward"] = partial(run, *(t.detach() for t in leaves))
            subjects[form, "both"] = partial(both_passes, run, leaves)
        times = timing.measure(subjects, arguments.device, SECONDS)
        for form in found:
            figures = (times[form, pass_] for pass_ in ("forward", "both"))
            rows.append((str(taps), form, *(f for t, spread in figures for f in (f"{1e3 * t:.1f}", f"{spread:.0%}"))))
    print(records.aligned(rows))
    batch, time, channels = arguments.shape
    print(f"\nB = {batch}, T = {time}, D = {channels}, float32, sigma {SIGMA}; with the making of the kernel.")
    print(f"{torch.get_num_threads()} threads; allocator: {allocator.describe()}")
    return 0
