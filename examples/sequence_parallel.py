"""A sequence that is too long for one process: each rank scans a segment of time.

    torchrun --standalone --nproc-per-node 2 -m examples.sequence_parallel

The sequence has ten million steps. Every rank draws its own segment, so no process has the whole sequence. Ranks
exchange one map per channel. Then rank 0 scans the segments alone, one after another, and compares the results.
"""

from __future__ import annotations

import argparse
import os
import resource
import time

import torch
import torch.distributed as dist
from torch import Tensor

import mru_kernels as mk


def gates(segment: int, steps: int, channels: int) -> tuple[Tensor, Tensor]:
    """Candidate and threshold of a segment. Every process draws the same values for a segment."""
    generator = torch.Generator().manual_seed(segment)
    candidate, threshold = torch.randn(2, 1, steps, channels, generator=generator).unbind()
    return candidate.requires_grad_(), threshold.add_(3).requires_grad_()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000_000, help="steps of the whole sequence")
    parser.add_argument("--channels", type=int, default=8)
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    steps = arguments.steps // ranks
    candidate, threshold = gates(rank, steps, arguments.channels)

    dist.barrier()
    start = time.perf_counter()
    h, final = mk.distributed.sequence_parallel(mk.bmru)(candidate, threshold)
    forward = time.perf_counter() - start
    h.sum().backward()
    both = time.perf_counter() - start
    # In each pass a rank sends a description of its call, a map (a, w) with one flag, and the state that leaves its
    # segment, with two flags.
    exchanged = 2 * (512 + (2 * final.numel() + 1 + final.numel() + 2) * final.element_size())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    rows: list = [None] * ranks
    dist.all_gather_object(rows, (forward, both, exchanged, peak))

    if rank == 0:
        torch.set_num_threads(os.cpu_count() or 1)
        state, alone = None, 0.0
        for segment in range(ranks):
            c, b = gates(segment, steps, arguments.channels)
            start = time.perf_counter()
            h_alone, state = mk.bmru(c, b, state)
            if segment == rank:
                assert torch.equal(h_alone, h)
            h_alone.sum().backward()
            alone += time.perf_counter() - start
            state = state.detach()
        assert torch.equal(state, final)
        print(f"{arguments.steps:,} steps, {arguments.channels} channels, float32; final state equal to one process's")
        print("| rank | forward, s | forward + backward, s | bytes sent | bytes of streams | peak memory, MiB |")
        print("|---|---:|---:|---:|---:|---:|")
        for i, (f, fb, sent, memory) in enumerate(rows):
            print(f"| {i} | {f:.2f} | {fb:.2f} | {sent} | {2 * candidate.nbytes:,} | {memory} |")
        print(f"| rank 0 alone, no gradient between segments | | {alone:.2f} | | | |")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
