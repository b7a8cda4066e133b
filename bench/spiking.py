"""Leaky integrate-and-fire neurons against their peers: `python -m bench spiking`.

The peers are snnTorch, with a loop over `x.unbind(0)` and one over `x[t]`, and SpikingJelly. Their spikes are compared
with those of `mk.lif` before anything is timed, and must be equal. Inputs are [T, B, D]. `torch.add` reads and writes
the bytes that a pass cannot avoid: one stream in and one out forward, two in and one out backward.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mru_kernels as mk

from . import allocator, cli, records, timing

SECONDS = 1.0  # for each subject and pass
BETA = 0.9
#: The neuron of SpikingJelly: a soft reset before the leak of 1 - 1 / tau.
_TAU = 2.0
_JELLY = {"reset": "subtract_decayed", "tie": True}
FLOOR = "torch.add"


class Subject(NamedTuple):
    """What is timed: spikes `[T, B, D]` from a current of this shape, and the options of `mk.lif` that equal it."""

    run: Callable[[Tensor], Tensor]
    beta: float = BETA
    options: dict[str, Any] = {}


def ours(x: Tensor, beta: float = BETA, **options: Any) -> Tensor:
    vectors = x.new_full(x.shape[2:], beta), x.new_ones(x.shape[2:])
    return mk.lif(x.transpose(0, 1), *vectors, **options)[0].transpose(0, 1)


def looped(neuron: Callable[..., Any], indexed: bool, x: Tensor) -> Tensor:
    """The loop of a script for snnTorch."""
    mem, spikes = torch.zeros_like(x[0]), []
    for t, step in enumerate(range(x.shape[0]) if indexed else x.unbind(0)):
        spk, mem = neuron(x[t] if indexed else step, mem)
        spikes.append(spk)
    return torch.stack(spikes)


def jelly(neuron: Any, x: Tensor) -> Tensor:
    neuron.reset()
    return neuron(x)


def subjects(device: torch.device, compiled: bool = False) -> dict[str, Subject]:
    """Ours, and the peers that are installed."""
    leaky = mk.snn.Leaky(BETA).to(device)
    found = {"mk.lif": Subject(ours), "mk.snn.Leaky, with membranes": Subject(lambda x: leaky(x)[0])}
    if find_spec("snntorch"):
        import snntorch

        neuron = snntorch.Leaky(BETA).to(device)
        found["snnTorch, x.unbind(0)"] = Subject(partial(looped, neuron, False))
        found["snnTorch, x[t]"] = Subject(partial(looped, neuron, True))
        if compiled:  # the whole loop, whose graph has all steps, does not compile in minutes
            found["snnTorch, compiled step"] = Subject(partial(looped, torch.compile(_step), False))
    if find_spec("spikingjelly"):
        from spikingjelly.activation_based import neuron as neurons
        from spikingjelly.activation_based import surrogate

        options = {"tau": _TAU, "decay_input": False, "v_reset": None, "detach_reset": True, "step_mode": "m"}
        for backend in ("torch", *["triton"] * (device.type == "cuda")):
            node = neurons.LIFNode(surrogate_function=surrogate.ATan(), **options).to(device)
            node.backend = backend
            found[f"SpikingJelly, {backend}"] = Subject(partial(jelly, node), 1 - 1 / _TAU, _JELLY)
    return found


def _step(x: Tensor, mem: Tensor) -> tuple[Tensor, Tensor]:
    """A step of `snntorch.Leaky`, whose module torch.compile breaks into several graphs."""
    reset = (mem > 1.0).to(x.dtype)
    mem = BETA * mem + x - reset
    return mk.heaviside(mem - 1.0), mem


def check(found: dict[str, Subject], x: Tensor) -> None:
    """Raise unless the spikes of every subject are those of `mk.lif`, and its gradient is close."""
    g = torch.randn_like(x)
    for name, subject in found.items():
        subject.run(x)  # without a gradient: a compiled step compiles
        results = []
        for run in (subject.run, partial(ours, beta=subject.beta, **subject.options)):
            leaf = x.clone().requires_grad_()
            spikes = run(leaf)
            results.append((spikes.detach(), torch.autograd.grad(spikes, leaf, g)[0]))
        (spikes, grad), (expected, expected_grad) = results
        different = (spikes != expected).sum().item()
        if different:
            raise ValueError(f"{name}: expected the spikes of mk.lif, got {different} different ones of {x.numel()}")
        torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def passes(found: dict[str, Subject], x: Tensor) -> dict[tuple[str, str], Callable[[], object]]:
    """The forward pass, and both passes, of every subject and of the floor."""
    leaf, g, out = x.clone().requires_grad_(), torch.randn_like(x), torch.empty_like(x)

    def both(run: Callable[[Tensor], Tensor]) -> None:
        torch.autograd.grad(run(leaf), leaf, g)

    def floor() -> None:
        torch.add(x, 1.0, out=out)
        torch.add(x, g, out=out)

    made: dict[tuple[str, str], Callable[[], object]] = {
        (FLOOR, "forward"): partial(torch.add, x, 1.0, out=out), (FLOOR, "both"): floor
    }  # fmt: skip
    for name, subject in found.items():
        made[name, "forward"] = partial(subject.run, x)
        made[name, "both"] = partial(both, subject.run)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=cli.prog("spiking"), description=__doc__)
    parser.add_argument("--shape", type=cli.shape, nargs="+", default=[(16, 500, 512), (4, 4096, 512)], metavar="B,T,D")
    parser.add_argument("--device", default="cpu", type=cli.device)
    parser.add_argument(
        "--batch-first", action="store_true", help="inputs lie in memory as [B, T, D], not as [T, B, D]"
    )
    parser.add_argument("--compile", action="store_true", help="also time a compiled step of the loop")
    arguments = parser.parse_args(argv)
    found = subjects(arguments.device, arguments.compile)
    missing = [name for name in ("snntorch", "spikingjelly") if not find_spec(name)]
    rows = [("B, T, D", "neuron", "forward, ms", "spread", "to mk.lif", "with backward, ms", "spread", "to mk.lif")]
    for batch, time, channels in arguments.shape:
        torch.manual_seed(0)
        x = torch.randn(time, batch, channels).to(arguments.device)
        if arguments.batch_first:
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        check(found, x)
        times = timing.measure(passes(found, x), arguments.device, SECONDS)
        for name in (FLOOR, *found):
            row = [f"{batch}, {time}, {channels}", name]
            for pass_ in ("forward", "both"):
                seconds, spread = times[name, pass_]
                row += [f"{1e3 * seconds:.2f}", f"{spread:.0%}", f"{seconds / times['mk.lif', pass_][0]:.2f}"]
            rows.append(tuple(row))
    print(records.aligned(rows))
    print(f"\nfloat32, reset by subtraction, spikes of all equal to those of mk.lif on {arguments.device}.")
    print(f"{torch.get_num_threads()} threads; allocator: {allocator.describe()}")
    if missing:
        print(f"not installed: {', '.join(missing)}")
    return 0
