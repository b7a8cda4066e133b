"""How results are judged: the error and its limits, where equality is asked, the inputs, the comparison."""

from __future__ import annotations

import json
import math
from itertools import combinations

import pytest
import torch
from torch import Tensor

import mru_kernels
import python_ref
from bench import compare, errors, inputs

NAN, INF = math.nan, math.inf
DTYPES = list(inputs.DTYPES.values())


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ------------------------------------------------------------------------------------------ the error


def test_error_is_the_rms_of_the_difference_over_the_rms_of_the_terms():
    reference, terms = f64(1, 2, -3, 4), f64(10, 20, 30, 40)
    result = reference + f64(0.1, -0.1, 0.3, 0.5)
    expected = math.sqrt(0.36 / 4) / math.sqrt(3000 / 4)
    assert errors.relative_error(result, reference, terms) == pytest.approx(expected, rel=1e-12)


def test_neither_cancellation_nor_a_zero_reference_decides():
    cancelled = errors.relative_error(f64(1e-9), f64(0), f64(1))
    assert cancelled == pytest.approx(1e-9)
    assert errors.relative_error(f64(0), f64(0), f64(0)) == 0
    assert errors.relative_error(f64(1e-30), f64(0), f64(0)) > 1  # something where nothing is added up
    assert errors.relative_error(f64(), f64(), f64()) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_to_the_result_is_within_the_limit_down_to_its_smallest_numbers(dtype):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    smallest = torch.finfo(dtype).smallest_normal
    for size in (1.0, 1e-3, smallest, smallest / 50):
        assert errors.judge((size * x).to(dtype), size * x, (size * x).abs()).passed
    assert not errors.judge((1.02 * x).to(dtype), x, x.abs()).passed


@pytest.mark.parametrize(
    ("result", "reference", "met"),
    [
        ((1, NAN), (1, NAN), True),
        ((1, NAN), (1, 2), False),
        ((NAN, NAN), (1, 2), False),
        ((1, 2), (1, NAN), False),
        ((NAN, 1), (1, NAN), False),
        ((1, INF), (1, INF), True),
        ((1, -INF), (1, INF), False),
        ((1, INF), (1, 1e30), False),
        ((1, 1e30), (1, INF), False),
        ((1, NAN), (1, INF), False),
        ((1, INF), (1, NAN), False),
        ((NAN, INF), (NAN, INF), True),
        ((2, NAN), (1, NAN), False),
    ],
)
def test_nan_and_infinities_are_where_the_reference_has_them(result, reference, met):
    for dtype in (torch.float32, torch.float64):
        given = torch.tensor(result, dtype=dtype), f64(*reference), f64(*reference).abs()
        assert errors.judge(*given).passed is met
        assert not math.isnan(errors.relative_error(*given))
        assert errors.judge_exact(*given, torch.float64).passed is met


def test_what_overflows_the_result_is_infinite():
    reference = f64(1, 70000, -70000)
    for second, expected in ((INF, 0), (65504, INF)):
        result = torch.tensor([1, second, -INF], dtype=torch.float16)
        assert errors.relative_error(result, reference, reference.abs()) == expected


def test_terms_that_are_not_finite_excuse_nothing():
    for terms in (f64(1, INF), f64(1, NAN)):
        assert errors.relative_error(f64(1, 3), f64(1, 2), terms) == INF


def test_a_result_of_another_shape_does_not_pass():
    assert errors.relative_error(f64(1), f64(1, 1), f64(1, 1)) == INF
    assert not errors.judge_exact(f64(1), f64(1, 1), f64(1, 1), torch.float64).passed


# ------------------------------------------------------------------------------------------ limits


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)],
)
def test_limits(dtype, limit):
    reference = torch.ones(4, dtype=torch.float64)
    for share, met in ((0.8, True), (1.2, False)):
        # the difference is made in the terms, as not every dtype can hold it
        difference = 2.0**-4 * torch.ones(4, dtype=torch.float64)
        result = (reference + difference).to(dtype)
        verdict = errors.judge(result, reference, difference / (share * limit))
        assert verdict.limit == limit
        assert verdict.error == pytest.approx(share * limit)
        assert verdict.passed is met


@pytest.mark.parametrize("dtype", DTYPES)
def test_twice_the_error_of_a_float32_loop_is_accepted_where_larger(dtype):
    reference = torch.ones(4, dtype=torch.float64)
    result, loop = (1.25 * reference).to(dtype), (1.125 * reference).float()
    assert errors.judge(result, reference, reference, lambda: loop).passed is (dtype != torch.float64)
    result = (1.375 * reference).to(dtype)
    assert not errors.judge(result, reference, reference, lambda: loop).passed
    assert not errors.judge(result, reference, reference, lambda: torch.full((4,), NAN)).passed


def test_the_float32_loop_is_not_asked_where_it_cannot_decide():
    def loop():
        raise AssertionError

    one = f64(1)
    assert errors.judge(one.float(), one, one, loop).passed
    assert not errors.judge(2 * one, one, one, loop).passed


# ------------------------------------------------------------------------------------------ equality


def test_equality_ignores_the_sign_of_zero_and_nothing_else():
    assert errors.same_values(f64(0, NAN, 1), f64(-0.0, NAN, 1))
    assert not errors.same_values(f64(1), f64(1 + 2**-52))
    assert not errors.same_values(f64(1, 1), f64(1))


def test_exact_results_are_rounded_to_the_state_and_then_once_more():
    # To bfloat16 it would go up; from float32, where it is a tie, it goes to even.
    reference = f64(1 + 2.0**-8 + 2.0**-30)
    for result, met in ((1.0, True), (1 + 2.0**-7, False)):
        result = torch.tensor([result], dtype=torch.bfloat16)
        assert errors.judge_exact(result, reference, reference, torch.float32).passed is met


@pytest.mark.parametrize(
    ("epsilon", "amplitude", "initial_state", "time", "state", "exact"),
    [
        (0.0, False, None, 10, torch.float32, True),
        (0.0, True, f64(0.3), 2**25, torch.float32, True),
        (0.5, False, None, 10, torch.float64, False),
        (None, False, None, 10, torch.float64, False),
        (1.0, False, None, 10, torch.float32, True),
        (1.0, True, None, 10, torch.float32, False),
        (1.0, False, f64(3, -7, -0.0), 10, torch.float32, True),
        (1.0, False, f64(3, 0.5), 10, torch.float32, False),
        (1.0, False, f64(3, NAN), 10, torch.float32, True),
        (1.0, False, f64(3, INF), 10, torch.float32, False),
        (1.0, False, f64(-(2.0**24) + 10), 10, torch.float32, True),
        (1.0, False, f64(-(2.0**24) + 10), 11, torch.float32, False),
        (1.0, False, f64(-(2.0**24) + 10), 11, torch.float64, True),
        (1.0, False, f64(2.0**53), 1, torch.float64, False),
        (1.0, False, torch.empty(0, 3), 0, torch.float32, True),
    ],
)
def test_where_the_forward_pass_is_exact(epsilon, amplitude, initial_state, time, state, exact):
    assert exact is errors.is_exact(
        epsilon=epsilon, amplitude=amplitude, initial_state=initial_state, time=time, state=state
    )


# ------------------------------------------------------------------------------------------ inputs


@pytest.mark.parametrize(("cell", "dtype"), [(cell, name) for cell, x in inputs.CELLS.items() for name in x.dtypes])
def test_cases_cover_every_two_values_of_two_factors(cell, dtype):
    factors = inputs.COMMON_FACTORS | inputs.CELLS[cell].factors
    cases = inputs.covering_cases(cell, inputs.CELLS[cell].dtypes[dtype])
    assert len(cases) < 50
    met = {pair for case in cases for pair in combinations(case.options.items(), 2)}
    for a, b in combinations(factors, 2):
        if {a, b} != {"time", "channels"}:
            assert {((a, x), (b, y)) for x in factors[a] for y in factors[b]} <= met


@pytest.mark.parametrize(("cell", "dtype"), [(cell, name) for cell, x in inputs.CELLS.items() for name in x.dtypes])
def test_brief_cases_cover_every_two_values_but_of_time(cell, dtype):
    factors = inputs.COMMON_FACTORS | inputs.CELLS[cell].factors | {"channels": (17, 1, 64, 100)}
    cases = inputs.brief_cases(cell, inputs.CELLS[cell].dtypes[dtype])
    assert len(cases) <= 20
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


def test_layouts_hold_the_same_values_in_other_places():
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


# ------------------------------------------------------------------------------------------ comparison

SMALL = {"time": 20, "channels": 8, "threshold": "channel", "initial_state": "real"}
SMALL |= {"amplitude": True, "alpha": True}
NAMES = ["h", "final_state", "candidate", "threshold", "amplitude", "alpha", "initial_state"]


def labels(call: inputs.Call) -> list[str]:
    return ["h", "final_state", *(f"d {name}" for name in call.tensors)]


def small_case(dtype=torch.float32, **options):
    return inputs.case("bmru", dtype, **(SMALL | options))


@pytest.mark.parametrize(("cell", "dtype"), [(cell, name) for cell, x in inputs.CELLS.items() for name in x.dtypes])
def test_the_reference_passes(cell, dtype):
    every = inputs.covering_cases(cell, inputs.CELLS[cell].dtypes[dtype])
    cases = [case for case in every if case.options["time"] < 100]
    rows = compare.run(cases, "reference")
    assert len(rows) == len(cases)
    assert [row for row in rows if not row.passed] == []
    for row, case in zip(rows, cases, strict=True):
        assert [r.name for r in row.results] == labels(case.build())


def results_of(call: inputs.Call) -> dict[str, Tensor]:
    """What a right backend gives."""
    leaves = {name: x.detach().requires_grad_() for name, x in call.tensors.items()}
    outputs = python_ref.bmru(**leaves, **call.settings, dtype=errors.state_dtype(call.stream.dtype))
    outputs = [outputs[0].to(call.stream.dtype), outputs[1]]
    grads = torch.autograd.grad(outputs, list(leaves.values()), [call.grad_h, call.grad_final])
    results = zip(("h", "final_state", *leaves), (*outputs, *grads), strict=True)
    return {name: x.detach().clone() for name, x in results}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_fault_in_any_one_result_fails_and_is_named(dtype, name):
    call = small_case(dtype, epsilon=0.5).build()
    right = results_of(call)
    assert list(right) == NAMES
    assert all(r.passed for r in compare.judge(call, right))
    other = torch.float32 if right[name].dtype == torch.float64 else torch.float64

    def one_element(x, value):
        x = x.clone()
        x.view(-1)[x.numel() // 2] = value
        return x

    wrong = {
        "one NaN": one_element(right[name], NAN),
        "one infinity": one_element(right[name], INF),
        "scaled": right[name] * 1.05,
        "zero": torch.zeros_like(right[name]),
        "rolled": right[name].roll(1, -1),
        "another dtype": right[name].to(other),
        "another shape": right[name].unsqueeze(0),
    }
    for fault, value in wrong.items():
        failed = [r.name for r in compare.judge(call, right | {name: value}) if not r.passed]
        assert failed == [name if name in ("h", "final_state") else f"d {name}"], fault


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_are_held_against_a_reference_that_is_not_rounded(dtype):
    call = small_case(dtype).build()
    for verdict in compare.judge(call, results_of(call)):
        if verdict.name in ("d candidate", "d amplitude"):
            assert verdict.error > torch.finfo(dtype).eps / 20


def test_one_rounding_too_many_fails_where_the_forward_pass_is_exact():
    call = small_case(epsilon=1.0, amplitude=False, initial_state="integer").build()
    right = results_of(call)
    for name in ("h", "final_state"):
        wrong = right[name].clone()
        wrong.view(-1)[0] = torch.nextafter(wrong.view(-1)[0], torch.tensor(INF))
        verdicts = {r.name: r for r in compare.judge(call, right | {name: wrong})}
        assert verdicts[name].limit == 0
        assert not verdicts[name].passed


def test_gradients_are_asked_for_where_they_are_specified_only():
    for batch in (3, "packed"):
        call = small_case(nonfinite=True, batch=batch, threshold="stream", alpha=False).build()
        right = results_of(call)
        nan = right["final_state"].isnan()
        assert nan.any()
        assert not nan.all()
        elsewhere = {k: torch.where(nan, 123.0, x) if k == "initial_state" else x for k, x in right.items()}
        assert all(r.passed for r in compare.judge(call, elsewhere))
        there = {k: torch.where(nan, x, 123.0) if k == "initial_state" else x for k, x in right.items()}
        assert [r.name for r in compare.judge(call, there) if not r.passed] == ["d initial_state"]
        specified = compare._specified(call, right["final_state"], right["candidate"])
        assert specified.shape == right["candidate"].shape
        broken = right["h"].isnan()
        assert not (broken & specified).any()
        for name in ("candidate", "threshold", "amplitude"):
            wrong = right | {name: torch.where(specified, right[name], NAN)}
            assert all(r.passed for r in compare.judge(call, wrong))
            wrong = right | {name: torch.where(specified, 2 * right[name], right[name])}
            assert not all(r.passed for r in compare.judge(call, wrong))


def test_given_tensors_are_compared_and_left_as_they_are():
    c, b = torch.randn(2, 30, 10).chunk(2, -1)
    copy = c.clone()
    call = inputs.call("bmru", {"candidate": c, "threshold": b}, {"epsilon": 1.0}, label="activations")
    (row,) = compare.run([call], "reference")
    assert row.passed
    assert (row.label, row.shape, row.dtype) == ("activations", (2, 30, 5), "float32")
    assert torch.equal(c, copy)
    assert not c.requires_grad


def test_a_call_that_raises_is_a_failed_row(monkeypatch):
    def broken(cell, backend):
        def op(**arguments):
            raise RuntimeError("no such luck")

        return op

    monkeypatch.setattr(compare, "_op", broken)
    (row,) = compare.run([small_case()], "reference")
    assert not row.passed
    assert "no such luck" in row.failure
    assert "no such luck" in compare.table([row])
    assert not compare.to_record([row])["rows"][0]["passed"]


def test_command_writes_json_and_exits_with_1_where_something_fails(monkeypatch, tmp_path, capsys):
    cases = [small_case(), small_case(epsilon=0.5)]
    monkeypatch.setattr(inputs, "covering_cases", lambda cell, dtype: cases if cell == "bmru" else [])
    file = tmp_path / "rows.json"
    command = ["--backend", "reference", "--dtype", "fp32", "--json", str(file)]
    assert compare.main(command) == 0
    assert capsys.readouterr().out.count("PASS") == 2
    rows = json.loads(file.read_text())["rows"]
    assert [row["passed"] for row in rows] == [True, True]
    assert [r["name"] for r in rows[0]["results"]] == labels(cases[0].build())

    op = compare._op

    def infinite(cell, backend):
        return lambda **arguments: tuple(y + INF for y in op(cell, backend)(**arguments))

    monkeypatch.setattr(compare, "_op", infinite)
    assert compare.main(command) == 1
    assert capsys.readouterr().out.count("FAIL") == 2
    assert json.loads(file.read_text())["rows"][0]["results"][0]["error"] is None


def test_command_in_parts_and_with_no_time(monkeypatch, tmp_path, capsys):
    cases = [small_case(channels=n) for n in range(1, 10)]
    parts = [compare.part_of(cases, part, 3) for part in (1, 2, 3)]
    assert [[cases.index(case) for case in part] for part in parts] == [[0, 3, 6], [4, 7, 1], [8, 2, 5]]
    monkeypatch.setattr(inputs, "brief_cases", lambda cell, dtype: cases if cell == "bmru" else [])
    file = tmp_path / "rows.json"
    command = ["--backend", "reference", "--dtype", "fp32", "--brief", "--part", "2/3", "--json", str(file)]
    assert compare.main(command) == 0
    shapes = [row["shape"] for row in json.loads(file.read_text())["rows"]]
    assert shapes == [list(case.shape) for case in parts[1]]
    assert compare.main([*command, "--seconds", "-1"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == f"0 calls, 0 failed, no time for {len(parts[1])} more"


def test_command_names_a_backend_that_cannot_run(capsys):
    with pytest.raises(SystemExit) as exit_:
        compare.main(["--backend", "abacus"])
    assert exit_.value.code == 2
    assert "abacus" in capsys.readouterr().err


def test_no_backend_can_run(monkeypatch, capsys):
    """As in a clone that is not built: an error with the reasons, not an empty table."""
    monkeypatch.setattr(mru_kernels, "available_backends", lambda device: {"cpu": "it is not built"})
    with pytest.raises(SystemExit):
        compare.main([])
    assert "--backend: none can run on cpu (cpu: it is not built)" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["3", "0/2", "3/2", "1/x"])
def test_what_is_no_part(part, capsys):
    with pytest.raises(SystemExit):
        compare.main(["--part", part])
    assert f"--part: expected I/N with 1 <= I <= N, got '{part}'" in capsys.readouterr().err
