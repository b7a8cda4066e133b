"""Run a function in several processes of one gloo group, with a deadline; and the peak memory of a program."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from time import monotonic

import pytest
import torch

SECONDS = 240  # deadline for the processes


def run(
    function: Callable[..., None], rendezvous: Path, *arguments: object, count: int = 2, timeout: int = 120
) -> None:
    """Run `function(rank, *arguments)` in each process. An exception in a process is raised; a hang fails the test.

    A member of the group waits at most `timeout` seconds for another.
    """
    given = (function, str(rendezvous), count, timeout, arguments)
    context = torch.multiprocessing.spawn(_member, given, nprocs=count, join=False)
    deadline = monotonic() + SECONDS
    while not context.join(timeout=1):
        if monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail(f"the processes did not end within {SECONDS} s")


def _member(
    rank: int, function: Callable[..., None], rendezvous: str, count: int, timeout: int, arguments: tuple
) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=count, timeout=timedelta(seconds=timeout)
    )
    function(rank, *arguments)
    # A DistributedDataParallel that outlives the group drops the last reference to the group with the GIL held. The
    # threads of the group need the GIL to end, so some runs would hang. Collect such objects first.
    gc.collect()
    torch.distributed.destroy_process_group()


_PRINT_PEAK = """
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak_memory(program: str, *arguments: int) -> int:
    """Peak resident memory in KiB of a Python program in a process of its own.

    Not by `ru_maxrss`: a process inherits that of the process that started it.
    """
    if sys.platform != "linux":
        pytest.skip("the peak is read from /proc")
    command = [sys.executable, "-c", program + _PRINT_PEAK, *map(str, arguments)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
