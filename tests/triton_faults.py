"""Faults planted into a copy of the Triton kernels, one at a time: a check must catch each. Run by test_triton.py."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from bench import errors
from mru_kernels import backends
from mru_kernels.backends import triton_kernels
from mru_kernels.checks import state_dtype
from tests.triton_interpreted import arguments_of, run

NAME = triton_kernels.__name__


def plant(monkeypatch, folder, old: str, new: str) -> None:
    """Let launches take kernels in whose source the text `old`, which stands there once, is `new`."""
    with open(triton_kernels.__file__) as file:
        text = file.read()
    assert text.count(old) == 1, f"expected the text once: {old}"
    path = folder / "triton_kernels.py"
    path.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location(NAME, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, NAME, module)
    monkeypatch.setattr(backends, "triton_kernels", module)


def kernels():
    return sys.modules[NAME]


# ------------------------------------------------------------------------- calls, cut and whole


def results(segment: int, streams, grad_h, grad_final, cell="bmru", **options) -> list[Tensor]:
    outputs, grads, *_ = run(arguments_of(streams, segment, **options), grad_h, grad_final, cell=cell)
    return [*outputs[:2], *grads]


def assert_cut_equals_whole(streams, grad_h, grad_final, atol=1e-30, **options) -> None:
    """NaN and infinities at the same places, and elsewhere the same numbers but for rounding."""
    whole = results(0, streams, grad_h, grad_final, **options)
    cut = results(64, streams, grad_h, grad_final, **options)
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
    streams = [t.flip(1) if reverse else t for t in (update, decay)]
    grad_h = grad_h.flip(1) if reverse else grad_h
    assert_cut_equals_whole(streams, grad_h, grad_final, cell="linear_recurrence", reverse=reverse)


def cuts_overflow() -> None:
    late_update(150, 150)


def a_factor_of_few_bits_grows() -> None:
    """Under a huge state: it falls below the range's normal numbers and grows again within a segment."""
    time = 192
    decay, update = torch.ones(1, time, 3), torch.zeros(1, time, 3)
    decay[:, 64:100], decay[:, 100:128] = 2.0**-4.07, 16.0  # to 2^-146.5, and to 2^-34.5
    initial_state = torch.full((1, 3), 2.0**100)
    assert_cut_equals_whole(
        [update, decay], torch.zeros_like(update), torch.zeros(1, 3), cell="linear_recurrence",
        initial_state=initial_state,
    )  # fmt: skip


def the_only_segment_overflows() -> None:
    late_update(64, 64)


def the_first_segment_overflows() -> None:
    late_update(150, 64)


def sums_are_replaced() -> None:
    """The first segment is handed a wrong gradient: its sum over time, of a decay [D], is wrong until redone."""
    time = 140
    update, grad_h = torch.zeros(1, time, 3), torch.zeros(1, time, 3)
    update[:, 0], update[:, 12], grad_h[:, :10] = 1, -(4.0**12), 1  # the state ends at 0, which never grows
    assert_cut_equals_whole(
        [update], grad_h, torch.zeros(1, 3), cell="linear_recurrence", channel=[torch.full((3,), 4.0)]
    )


def sums_of_segments() -> None:
    time = 150
    options = {"channel": [torch.tensor([0.5, 1.0, 1.5])], "alpha": torch.tensor([1.0, 0.5, 2.0]), "epsilon": 1.0}
    assert_cut_equals_whole([normal(time)], torch.ones(1, time, 3), torch.ones(1, 3), 1e-4, **options)


def infinite_state(cu_seqlens=None, **options) -> None:
    """An infinite state before every sequence, which a leaky unit keeps."""
    time = 150
    n = 1 if cu_seqlens is None else len(cu_seqlens) - 1
    streams = [normal(time).abs() + 1, torch.full((1, time, 3), 0.5)]
    assert_cut_equals_whole(
        streams, torch.ones(1, time, 3), torch.ones(n, 3), epsilon=0.17,
        cu_seqlens=None if cu_seqlens is None else torch.tensor(cu_seqlens),
        initial_state=torch.full((n, 3), math.inf), **options,
    )  # fmt: skip


def infinite_states_of_packed_sequences() -> None:
    infinite_state([0, 5, 5, 137, 150], reverse=True)


# ------------------------------------------------------------------------- packed sequences


def events_of_packed_sequences() -> None:
    """Words of events of sequences that share no word, though their lengths are no multiples of 16."""
    time, cu_seqlens = 150, torch.tensor([0, 5, 7, 7, 90, 150])
    streams = [normal(time), normal(time + 1)[:, 1:]]
    for reverse in (False, True):
        assert_cut_equals_whole(
            streams, normal(time), torch.ones(5, 3), 1e-5, epsilon=1.0, cu_seqlens=cu_seqlens, reverse=reverse
        )


def empty_sequences_keep_their_state() -> None:
    """Whatever alpha is: their state after is the state before."""
    time, cu_seqlens = 90, torch.tensor([0, 0, 80, 80, 90])
    streams, initial_state = [normal(time), normal(time)], torch.arange(12.0).view(4, 3)
    alpha = torch.tensor([1.0, math.nan, 2.0])
    for segment in (0, 64):
        final_state = results(segment, streams, normal(time), torch.ones(4, 3), epsilon=1.0, cu_seqlens=cu_seqlens,
                              alpha=alpha, initial_state=initial_state)[1]  # fmt: skip
        assert torch.equal(final_state[[0, 2]], initial_state[[0, 2]]), segment
        assert final_state[[1, 3], 1].isnan().all(), segment
        assert final_state[[1, 3]][:, [0, 2]].isfinite().all(), segment


@triton.jit
def _spans(scan, offsets, out, bounds: tl.constexpr, sizes: tl.constexpr):
    scan = sizes(scan, 1)
    n = tl.program_id(0).to(tl.int64)
    index, start, length = bounds(scan, offsets, n)
    tl.store(out + 3 * n, index)
    tl.store(out + 3 * n + 1, start)
    tl.store(out + 3 * n + 2, length)


def spans_lie_within_time() -> None:
    """Whatever the offsets on a device are."""
    time, encode = 100, triton_kernels.encode
    for offsets in ([5, -3, 1000, 2], [0, 90, 20, 100], [2**40, -(2**40)], [0, 10, 10, 100]):
        n = len(offsets) - 1
        for reverse in (False, True):
            sizes = triton_kernels.Scan(*[0] * len(triton_kernels.Scan._fields))
            sizes = sizes._replace(sequences=n, time=time, channels=1, segment=64, reverse=int(reverse), packed=1)
            out = torch.empty(n, 3, dtype=torch.int64)
            scan = triton_kernels.Scan(*map(encode, sizes))
            _spans[(n,)](scan, torch.tensor(offsets), out, kernels().bounds, kernels().sizes)
            index, start, length = out.unbind(1)
            assert sorted(index.tolist()) == list(range(n))
            assert (start >= 0).all()
            assert (length >= 0).all()
            assert (start + length <= time).all()


# ------------------------------------------------------------------------- programs


def programs_beyond_one_axis() -> None:
    """Where programs are too many for the grid's first axis, some of its last row have nothing to do."""
    time, batch = 70, 3
    streams = [normal(batch * time).view(batch, time, 3), normal(batch * time + 1)[:, 1:].view(batch, time, 3)]
    grad_h, grad_final = torch.ones(batch, time, 3), torch.ones(batch, 3)
    for segment in (0, 64):
        expected = results(segment, streams, grad_h, grad_final, epsilon=1.0)
        module = kernels()
        usual, module.GRID = module.GRID, tl.constexpr(2)
        try:
            got = results(segment, streams, grad_h, grad_final, epsilon=1.0)
        finally:
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
    events_of_packed_sequences,
    empty_sequences_keep_their_state,
    spans_lie_within_time,
    programs_beyond_one_axis,
]

_RAISE = "tl.store(flag + tl.zeros_like(at.d), 1,"
_ENDS = "        if at.begin < at.end:\n            flip = size(walk.flip)\n"
FAULTS = {
    "check that never fires": (cuts_overflow, _RAISE, _RAISE.replace("1,", "0,")),
    "check that skips the last boundary": (
        the_only_segment_overflows, _ENDS, _ENDS.replace("at.begin < at.end", "at.end < at.length"),
    ),
    "check that skips the first boundary": (
        the_first_segment_overflows, _ENDS, _ENDS.replace("at.begin < at.end", "(at.begin > 0) & (at.begin < at.end)"),
    ),
    "sums of another chunk": (
        sums_of_segments, "summed = sums_rows(scan, at.start, at.n, CHUNK) + chunk // CHUNK",
        "summed = sums_rows(scan, at.start, at.n, CHUNK) + (chunk - at.begin) // CHUNK",
    ),
    "sums of the cut kept": (
        sums_are_replaced, "put(partial, k * rows + summed, at, sums[k], at.mask)",
        "put(partial, k * rows + summed, at, sums[k], when(scan.redo == 0, at.mask))",
    ),
    "rounding measured by what entered": (
        a_factor_of_few_bits_grows, "* terms + ROUNDING * late", "* terms + ROUNDING * MAGNITUDE(entry)",
    ),
    "factors that underflow taken as rounding": (
        infinite_state, "near = (error <= bound) & (bound < float(\"inf\"))", "near = error == error",
    ),
    "row of events by index": (
        events_of_packed_sequences, "at.start // WORD + at.n, at.n *", "at.start // WORD + at.index, at.n *",
    ),
    "row of events shared": (events_of_packed_sequences, "at.start // WORD + at.n, at.n *", "at.start // WORD, at.n *"),
    "empty sequence poisoned in carry": (
        empty_sequences_keep_their_state, "when(length > 0, scale != scale)", "(scale != scale)",
    ),
    "empty sequence poisoned": (
        empty_sequences_keep_their_state, "when(at.length > 0, scale != scale)", "(scale != scale)",
    ),
    "alpha not looked at in carry": (
        empty_sequences_keep_their_state, "when(length > 0, scale != scale)", "when(length < 0, scale != scale)",
    ),
    "offsets that fall": (
        spans_lie_within_time, "tl.load(offsets + index + 1), low)", "tl.load(offsets + index + 1), 0)",
    ),
    "offsets below 0": (spans_lie_within_time, "tl.maximum(tl.load(offsets + index), 0)", "tl.load(offsets + index)"),
    "offsets beyond the end": (
        spans_lie_within_time, "tl.load(offsets + index + 1), low), scan.time)",
        "tl.load(offsets + index + 1), low), 2 * scan.time)",
    ),
    "programs of one axis": (
        programs_beyond_one_axis, "unit = tl.program_id(1).to(tl.int64) * GRID + tl.program_id(0)",
        "unit = tl.program_id(0).to(tl.int64)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_faultless(check):
    check()


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_caught(monkeypatch, tmp_path, name):
    check, old, new = FAULTS[name]
    plant(monkeypatch, tmp_path, old, new)
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize(("dtype", "reverse"), [(torch.complex64, False), (torch.float64, True)])
def test_cuts_overflow_in_other_dtypes(dtype, reverse):
    late_update(150, 150, dtype, reverse)
