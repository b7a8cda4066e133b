"""The comparison of a backend with the reference: it fails on any fault, and names it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

import mru_kernels
import python_ref
from bench import compare, errors, inputs, softmax_cases

NAN, INF = math.nan, math.inf
DTYPES = list(inputs.DTYPES.values())

SMALL = {"time": 20, "channels": 8, "threshold": "channel", "initial_state": "real"}
SMALL |= {"amplitude": True, "alpha": True}
NAMES = ["h", "final_state", "candidate", "threshold", "amplitude", "alpha", "initial_state"]


def labels(call: inputs.Call) -> list[str]:
    return [*compare.outputs_of(call), *(f"d {name}" for name in call.tensors)]


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
    """The results of a correct backend."""
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
def test_half_precision_gradients_are_compared_with_an_unrounded_reference(dtype):
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


def test_gradients_are_compared_only_where_they_are_specified():
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
        specified = compare._specified(call, right, right["candidate"])
        assert specified.shape == right["candidate"].shape
        broken = right["h"].isnan()
        assert not (broken & specified).any()
        for name in ("candidate", "threshold", "amplitude"):
            wrong = right | {name: torch.where(specified, right[name], NAN)}
            assert all(r.passed for r in compare.judge(call, wrong))
            wrong = right | {name: torch.where(specified, 2 * right[name], right[name])}
            assert not all(r.passed for r in compare.judge(call, wrong))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", [("wkv", False, True), ("aaren", True, False)])
def test_a_fault_in_any_one_result_of_the_softmax_recurrence_fails_and_is_named(case, dtype, monkeypatch):
    call = softmax_cases.Case(case[0], dtype, *case[1:]).build()
    right = compare.results_of(call, compare._op(call.cell, "cpu"))
    reference = compare.results_of(replace(call, tensors={name: t.double() for name, t in call.tensors.items()}),
                                   softmax_cases.reference)  # fmt: skip
    monkeypatch.setattr(compare, "results_of", lambda *_: reference)  # once
    assert [r.name for r in compare.judge(call, right) if not r.passed] == []
    columns = {name: slice(None) for name in right}
    if case[0] == "aaren":
        columns |= {"final_state": slice(-6, -3)}  # the log weights of its three heads
    for name, kept in columns.items():
        for fault, factor in (("scaled", 1.05), ("zero", 0.0), ("NaN", NAN)):
            wrong = right[name].clone()
            wrong[..., kept] *= factor
            failed = [r.name for r in compare.judge(call, right | {name: wrong}) if not r.passed]
            assert failed == [name if name in ("h", "final_state") else f"d {name}"], fault
        failed = [r.name for r in compare.judge(call, right | {name: right[name].unsqueeze(0)}) if not r.passed]
        assert len(failed) == 1


def test_the_cases_of_the_softmax_recurrence():
    every = {case for dtype in DTYPES for case in softmax_cases.covering_cases(dtype)}
    wanted = set(product(softmax_cases.FORMS, (False, True), (False, True)))
    assert {(c.form, c.packed, c.reverse) for c in every} == wanted
    assert {(c.form, c.reverse) for c in every if c.time >= 256 and not c.packed} == {w[::2] for w in wanted}
    assert {c.form for c in every if c.time >= 5 * 256 and c.packed} == set(softmax_cases.FORMS)  # 5 sequences
    brief = {case for dtype in DTYPES for case in softmax_cases.brief_cases(dtype)}
    assert 2 * len(brief) < len(every)
    assert {c.dtype for c in brief} == set(DTYPES)
    assert len({(c.form, c.packed, c.reverse, c.time) for c in brief}) == len(every) / len(DTYPES)


def test_given_tensors_are_compared_and_not_changed():
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


def test_command_compares_the_softmax_recurrence_too(monkeypatch, tmp_path):
    monkeypatch.setattr(inputs, "brief_cases", lambda cell, dtype: [])
    file = tmp_path / "rows.json"
    assert compare.main(["--backend", "cpu", "--dtype", "bf16", "--brief", "--part", "1/4", "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert row["cell"] == "softmax_recurrence"


def test_command_names_a_backend_that_cannot_run(capsys):
    with pytest.raises(SystemExit) as exit_:
        compare.main(["--backend", "abacus"])
    assert exit_.value.code == 2
    assert "abacus" in capsys.readouterr().err


def test_no_backend_can_run(monkeypatch, capsys):
    """A package without a built extension gives an error with the reasons, not an empty table."""
    monkeypatch.setattr(mru_kernels, "available_backends", lambda device: {"cpu": "it is not built"})
    with pytest.raises(SystemExit):
        compare.main([])
    assert "--backend: none can run on cpu (cpu: it is not built)" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["3", "0/2", "3/2", "1/x"])
def test_an_invalid_part_is_refused(part, capsys):
    with pytest.raises(SystemExit):
        compare.main(["--part", part])
    assert f"--part: expected I/N with 1 <= I <= N, got '{part}'" in capsys.readouterr().err
