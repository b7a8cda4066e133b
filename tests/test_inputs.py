"""The inputs of the comparison: which cases there are, and what their values do."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from bench import errors, inputs

DTYPES = list(inputs.DTYPES.values())


def most_pairs(factors, apart) -> int:
    """The most pairs of values of two factors, over all pairs of factors that are not both in `apart`."""
    return max(len(factors[a]) * len(factors[b]) for a, b in combinations(factors, 2) if not {a, b} <= apart)


@pytest.mark.parametrize(("cell", "dtype"), [(cell, name) for cell, x in inputs.CELLS.items() for name in x.dtypes])
def test_cases_cover_every_two_values_of_two_factors(cell, dtype):
    factors = inputs.COMMON_FACTORS | inputs.CELLS[cell].factors
    cases = inputs.covering_cases(cell, inputs.CELLS[cell].dtypes[dtype])
    assert len(cases) < max(50, 1.6 * most_pairs(factors, {"time", "channels"}))
    met = {pair for case in cases for pair in combinations(case.options.items(), 2)}
    for a, b in combinations(factors, 2):
        if {a, b} != {"time", "channels"}:
            assert {((a, x), (b, y)) for x in factors[a] for y in factors[b]} <= met


@pytest.mark.parametrize(("cell", "dtype"), [(cell, name) for cell, x in inputs.CELLS.items() for name in x.dtypes])
def test_brief_cases_cover_every_two_values_except_of_time(cell, dtype):
    factors = inputs.COMMON_FACTORS | inputs.CELLS[cell].factors | {"channels": (17, 1, 64, 100)}
    cases = inputs.brief_cases(cell, inputs.CELLS[cell].dtypes[dtype])
    assert len(cases) <= max(20, 1.6 * most_pairs(factors, {"time"}))
    met = {pair for case in cases for pair in combinations(case.options.items(), 2)}
    for a, b in combinations(factors.keys() - {"time"}, 2):
        assert all({((a, x), (b, y)), ((b, y), (a, x))} & met for x in factors[a] for y in factors[b])
    times = [case.options["time"] for case in cases]
    assert set(times) == set(factors["time"])
    assert times.count(4097) == 1


@pytest.mark.parametrize("cell", inputs.CELLS)
def test_inputs_are_the_same_every_time(cell):
    first, second = (inputs.case(cell, torch.float32, seed=3, nonfinite=True).build() for _ in range(2))
    for name, x in first.tensors.items():
        assert errors.same_values(x, second.tensors[name])
    assert torch.equal(first.grad_h, second.grad_h)
    other = inputs.case(cell, torch.float32, seed=4, nonfinite=True).build()
    assert not errors.same_values(first.stream, other.stream)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", ["stream", "channel"])
def test_bmru_inputs_write_hold_and_tie(dtype, threshold):
    call = inputs.case("bmru", dtype, time=1000, threshold=threshold, parameters="as streams").build()
    c, b = call.tensors["candidate"].abs(), call.tensors["threshold"].abs()
    assert 0.25 < (c >= b).double().mean() < 0.5
    assert (c == b).double().mean() > 0.03
    zero = call.tensors["candidate"] == 0
    assert zero.any()
    assert zero.logical_and(call.tensors["candidate"].signbit()).any()


def test_layouts_have_the_same_values_and_other_strides():
    calls = {x: inputs.case("bmru", torch.float32, layout=x).build() for x in inputs.COMMON_FACTORS["layout"]}
    for call in calls.values():
        for name, x in call.tensors.items():
            assert torch.equal(x, calls["contiguous"].tensors[name])
    batch, time, channels = calls["contiguous"].stream.shape
    assert calls["contiguous"].stream.is_contiguous()
    assert calls["time-major"].stream.stride() == (channels, batch * channels, 1)
    row = calls["chunked"].stream.stride(1)
    assert row > channels
    assert calls["chunked"].stream.stride() == (time * row, row, 1)


def test_an_unknown_option_is_named():
    with pytest.raises(ValueError, match="colour"):
        inputs.case("bmru", torch.float32, colour="red")
    with pytest.raises(ValueError, match="threshold: expected one of 'stream', 'channel', got 'per channel'"):
        inputs.case("bmru", torch.float32, threshold="per channel")
