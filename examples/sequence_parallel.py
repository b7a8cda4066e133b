"""A sequence longer than one process holds: each rank scans its piece of time.

    torchrun --standalone --nproc-per-node 2 -m examples.sequence_parallel

Every rank draws its own piece of ten million steps, so that no process ever has the whole, and ranks exchange one map
a channel. Rank 0 then does the same work alone, piece after piece with the state handed over, and compares.
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


def gates(piece: int, steps: int, channels: int) -> tuple[Tensor, Tensor]:
    """Candidate and threshold of a piece, the same wherever it is drawn."""
    generator = torch.Generator().manual_seed(piece)
    candidate, threshold = torch.randn(2, 1, steps, channels, generator=generator).unbind()
    return candidate.requires_grad_(), threshold.add_(3).requires_grad_()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000_000, help="of the whole sequence")
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
    # Forward and backward alike, each rank sends a description of its call, a map (a, w) and the state that leaves its
    # piece, with one flag and two.
    exchanged = 2 * (512 + (2 * final.numel() + 1 + final.numel() + 2) * final.element_size())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    rows: list = [None] * ranks
    dist.all_gather_object(rows, (forward, both, exchanged, peak))

    if rank == 0:
        torch.set_num_threads(os.cpu_count() or 1)
        state, alone = None, 0.0
        for piece in range(ranks):
            c, b = gates(piece, steps, arguments.channels)
            start = time.perf_counter()
            h_alone, state = mk.bmru(c, b, state)
            if piece == rank:
                assert torch.equal(h_alone, h)
            h_alone.sum().backward()
            alone += time.perf_counter() - start
            state = state.detach()
        assert torch.equal(state, final)
        print(f"{arguments.steps:,} steps, {arguments.channels} channels, float32; final state: that of one process")
        print("| rank | forward, s | forward + backward, s | bytes sent | of streams, bytes | peak memory, MiB |")
        print("|---|---:|---:|---:|---:|---:|")
        for i, (f, fb, sent, memory) in enumerate(rows):
            print(f"| {i} | {f:.2f} | {fb:.2f} | {sent} | {2 * candidate.nbytes:,} | {memory} |")
        print(f"| alone, piece by piece, no gradient between them | | {alone:.2f} | | | |")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
