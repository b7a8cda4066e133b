"""`make gpu-check` on the CPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

import mru_kernels as mk
from bench import peers, records, softmax_cases, timing, work
from bench.gpu import command, jobs, processes, report, stages
from bench.gpu.processes import Outcome

CPU = torch.device("cpu")
SHAPES = [(2, 64, 8, "fp32"), (1, 70, 3, "bf16")]
IN_TORCH = ["cummax + gather", "log-step scan", "python loop"]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.fixture
def check(tmp_path) -> stages.Check:
    return stages.Check("cpu", SHAPES, tmp_path / "logs")


def test_jobs_run_side_by_side_and_each_outcome_is_reported(tmp_path, capsys):
    jobs = {
        "good": python("print('all is well')"),
        "bad": python("print('alas'); raise SystemExit(3)"),
        "slow": python("import time; print('begun', flush=True); time.sleep(60)"),
        "absent": [str(tmp_path / "no such program")],
    }
    start = time.monotonic()
    outcomes = {outcome.name: outcome for outcome in processes.run_jobs(jobs, 3, tmp_path)}
    assert time.monotonic() - start < 30
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        "good": "passed", "bad": "failed", "slow": "timed out", "absent": "failed",
    }  # fmt: skip
    assert outcomes["good"].reason == "all is well"
    assert outcomes["bad"].reason == "exit status 3: alas"
    assert [outcome.bad for outcome in outcomes.values()].count(True) == 3
    assert (tmp_path / "slow.log").read_text().startswith("begun\n")
    assert "KeyboardInterrupt" in (tmp_path / "slow.log").read_text()  # the job gets an interrupt before it is killed
    assert "alas" in capsys.readouterr().out


def test_a_late_job_ends_with_its_child_processes(tmp_path):
    code = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        "print(p.pid, flush=True); p.wait()"
    )
    (outcome,) = processes.run_jobs({"parent": python(code)}, 3, tmp_path)
    assert outcome.status == "timed out"
    child = int((tmp_path / "parent.log").read_text().split()[0])
    state = ""
    for _ in range(50):
        try:
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return
        if state == "Z":  # ended, and no process has collected its status
            return
        time.sleep(0.1)
    pytest.fail(f"process {child} is in state {state}")


def test_stages_that_raise_do_not_stop_the_others_and_time_left_over_is_passed_on(check):
    given = {}

    def stage(name, then=None):
        def run(seconds):
            given[name] = seconds
            if then is not None:
                raise then
            yield Outcome(name, "passed")

        return run

    def found():
        check.backends = ["cpu"]
        return []

    check.build, check.find_backends, check.checks = stage("build"), found, stage("checks", KeyError("lost"))
    check.times, check.sanitizers = stage("times"), stage("sanitizers")
    outcomes = stages.run_stages(check, stages.DEADLINES)
    assert [o.name for o in outcomes if o.status == "passed"] == ["build", "times", "sanitizers"]
    (failed,) = (o for o in outcomes if o.bad)
    assert (failed.name, failed.reason) == ("checks", "KeyError: 'lost'")
    assert given == pytest.approx(stages.DEADLINES, abs=5)


def test_without_a_backend_the_rest_is_skipped(check):
    check.build = lambda seconds: [Outcome("build", "failed", "no compiler")]
    check.find_backends = list
    outcomes = stages.run_stages(check, stages.DEADLINES)
    assert [o.status for o in outcomes] == ["failed"] + ["skipped"] * 3


def test_everything_fits_nine_minutes():
    ends = list(stages.DEADLINES.values())
    assert ends == sorted(ends)
    assert ends[-1] + 15 <= 540


def test_tests_and_comparison_share_the_cores(check):
    check.backends = ["cuda", "triton"]
    given = []
    with (
        patch.object(os, "cpu_count", lambda: 16),
        patch.object(stages, "run_jobs", lambda *jobs, **environment: given.append((*jobs, environment)) or []),
    ):
        assert list(check.checks(130)) == []
    ((jobs, seconds, _, environment),) = given
    assert (seconds, environment) == (130, {"OMP_NUM_THREADS": "1"})
    commands = {name: " ".join(command) for name, command in jobs.items()}
    of_triton = [f"compare triton --brief {part}/8" for part in range(1, 9)]
    assert list(jobs) == ["compare cuda 1/1", *of_triton, "tests cuda brief", "tests triton few"]
    assert "--backend cuda --part 1/1 --seconds 110" in commands["compare cuda 1/1"]
    assert "--backend triton --brief --part 8/8 --seconds 110" in commands[of_triton[-1]]
    workers = {
        name: int(re.search(r" -n (\d+) ", command)[1]) for name, command in commands.items() if " -n " in command
    }
    assert len(of_triton) + sum(workers.values()) == 16


def test_missing_requirements_are_skipped_by_name(check):
    check.backends = ["cpu"]
    with patch.object(processes, "find_spec", lambda name: None if name in ("hypothesis", "ninja") else object()):
        with patch.object(stages, "run_jobs", lambda jobs, *_, **__: [Outcome(name, "passed") for name in jobs]):
            tests, *comparison = check.checks(30)
        (build,) = check.build(5)
    assert {outcome.name.split()[0] for outcome in comparison} == {"compare"}
    assert (tests.status, tests.reason) == ("skipped", "hypothesis not installed")
    assert (build.status, build.reason) == ("skipped", "ninja not installed: there is no C++ extension")
    with patch.dict(os.environ, {"PATH": ""}):
        (sanitizers,) = check.sanitizers(5)
    assert sanitizers.status == "skipped"


def test_each_sanitizer_runs_the_small_set_and_its_findings_count(check, tmp_path):
    program = tmp_path / "compute-sanitizer"
    program.write_text('#!/bin/sh\necho "$@"\n[ $2 != racecheck ] || exit $4\n')
    program.chmod(0o755)
    check.backends = ["triton", "cuda"]
    with patch.dict(os.environ, {"PATH": f"{tmp_path}:{os.environ['PATH']}"}):
        outcomes = {outcome.name: outcome for outcome in check.sanitizers(20)}
    assert {name: o.status for name, o in outcomes.items()} == {
        "memcheck": "passed", "racecheck": "failed", "synccheck": "passed",
    }  # fmt: skip
    log = (check.logs / "memcheck.log").read_text()
    assert "--backend triton cuda --job small-set" in log


def test_the_version_is_recorded_in_a_tree_without_an_install(tmp_path):
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "mru_kernels"\nversion = "4.5.6"\n')
    with patch.object(stages, "ROOT", tmp_path), patch.object(records, "version_of", lambda package: None):
        stages.record_version()
    (found,) = records.metadata.distributions(name="mru_kernels", path=[str(tmp_path)])
    assert found.version == "4.5.6"


def test_nothing_imports_the_package_before_its_version_is_recorded():
    code = "import sys, bench.gpu.command; sys.exit('mru_kernels' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=processes.ROOT, check=False).returncode == 0


@pytest.mark.check
def test_backends_are_found_in_a_new_process(check):
    assert list(check.find_backends()) == []
    assert check.backends == ["cpu"]


def test_a_machine_without_a_gpu_prints_one_line(capsys):
    with patch.object(torch.cuda, "is_available", lambda: False):
        assert command.main([]) == 2
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    """Path of the file with the times on the CPU."""
    path = tmp_path_factory.mktemp("times") / "figures.jsonl"
    with open(path, "w") as file, patch.object(jobs, "_PER_SUBJECT", 0.01):
        timing = jobs.Timing(CPU, lambda kind, what: print(json.dumps([kind, what]), file=file), 2**20)
        timing.calls = lambda name: timing.write("call", {"backend": name, "microseconds": {"a call": 1.0}})
        deadline = time.monotonic() + 60
        jobs.time_all(timing, SHAPES, ["cpu"], deadline, [*IN_TORCH[:2], "cumsum"])
        jobs.time_all(timing, SHAPES[:1], [], time.monotonic() - 1, ["log-step scan"])
        jobs.time_all(timing, SHAPES[:1], [], time.monotonic() + 30, ["log-step scan, compiled"])
    return path


def test_times_are_at_the_bytes_of_the_floor(timed):
    found = report.read_figures(timed)
    assert found["failed"] == []
    (copy,) = found["copy"]
    subjects = {(f["subject"], f["work"]) for f in found["figure"]}
    whole = {(name, work) for name in ("cpu", "log-step scan") for work in ("forward", "forward + backward")}
    whole |= {("cpu" + jobs.SELDOM, work) for work in work.MAIN} | {("cpu", "backward")}
    assert subjects == whole | {("torch.add(out=)", "forward"), ("cummax + gather", "forward")}
    for f in found["figure"]:
        batch, steps, channels = f["shape"]
        itemsize = {"fp32": 4, "bf16": 2}[f["dtype"]]
        moved = {"forward": 3, "backward": 5, "forward + backward": 8}[f["work"]] * batch * steps * channels * itemsize
        assert f["ms"] > 0
        assert f["gb_per_s"] == pytest.approx(moved / f["ms"] / 1e6)
        assert f["percent_of_copy"] == pytest.approx(100 * f["gb_per_s"] / copy["gb_per_s"])
    assert [reason.partition(": ")[2] for reason in found["left out"]] == [
        "epsilon 1 only", "epsilon 1 only", "no time was left", "no time was left",
    ]  # fmt: skip


def test_the_other_ops_are_timed_on_one_shape_each(timed):
    """Bytes of the streams: `lif` and `resonate` read one, wkv two, aaren one and a score."""
    found = report.read_figures(timed)
    assert len(found["other"]) == len(jobs.OTHERS) * len(work.MAIN)
    given = {(f["subject"], f["work"]): f for f in found["other"]}
    for op, read in (("lif", 3), ("resonate", 3), (softmax_cases.WKV, 16), (softmax_cases.AAREN, 9)):
        shape = SHAPES[jobs.OTHERS[op]]
        for name, elements in (("forward", read + shape[2]), ("backward", 2 * read + shape[2])):
            f = given[f"cpu, {op}", name]
            assert (*f["shape"], f["dtype"]) == shape
            moved = elements * shape[0] * shape[1] * {"fp32": 4, "bf16": 2}[shape[3]]
            assert f["gb_per_s"] == pytest.approx(moved / f["ms"] / 1e6)
            assert f["percent_of_copy"] == pytest.approx(100 * f["gb_per_s"] / found["copy"][0]["gb_per_s"])


@pytest.mark.parametrize("op", jobs.OTHERS)
def test_another_op_that_is_wrong_is_not_timed(op):
    written = []
    name = op if hasattr(mk, op) and op not in softmax_cases.FORMS else softmax_cases.OP
    right = getattr(mk, name)

    def wrong(*arguments, **options):
        y, final = right(*arguments, **options)
        return y * 1.05, final

    with patch.object(mk, name, wrong):
        jobs.Timing(CPU, lambda *what: written.append(what), 2**16).other(op, "cpu", SHAPES[0])
    assert [kind for kind, _ in written] == ["copy", "failed"]


def test_without_time_the_other_ops_are_left_out():
    written = []
    timing = jobs.Timing(CPU, lambda *what: written.append(what), 2**16)
    with patch.object(timing, "backends", lambda *_: None), patch.object(timing, "calls", lambda *_: None):
        jobs.time_all(timing, SHAPES, ["cpu"], time.monotonic() - 1, [])
    assert [kind for kind, _ in written] == ["copy"] + ["left out"] * len(jobs.OTHERS)


def test_a_backend_that_is_wrong_is_not_timed():
    written = []
    with patch.object(jobs, "_meets_limits", lambda *_: False):
        timing = jobs.Timing(CPU, lambda *what: written.append(what), 2**16)
        timing.backends(["cpu"], SHAPES[0])
    assert [kind for kind, _ in written] == ["copy", "failed", "figure"]
    assert written[-1][1]["subject"] == "torch.add(out=)"


def test_an_exception_is_reported_and_the_rest_is_timed():
    written = []
    timing = jobs.Timing(CPU, lambda *what: written.append(what), 2**16)
    broken = {"log-step scan": peers.Peer(lambda a, w: 1 / 0)}
    with patch.dict(peers.PEERS, broken), patch.object(timing, "backends", side_effect=RuntimeError("no\nmemory")):
        jobs.time_all(timing, SHAPES[:1], [], time.monotonic() + 60, ["log-step scan", "cummax + gather"])
    kinds = [kind for kind, _ in written]
    assert kinds == ["copy", "failed", "left out", "figure"]
    assert written[1][1].endswith("RuntimeError: no")
    assert "ZeroDivisionError" in written[2][1]


def test_on_a_gpu_a_call_is_timed_between_events_with_the_caches_emptied():
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("event")

        def synchronize(self):
            done.append("wait")

        def elapsed_time(self, end):
            assert self is not end
            return 2.5

    flushed = SimpleNamespace(sum=lambda: done.append("flush"))
    with (
        patch.object(torch, "ones", lambda count, device: flushed),
        patch.object(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1)),
        patch.object(torch.cuda, "Event", Event),
        patch.object(torch.cuda, "_sleep", lambda cycles: done.append("sleep")),
    ):
        stopwatch = timing.Stopwatch(torch.device("cuda"))
        assert stopwatch(lambda: done.append("call")) == 0.0025
    assert done == ["flush", "sleep", "event", "call", "event", "wait"]


def test_ratios_are_to_the_same_work():
    same = {"shape": [1, 2, 3], "dtype": "fp32", "work": "forward"}
    figures = [
        same | {"subject": "triton", "ms": 2.0},
        same | {"subject": "triton", "ms": 5.0, "work": "backward"},
        same | {"subject": "cuda", "ms": 4.0, "dtype": "bf16"},
        same | {"subject": "peer", "ms": 8.0},
    ]
    *_, peer = report.with_ratios(figures, ["triton", "cuda"])
    assert peer["slower_than"] == {"triton": 4.0}


def test_the_report_has_the_measurements_and_the_failures(timed, check, tmp_path, capsys):
    check.backends = ["cpu"]
    check.logs.mkdir()
    with open(timed) as file:
        check.figures.write_text(file.read() + '["figure", {"cut o')
    (check.logs / "a.log").write_text("of a")
    for part in (1, 2):
        text = json.dumps({"torch": "2", "rows": [{"part": part}]})
        (check.logs / f"compare-cuda-{part}.json").write_text(text)
    outcomes = [Outcome("checks", "timed out", "at work", 9.0)]
    paths = report.report(check, outcomes, tmp_path / "results")
    capsys.readouterr()
    assert [path.suffix for path in paths] == [".json", ".md", ".png"]
    assert all(set(path.name) <= set(map(chr, range(48, 123))) | set("-.") for path in paths)
    assert f"torch{torch.__version__}".replace("+", "-") in paths[0].name
    record = json.loads(paths[0].read_text())
    assert record["machine"]["torch"] == torch.__version__
    assert len(record["figures"]) == len(report.read_figures(timed)["figure"])
    assert all(f["slower_than"]["cpu"] > 0 for f in record["figures"] if f["subject"] != "cpu")
    assert record["stages"][0]["status"] == "timed out"
    text = paths[1].read_text()
    assert "timed out" in text
    assert "no time was left" in text
    assert text.count("| fp32 |") + text.count("| bf16 |") == len(record["figures"]) + len(record["other"])
    assert len(record["other"]) == len(report.read_figures(timed)["other"])
    report.copy_out(paths, check.logs, tmp_path / "out")
    names = {p.name for p in paths} | {"compare.json", "gpu-check.log"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    comparison = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert comparison == {"torch": "2", "rows": [{"part": 1}, {"part": 2}]}


def test_the_small_set_runs_whole_and_split(capsys):
    assert jobs.run_small_set(["cpu"], CPU)
    printed = capsys.readouterr().out
    assert printed.count("PASS") == 16
    assert printed.count("softmax_recurrence") == 4
    assert not jobs.run_small_set([], CPU)


@pytest.mark.check
def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    arguments = ["--device", "cpu", "--stage", "checks", "times", "--shape", "1,64,4,fp32"]
    arguments += ["--logs", str(tmp_path / "logs"), "--results", str(tmp_path / "results")]
    with (
        patch.object(stages.Check, "checks", lambda self, seconds: [Outcome("checks", "failed", "by design")]),
        patch.object(command, "run_stages", _with_backend(stages.run_stages)),
    ):
        assert command.main(arguments) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "failed: checks"
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".md", ".png", ".log"}


def _with_backend(run_stages):
    def run(check, deadlines):
        check.backends = ["cpu"]
        return run_stages(check, deadlines)

    return run


@pytest.mark.parametrize("file", sorted(command.RESULTS.glob("NVIDIA*.json")), ids=lambda file: file.stem)
def test_committed_records_are_read(file):
    record = json.loads(file.read_text())
    assert record["machine"]["device"] in report.markdown(record)
    assert report.summary(record).count("%") == 4 * len({(*f["shape"], f["dtype"]) for f in record["figures"]})
