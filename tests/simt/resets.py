"""Checks of resets and boundary states under host execution, which the battery runs."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product

import torch
from torch import Tensor

import mru_kernels as mk
import simt
from bench import compare, inputs
from mru_kernels import ops
from mru_kernels.backends import CHUNK
from simt.calls import cells_of, require, results, scan_once, segments

#: Positions of resets: at the ends of words and groups of their bits, of segments, tiles and rows.
RESETS = (0, 1, 31, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 1023, 1024, 1025, 1100)


def exact_call(cell: str, dtype: torch.dtype, offsets: list[int], **options) -> inputs.Call:
    """A call whose forward values are exact however time is cut, with a reset at each of RESETS."""
    call = inputs.case(cell, dtype, time=offsets[-1], batch=1, channels=3, initial_state="integer",
                       resets="to a state", boundaries=True, **options).build()  # fmt: skip
    n, channels = len(offsets) - 1, 3
    tensors = dict(call.tensors)
    if cell == "resonate":
        turns = torch.tensor([0, 1, 1j, -1, -1j], dtype=tensors["decay"].dtype)
        tensors |= {"decay": turns[torch.randint(5, (channels,))], "gain": torch.ones(channels),
                    "threshold": torch.full((channels,), 0.5),
                    "input": torch.randint(-2, 3, call.stream.shape).to(dtype)}  # fmt: skip
    elif "decay" in tensors:  # a state is a sum of few integers
        tensors |= {"decay": torch.randint(-1, 2, call.stream.shape).to(dtype),
                    "update": torch.randint(-2, 3, call.stream.shape).to(dtype)}  # fmt: skip
    for name in ("initial_state", "reset_state"):
        tensors[name] = torch.randint(-3, 4, (n, channels)).to(ops.CELLS[cell].state_dtype(dtype))
    resets = torch.zeros(1, offsets[-1], dtype=torch.bool)
    resets[0, list(RESETS)] = True
    settings = call.settings | {"resets": resets}
    if n > 1:
        settings["cu_seqlens"] = torch.tensor(offsets)
    return inputs.call(cell, tensors, settings)


def pieces(call: inputs.Call, offsets: list[int]) -> tuple[Tensor, Tensor]:
    """The results of the pieces between resets, each scanned as a sequence: h `[1, T, D]`, final states `[N, D]`."""
    reverse, resets = call.settings["reverse"], call.settings["resets"][0]
    cuts = resets.nonzero()[:, 0] + (1 if reverse else 0)  # in time, a reset of a reversed scan is after its step
    bounds = sorted({*offsets, *cuts.tolist()})
    entry, last = [], {}
    for i, (a, b) in enumerate(pairwise(bounds)):
        n = next(n for n, (start, stop) in enumerate(pairwise(offsets)) if start <= a < stop)
        entry.append(call.tensors["reset_state" if resets[b - 1 if reverse else a] else "initial_state"][n])
        if not reverse or n not in last:
            last[n] = i
    arrays = {name: t for name, t in call.tensors.items() if name not in ("initial_state", "reset_state")}
    scalars = {name: x for name, x in call.settings.items() if name in inputs.CELLS[call.cell].scalars}
    h, finals = getattr(mk, call.cell)(**arrays, **scalars, initial_state=torch.stack(entry), reverse=reverse,
                                       cu_seqlens=torch.tensor(bounds), backend="simt")  # fmt: skip
    states = call.tensors["initial_state"]
    return h, torch.stack([finals[last[n]] if n in last else states[n] for n in range(len(offsets) - 1)])


def check_resets(dtype: torch.dtype) -> None:
    """Where values are exact, a scan with resets equals its pieces scanned apart; NaN does not pass a reset."""
    exact = [cell for cell in cells_of(dtype) if cell in ("bmru", "schmitt", "linear_recurrence")]
    for cell, reverse, offsets in product(exact, (False, True), ([0, 1101], [0, 40, 40, 1050, 1101])):
        call = exact_call(cell, dtype, offsets, reverse=reverse)
        call.stream[0, 1024 - 20, 1] = call.stream[0, 36, 2] = torch.nan
        expected = pieces(call, offsets)
        for steps in (0, CHUNK):
            with segments(steps):
                got = getattr(mk, cell)(**call.tensors, **call.settings, backend="simt")
            for name, one, other in zip(("h", "final_state"), got, expected, strict=False):
                same = (one == other) | (one.isnan() & other.isnan())
                require(same.all(), f"{name} of {cell} {reverse=} {offsets}, segments of {steps}: {int((~same).sum())}")


def check_boundaries(dtype: torch.dtype) -> None:
    """Boundary states and their gradients, with few, many and only resets, and with none. None is scanned again."""
    options = {"time": 4 * CHUNK + 5, "channels": 5, "initial_state": "real", "boundaries": True}
    for cell, batch, (seed, resets) in product(cells_of(dtype), (1, "packed"), enumerate((True, True, True, False))):
        case = inputs.case(cell, dtype, seed, batch=batch, reverse=seed % 2 == 1,
                           resets="to a state" if resets else "none", **options)  # fmt: skip
        call = case.build()
        if resets:
            call.settings["resets"] = torch.rand(1, options["time"]) < (0.01, 0.3, 1.0)[seed]
        twice = simt.control().cells()[cell]["adjoint_sees_state"]  # `backward` runs twice
        for steps, got in ((0, results(call, 0)), (CHUNK, results(call, CHUNK) if twice else scan_once(call))):
            failed = [r for r in compare.judge(call, got) if not r.passed]
            require(not failed, f"{case.label()} of {cell}, segments of {steps}: {failed}")


def check_far_resets(dtype: torch.dtype) -> None:
    """A reset more than a group of the mask's bits away from the end of its sequence."""
    for cell, reverse in product(cells_of(dtype), (False, True)):
        options = {"time": 2100, "batch": 1, "channels": 2, "initial_state": "real", "reverse": reverse}
        call = inputs.case(cell, dtype, resets="to a state", **options).build()
        call.settings["resets"] = torch.arange(2100).unsqueeze(0) == (2000 if reverse else 100)
        failed = [r for r in compare.judge(call, results(call, 0)) if not r.passed]
        require(not failed, f"{cell} {reverse=}: {failed}")


def check_no_resets(dtype: torch.dtype) -> None:
    """A mask that is all false changes no bit, and the reset state then has a gradient of zeros."""
    for cell, steps, batch in product(cells_of(dtype), (0, CHUNK), (2, "packed")):
        call = inputs.case(cell, dtype, time=5 * CHUNK + 3, batch=batch, channels=5, resets="to a state").build()
        tensors = {name: t for name, t in call.tensors.items() if name != "reset_state"}
        settings = {name: x for name, x in call.settings.items() if name != "resets"}
        call = replace(call, settings=call.settings | {"resets": torch.zeros_like(call.settings["resets"])})
        got, plain = results(call, steps), results(replace(call, tensors=tensors, settings=settings), steps)
        require((got["reset_state"] == 0).all(), f"gradient of the reset state of {cell}, segments of {steps}")
        for name, values in plain.items():
            require(torch.equal(got[name], values), f"{name} of {cell}, segments of {steps}, {batch=}")


def check_sums_over_resets(dtype: torch.dtype) -> None:
    """The gradient of the reset state where every step is reset: a sum of equal terms."""
    time = 4096
    tensors = {"candidate": torch.full((1, time, 1), 0.25).to(dtype)}
    tensors |= {"threshold": torch.full((1,), 1.0), "reset_state": torch.full((1, 1), 0.5)}
    call = inputs.call("bmru", tensors, {"epsilon": 0.5, "resets": torch.ones(1, time, dtype=torch.bool)})
    g = torch.full_like(tensors["candidate"], 0.3)
    call = replace(call, grad_h=g, grad_final=torch.zeros_like(call.grad_final))
    for steps in (0, CHUNK, 16 * CHUNK):
        got, expected = results(call, steps)["reset_state"].double(), time * g[0, 0, 0].double()
        error = float((got - expected).abs().max() / expected)
        require(error <= 2e-7, f"reset_state, segments of {steps}: {error}")
