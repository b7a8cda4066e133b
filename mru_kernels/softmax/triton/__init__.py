"""The softmax recurrence in Triton, for CUDA and ROCm devices, and for CPU tensors under Triton's interpreter.

    ops.py          the functions `forward` and `backward` of the ops
    launch.py       from the arguments of an op to those of kernels
    forward.py, backward.py, layout.py       the kernels
    step.py         one step, pieces of time, and the adjoint

A kernel is compiled for each dtype, way in which the decay comes, bonus or none, and layout (aligned or not, and channels of
a head up to a power of two); never for sizes. Not yet run on a GPU.
"""

from .ops import backward, forward, segment

__all__ = ["backward", "forward", "segment"]
