"""The bits of results that must survive a change of the kernels: hashes of small calls, kept in tests/golden.json.

`python -m tests.golden` compares the CPU kernels with the file and names each case that differs. `--write` makes the
hashes of a backend again: only in a commit that means to change results, whose message says so. Inputs come from
`random.Random`, exact arithmetic and rounding, so they are the same with any release of torch.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import math
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mru_kernels as mk
from bench import inputs
from bench.errors import state_dtype
from mru_kernels import backends
from mru_kernels.ops.spec import CELLS
from tests import calls

FILE = Path(__file__).with_suffix(".json")
BACKENDS = ("cpu", "simt", "triton")
CPU = torch.device("cpu")
ROWS = 9  # cases of each form and dtype, a multiple of the values of epsilon
INTERPRETED = 10  # every tenth case runs under Triton's interpreter, which is slow

#: Each form of a cell's inputs: the cell, then the inputs by name. Those marked `[D]` have one value per channel.
FORMS = {
    "bmru": ("bmru", "candidate threshold"),
    "bmru [D]": ("bmru", "candidate threshold[D]"),
    "bmru amplitude": ("bmru", "candidate threshold amplitude"),
    "bmru amplitude [D]": ("bmru", "candidate threshold[D] amplitude"),
    "schmitt": ("schmitt", "candidate low[D] high[D]"),
    "linear": ("linear_recurrence", "update decay"),
    "linear [D]": ("linear_recurrence", "update decay[D]"),
    "lif": ("lif", "input beta[D] threshold[D]"),
    "resonate": ("resonate", "input decay[D] gain[D] threshold[D]"),
    "min_gru": ("min_gru", "candidate update"),
    "min_lstm": ("min_lstm", "candidate update forget"),
    "leaky_integrator": ("leaky_integrator", "input decay"),
}
#: Cases of each dtype, if not ROWS.
FEWER = {"lif": 5, "resonate": 3, "min_gru": 3, "min_lstm": 3, "leaky_integrator": 3}
OF_CPU = ("min_gru", "min_lstm", "leaky_integrator")  # elsewhere the C library or Triton computes exp and tanh

MODULES = ("BMRU", "CMRU", "AlphaCMRU")  # that hand packed gates to the kernels

FACTORS: dict[str, tuple] = {
    "D": (3, 32, 67),
    "T": (203, 203, 203, 17),
    "sequences": ("batch", "packed"),
    "segment": (0, 64),
    "chunk": (64, None, 16, 128),
    "layout": ("contiguous", "chunked", "time-major"),
    "values": ("finite", "special"),
    "vectors": ("wide-vectors", "vectors-as-streams"),  # in the state dtype, or in that of the streams
    "initial": (False, True),
    "reverse": (False, True),
}
FACTORS_OF_WRITES = {"epsilon": (0.0, 0.5, 1.0), "alpha": (False, True), "scale": (1.0, 2.5)}

#: The surrogate "sigmoid" is absent: off the CPU, the C library or Triton computes its exp.
FACTORS_OF_SPIKES = {
    "tie": (False, True),
    "surrogate": ("atan", "fast_sigmoid", "triangle", "straight_through"),
    "surrogate_scale": (1.0, 2.5),
    "membrane": (False, False, True),
}
FACTORS_OF_LIF = {
    "reset": ("subtract", "none", "subtract_decayed", "zero", "zero_input"),
    "detach_reset": (True, False),
}

#: Per cell: its own factors, and the settings of its steps. Other cells write or hold.
OWN: dict[str, tuple[dict[str, tuple], tuple[dict[str, Any], ...]]] = {
    "linear_recurrence": ({}, ({},)),
    "lif": (FACTORS_OF_SPIKES | FACTORS_OF_LIF, ({"reset": "subtract"}, {"reset": "zero", "tie": True})),
    "resonate": (FACTORS_OF_SPIKES, ({},)),
    "min_gru": ({}, ({},)),
    "min_lstm": ({}, ({},)),
    "leaky_integrator": ({}, ({},)),
}
WRITES = (FACTORS_OF_WRITES, ({"epsilon": 0.0}, {"epsilon": 0.5}))

Results = dict[str, Tensor]


# ------------------------------------------------------------------------------------------------ inputs


class Draw:
    """Numbers that depend on a case's name alone, in a dtype that states need not share."""

    def __init__(self, name: str, dtype: torch.dtype, special: bool = False) -> None:
        self.random, self.dtype, self.special = random.Random(name), dtype, special

    def uniform(self, shape: tuple[int, ...], low: float, high: float) -> Tensor:
        """Float64 numbers between two limits."""
        raw = bytearray(self.random.randbytes(4 * math.prod(shape)))
        share = torch.frombuffer(raw, dtype=torch.int32).double().view(shape) * 2.0**-32 + 0.5
        return low + (high - low) * share

    def some(self, shape: tuple[int, ...], share: float) -> Tensor:
        """A mask, true with probability `share`."""
        return self.uniform(shape, 0.0, 1.0) < share

    def replaced(self, x: Tensor, share: float, *values: float | Tensor) -> Tensor:
        for value in values:
            x = torch.where(self.some(x.shape, share), value, x)
        return x

    def number(self, shape: tuple[int, ...], limit: float) -> Tensor:
        """Between -limit and limit; of both parts where the dtype is complex."""
        x = self.uniform(shape, -limit, limit)
        return torch.complex(x, self.uniform(shape, -limit, limit)) if self.dtype.is_complex else x

    def input(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Values of the input of a cell, before ties and special values."""
        if name == "threshold":
            return self.replaced(self.uniform(shape, 0.5, 1.5), 0.5, self.uniform(shape, -1.5, -0.5))
        if name == "low":
            return self.uniform(shape, 0.0, 0.5)
        if name == "high":
            return self.uniform(shape, 0.4, 1.5)
        if name not in ("decay", "beta"):
            return self.replaced(self.number(shape, 2.0), 0.03, 0.0, -0.0)
        if self.dtype.is_complex:
            return self.replaced(self.number(shape, 0.7), 0.02, 0.0, 1.0)
        return self.replaced(self.uniform(shape, 0.7, 1.0), 0.05, -0.9, 0.0, 1.0)

    def finish(self, x: Tensor, dtype: torch.dtype, share: float = 0.001) -> Tensor:
        """In a dtype, with NaN and infinities if the case is special."""
        return (self.replaced(x, share, math.inf, -math.inf, math.nan) if self.special else x).to(dtype)


def scan_call(name: str, cell: str, form: str, dtype: torch.dtype, options: dict[str, Any]) -> inputs.Call:
    """The inputs of a case."""
    state, special = inputs.CELLS[cell].state_dtype(dtype), options["values"] == "special"
    draw = Draw(name, dtype, special)
    of_states = Draw(f"{name}, states", state, special) if CELLS[cell].complex_state else draw
    packed = options["sequences"] == "packed"
    time, channels = options["T"], options["D"]
    shape = (1 if packed else 2, time, channels)
    states = (4 if packed else 2, channels)
    parameters = dtype if options["vectors"] == "vectors-as-streams" else state_dtype(dtype)

    def vector(argument: str, numbers: Callable[[Draw], Tensor]) -> Tensor:
        """In the state dtype if it is complex though the streams are real."""
        apart = argument in CELLS[cell].complex_names
        source = of_states if apart else draw
        return source.finish(numbers(source), state if apart else parameters, 0.01)

    streams, vectors = {}, {}
    for argument in form.split():
        if argument.endswith("[D]"):
            argument = argument.removesuffix("[D]")
            vectors[argument] = vector(argument, lambda draw, argument=argument: draw.input(argument, shape[2:]))
        else:
            streams[argument] = draw.finish(draw.input(argument, shape), dtype)
    edges = [t.to(dtype) for name, t in (streams | vectors).items() if name in ("threshold", "low", "high")]
    first = next(iter(streams))
    streams[first] = draw.replaced(streams[first], 0.03, *edges, *(-t for t in edges))
    tensors = inputs._laid_out(streams, options["layout"]) | vectors
    if options.get("alpha"):
        tensors["alpha"] = draw.finish(draw.number(shape[2:], 2.0), parameters, 0.0)
    if options["initial"]:
        tensors["initial_state"] = vector("initial_state", lambda draw: draw.number(states, 2.0))
    settings: dict[str, Any] = {"reverse": options["reverse"], "chunk_size": options["chunk"]}
    if packed:
        settings["cu_seqlens"] = torch.tensor([0, time // 3, time // 3, time - 1, time])
    if "epsilon" in options:
        settings |= {"epsilon": options["epsilon"], "surrogate_scale": options["scale"]}
    settings |= {name: options[name] for name in FACTORS_OF_SPIKES | FACTORS_OF_LIF if name in options}
    if settings.get("membrane"):
        settings["membrane"] = "only"
    draw.special = of_states.special = False
    grad_h = draw.finish(draw.number(shape, 1.0), dtype)
    grad_final = of_states.finish(of_states.number(states, 1.0), state)
    return inputs.Call(cell, tensors, settings, grad_h, grad_final)


# ------------------------------------------------------------------------------------------------ cases


def run_scan(backend: str, name: str, cell: str, form: str, dtype: torch.dtype, options: dict[str, Any]) -> Results:
    call = scan_call(name, cell, form, dtype, options)
    with calls.segments(backend, options["segment"]):
        return calls.run(call, calls.op_of(cell, backend), CPU)


def run_step(backend: str, name: str, cell: str, form: str, dtype: torch.dtype, settings: dict[str, Any]) -> Results:
    """A step has no argument `backend`: CPU tensors take the CPU kernels."""
    options = {"D": 67, "T": 1, "sequences": "batch", "layout": "contiguous", "values": "special"}
    options |= {"vectors": "wide-vectors", "initial": True, "reverse": False, "chunk": 64}
    options["alpha"] = settings.get("epsilon") == 0.5
    call = scan_call(name, cell, form, dtype, options)
    tensors = {name: t.squeeze(1) if t.dim() == 3 else t for name, t in call.tensors.items()}
    tensors["state"] = tensors.pop("initial_state")
    h, state = getattr(mk, f"{cell}_step")(**tensors, **settings)
    return {"h": h, "state": state}


def run_module(backend: str, name: str, unit: str, dtype: torch.dtype, steps: int) -> Results:
    """A module whose weights are the identity, so that its products are exact and its gates are its input."""
    gates, channels, draw = len(getattr(mk, unit).gates), 35, Draw(name, dtype)
    module = getattr(mk, unit)(gates * channels, channels, dtype=dtype, learn_initial_state=True)
    with torch.no_grad():
        for parameter, t in module.named_parameters():
            is_weight = parameter.startswith("weight")
            t.copy_(torch.eye(len(t)) if is_weight else draw.number(t.shape, 1.0) * ("bias" not in parameter))
    x = draw.finish(draw.number((2, 203, gates * channels), 2.0), dtype).requires_grad_()
    leaves = {"input": x} | {n: p for n, p in module.named_parameters() if not n.startswith(("weight", "bias"))}
    with calls.segments(backend, steps):
        h, h_n = module(x)
        cotangents = draw.finish(draw.number(h.shape, 1.0), dtype), draw.finish(draw.number(h_n.shape, 1.0), h_n.dtype)
        grads = torch.autograd.grad((h, h_n), list(leaves.values()), cotangents)
    results = {"h": h, "h_n": h_n} | dict(zip(leaves, grads, strict=True))
    return {name: t.detach() + 0.0 for name, t in results.items()}  # a product may drop the sign of a zero


def rows(form: str, factors: dict[str, tuple], count: int) -> list[dict[str, Any]]:
    """Rows of options in which each value of a factor comes up about as often as any other."""
    columns = {}
    for factor, values in factors.items():
        columns[factor] = [values[i % len(values)] for i in range(count)]
        random.Random(f"{form} {factor}").shuffle(columns[factor])
    return [{factor: column[i] for factor, column in columns.items()} for i in range(count)]


def named_cases() -> dict[str, Callable[[str], Results]]:
    """What runs each case on a backend, by its name."""
    cases = {}
    for form, (cell, arguments) in FORMS.items():
        own, steps = OWN.get(cell, WRITES)
        for short, dtype in inputs.CELLS[cell].dtypes.items():
            for options in rows(f"{form} {short}", FACTORS | own, FEWER.get(form, ROWS)):
                words = [factor if v is True else str(v) if isinstance(v, str) else f"{factor}={v}"
                         for factor, v in options.items() if v is not False]  # fmt: skip
                name = f"{form}, {short}, {' '.join(words)}"
                cases[name] = partial(run_scan, name=name, cell=cell, form=arguments, dtype=dtype, options=options)
            for settings in steps:
                name = " ".join([f"{form}, {short}, step", *(f"{factor}={v}" for factor, v in settings.items())])
                cases[name] = partial(run_step, name=name, cell=cell, form=arguments, dtype=dtype, settings=settings)
    for unit in MODULES:
        for short, dtype in inputs.DTYPES.items():
            for segment in (0, 64):
                name = f"{unit}, {short}, segment={segment}"
                cases[name] = partial(run_module, name=name, unit=unit, dtype=dtype, steps=segment)
    return cases


CASES = named_cases()


def cases_of(backend: str) -> list[str]:
    """The names of the cases that a backend runs."""
    if backend == "cpu":
        return list(CASES)
    least, most = backends.TABLE[backend].module.CHUNK_SIZES
    scans = [name for name, run in CASES.items() if run.func is run_scan and not name.startswith(OF_CPU)]
    cases = [name for name in scans if least <= (CASES[name].keywords["options"]["chunk"] or 64) <= most]
    return cases[::INTERPRETED] if backend == "triton" else cases


# ------------------------------------------------------------------------------------------------ hashes


def digest(t: Tensor) -> str:
    """A hash of a tensor's bytes, alike for every NaN."""
    t = torch.view_as_real(t) if t.is_complex() else t
    t = t.masked_fill(t.isnan(), math.nan).contiguous()
    return hashlib.sha256(ctypes.string_at(t.data_ptr(), t.nbytes)).hexdigest()[:8]


def hashes(name: str, backend: str) -> dict[str, str]:
    """A hash of each result of a case, and of each gradient under the name of its argument."""
    return {result: digest(t) for result, t in CASES[name](backend).items()}


def load() -> dict[str, dict[str, str]]:
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def differing(backend: str) -> list[str]:
    """The cases of a backend that differ from the file, each with the results that do."""
    kept, differ = load(), []
    for name in cases_of(backend):
        expected = kept.get(name, {}).get(backend, "").split()
        got = hashes(name, backend)
        if list(got.values()) != expected:
            same = [a == b for a, b in zip(got.values(), expected, strict=False)] + [False] * len(got)
            differ.append(f"{name}: {', '.join(r for r, equal in zip(got, same, strict=False) if not equal)}")
    return differ


def write(backend: str) -> None:
    """Replace the hashes of a backend; those of the others stay."""
    kept, made = load(), {name: " ".join(hashes(name, backend).values()) for name in cases_of(backend)}
    lines = []
    for name in CASES:
        of_case = {b: made.get(name) if b == backend else kept.get(name, {}).get(b) for b in BACKENDS}
        of_case = {b: found for b, found in of_case.items() if found}
        lines.append(f"{json.dumps(name)}: {json.dumps(of_case)}")
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def prepare(backend: str) -> None:
    """Make a backend available to this process."""
    if backend == "simt":
        sys.path.insert(0, str(Path(__file__).parent))
        import simt

        simt.register()
    if backend == "triton":
        import tests.interpreter  # noqa: F401  (needs TRITON_INTERPRET=1 from the start)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("--write", action="store_true", help="make the hashes of the backend again")
    parser.add_argument("--backend", choices=BACKENDS, default="cpu", help="triton: with TRITON_INTERPRET=1 set")
    arguments = parser.parse_args()
    prepare(arguments.backend)
    if arguments.write:
        write(arguments.backend)
        return
    differ = differing(arguments.backend)
    print(*differ, f"{len(differ)} of {len(cases_of(arguments.backend))} cases differ", sep="\n")
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
