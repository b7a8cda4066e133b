"""The reference: each cell's step and the time loop, readable as the equations, in plain float64 PyTorch.

Every function takes the arguments of the op of the same name in `mru_kernels` (`backend` aside), and `dtype`:
float64 makes it the reference, float32 the plain sequential float32 loop that error limits refer to; complex
arguments are computed in its complex counterpart. Nothing is validated.
"""

from . import adjoint
from .bmru import bmru
from .linear_recurrence import linear_recurrence
from .schmitt import schmitt

__all__ = ["adjoint", "bmru", "linear_recurrence", "schmitt"]
