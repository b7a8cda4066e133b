"""The softmax recurrence in Triton, for CUDA and ROCm devices, and for CPU tensors under Triton's interpreter.

    ops.py          the kernels of `mru::softmax_recurrence.triton` and its backward op
    launch.py       from the arguments of an op to those of kernels, and how they are compiled
    forward.py, backward.py       the kernels; in each the pass itself, then time in parallel
    layout.py       what a kernel is given, and where a program finds its numbers
    step.py         one step, maps of segments, and the adjoint

A kernel is compiled for each dtype, form of the decay, bonus or none, alignment, and number of channels of a head up
to a power of two; never for other sizes. Not yet run on a GPU.
"""

from .ops import register, segment

__all__ = ["register", "segment"]
