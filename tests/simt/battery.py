"""Checks of the CUDA kernels under host execution; a check that fails raises.

`python -m simt.battery float32` runs the checks of a dtype on the cells of the module that MRU_SIMT_MODULE names.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product
from unittest.mock import patch

import torch
from torch import Tensor

import mru_kernels as mk
import simt
from bench import compare, errors, inputs
from mru_kernels import backends, ops
from mru_kernels.backends import CHUNK
from simt.calls import Op, cells_of, per_channel_options, require, results, scan_once, segments
from simt.resets import check_boundaries, check_far_resets, check_no_resets, check_resets, check_sums_over_resets
from simt.traffic import check_mask_traffic, check_traffic
from tests import test_cuts, test_slots

_MAP_NORESERVE = 0x4000  # pages that are never written take no memory
WAVES = [(1, 24), (2, 1), (3, 200)]  # seeds of the order of threads and blocks, and blocks that run at the same time


# ------------------------------------------------------------------------------------------ the numbers


def compare_cases(cases: list[inputs.Case]) -> None:
    """Every result and gradient against the float64 reference, whole and in segments, in several orders."""
    for i, (case, steps) in enumerate(product(cases, (0, CHUNK, 2 * CHUNK))):
        seed, resident = WAVES[i % len(WAVES)]
        simt.control().configure(seed=seed + i, resident=resident)
        with segments(steps):
            (row,) = compare.run([case], "simt")
        require(row.passed, f"{compare.table([row])}, segments of {steps}")


def small_cases(dtype: torch.dtype) -> list[inputs.Case]:
    """The covering cases, with sizes reduced for the host execution, which is slow."""
    cases = []
    for case in (case for cell in cells_of(dtype) for case in inputs.covering_cases(cell, dtype)):
        time = {1000: 129, 4097: 193}.get(case.options["time"], case.options["time"])
        channels = {100: 20}.get(case.options["channels"], case.options["channels"])
        cases.append(inputs.Case(case.cell, dtype, {**case.options, "time": time, "channels": channels}, case.seed))
    return cases


def check_numbers(dtype: torch.dtype) -> None:
    compare_cases(small_cases(dtype)[:: 3 if simt.SANITIZE else 1])  # the sanitizers take long


def check_maps(dtype: torch.dtype) -> None:
    """The map of each sequence gives the final state of any initial state; in segments as a whole."""
    composing = [cell for cell in cells_of(dtype) if ops.CELLS[cell].composes]
    for cell, packed, reverse, resets in product(composing, (False, True), (False, True), (None, 0.005, 1.0)):
        batch = "packed" if packed else 2
        case = inputs.case(cell, dtype, time=4 * CHUNK + 5, batch=batch, channels=20, initial_state="real",
                           resets="to a state" if resets else "none", reverse=reverse,
                           **per_channel_options(cell))  # fmt: skip
        call = case.build()
        if resets:
            call.settings["resets"] = torch.rand(call.stream.shape[:2]) < resets
        is_reset = _any_in_sequence(call)
        state = call.tensors["initial_state"].to(ops.CELLS[cell].state_dtype(dtype))
        arrays = {name: t for name, t in call.tensors.items() if name != "initial_state"}
        _, final = getattr(mk, cell)(**arrays, **call.settings, initial_state=state, backend="simt")
        for steps in (0, CHUNK):
            with segments(steps), ops.as_maps():
                factor, offset = getattr(mk, cell)(**arrays, **call.settings, backend="simt")
            terms = errors.wide(factor * state), errors.wide(offset)
            error = errors.relative_error(final, sum(terms), sum(t.abs() for t in terms))
            require(error <= errors.LIMITS[torch.float32], f"map of {case.label()}, segments of {steps}: {error}")
            require((factor[is_reset] == 0).all(), f"factor of {case.label()}, segments of {steps}, after a reset")


def _any_in_sequence(call: inputs.Call) -> Tensor:
    """Which sequences have a reset, `[N]`."""
    offsets = call.settings.get("cu_seqlens")
    resets = call.settings.get("resets", torch.zeros(call.stream.shape[:2], dtype=torch.bool))
    if offsets is None:
        return resets.any(1)
    return torch.tensor([resets[0, a:b].any() for a, b in pairwise(offsets.tolist())], dtype=torch.bool)


def check_many_segments(dtype: torch.dtype) -> None:
    """More segments than `carry` has parts, more than it takes in a turn, and more sequences than rows of sums."""
    parameters = {"threshold": "channel", "alpha": True, "epsilon": 0.5, "initial_state": "real"}
    for reverse in (False, True):
        case = inputs.case("bmru", dtype, time=70 * CHUNK + 5, batch=2, channels=3, reverse=reverse, **parameters)
        with segments(CHUNK):
            (row,) = compare.run([case], "simt")
        require(row.passed, compare.table([row]))
        scan_once(case.build())
    in_a_turn = 128 * 64 // errors.state_dtype(dtype).itemsize
    call = inputs.case("bmru", dtype, time=(in_a_turn + 70) * CHUNK, batch=1, channels=1, **parameters).build()
    whole, cut = results(call, 0), scan_once(call)  # the reference would take a minute
    for name in ("h", "candidate"):
        expected = errors.wide(whole[name])
        error = errors.relative_error(cut[name], expected, expected.abs())
        require(error <= errors.LIMITS[dtype], f"{name} depends on segments: {error}")
    (row,) = compare.run([inputs.case("bmru", dtype, time=2, batch=8200, channels=1, **parameters)], "simt")
    require(row.passed, compare.table([row]))


def check_held(dtype: torch.dtype) -> None:
    """Where writes overwrite and few steps write, gradients pass the ends of many segments, and of sequences none."""
    batch, time, channels = 2, 6 * CHUNK + 3, 20
    for offsets in (None, [0, 0, 40, 41, 3 * CHUNK, time]):
        rows, n = (batch, batch) if offsets is None else (1, len(offsets) - 1)
        threshold = torch.full((channels,), 2.5)
        threshold[7] = 9.0  # never writes
        tensors = {
            "candidate": torch.randn(rows, time, channels).to(dtype),
            "threshold": threshold.to(errors.state_dtype(dtype)),
            "initial_state": torch.randn(n, channels).to(errors.state_dtype(dtype)),
            "alpha": torch.randn(channels).to(errors.state_dtype(dtype)),
        }
        for gate, reverse in product(("stream", "channel", "amplitude"), (False, True)):
            settings = {"epsilon": 0.0, "reverse": reverse}
            if offsets is not None:
                settings["cu_seqlens"] = torch.tensor(offsets)
            more = {}
            if gate != "channel":
                more["threshold"] = threshold.to(dtype).expand(rows, time, channels).contiguous()
            if gate == "amplitude":
                more["amplitude"] = torch.randn(rows, time, channels).to(dtype)
            call = inputs.call("bmru", tensors | more, settings)
            whole, cut = results(call, 0), results(call, CHUNK)
            for name, values in whole.items():
                expected = errors.wide(values)
                error = errors.relative_error(cut[name], expected, expected.abs())
                require(error <= errors.LIMITS[dtype], f"{name} depends on segments: {error}, {gate} {settings}")


def check_sums(dtype: torch.dtype) -> None:
    """Sums of equal terms over the steps of a thread, over a block, and over many rows of sums."""
    settings = {"epsilon": 0.5, "surrogate_scale": 0.3}
    for batch, time in ((1, 2**14), (16384, 3)):
        row = torch.tensor([0.3, 0.5, 0.7, 1.1, 1.3])
        tensors = {"candidate": row.to(dtype).expand(batch, time, 5).contiguous()}
        tensors |= {name: (0.4 * row).to(errors.state_dtype(dtype)) for name in ("threshold", "alpha")}
        call = inputs.call("bmru", tensors, settings)
        call = replace(call, grad_h=tensors["candidate"], grad_final=torch.zeros_like(call.grad_final))
        wide = replace(call, tensors={name: errors.wide(t) for name, t in tensors.items()})
        wide = replace(wide, grad_h=errors.wide(call.grad_h), grad_final=errors.wide(call.grad_final))
        got, expected = results(call, 0), results(wide, 0, "cpu")
        for name in ("threshold", "alpha"):
            error = (got[name].double() - expected[name]).abs() / expected[name].abs()
            require((error <= 1e-6).all(), f"{name}, batch {batch}, time {time}: {error}")


def check_slopes(dtype: torch.dtype) -> None:
    """Surrogate slopes at ties and elsewhere, for scales of any size."""
    tensors = {"candidate": torch.randn(1, 40, 5).to(dtype)}
    tensors["threshold"] = torch.where(torch.rand(1, 40, 5) < 0.5, tensors["candidate"].abs(), 0.5).to(dtype)
    for scale in (1e-40, 1e-36, 1.0, 4e37, 1e38, 1e39):
        call = inputs.call("bmru", tensors, {"epsilon": 0.0, "surrogate_scale": scale})
        call = replace(call, grad_h=1e4 * call.grad_h)
        least = 1e-30 if scale > 1 else torch.finfo(torch.float32).smallest_normal
        got, expected = results(call, 0), results(call, 0, "cpu")
        for name in tensors:
            one, other = errors.wide(got[name]), errors.wide(expected[name])
            right = ((one - other).abs() <= 4 * errors.LIMITS[dtype] * other.abs() + least) | (one == other)
            require(right.all(), f"{name}, scale {scale}: {one[~right][:3]}, not {other[~right][:3]}")


def check_little_shared_memory(dtype: torch.dtype) -> None:
    """Tiles fit the shared memory that a block may have, here less than on any device that is compiled for."""
    simt.control().configure(most_shared=64 << 10)
    for cell in cells_of(dtype):
        case = inputs.case(cell, dtype, time=3 * CHUNK + 5, channels=130, batch=2)
        for steps in (0, CHUNK):
            with segments(steps):
                (row,) = compare.run([case], "simt")
            require(row.passed, compare.table([row]))
    simt.control().configure()


def check_any_order(dtype: torch.dtype) -> None:
    """The order in which threads and blocks run changes no bit."""
    for cell, steps in product(cells_of(dtype), (0, CHUNK)):
        options = per_channel_options(cell) | ({"epsilon": 0.5} if "epsilon" in inputs.CELLS[cell].factors else {})
        call = inputs.case(cell, dtype, time=5 * CHUNK + 3, channels=20, resets="to a state", boundaries=True,
                           **options).build()  # fmt: skip
        runs = []
        for seed, resident in WAVES:
            simt.control().configure(seed=seed, resident=resident)
            runs.append(results(call, steps))
        for name, first in runs[0].items():
            for other in runs[1:]:
                require(torch.equal(first, other[name]), f"{name} of {cell} depends on the order, segments of {steps}")


def check_copies(dtype: torch.dtype) -> None:
    """Where writes overwrite, values are copied, and NaN stays: ties, zeros of both signs, infinities, NaN."""
    values = torch.tensor([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 2.0, -2.0, torch.inf, -torch.inf], dtype=dtype)
    shape = (2, 4 * CHUNK, 16)
    candidate, threshold = values[torch.randint(len(values), (2, *shape))].unbind()
    threshold[:, CHUNK : 3 * CHUNK] = 3.0  # what is held comes from far
    candidate[0, 70, 3] = threshold[1, 2 * CHUNK + 9, 8] = candidate[1, 0, 15] = torch.nan
    initial, alpha = torch.randn(2, 16), torch.randn(16)
    initial[0, 5] = alpha[11] = torch.nan
    state = errors.state_dtype(dtype)
    call = {"initial_state": initial.to(state), "alpha": alpha.to(state)}
    h, final_state = mk.bmru(candidate, threshold, **call, backend="cpu")
    for steps in (0, CHUNK):
        with segments(steps):
            results = mk.bmru(candidate, threshold, **call, backend="simt")
        for name, result, expected in zip(("h", "final_state"), results, (h, final_state), strict=True):
            same = (result == expected) | (result.isnan() & expected.isnan())
            require(same.all(), f"{name}, segments of {steps}: {int((~same).sum())} values differ from the CPU's")


def check_cuts(dtype: torch.dtype) -> None:
    """Results where composed states leave the range of their dtype: the tests of every backend."""
    here, cells = ("simt", torch.device("cpu")), cells_of(dtype)

    def built(case: Callable[[test_cuts.Draw], inputs.Call]) -> bool:
        return case(test_cuts.Draw(dtype)).cell in cells

    for name, key in test_cuts.cases():
        if test_cuts.DTYPES[key] == dtype and built(test_cuts.CASES[name]):
            for form in test_cuts.FORMS:
                test_cuts.test_every_cut_equals_the_whole(*here, name, key, form)
    if dtype != torch.float32:
        return
    for name, steps in product(test_cuts.LEAPS, (0, CHUNK)):
        if built(test_cuts.LEAPS[name]):
            test_cuts.test_few_steps_that_leave_the_range(*here, name, steps)
    for name in ("late update, decay per channel", "gradient held"):
        if built(test_cuts.CASES[name]):
            test_cuts.test_no_state_saved_and_any_number_of_threads(*here, name)
    if "linear_recurrence" in cells:
        test_cuts.test_ordinary_numbers_are_not_scanned_again(*here)
        test_cuts.test_states_that_are_small_by_chance_are_not_scanned_again(*here)
    if "leaky_integrator" in cells:
        test_cuts.test_gradients_that_depend_on_the_state_are_not_scanned_again(*here)
    if "bmru" in cells:
        test_cuts.test_gradients_that_cancel_are_not_scanned_again(*here)


# ------------------------------------------------------------------------------------------ memory


def check_slots(dtype: torch.dtype) -> None:
    """A step in slots equals steps on separate states; a sequence whose slot does not exist is skipped."""
    for cell, channels in product(cells_of(dtype), (20, 3)):
        call = inputs.case(cell, dtype, time=1, batch=4, channels=channels, **per_channel_options(cell)).build()
        with patch.object(backends, "_CHOSEN", "simt"):
            test_slots.assert_slots_equal_separate_states(call, [5, -1, 0, 3], 6, torch.int32)
            step, arguments = getattr(mk, f"{cell}_step"), test_slots.of_step(call)
            slots = torch.randn(6, channels).to(ops.CELLS[cell].state_dtype(dtype))
            before = slots.clone()
            h, _ = step(**arguments, state=slots, state_indices=torch.tensor([6, -2, 2**40, -(2**40)]))
        require(torch.equal(slots, before) and not h.any(), f"{cell}: a slot that does not exist was written")


def check_far_strides(dtype: torch.dtype) -> None:
    """Streams whose rows are more than 2^31 elements apart."""
    stride = 2**31 + 64
    room = mmap.mmap(-1, (stride + 128) * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    flat = torch.frombuffer(room, dtype=dtype)
    for strides in ((64, stride, 1), (stride, 64, 1)):
        c = flat.as_strided((2, 2, 16), strides)
        values = torch.randn(2, 2, 16).to(dtype)
        c.copy_(values)
        tensors = {"candidate": c, "threshold": torch.full((16,), 0.5)}
        far = inputs.call("bmru", tensors, {"epsilon": 0.5})
        near = inputs.call("bmru", {**tensors, "candidate": values}, {"epsilon": 0.5})
        one, other = results(far, 0), results(near, 0)
        for name, result in one.items():
            require(torch.equal(result, other[name]), f"{name} with strides {strides}")


def check_misaligned(dtype: torch.dtype) -> None:
    """A number of channels that is a multiple of 16 bytes, in rows or tensors that are not aligned to 16 bytes."""
    for cell in cells_of(dtype):
        call = inputs.case(cell, dtype, time=70, channels=16, **per_channel_options(cell)).build()
        _check_misaligned(inputs.call(cell, call.tensors, call.settings))


def _check_misaligned(aligned: inputs.Call) -> None:
    def moved(t: Tensor, offset: int, padding: int) -> Tensor:
        wide = t.new_empty((*t.shape[:-1], offset + t.shape[-1] + padding))
        return wide[..., offset : offset + t.shape[-1]].copy_(t)

    tensors = aligned.tensors
    for steps in (0, CHUNK):
        expected = results(aligned, steps)
        for name in tensors:
            for offset, padding in ((1, 15), (0, 1)):
                elsewhere = {**tensors, name: moved(tensors[name], offset, padding)}
                call = inputs.call(aligned.cell, elsewhere, aligned.settings)
                for result, value in results(call, steps).items():
                    require(torch.equal(value, expected[result]), f"{result}, {name} at {offset} + {padding}")


def check_offsets_are_clamped(dtype: torch.dtype) -> None:
    """The kernels cannot check the values of cu_seqlens, but wrong ones must not lead out of bounds."""
    time = 3 * CHUNK + 1
    for name in cells_of(dtype):
        cell = ops.CELLS[name]
        arrays = {i.name: torch.randn(5) if i.kind == "channel" else torch.randn(1, time, 5) for i in cell.inputs}
        arrays = {n: t.to(dtype if t.dim() == 3 else errors.state_dtype(dtype)) for n, t in arrays.items()}
        arrays |= {n: arrays[n].to(cell.state_dtype(dtype)) for n in arrays.keys() & cell.complex_names}
        for offsets in ([0, 2**40, time], [-7, 60, 9999], [100, 50, 3], [time, time, 0], [9, 9, 9]):
            for reverse, steps in product((False, True), (0, CHUNK)):
                op = Op(cell, arrays, reverse, steps, torch.tensor(offsets))
                op.backward(op.forward())


#: The slowest come last, because a planted fault ends the battery at the first check that fails.
CHECKS = (
    check_slots,
    check_copies,
    check_maps,
    check_cuts,
    check_held,
    check_resets,
    check_no_resets,
    check_traffic,
    check_mask_traffic,
    check_any_order,
    check_far_strides,
    check_misaligned,
    check_offsets_are_clamped,
    check_slopes,
    check_little_shared_memory,
    check_sums_over_resets,
    check_boundaries,
    check_far_resets,
    check_numbers,
    check_many_segments,
    check_sums,
)
#: Checks of one cell only.
OF_BMRU = {check_copies, check_held, check_far_strides, check_many_segments, check_sums, check_sums_over_resets,
           check_slopes}  # fmt: skip


def failure(element: str) -> str:
    """The first check of a dtype that fails, and why; empty if all pass."""
    dtype = getattr(torch, element)
    simt.register()
    torch.manual_seed(0)
    for check in CHECKS if "bmru" in cells_of(dtype) else [check for check in CHECKS if check not in OF_BMRU]:
        try:
            check(dtype)
        except (AssertionError, RuntimeError) as error:
            return f"{check.__name__}: {error}"
    return ""


if __name__ == "__main__":
    sys.exit(failure(sys.argv[1]) or print("all checks pass"))
