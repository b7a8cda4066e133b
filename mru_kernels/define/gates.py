"""What the gate of a defined cell returns: how a step changes the state."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Affine(NamedTuple):
    """A step that is affine in the state: `s_t = factor s_{t-1} + offset`.

    Attributes:
        factor, offset: tensors in the shape of the gate's inputs, or numbers.

    Example::

        >>> def leaky(input, decay):
        ...     return mk.Affine(decay, (1 - decay) * input)
    """

    factor: Tensor | float
    offset: Tensor | float


class Write(NamedTuple):
    """A step that writes or holds: `s_t = value + epsilon s_{t-1}` where it writes, else `s_t = s_{t-1}`.

    A NaN in an input of the gate, and a NaN value, make the state NaN. A NaN state stays NaN.

    Attributes:
        write: whether the step writes: a bool tensor, whose choice has no gradient, or one of zeros and ones with a
            surrogate derivative, as `heaviside` returns.
        value: what it writes, a tensor or a number.

    Example::

        >>> def latch(set, reset):
        ...     return mk.Write(mk.heaviside(torch.maximum(set, reset)), mk.heaviside(set - reset))
    """

    write: Tensor
    value: Tensor | float
