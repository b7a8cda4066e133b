"""Streams of more than 2^31 elements, where 32-bit offsets would wrap."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import mru_kernels as mk

CHANNELS = 4096
TIME = 2**31 // CHANNELS + 100
NEEDED = 12 * 2**30  # bytes: two streams of 4 GiB, and some room


def free_memory(device: torch.device) -> int:
    if device.type == "cpu":
        found = re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())
        return int(found[1]) * 1024 if found else 0
    return torch.cuda.mem_get_info(device)[0]


@pytest.mark.check
@pytest.mark.parametrize("reverse", [False, True])
def test_more_than_2_to_the_31_elements(backend, device, reverse):
    if free_memory(device) < NEEDED:
        pytest.skip(f"needs {NEEDED / 2**30:.0f} GiB of free memory, got {free_memory(device) / 2**30:.0f}")
    candidate = torch.zeros(1, TIME, CHANNELS, dtype=torch.bfloat16, device=device)
    assert candidate.numel() > 2**31
    tail = slice(TIME - 150, TIME)  # contains element 2^31
    generator = torch.Generator().manual_seed(0)
    candidate[:, tail] = torch.randn(1, 150, CHANNELS, generator=generator).to(device, torch.bfloat16)
    candidate[:, :1] = -1.0
    threshold = torch.full((CHANNELS,), 0.5, device=device)
    settings = {"epsilon": 1.0, "reverse": reverse, "backend": backend}
    h, final_state = mk.bmru(candidate, threshold, **settings)

    # No step between the first one and the tail writes.
    start = None if reverse else torch.full((1, CHANNELS), -1.0, device=device)
    expected, state = mk.bmru(candidate[:, tail].clone(), threshold, start, **settings)
    before = state if reverse else start
    assert torch.equal(h[:, tail], expected)
    assert torch.equal(h[:, TIME - 151], before.bfloat16())
    assert torch.equal(h[:, 1], before.bfloat16())
    assert torch.equal(h[:, 0], (before - 1.0 if reverse else before).bfloat16())
    assert torch.equal(final_state, state - 1.0 if reverse else state)
