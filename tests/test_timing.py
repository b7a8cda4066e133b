"""How often a subject is timed. No test here depends on a real time."""

from __future__ import annotations

import pytest
import torch

from bench import timing

CPU = torch.device("cpu")


@pytest.fixture
def given(monkeypatch):
    """A stopwatch that reports what a subject returns."""

    class Given(timing.Stopwatch):
        def __call__(self, subject):
            return subject()

    monkeypatch.setattr(timing, "Stopwatch", Given)


def runs(elapsed: float, seconds: float) -> int:
    calls = []
    timing.measure({"subject": lambda: calls.append(1) or elapsed}, CPU, seconds)
    return len(calls)


@pytest.mark.usefixtures("given")
@pytest.mark.parametrize(
    ("elapsed", "seconds", "expected"),
    [
        (5.0, 1.5, 2),  # slow: timed twice
        (1.0, 0.25, 4),  # one warm-up, then at least three times
        (2.0, 0.25, 3),  # no warm-up of long runs
        (0.125, 1.0, 10),  # until the sum is over a second
        (0.001, 1.0, 61),  # at most 60 times after it
        (2.0**-14, 1.0, 329),  # a small call: until 20 ms
        (1.0, 0.0, 4),
    ],
)
def test_how_often_a_subject_is_timed(elapsed, seconds, expected):
    assert runs(elapsed, seconds) == expected


@pytest.mark.usefixtures("given")
def test_subjects_take_turns():
    order = []
    timing.measure({name: lambda name=name: order.append(name) or 1.0 for name in ("one", "other")}, CPU, seconds=2.0)
    assert order == ["one", "other"] * 4  # with a warm-up


@pytest.mark.usefixtures("given")
def test_a_warm_up_is_left_out():
    values = iter([0.5, 1.0, 2.0, 4.0])
    found = timing.measure({"subject": lambda: next(values)}, CPU, seconds=5.0)
    assert found == {"subject": (2.0, 1.5)}
