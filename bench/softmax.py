"""Time, memory and accuracy of `mk.wkv` against other forms of RWKV-4's recurrence: `python -m bench softmax`.

The public kernels (the authors', Hugging Face's and fla's) scan in sequence. Their state is two sums and the log of
their scale, the largest exponent so far, in one float. `torch.add` reads and writes the bytes that a pass cannot avoid:
two streams in and one out forward, three in and two out backward.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

import mru_kernels as mk

from . import allocator, cli, errors, records, timing
from .mesa import saved

Form = Callable[..., Tensor]
CHANNELS = 16  # of the accuracy table
CHECKED = 1024  # steps whose results are compared before anything is timed: the public form is a loop over them
FLOOR = "torch.add"
LIMIT = 1e-4  # of the relative error of each form before it is timed; the keys are small


def inputs(shape: tuple[int, int, int], device: torch.device, size: float = 0.0) -> list[Tensor]:
    """float32 key, value, time_decay and bonus. Keys are `size` and a standard normal number."""
    torch.manual_seed(0)
    channels = shape[2]
    key, value = torch.randn(2, *shape, device=device).unbind(0)
    time_decay = torch.linspace(-5.0, 3.0, channels, device=device)  # the initial values of RWKV-4's first layer
    return [key + size, value, time_decay, torch.full((channels,), math.log(0.3), device=device)]


def kernel(key: Tensor, value: Tensor, time_decay: Tensor, bonus: Tensor) -> Tensor:
    return mk.wkv(key, value, -time_decay.exp(), bonus)[0]


def public(key: Tensor, value: Tensor, time_decay: Tensor, bonus: Tensor) -> Tensor:
    """A loop over steps with the state of the public kernels."""
    decay = -time_decay.exp()
    p = q = torch.zeros_like(key[:, 0])
    scale = torch.full_like(p, -1e38)
    outputs = []
    for k, v in zip(key.unbind(1), value.unbind(1), strict=True):
        most = torch.maximum(scale, k + bonus)
        past, own = (scale - most).exp(), (k + bonus - most).exp()
        outputs.append((past * p + own * v) / (past * q + own))
        most = torch.maximum(scale + decay, k)
        past, own = (scale + decay - most).exp(), (k - most).exp()
        p, q, scale = past * p + own * v, past * q + own, most
    return torch.stack(outputs, 1)


def _read(before: Sequence[Tensor], key: Tensor, value: Tensor, bonus: Tensor) -> Tensor:
    """Every step's output from the sums p, q and their log scale after the step before it, `[B, T - 1, C]` each."""
    p, q, scale = (F.pad(t, (0, 0, 1, 0), value=fill) for t, fill in zip(before, (0.0, 0.0, -1e38), strict=True))
    most = torch.maximum(scale, key + bonus)
    past, own = (scale - most).exp(), (key + bonus - most).exp()
    return (past * p + own * value) / (past * q + own)


def _compose(left: Sequence[Tensor], right: Sequence[Tensor]) -> tuple[Tensor, ...]:
    (p, q, scale, _), (p_next, q_next, scale_next, decay) = left, right
    most = torch.maximum(scale + decay, scale_next)
    past, own = (scale + decay - most).exp(), (scale_next - most).exp()
    return past * p + own * p_next, past * q + own * q_next, most, left[3] + decay


def scanned(key: Tensor, value: Tensor, time_decay: Tensor, bonus: Tensor) -> Tensor:
    """The associative_scan of torch over (p, q, scale, decay), in plain torch operations."""
    from torch._higher_order_ops.associative_scan import associative_scan

    decay = (-time_decay.exp()).expand_as(key)
    steps = (value, torch.ones_like(key), key, decay)
    p, q, scale, _ = associative_scan(_compose, steps, dim=1, combine_mode="generic")
    return _read([t[:, :-1] for t in (p, q, scale)], key, value, bonus)


def composed(key: Tensor, value: Tensor, time_decay: Tensor, bonus: Tensor) -> Tensor:
    """Two `mk.linear_recurrence` and a division, in a scale that `cummax` finds and that has no gradient."""
    decay = -time_decay.exp()
    with torch.no_grad():
        sums = decay * torch.arange(1, key.shape[1] + 1, device=key.device, dtype=key.dtype).unsqueeze(1)
        scale = sums + (key - sums).cummax(1).values
    kept = F.pad(scale[:, :-1] - scale[:, 1:], (0, 0, 1, 0)) + decay
    factor, weight = kept.exp(), (key - scale).exp()
    p = mk.linear_recurrence(factor, weight * value)[0]
    q = mk.linear_recurrence(factor, weight)[0]
    return _read([t[:, :-1] for t in (p, q, scale)], key, value, bonus)


def fla(key: Tensor, value: Tensor, time_decay: Tensor, bonus: Tensor) -> Tensor:
    """`fused_recurrent_rwkv4` of fla-core."""
    from fla.ops.rwkv4.fused_recurrent import fused_recurrent_rwkv4

    state = key.new_zeros(key.shape[0], 3, 1, key.shape[2])
    state[:, 2] = -1e38
    return fused_recurrent_rwkv4(time_decay, bonus, key, value, state)[0]


def error(form: Form, tensors: Sequence[Tensor], reference: Tensor) -> float:
    """The RMS error of a form's output, relative to the reference in float64."""
    return errors.relative_error(form(*tensors), reference, reference.abs())


def check(forms: dict[str, Form], leaves: Sequence[Tensor]) -> None:
    """Raise unless outputs and gradients of every form are those of the public form in float64."""
    wide = [t.detach().double().requires_grad_() for t in leaves]
    reference = public(*wide)
    expected = [reference.detach(), *torch.autograd.grad(reference.sin().sum(), wide)]
    for name, form in forms.items():
        output = form(*leaves)
        results = [output.detach(), *torch.autograd.grad(output.sin().sum(), leaves)]
        for what, got, right in zip(("y", "key", "value", "time_decay", "bonus"), results, expected, strict=True):
            found = errors.relative_error(got, right, right.abs())
            if not found <= LIMIT:
                raise RuntimeError(
                    f"{name}: expected a relative error of at most {LIMIT:g} for {what}, got {found:.1e}"
                )


def floor(leaves: Sequence[Tensor], grad: Tensor) -> dict[str, Callable[[], object]]:
    """`torch.add` over the bytes of each pass."""
    key, value = (t.detach() for t in leaves[:2])
    first, second = torch.empty_like(key), torch.empty_like(key)

    def backward() -> None:
        torch.add(key, value, out=first)
        torch.add(grad, 1.0, out=second)

    return {"forward": partial(torch.add, key, value, out=first), "backward": backward}


def passes(form: Form, leaves: Sequence[Tensor], grad: Tensor) -> dict[str, Callable[[], object]]:
    """The forward pass of a form without a graph, and the backward pass of its output."""
    output = form(*leaves)
    return {
        "forward": partial(form, *(t.detach() for t in leaves)),
        "backward": partial(torch.autograd.grad, output, leaves, grad, retain_graph=True),
    }


def times(forms: dict[str, Form], leaves: Sequence[Tensor], device: torch.device) -> list[tuple[str, ...]]:
    check(forms, [t.detach()[:, :CHECKED].requires_grad_() if t.dim() == 3 else t for t in leaves])
    grad = torch.randn_like(leaves[1])
    found = {FLOOR: floor(leaves, grad)} | {name: passes(form, leaves, grad) for name, form in forms.items()}
    subjects = {(name, pass_): run for name, runs in found.items() for pass_, run in runs.items()}
    measured = timing.measure(subjects, device)
    header = (
        "form",
        "forward, ms",
        "spread",
        f"of {FLOOR}",
        "backward, ms",
        "spread",
        f"of {FLOOR}",
        "saved, MiB",
    )
    rows = [header]
    for name in (FLOOR, *forms):
        row = [name]
        for pass_ in found[name]:
            seconds, spread = measured[name, pass_]
            row += [f"{1e3 * seconds:.2f}", f"{spread:.0%}", f"{seconds / measured[FLOOR, pass_][0]:.2f}"]
        rows.append((*row, f"{saved(forms[name], leaves):.1f}" if name in forms else ""))
    return rows


def accuracy(
    forms: dict[str, Form], sizes: Sequence[float], decays: Sequence[float], steps: Sequence[int], device: torch.device
) -> list[tuple[str, ...]]:
    rows = [("keys", "decay", "T", *forms)]
    with torch.no_grad():
        for size, decay, time in product(sizes, decays, steps):
            tensors = inputs((1, time, CHANNELS), device, size)
            tensors[2].fill_(decay)
            reference = public(*(t.double() for t in tensors))
            found = (f"{error(form, tensors, reference):.1e}" for form in forms.values())
            rows.append((f"{size:g} + N(0, 1)", f"-e^{decay:g}", f"{time:,}", *found))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=cli.prog("softmax"), description=__doc__.split(":")[0])
    parser.add_argument("--shape", type=cli.shape, nargs="+", default=[(4, 1024, 256)], metavar="B,T,D")
    parser.add_argument("--device", default="cpu", type=cli.device)
    parser.add_argument(
        "--keys", type=float, nargs="*", default=[0, 10, 100, 1000], help="means of the keys in the accuracy table"
    )
    parser.add_argument("--time-decays", type=float, nargs="+", default=[-5, -10], help="logs of -decay")
    parser.add_argument("--steps", type=int, nargs="+", default=[1024, 16384], help="T of the accuracy table")
    parser.add_argument("--alone", action="store_true", help="time mk.wkv and no other form")
    parser.add_argument("--fla", action="store_true", help="also fla-core's kernel, which needs a GPU")
    arguments = parser.parse_args(argv)
    forms: dict[str, Form] = {"mk.wkv": kernel, "public form": public, "on linear_recurrence": composed}
    timed: dict[str, Form] = forms | {"associative_scan": scanned}
    if arguments.fla:
        forms, timed = ({**group, "fla": fla} for group in (forms, timed))
    if arguments.alone:
        timed = {"mk.wkv": kernel}
    for batch, time, channels in arguments.shape:
        leaves = [t.requires_grad_() for t in inputs((batch, time, channels), arguments.device)]
        print(records.aligned(times(timed, leaves, arguments.device)))
        print(f"\nB = {batch}, T = {time}, D = {channels}, float32; saved: between the passes, without the inputs.\n")
    print(f"{torch.get_num_threads()} threads; allocator: {allocator.describe()}")
    if arguments.keys:
        table = accuracy(forms, arguments.keys, arguments.time_decays, arguments.steps, arguments.device)
        print(f"\n{records.aligned(table)}")
        print(f"\nRMS error of y in float32, relative to the public form in float64; B = 1, D = {CHANNELS}.")
    return 0
