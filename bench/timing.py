"""A stopwatch for calls on a device. Every command that measures time uses it.

Subjects that are compared take turns in one process. A figure is the median time. Its spread is the range between the
quartiles, divided by the median. On a GPU the device measures the time between two events. The caches are emptied
before a call, and the host issues the call before the device is free to start it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

Key = TypeVar("Key")

_SECONDS = 1.5
_MOST = 60  # runs of a subject; on the CPU more, until they add up to `_LEAST_SECONDS`
_LEAST_SECONDS = 0.02
_WARM_UP = 1.5  # seconds; a first run that takes no longer is warm-up and is not counted
_SLOW = 4.5  # seconds; a subject whose first run takes longer is timed only twice


class Stopwatch:
    """Measures the seconds that a call takes on a device."""

    _AHEAD = 4_000_000  # cycles, about two milliseconds, that the device waits while the host issues a call

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        if self.on_gpu:
            # Reading empties the caches. After writing, the write-back would take bandwidth from the next call.
            size = max(4 * torch.cuda.get_device_properties(device).L2_cache_size, 2**28)
            self.other = torch.ones(size // 4, device=device)
            self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, subject: Callable[[], object]) -> float:
        if not self.on_gpu:
            start = time.perf_counter()
            subject()
            return time.perf_counter() - start
        self.other.sum()
        torch.cuda._sleep(self._AHEAD)
        self.start.record()
        subject()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1e3


def measure(
    subjects: Mapping[Key, Callable[[], object]], device: torch.device, seconds: float = _SECONDS
) -> dict[Key, tuple[float, float]]:
    """Median seconds and relative spread of each subject. Subjects take turns.

    A subject is timed at least three times, and until its runs add up to more than `seconds`. It is timed at most 60
    times, but on the CPU until its runs add up to 20 ms. A subject whose first run takes over 4.5 seconds is timed
    twice. A first run of at most 1.5 seconds is warm-up, which may load code and start threads. It is not counted.
    """
    stopwatch = Stopwatch(device)
    times: dict[Key, list[float]] = {name: [] for name in subjects}
    if stopwatch.on_gpu:  # the first call compiles kernels, so it is not timed
        for subject in subjects.values():
            subject()
    waiting, turn = dict(subjects), 0
    while waiting:
        for name, subject in waiting.items():
            elapsed = stopwatch(subject)
            if turn > 0 or elapsed > _WARM_UP:
                times[name].append(elapsed)
        turn += 1
        waiting = {name: f for name, f in waiting.items() if not _enough(times[name], seconds, stopwatch.on_gpu)}
    return {name: _median_and_spread(values) for name, values in times.items()}


def _enough(times: list[float], seconds: float, on_gpu: bool) -> bool:
    """Whether a subject has been timed often enough."""
    total = sum(times)
    if len(times) < (2 if times and times[0] > _SLOW else 3):
        return False
    return total > seconds or (len(times) >= _MOST and (on_gpu or total > _LEAST_SECONDS))


def _median_and_spread(values: list[float]) -> tuple[float, float]:
    ordered = sorted(values)
    n = len(ordered)
    median = ordered[n // 2]
    return median, (ordered[(3 * n) // 4] - ordered[n // 4]) / median


def per_call(subject: Callable[[], object], calls: int = 2000, rounds: int = 5) -> float:
    """Mean seconds of a call in the fastest of several rounds of calls."""
    in_a_round = max(calls // rounds, 1)
    means = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(in_a_round):
            subject()
        means.append((time.perf_counter() - start) / in_a_round)
    return min(means)
