"""The CUDA kernels without a GPU: their unmodified sources under host execution (csrc/simt), x86-64 Linux only."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import simt
import torch
from simt import mutants, planting

from bench import inputs
from mru_kernels.backends import CHUNK, cuda

pytestmark = [
    pytest.mark.check,
    pytest.mark.skipif(not simt.SUPPORTED, reason="the host execution of CUDA sources needs x86-64 Linux"),
]

SELFTESTS = {
    "warp": "right",
    "static shared memory": "right",
    "atomics": "right",
    "chain of blocks": "right",
    "shared memory not written": "NaN",
    "barriers that differ": "different calls of __syncthreads",
    "a thread that left": "__syncthreads",
    "deadlock": "deadlock",
    "divergent shuffles": "different operations",
    "livelock": "livelock",
    "misaligned": "misaligned access of 16 bytes",
}


@pytest.fixture(scope="module")
def selftest(tmp_path_factory):
    program = tmp_path_factory.mktemp("selftest") / "selftest"
    source = simt.ROOT / "tests" / "simt" / "selftest.cu"
    command = [*simt.COMPILER, "-x", "c++", "-I", str(simt.ROOT / "csrc" / "simt"), str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    return program


@pytest.mark.parametrize("case", SELFTESTS)
def test_host_execution_itself(selftest, case):
    done = subprocess.run([selftest, case], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert SELFTESTS[case] in done.stdout


@pytest.fixture(scope="module")
def battery():
    simt.register()
    from simt import battery

    torch.manual_seed(0)
    yield battery
    simt.control().configure()


# Checks of every cell that takes a dtype, and of one.
ANY_CELL = ["slots", "numbers", "maps", "cuts", "traffic", "any_order", "misaligned", "little_shared_memory",
            "offsets_are_clamped", "resets", "boundaries", "far_resets", "no_resets", "mask_traffic"]  # fmt: skip
BMRU = ["copies", "held", "many_segments", "sums", "sums_over_resets", "slopes", "far_strides"]
#: Checks of bits and of counts. The memory that they touch is that of the other checks.
NOT_SANITIZED = {"any_order", "sums", "traffic", "mask_traffic"}


@pytest.mark.parametrize(
    ("check", "dtype"),
    [(check, dtype) for check in ANY_CELL for dtype in inputs.DTYPES | inputs.COMPLEX_DTYPES]
    + [(check, dtype) for check in BMRU for dtype in inputs.DTYPES],
)
def test_kernels(battery, check, dtype):
    if simt.SANITIZE and str((inputs.DTYPES | inputs.COMPLEX_DTYPES)[dtype]).removeprefix("torch.") not in simt.LOADED:
        pytest.skip("under the sanitizers float32, bfloat16 and complex64 stand for all widths")
    if check in NOT_SANITIZED and simt.SANITIZE:
        pytest.skip("the sanitizers look for wrong accesses, and other checks make the same")
    if check == "far_strides" and simt.SANITIZE:
        pytest.skip("the address sanitizer's own memory does not bear strides of 2^31 elements")
    getattr(battery, f"check_{check}")((inputs.DTYPES | inputs.COMPLEX_DTYPES)[dtype])


def test_a_launch_that_fails_raises(battery):
    simt.control().configure(budget=0)
    try:
        with pytest.raises(RuntimeError, match="livelock"):
            battery.results(inputs.case("bmru", torch.float32).build(), 64)
    finally:
        simt.control().configure()


def test_segments_are_a_function_of_sizes():
    device = torch.device("cpu")
    for sequences, time, channels in ((2, 8192, 1024), (1, 2**20, 64), (1, 2**31, 1), (3, 300, 5)):
        steps = {size: cuda.segment(sequences, sequences * time, channels, size, device) for size in (2, 4, 8)}
        assert all(n % CHUNK == 0 and CHUNK <= n < time for n in steps.values())
        assert steps[2] <= steps[4] <= steps[8] <= max(2 * steps[4], 2 * CHUNK)
    for whole in (
        (32, 2**20, 512, 4),
        (8, 4096, 2048, 2),
        (1, 255, 64, 4),
        (0, 0, 4, 4),
        (4, 4096, 0, 4),
        (1, 0, 1, 4),
    ):
        assert cuda.segment(*whole, device) == 0


# ------------------------------------------------------------------------------------------ planted faults


@pytest.fixture(scope="module")
def outcomes():
    """Futures of the battery: on every copy without a fault, and with each fault, by name."""
    if simt.SANITIZE:
        pytest.skip("the sanitizers end a run at the first fault")
    planting.start_server()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            **{shown: pool.submit(mutants.outcome, *shown) for shown in mutants.SHOWN},
            **{fault.name: pool.submit(mutants.outcome, *fault.shown, fault) for fault in mutants.FAULTS},
        }


@pytest.mark.parametrize("shown", mutants.SHOWN, ids="-".join)
def test_a_copy_without_a_fault_passes(outcomes, shown):
    assert outcomes[shown].result() == ""


@pytest.mark.parametrize("name", [fault.name for fault in mutants.FAULTS])
def test_every_fault_is_caught(outcomes, name):
    assert outcomes[name].result().startswith(("check_", "crash"))
