"""Sequence parallelism: segments of time in several gloo processes equal one process with the whole."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import mru_kernels as mk
from mru_kernels.distributed import sequence_parallel
from tests import parallel_failures, parallel_halos, parallel_modules, parallel_ops, parallel_softmax, processes

pytestmark = pytest.mark.check


TIMEOUT = 20


def _one_rank_is_gone(rank: int) -> None:
    if rank == 1:
        os._exit(0)
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        sequence_parallel(mk.bmru)(torch.randn(2, 10, 3), torch.randn(2, 10, 3))
    assert time.monotonic() - start < 2 * TIMEOUT
    os._exit(0)  # this process cannot leave the group without the rank that is gone


def test_a_missing_rank_raises_and_does_not_hang(tmp_path):
    processes.run(_one_rank_is_gone, tmp_path / "rendezvous", count=3, timeout=TIMEOUT)


#: Jobs by the number of processes. One set of processes runs all of them, because their start takes longest.
JOBS = {
    1: [parallel_ops.every_case, parallel_halos.every_halo, parallel_softmax.every_call],
    2: [
        parallel_ops.every_case,
        parallel_failures.bad_arguments,
        parallel_modules.without_gradients,
        parallel_modules.compiled_and_wrapped,
        parallel_modules.reparametrised,
        parallel_modules.copies,
        parallel_halos.every_halo,
        parallel_halos.nan_before_a_reset,
        parallel_halos.halves_of_precision,
        parallel_halos.wrapped,
        parallel_halos.refused,
        parallel_softmax.every_call,
        parallel_softmax.rwkv4,
        parallel_softmax.without_gradients,
        parallel_softmax.refused,
        parallel_failures.two_threads,
        parallel_failures.one_rank_makes_another_call,
    ],
    3: [
        parallel_ops.every_case,
        parallel_modules.every_module,
        parallel_halos.every_halo,
        parallel_softmax.every_call,
        parallel_softmax.rwkv4,
        parallel_softmax.exact,
        parallel_ops.out_of_range,
        parallel_ops.large_states,
        parallel_failures.one_rank_fails_before_the_exchange,
    ],
    4: [
        parallel_ops.every_case,
        parallel_modules.two_dimensional_mesh,
        parallel_modules.sharded_parameters,
        parallel_halos.every_halo,
        parallel_softmax.every_call,
    ],
}


def _all(rank: int) -> None:
    for job in JOBS[dist.get_world_size()]:
        job(rank)


@pytest.mark.parametrize("count", JOBS, ids=str)
def test_processes(tmp_path, count):
    """Results agree with one process and have the same bits from run to run."""
    processes.run(_all, tmp_path / "rendezvous", count=count)


def test_the_example():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "examples.sequence_parallel", "--steps", "2000"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=240)
    assert done.returncode == 0, done.stderr
    assert "2,000 steps" in done.stdout
    assert "| rank 0 alone" in done.stdout


def test_without_a_group_it_raises():
    with pytest.raises(RuntimeError, match=r"torch\.distributed to be initialised"):
        sequence_parallel(mk.bmru)
