"""Checks of the arguments that several modules have in common. Each error names the argument."""

from __future__ import annotations

import difflib
import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import ParamSpec

import torch
from torch import Tensor

from .. import checks

P = ParamSpec("P")


def constructor(init: Callable[P, None]) -> Callable[P, None]:
    """Decorate `__init__`: a TypeError for wrong arguments names the class and the nearest argument.

    `init` must spell all its arguments out.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def checked(*args: P.args, **options: P.kwargs) -> None:
        try:
            signature.bind(*args, **options)
        except TypeError as error:
            reason = _misfit(signature.parameters, len(args) - 1, options) or error
            raise TypeError(f"{type(args[0]).__name__}: {reason}") from None
        init(*args, **options)

    return checked


def _misfit(parameters: Mapping[str, inspect.Parameter], positional: int, options: Mapping[str, object]) -> str | None:
    """The message for too many positional or unknown keyword arguments; None if neither applies."""
    places = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD and name != "self"]
    keywords = [name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
    if positional > len(places):
        expected = f"expected at most {len(places)} positional arguments ({', '.join(places)}), got {positional}"
        return f"{expected}; give by name: {', '.join(keywords)}"
    for name in options:
        if name not in parameters:
            near = difflib.get_close_matches(name, places + keywords, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(places + keywords)}"
            return f"unknown argument {name!r}; {hint}"
    return None


def check_sizes(least: int = 1, **sizes: int) -> None:
    """Raise unless every size is an int from `least`, which is 1 or 0, to `checks.MOST_SIZE`."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name}: expected an int, got {type(size).__name__}")
        if size < least:
            raise ValueError(f"{name}: expected a {'positive' if least else 'non-negative'} int, got {size}")
        if size > checks.MOST_SIZE:
            raise ValueError(f"{name}: expected at most {checks.MOST_SIZE}, got {size}")


def check_number(name: str, value: float, least: float, most: float) -> float:
    """`value` as a float. Raise unless it is finite and lies in [least, most]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
    if not least <= value <= min(most, sys.float_info.max):  # an int may be too large for a float
        raise ValueError(f"{name}: expected a finite number in [{least:g}, {most:g}], got {value}")
    return float(value)


def check_dropout(dropout: float, num_layers: int) -> float:
    """`dropout` as a float. Raise unless it is a probability; warn where it has no effect."""
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)):
        raise TypeError(f"dropout: expected a float, got {type(dropout).__name__}")
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout: expected a probability in [0, 1], got {dropout}")
    if dropout > 0.0 and num_layers == 1:
        warnings.warn(f"dropout acts between layers, so dropout={dropout} does nothing with num_layers=1", stacklevel=3)
    return float(dropout)


def check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_input_dtype(input: Tensor, dtype: torch.dtype) -> None:
    """Raise unless a module with parameters of `dtype` can take `input`.

    The dtypes must be equal. Under autocast they may differ, because autocast converts every floating dtype except
    float64.
    """
    if input.dtype == dtype:
        return
    dtypes = {input.dtype, dtype}
    converts = dtypes <= set(checks.STREAM_DTYPES) and torch.float64 not in dtypes
    if not converts or checks.autocast_dtype(input.device) is None:
        raise TypeError(f"input: expected the module's dtype {dtype}, got {input.dtype}")


def check_state(state: object, count: int) -> None:
    """Raise unless `state` is a tuple or list of `count` tensors."""
    if not isinstance(state, (tuple, list)) or not all(isinstance(t, Tensor) for t in state):
        raise TypeError(f"state: expected a tuple of tensors, as a call returns it, got {type(state).__name__}")
    if len(state) != count:
        raise ValueError(f"state: expected {count} tensors, as a call returns them, got {len(state)}")


def check_state_shapes(
    state: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], device: torch.device, first: int = 0
) -> None:
    """Raise unless the tensors of a state, from number `first` on, have these shapes and are on the device."""
    for i, (tensor, shape) in enumerate(zip(state, shapes, strict=True), first):
        if tensor.shape != shape:
            raise ValueError(f"state: expected shape {list(shape)} for tensor {i}, got {list(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"state: expected the input's device {device} for tensor {i}, got {tensor.device}")


def check_resets(resets: object, input: Tensor, letters: str) -> None:
    """Raise unless `resets` is None or a mask of the steps of `input [*, features]`."""
    if resets is None:
        return
    if not isinstance(resets, Tensor):
        raise TypeError(f"resets: expected a bool tensor {letters}, got {type(resets).__name__}")
    if resets.dtype != torch.bool:
        raise TypeError(f"resets: expected dtype bool, got {resets.dtype}")
    if resets.shape != input.shape[:-1]:
        raise ValueError(f"resets: expected shape {list(input.shape[:-1])} {letters}, got {list(resets.shape)}")
    if resets.device != input.device:
        raise ValueError(f"resets: expected the input's device {input.device}, got {resets.device}")
