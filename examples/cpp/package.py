"""Export a network's step for C++: FOLDER/start.pt2 begins a sequence, FOLDER/next.pt2 continues from a state.

python examples/cpp/package.py FOLDER
cmake -S examples/cpp -B build/cpp -DCMAKE_PREFIX_PATH=$(python -c "import torch; print(torch.utils.cmake_prefix_path)")
cmake --build build/cpp
build/cpp/stream_samples mru_kernels/_C*.so FOLDER samples.txt
"""

import sys
from pathlib import Path

import torch

import mru_kernels as mk


class Step(torch.nn.Module):
    """`network.step` with each tensor of the state as an argument and a result."""

    def __init__(self, network: mk.MRUNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, sample, *state):
        output, after = self.network.step(sample, state or None)
        return output, *after


def package(network: mk.MRUNetwork, folder: Path) -> None:
    """Write both files, for a batch of one sequence."""
    step = Step(network.eval())
    sample = torch.zeros(1, network.input_size)
    state = step(sample)[1:]
    for name, inputs in (("start", (sample,)), ("next", (sample, *state))):
        program = torch.export.export(step, inputs)
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / f"{name}.pt2"))


if __name__ == "__main__":
    torch.manual_seed(0)
    package(mk.MRUNetwork(2, 3, width=16, num_blocks=2, conv_size=4), Path(sys.argv[1]))
