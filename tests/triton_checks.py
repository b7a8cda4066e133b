"""Checks of what is Triton's own: cuts of time, resets, packed sequences, maps and large grids."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench import errors
from mru_kernels.backends import triton as backend
from mru_kernels.checks import state_dtype
from mru_kernels.ops import CELLS
from tests.triton_calls import arguments_of, run


def module_of(name: str) -> ModuleType:
    """A module of the backend that calls take."""
    return importlib.import_module(f"{backend.__name__}.{name}")


# ------------------------------------------------------------------------- calls, cut and whole


def results(segment: int, tensors, grad_h, grad_final, cell="bmru", **options) -> list[Tensor]:
    outputs, grads, *_ = run(arguments_of(tensors, segment, cell=cell, **options), grad_h, grad_final, cell=cell)
    return [*outputs[:2], *grads]


def assert_cut_equals_whole(tensors, grad_h, grad_final, atol=1e-30, **options) -> None:
    """NaN and infinities at the same places, and elsewhere the same numbers but for rounding."""
    whole = results(0, tensors, grad_h, grad_final, **options)
    cut = results(64, tensors, grad_h, grad_final, **options)
    for i, (got, expected) in enumerate(zip(cut, whole, strict=True)):
        assert torch.equal(got.isnan(), expected.isnan()), i
        finite = expected.isfinite()
        assert errors.same_values(got[~finite], expected[~finite]), i
        torch.testing.assert_close(got[finite], expected[finite], rtol=1e-5, atol=atol)


def normal(time: int, channels: int = 3, dtype=torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(time)
    return torch.randn(1, time, channels, generator=generator).to(dtype)


def late_update(time: int, grows: int, dtype=torch.float32, reverse: bool = False) -> None:
    """A linear recurrence whose decays, the first `grows` of them above 1, make a factor overflow, with updates in the
    last ten steps only; gradients alike from the right.
    """
    decay, update = torch.full((1, time, 3), 0.5, dtype=dtype), torch.zeros(1, time, 3, dtype=dtype)
    decay[:, :grows], update[:, -10:] = 4, 1
    grad_h, grad_final = torch.zeros_like(update), torch.zeros(1, 3, dtype=state_dtype(dtype))
    grad_h[:, :10] = 1
    tensors = {"update": update.flip(1) if reverse else update, "decay": decay.flip(1) if reverse else decay}
    grad_h = grad_h.flip(1) if reverse else grad_h
    assert_cut_equals_whole(tensors, grad_h, grad_final, cell="linear_recurrence", reverse=reverse)


def cuts_overflow() -> None:
    late_update(150, 150)


def a_factor_of_few_bits_grows() -> None:
    """Under a huge state: it falls below the range's normal numbers and grows again within a segment."""
    time = 192
    decay, update = torch.ones(1, time, 3), torch.zeros(1, time, 3)
    decay[:, 64:100], decay[:, 100:128] = 2.0**-4.07, 16.0  # to 2^-146.5, and to 2^-34.5
    initial_state = torch.full((1, 3), 2.0**100)
    assert_cut_equals_whole(
        {"update": update, "decay": decay}, torch.zeros_like(update), torch.zeros(1, 3), cell="linear_recurrence",
        initial_state=initial_state,
    )  # fmt: skip


def the_only_segment_overflows() -> None:
    late_update(64, 64)


def the_first_segment_overflows() -> None:
    late_update(150, 64)


def sums_are_replaced() -> None:
    """The first segment is handed a wrong gradient: its sum over time, of a decay [D], is wrong until rescanned."""
    time = 140
    update, grad_h = torch.zeros(1, time, 3), torch.zeros(1, time, 3)
    update[:, 0], update[:, 12], grad_h[:, :10] = 1, -(4.0**12), 1  # the state ends at 0, which never grows
    tensors = {"update": update, "decay": torch.full((3,), 4.0)}
    assert_cut_equals_whole(tensors, grad_h, torch.zeros(1, 3), cell="linear_recurrence")


def sums_of_segments() -> None:
    time = 150
    threshold, alpha = torch.tensor([0.5, 1.0, 1.5]), torch.tensor([1.0, 0.5, 2.0])
    tensors = {"candidate": normal(time), "threshold": threshold, "alpha": alpha}
    assert_cut_equals_whole(tensors, torch.ones(1, time, 3), torch.ones(1, 3), 1e-4, epsilon=1.0)


def infinite_state(cu_seqlens=None, **options) -> None:
    """An infinite state before every sequence, which a leaky unit keeps."""
    time = 150
    n = 1 if cu_seqlens is None else len(cu_seqlens) - 1
    tensors = {"candidate": normal(time).abs() + 1, "threshold": torch.full((1, time, 3), 0.5)}
    assert_cut_equals_whole(
        tensors, torch.ones(1, time, 3), torch.ones(n, 3), epsilon=0.17,
        cu_seqlens=None if cu_seqlens is None else torch.tensor(cu_seqlens),
        initial_state=torch.full((n, 3), math.inf), **options,
    )  # fmt: skip


def infinite_states_of_packed_sequences() -> None:
    infinite_state([0, 5, 5, 137, 150], reverse=True)


# ------------------------------------------------------------------------- packed sequences


def codes_of_packed_sequences() -> None:
    """Words of codes of sequences that share no word, though their lengths are no multiples of 16."""
    time, cu_seqlens = 150, torch.tensor([0, 5, 7, 7, 90, 150])
    tensors = {"candidate": normal(time), "threshold": normal(time + 1)[:, 1:]}
    for reverse in (False, True):
        assert_cut_equals_whole(
            tensors, normal(time), torch.ones(5, 3), 1e-5, epsilon=1.0, cu_seqlens=cu_seqlens, reverse=reverse
        )


def empty_sequences_keep_their_state() -> None:
    """Whatever alpha is: their state after is the state before. NaN in alpha makes the others NaN."""
    time, cu_seqlens = 90, torch.tensor([0, 0, 80, 80, 90])
    initial_state = torch.arange(12.0).view(4, 3)
    tensors = {"candidate": normal(time), "threshold": normal(time), "alpha": torch.tensor([1.0, math.nan, 2.0])}
    for segment in (0, 64):
        for epsilon in (0.0, 1.0):
            final_state = results(segment, tensors, normal(time), torch.ones(4, 3), epsilon=epsilon,
                                  cu_seqlens=cu_seqlens, initial_state=initial_state)[1]  # fmt: skip
            assert torch.equal(final_state[[0, 2]], initial_state[[0, 2]]), segment
            assert final_state[[1, 3], 1].isnan().all(), segment
            assert final_state[[1, 3]][:, [0, 2]].isfinite().all(), segment


@triton.jit
def _spans(scan, block, out, bounds: tl.constexpr, sizes: tl.constexpr):
    scan = sizes(scan, block)
    n = tl.program_id(0).to(tl.int64)
    index, start, length = bounds(scan, n)
    tl.store(out + 3 * n, index)
    tl.store(out + 3 * n + 1, start)
    tl.store(out + 3 * n + 2, length)


def spans_lie_within_time() -> None:
    """Whatever the offsets on a device are."""
    arguments, place = module_of("kernels.arguments"), module_of("kernels.place")
    time, none = 100, torch.empty(0, dtype=torch.int64)
    for offsets in ([5, -3, 1000, 2], [0, 90, 20, 100], [2**40, -(2**40)], [0, 10, 10, 100]):
        n = len(offsets) - 1
        for reverse in (False, True):
            scan = arguments.Scan(
                torch.tensor(offsets), none, none, *[arguments.encode(0)] * (len(arguments.Scan._fields) - 3)
            )
            sizes = {
                "sequences": n,
                "time": time,
                "channels": 1,
                "segment_size": 64,
                "reverse": int(reverse),
                "packed": 1,
            }
            scan = scan._replace(**{name: arguments.encode(value) for name, value in sizes.items()})
            block = arguments.Block(*map(tl.constexpr, (1, 1, 1)))
            out = torch.empty(n, 3, dtype=torch.int64)
            _spans[(n,)](scan, block, out, place.bounds, arguments.sizes)
            index, start, length = out.unbind(1)
            assert sorted(index.tolist()) == list(range(n))
            assert (start >= 0).all()
            assert (length >= 0).all()
            assert (start + length <= time).all()


# ------------------------------------------------------------------------- resets and boundaries


def resets_equal_pieces(cell: str, reverse: bool = False, nan: bool = False, **options) -> None:
    """Resets to a state, whole and cut, equal the pieces between them as packed sequences from that state.

    Resets are at the first and the last step, at the border of segments, within a word, and side by side. The gradient
    of a boundary joins that of the h before it, as h is the state. With NaN only states are compared.
    """
    time, at = 150, [0, 5, 6, 64, 100, 149]
    names, start, n = SHIFTED[cell], torch.tensor([[3.0, -2.0, 1.0]]), len(at)
    tensors = {names[0]: normal(time), names[1]: normal(time + 1)[:, 1:].sigmoid()}
    in_time = lambda steps: [time - 1 - step for step in steps] if reverse else steps  # noqa: E731
    if nan:
        tensors[names[0]][:, in_time([10])] = math.nan  # until the reset at 64
    resets = torch.zeros(1, time, dtype=torch.bool)
    resets[0, in_time(at)] = True
    grad_h, grad_final, grad_checkpoints = normal(time + 2)[:, 2:], torch.ones(1, 3), normal(2)[0]
    before_boundaries = in_time([63, 127])

    joined, of_pieces = grad_h.clone(), torch.zeros(n, 3)
    joined[0, before_boundaries] += grad_checkpoints
    of_pieces[0 if reverse else -1] = grad_final
    ends = [*at, time]
    cu_seqlens = torch.tensor([time - end for end in reversed(ends)] if reverse else ends)
    arguments = arguments_of(tensors, 0, cell=cell, cu_seqlens=cu_seqlens, reverse=reverse,
                             initial_state=start.expand(n, 3).contiguous(), **options)  # fmt: skip
    (h, states, *_), grads, *_ = run(arguments, joined, of_pieces, cell=cell)
    expected = [h, states[:1] if reverse else states[-1:], h[0, before_boundaries]]
    expected += [] if nan else [*grads[:2], torch.zeros(1, 3), grads[2].sum(0, keepdim=True)]
    for segment in (0, 64):
        arguments = arguments_of(tensors, segment, cell=cell, resets=resets, reset_state=start, reverse=reverse,
                                 initial_state=torch.full((1, 3), math.nan), **options)  # fmt: skip
        outputs, grads, *_ = run(arguments, grad_h, grad_final, cell=cell, grad_checkpoints=grad_checkpoints)
        got = [*outputs[:3], *grads]
        for i, (a, b) in enumerate(zip(got, expected, strict=not nan)):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True, msg=f"{segment}, {i}")


SHIFTED = {"bmru": ("candidate", "threshold"), "linear_recurrence": ("update", "decay")}


def resets_of_codes() -> None:
    resets_equal_pieces("bmru", reverse=True, epsilon=0.5)


def resets_and_writes_that_reset() -> None:
    resets_equal_pieces("bmru", epsilon=0.0)


def resets_of_streams() -> None:
    resets_equal_pieces("linear_recurrence")


def resets_drop_nan() -> None:
    """Also without the check of a cut, which epsilon 0 does not need."""
    resets_equal_pieces("bmru", nan=True, epsilon=0.0)


def boundaries_of_packed_sequences() -> None:
    """Rows between the sequences are 0, and the gradients of the others join at their steps."""
    time, cu_seqlens = 300, torch.tensor([0, 5, 69, 69, 230, 300])
    tensors = {"update": normal(time), "decay": normal(time + 1)[:, 1:].sigmoid()}
    grad_checkpoints = normal(4)[0]
    rows, steps = [1, 2, 3], [69 + 63, 69 + 127, 230 + 63]  # the row of the second sequence would be the first
    grad_h, joined = normal(time + 2)[:, 2:], normal(time + 2)[:, 2:].clone()
    joined[0, steps] += grad_checkpoints[rows]
    for segment in (0, 64):
        arguments = arguments_of(tensors, segment, cell="linear_recurrence", cu_seqlens=cu_seqlens)
        (h, _, boundaries, _), grads, *_ = run(
            arguments, grad_h, torch.ones(5, 3), cell="linear_recurrence", grad_checkpoints=grad_checkpoints
        )
        _, expected, *_ = run(arguments, joined, torch.ones(5, 3), cell="linear_recurrence")
        assert torch.equal(boundaries[rows], h[0, steps])
        assert (boundaries[0] == 0).all()
        for a, b in zip(grads, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def sums_over_many_resets() -> None:
    """The gradient of a reset state sums up the same over time, many times."""
    time = 2000
    tensors = {"update": torch.zeros(1, time, 1), "decay": torch.ones(1, time, 1)}
    arguments = arguments_of(
        tensors, 0, cell="linear_recurrence", resets=torch.ones(1, time, dtype=torch.bool), reset_state=torch.ones(1, 1)
    )
    grad_h = torch.full((1, time, 1), 0.1)
    *_, grad = run(arguments, grad_h, torch.zeros(1, 1), cell="linear_recurrence")[1]
    assert (grad.double() / (time * grad_h[0, 0, 0].double()) - 1).abs() < 1e-6


# ------------------------------------------------------------------------- maps


def maps_take_states_on(cu_seqlens: Tensor | None, reverse: bool) -> None:
    """The map of each sequence, from groups of segments too, takes the state before it to the state after it."""
    time, n = 200, 1 if cu_seqlens is None else cu_seqlens.numel() - 1
    tensors = {"update": normal(time), "decay": 0.5 + 0.5 * normal(time + 1)[:, 1:].sigmoid()}
    initial_state, module = torch.arange(3.0 * n).view(n, 3), module_of("launch")
    usual, module.MOST_WALKED = module.MOST_WALKED, 1
    try:
        outputs = results(64, tensors, normal(time), torch.ones(n, 3), cell="linear_recurrence", reverse=reverse,
                          cu_seqlens=cu_seqlens, initial_state=initial_state)  # fmt: skip
        inputs = arguments_of(tensors, 64, cell="linear_recurrence")[:4]
        factor, offset = CELLS["linear_recurrence"].map["triton"](*inputs, cu_seqlens, None, None, reverse, 64)
    finally:
        module.MOST_WALKED = usual
    torch.testing.assert_close(factor * initial_state + offset, outputs[1], rtol=1e-5, atol=1e-5)
    whole = results(0, tensors, normal(time), torch.ones(n, 3), cell="linear_recurrence", reverse=reverse,
                    cu_seqlens=cu_seqlens, initial_state=initial_state)  # fmt: skip
    torch.testing.assert_close(outputs[1], whole[1], rtol=1e-5, atol=1e-5)


def maps_of_groups() -> None:
    maps_take_states_on(None, False)


def maps_of_packed_sequences() -> None:
    maps_take_states_on(torch.tensor([0, 5, 137, 137, 200]), True)


# ------------------------------------------------------------------------- programs


def programs_beyond_one_axis() -> None:
    """If programs are too many for the grid's first axis, some of its last row have nothing to do."""
    time, batch = 70, 3
    candidate, threshold = normal(batch * time), normal(batch * time + 1)[:, 1:]
    tensors = {"candidate": candidate.view(batch, time, 3), "threshold": threshold.reshape(batch, time, 3)}
    grad_h, grad_final = torch.ones(batch, time, 3), torch.ones(batch, 3)
    for segment in (0, 64):
        expected = results(segment, tensors, grad_h, grad_final, epsilon=1.0)
        modules = module_of("launch"), module_of("kernels.place")
        usual = modules[0].GRID
        try:
            for module in modules:
                module.GRID = tl.constexpr(2)
            got = results(segment, tensors, grad_h, grad_final, epsilon=1.0)
        finally:
            for module in modules:
                module.GRID = usual
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)


CHECKS: list[Callable[[], None]] = [
    cuts_overflow,
    a_factor_of_few_bits_grows,
    the_only_segment_overflows,
    the_first_segment_overflows,
    sums_are_replaced,
    sums_of_segments,
    infinite_state,
    infinite_states_of_packed_sequences,
    codes_of_packed_sequences,
    empty_sequences_keep_their_state,
    resets_of_codes,
    resets_and_writes_that_reset,
    resets_of_streams,
    resets_drop_nan,
    boundaries_of_packed_sequences,
    sums_over_many_resets,
    spans_lie_within_time,
    maps_of_groups,
    maps_of_packed_sequences,
    programs_beyond_one_axis,
]
