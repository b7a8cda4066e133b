"""What the gate of a defined cell returns: how a step changes the state."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Affine(NamedTuple):
    """A step that is affine in the state: `s_t = factor s_{t-1} + offset`.

    Example::

        >>> def leaky(input, decay):
        ...     return mk.Affine(decay, (1 - decay) * input)
    """

    factor: torch.Tensor | complex
    """A tensor in the shape of the gate's inputs, or a number, real or complex."""
    offset: torch.Tensor | complex
    """A tensor in the shape of the gate's inputs, or a number, real or complex."""


class Write(NamedTuple):
    """A step that writes or holds: `s_t = value + epsilon s_{t-1}` where it writes, else `s_t = s_{t-1}`.

    A NaN in an input of the gate, and a NaN value, make the state NaN. A NaN state stays NaN.

    Example::

        >>> def latch(set, reset):
        ...     return mk.Write(mk.heaviside(torch.maximum(set, reset)), mk.heaviside(set - reset))
    """

    write: torch.Tensor
    """A mask of the steps that write, whose choice has no gradient, or zeros and ones as `heaviside` returns them."""
    value: torch.Tensor | float
    """A tensor in the shape of the gate's inputs, or a number. It is what the step writes."""
