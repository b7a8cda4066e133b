"""`python -m bench speed`: peers compute the same results, and the record has every figure that the options ask for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from bench import aside, inputs, memory, peers, profile, report, scans, speed, verify, work
from mru_kernels import backends

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
overhead = speed.overhead


def case(cell: str, epsilon: float | None = None, dtype: torch.dtype = torch.float32, **sizes: int) -> inputs.Case:
    given = {} if epsilon is None else {"epsilon": epsilon}
    return inputs.case(cell, dtype, **{"batch": 2, "time": 20, "channels": 5} | sizes, **given)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Measure few repetitions, no cost of calls, and no processes with other settings."""
    monkeypatch.setattr(speed, "_PER_SUBJECT", 0.0)
    monkeypatch.setattr(speed, "overhead", lambda *_: {"a call": 1.0})
    monkeypatch.setattr(speed, "Others", lambda _: nullcontext())


def run(capsys, *arguments: str) -> tuple[int, str]:
    status = speed.main(arguments)
    return status, capsys.readouterr().out


def test_the_overhead_is_that_of_the_named_backend():
    with patch.object(backends, "_CHOSEN", "cuda"), patch.object(speed, "per_call", lambda f: f() is None):
        assert len(overhead(CPU, "cpu")) == 4


def test_a_peer_that_fails_on_a_dtype_does_not_end_the_run(tmp_path, capsys):
    def only_wide(a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        if w.dtype == torch.bfloat16:
            raise NotImplementedError("not for bfloat16")
        return scans.log_step(a, w)

    file = tmp_path / "record.json"
    with patch.dict(peers.PEERS, {"log-step scan": peers.Peer(only_wide, needs=("torch",))}):
        status, page = run(capsys, "--shape", "2,20,5", "--peer", "log-step scan", "--json", str(file))
    assert status == 1
    assert "FAIL (2, 20, 5) bfloat16: peer 'log-step scan' not for bfloat16; it is not timed" in page
    timed = {(f["dtype"], f["subject"]) for f in report.load(file)["figures"]}
    assert {("float32", "log-step scan"), ("bfloat16", "bmru")} <= timed
    assert ("bfloat16", "log-step scan") not in timed


def rows_peer(factor: float = 1.0) -> peers.Peer:
    """A peer that scans `[B D, T]`. The results of its own job are multiplied by a factor."""

    class InRows(peers.Peer):
        def own_passes(self, a, w, grad):
            works = super().own_passes(a, w, grad)
            return works | {work.FORWARD: lambda: works[work.FORWARD]() * factor}

    return InRows(lambda a, w: scans.log_step(a.unsqueeze(-1), w.unsqueeze(-1)).squeeze(-1), peers.ROWS)


def test_a_wrong_own_job_is_refused(capsys):
    with patch.dict(peers.PEERS, {"log-step scan": rows_peer(1.01)}):
        status, page = run(
            capsys, "--cell", speed.LINEAR, "--shape", "2,20,5", "--dtype", "fp32", "--peer", "log-step scan"
        )
    assert status == 1
    assert page.count("FAIL") == 1
    reason = "does not compute what linear_recurrence computes; it is not timed"
    assert f"FAIL (2, 20, 5) float32: peer 'log-step scan{work.OWN_JOB}' {reason}" in page


def test_own_jobs_are_timed_beside_the_linear_recurrence_only(tmp_path, capsys):
    file = tmp_path / "record.json"
    with patch.dict(peers.PEERS, {"log-step scan": rows_peer()}):
        for cell, own in (("linear_recurrence", True), ("bmru", False)):
            run(capsys, "--cell", cell, "--shape", "2,20,5", "--dtype", "fp32", "--peer", "log-step scan",
                "--json", str(file))  # fmt: skip
            figures = {(f["subject"], f["work"]): f for f in report.load(file)["figures"]}
            for what in (work.FORWARD, work.BOTH):
                assert "slower" in figures["log-step scan", what]
                assert ((f"log-step scan{work.OWN_JOB}", what) in figures) == own
    assert report.main([str(file)]) == 0


def test_the_record_has_the_versions_of_peers(tmp_path, capsys):
    needing = peers.Peer(scans.log_step, needs=("numpy", "no_such_package"))
    with patch.dict(peers.PEERS, {"log-step scan": needing}):
        assert peers.versions(["log-step scan", work.GRU]) == {"numpy": metadata.version("numpy")}
        options = ["--shape", "2,20,5", "--dtype", "fp32", "--json", str(tmp_path / "record.json")]
        _, page = run(capsys, *options, "--peer", "log-step scan")
    assert report.load(tmp_path / "record.json")["machine"]["numpy"] == metadata.version("numpy")
    assert "no_such_package not installed" in page
    assert peers.versions([]) == {}


@pytest.mark.parametrize(
    ("cell", "dtype"),
    [(cell, dtype) for cell, x in inputs.CELLS.items() for dtype in ("fp32", "bf16", "c64") if dtype in x.dtypes],
)
def test_a_record_holds_what_was_asked_for(cell, dtype, tmp_path, capsys):
    declared = inputs.CELLS[cell]
    vectors = [name for name, values in declared.factors.items() if "channel" in values]
    module = None if dtype == "c64" else declared.unit
    file = tmp_path / "record.json"
    options = ["--cell", cell, "--shape", "2,20,5", "--dtype", dtype, "--json", str(file)]
    status, page = run(capsys, *options, "--peer", "log-step scan", work.GRU)
    assert status == 0
    record = report.load(file)
    ours = [cell, *(f"{cell}, {name} [D]" for name in vectors)]
    expected = {(subject, what) for subject in ours for what in (work.FORWARD, work.SAVING, work.BACKWARD, work.BOTH)}
    expected |= {(work.ADD, work.FORWARD), ("torch.add", work.FORWARD)}
    peers_timed = [] if declared.affine is None else ["log-step scan"]
    whole = [*peers_timed, module, work.GRU] if module else peers_timed
    expected |= {(subject, what) for subject in whole for what in (work.FORWARD, work.BOTH)}
    expected |= {(f"{module}{work.PROJECTIONS}", work.BOTH)} if module else set()
    figures = {(f["subject"], f["work"]): f for f in record["figures"]}
    assert figures.keys() == expected
    assert page.count("\n| 2, 20, 5 |") == len(expected) + 1  # and the summary
    assert all(
        ("floor_ratio" not in f) == (f["subject"] in (*whole, f"{module}{work.PROJECTIONS}")) for f in figures.values()
    )
    assert record["machine"]["cell"] == cell
    assert ("left out: torch.nn.GRU" in page) == (module is None)
    assert ("left out: log-step scan" in page) == (declared.affine is None)
    assert report.main([str(file)]) == 0
    assert report.main([str(file), str(file)]) == 0


def test_a_wrong_result_is_refused(tmp_path, capsys):
    file = tmp_path / "record.json"
    options = ["--shape", "2,20,5", "--dtype", "fp32", "--json", str(file), "--peer", "log-step scan"]
    with patch.object(verify, "faults", lambda *_: ["h is not that of the reference", "candidate depends on a cut"]):
        status, page = run(capsys, *options)
    assert status == 1
    reasons = "h is not that of the reference; candidate depends on a cut"
    assert f"FAIL (2, 20, 5) float32: bmru is not timed: {reasons}" in page
    assert json.loads(file.read_text())["figures"] == []
    with patch.dict(peers.PEERS, {"log-step scan": peers.Peer(lambda a, w: 1.01 * scans.log_step(a, w))}):
        status, page = run(capsys, *options)
    assert status == 1
    assert "FAIL (2, 20, 5) float32: peer 'log-step scan' does not compute what bmru computes" in page
    assert "log-step scan" not in {f["subject"] for f in json.loads(file.read_text())["figures"]}


@pytest.mark.parametrize("first", [1, 2])
def test_ctrl_c_leaves_the_figures_so_far(first, tmp_path, capsys, monkeypatch):
    """Ctrl-C while the `first` case is timed."""
    measure, calls = speed.measure, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == first:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(speed, "measure", interrupted)
    file = tmp_path / "record.json"
    status, page = run(capsys, "--shape", "2,20,5", "2,21,5", "2,22,5", "--dtype", "fp32", "--json", str(file))
    assert status == 130
    record = report.load(file)
    assert record["interrupted"]
    assert {tuple(f["shape"]) for f in record["figures"]} == ({(2, 20, 5)} if first == 2 else set())
    assert page.count("\n| 2, 20, 5 |") == (len(record["figures"]) + 1 if first == 2 else 0)
    assert "2, 21, 5" not in page
    assert report.main([str(file)]) == 0


class Failing:
    """Stands for `aside.Others`. The given question about the second shape fails."""

    def __init__(self, question: str):
        self.question = question

    def answer(self, question: str, call: inputs.Call, right):
        if (question, call.stream.shape[1]) == (self.question, 21):
            raise RuntimeError(f"{question}: the process\nwith other settings failed")
        return right

    def digest(self, call: inputs.Call) -> str:
        return self.answer("digest", call, verify.digest(call, "cpu"))

    def times(self, call: inputs.Call) -> list:
        return self.answer("times", call, [])


@pytest.mark.parametrize("question", ["digest", "times"])
def test_a_failure_at_a_case_leaves_the_figures_and_the_other_cases(question, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speed, "Others", lambda _: nullcontext(Failing(question)))
    file = tmp_path / "record.json"
    status, page = run(capsys, "--shape", "2,20,5", "2,21,5", "2,22,5", "--dtype", "fp32", "--json", str(file))
    assert status == 1
    reason = f"FAIL (2, 21, 5) float32: RuntimeError: {question}: the process with other settings failed"
    assert page.endswith(f"{reason}\n")
    record = report.load(file)
    assert record["failed"] == [reason]
    assert "interrupted" not in record
    assert record["microseconds"] == {"a call": 1.0}
    timed = {tuple(f["shape"]) for f in record["figures"]}
    assert timed == {(2, 20, 5), (2, 22, 5)} | ({(2, 21, 5)} if question == "times" else set())
    assert "\n| 2, 22, 5 | float32 | bmru | forward |" in page
    assert report.main([str(file)]) == 0


def test_a_failure_of_the_last_measurement_leaves_the_figures(tmp_path, capsys, monkeypatch):
    def failing(*_) -> dict[str, float]:
        raise ValueError("no such step")

    monkeypatch.setattr(speed, "overhead", failing)
    file = tmp_path / "record.json"
    status, page = run(capsys, "--shape", "2,20,5", "--dtype", "fp32", "--json", str(file))
    assert status == 1
    assert page.endswith("FAIL cost of a call: ValueError: no such step\n")
    assert {tuple(f["shape"]) for f in report.load(file)["figures"]} == {(2, 20, 5)}


@pytest.mark.check
def test_ctrl_c_at_the_terminal(tmp_path):
    """A signal to the whole group of processes, as a terminal sends it."""
    file = tmp_path / "record.json"
    shapes = ["2,20,5", *["8,4096,256"] * 40]
    command = [sys.executable, "-m", "bench", "speed", "--shape", *shapes, "--dtype", "fp32", "--json", str(file)]
    run = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    seen = ""
    while "| 1/41 [" not in seen and run.poll() is None:  # the progress bar
        seen += run.stderr.read(1)
    os.killpg(run.pid, signal.SIGINT)
    page, errors = run.communicate(timeout=120)
    assert run.returncode == 130, errors
    assert "Traceback" not in errors
    assert "| 2, 20, 5 | float32 | bmru | forward |" in page
    assert {tuple(f["shape"]) for f in report.load(file)["figures"]} >= {(2, 20, 5)}


def test_the_allocator_is_in_the_record_and_below_the_table(tmp_path, capsys, monkeypatch):
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    options = ["--shape", "2,20,5", "--dtype", "fp32", "--json", str(tmp_path / "record.json")]
    for value in ("glibc's default", "MALLOC_ARENA_MAX=3 MALLOC_TOP_PAD_=7"):
        if "=" in value:
            monkeypatch.setenv("MALLOC_TOP_PAD_", "7")
            monkeypatch.setenv("MALLOC_ARENA_MAX", "3")
        _, page = run(capsys, *options)
        assert f" Allocator: {value}.\n" in page
        assert report.load(tmp_path / "record.json")["machine"]["allocator"] == value


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_sweep_is_drawn(kind, tmp_path, capsys):
    file, image = tmp_path / "record.json", tmp_path / f"sweep.{kind}"
    run(capsys, "--shape", "2,16,5", "--sweep", "T", "--dtype", "fp32", "--peer", "log-step scan", "--json", str(file))
    assert report.main([str(file), "--plot", str(image)]) == 0
    assert image.read_bytes().startswith({"png": b"\x89PNG", "svg": b"<?xml"}[kind])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "c64"], "--dtype: expected one of fp32, fp64, bf16, fp16 for bmru, got c64"),
        (["--cell", "linear_recurrence", "--epsilon", "0.5"], "--epsilon: linear_recurrence has none"),
        (["--epsilon", "2"], "--epsilon: expected a number in [0, 1], got '2'"),
        (["--shape", "4x5x6"], "--shape: expected three positive sizes B,T,D such as 4,4096,512, got '4x5x6'"),
        (["--shape", "0,0,0"], "--shape: expected three positive sizes"),
        (["--device", "cpuu"], "--device: expected a device such as cpu or cuda:0, got 'cpuu'"),
        (["--backend", "none"], "--backend: expected None or one of 'cpu', 'cuda', 'triton', 'torch', got 'none'"),
        (["--device", "meta"], "--device: expected a device such as cpu or cuda:0, got 'meta'"),
        (["--backend", "cuda"], "--backend: 'cuda' cannot run this call"),
    ],
)
@pytest.mark.parametrize("command", [speed, profile, memory], ids=lambda command: command.__name__)
def test_a_command_refuses_invalid_options(command, options, message, capsys):
    if command is not speed and "--epsilon" in options:
        pytest.skip("an option of speed")
    with pytest.raises(SystemExit):
        command.main(options)
    assert message in capsys.readouterr().err


def test_memory_refuses_invalid_chunk_sizes(capsys):
    for size, message in (("17", 'a positive multiple of 16 or "None"'), ("8192", "16 to 4096 for backend cpu")):
        with pytest.raises(SystemExit):
            memory.main(["--chunk-size", size])
        assert f"--chunk-size: expected {message}, got" in capsys.readouterr().err


@pytest.mark.check
@pytest.mark.parametrize(("cell", "epsilon"), [("bmru", 0.5), ("linear_recurrence", None)])
def test_the_default_allocator_is_timed_too(cell, epsilon):
    with aside.Others("cpu") as others:
        figures = others.times(case(cell, epsilon).build())
    subjects = {f"{name}{work.DEFAULT_ALLOCATOR}" for name in (cell, work.ADD, "torch.add")}
    assert {f.subject for f in figures} == subjects
    assert {f.work for f in figures} == {work.FORWARD, work.SAVING, work.BACKWARD, work.BOTH}
    assert {f.shape for f in figures} == {(2, 20, 5)}


@pytest.mark.check
def test_peak_memory(tmp_path, capsys):
    _, page = run(capsys, "--shape", "1,100,8", "--dtype", "fp32", "--memory")
    assert "| peak, MiB |" in page.splitlines()[2]
