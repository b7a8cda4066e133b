"""The checks of `define_cell`'s arguments. Each raises an error that names the argument."""

from __future__ import annotations

import inspect
import keyword
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

MOST_INPUTS, MOST_SCALARS = 4, 2  # kMaxInputs and kMaxScalars of csrc/scan.h
_RESERVED = {"state", "initial_state", "epsilon", "reverse", "cu_seqlens", "resets", "reset_state", "chunk_size",
             "return_boundaries", "backend", "state_indices", "self"}  # fmt: skip
ANY = (-1.7976931348623157e308, 1.7976931348623157e308)  # the range of a scalar
#: Lower-case words without an underscore that a name must not be in C++, in addition to Python's.
_WORDS_OF_CPP = """
    alignas alignof asm auto bitand bitor bool case catch char class compl concept const consteval constexpr constinit
    decltype default delete do double enum explicit export extern float friend goto inline int long mutable namespace
    new noexcept nullptr operator private protected public register requires short signed sizeof static struct switch
    template this throw true false typedef typeid typename union unsigned using virtual void volatile xor
""".split()  # noqa: SIM905


def check_function(name: str, function: Any) -> None:
    if not callable(function):
        raise TypeError(f"{name}: expected a function, got {type(function).__name__}")
    try:
        kinds = [p.kind for p in inspect.signature(function).parameters.values()]
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a function whose arguments Python can read, got {function!r}") from None
    if any(kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD for kind in kinds):
        raise TypeError(f"{name}: expected named arguments only, got {inspect.signature(function)}")
    if any(p.default is not inspect.Parameter.empty for p in inspect.signature(function).parameters.values()):
        raise TypeError(f"{name}: expected arguments without defaults, got {inspect.signature(function)}; use scalars")


def checked_scalars(scalars: Mapping[str, float] | None) -> dict[str, float]:
    if scalars is None:
        return {}
    if not isinstance(scalars, Mapping):
        raise TypeError(f"scalars: expected a dict of names and numbers, got {type(scalars).__name__}")
    for name, value in scalars.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not ANY[0] <= value <= ANY[1]:
            raise ValueError(f"scalars: expected finite numbers, got {value!r} for {name!r}")
    return {name: float(value) for name, value in scalars.items()}


def checked_complex(complex_inputs: Collection[str], inputs: Sequence[str]) -> frozenset[str]:
    if isinstance(complex_inputs, str) or not isinstance(complex_inputs, Collection):
        raise TypeError(f"complex_inputs: expected a collection of names, got {complex_inputs!r}")
    for name in complex_inputs:
        if name not in inputs:
            raise ValueError(f"complex_inputs: expected names of inputs, {', '.join(inputs)}, got {name!r}")
    return frozenset(complex_inputs)


def check_names(name: str, inputs: list[str], of_gate: tuple[str, ...], scalars: Mapping[str, float]) -> None:
    if not isinstance(name, str):
        raise TypeError(f"name: expected a str, got {type(name).__name__}")
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name) or name in _WORDS_OF_CPP:
        raise ValueError(f"name: expected a lower-case identifier such as 'my_gru', got {name!r}")
    if not 1 <= len(inputs) <= MOST_INPUTS:
        raise ValueError(f"gate: expected 1 to {MOST_INPUTS} inputs, got {len(inputs)}")
    if len(scalars) > MOST_SCALARS:
        raise ValueError(f"scalars: expected at most {MOST_SCALARS}, got {len(scalars)}")
    if not of_gate or of_gate[0] != inputs[0]:
        raise ValueError(f"gate: expected an input as its first argument, got {list(of_gate)}")
    for argument in (*inputs, *scalars):
        if argument in _RESERVED:
            raise ValueError(f"gate: expected other names than those of the call, got {argument!r}")
