"""The parameters of a module as hardware has them: with mismatch from chip to chip, or quantised."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, SupportsFloat

import torch
from torch import Tensor

from .nn import WriteOrHold
from .nn.arguments import check_number, check_sizes
from .nn.noise import ThresholdNoise
from .nn.wrappers import unwrapped

__all__ = ["Robustness", "mismatch", "quantized", "robustness"]

DEVIATIONS = 3.0
"""Standard deviations in a mismatch: of a mismatch of 15 %, a standard deviation is 5 %."""


@dataclass(frozen=True)
class Robustness:
    """The results of `robustness`. `str` prints them as a table.

    Attributes:
        nominal: the result with the parameters as they are.
        results: for each mismatch the results of its trials.

    Example::

        >>> unit = mk.BMRU(3, 8)
        >>> table = mk.robustness(unit, lambda unit: unit.alpha_l0.square().mean(), trials=20)
        >>> print(table)
        mismatch    mean  spread   least    most
             0 %  1.0000
             5 %  0.9989  0.0128  0.9816  1.0284
            10 %  0.9982  0.0256  0.9641  1.0573
            15 %  0.9981  0.0385  0.9477  1.0869
        >>> round(table.mean(0.05), 4), round(table.spread(0.05), 4)
        (0.9989, 0.0128)
    """

    nominal: float
    results: dict[float, list[float]]

    def mean(self, mismatch: float) -> float:
        """The mean over the trials with this mismatch."""
        return statistics.fmean(self.results[mismatch])

    def spread(self, mismatch: float) -> float:
        """The standard deviation over the trials with this mismatch; 0 for one trial."""
        values = self.results[mismatch]
        return statistics.stdev(values) if len(values) > 1 else 0.0

    def __str__(self) -> str:
        rows: list[tuple[str, ...]]
        rows = [("mismatch", "mean", "spread", "least", "most"), ("0 %", f"{self.nominal:.4f}", "", "", "")]
        for size, values in self.results.items():
            numbers = (self.mean(size), self.spread(size), min(values), max(values))
            rows.append((f"{100 * size:g} %", *(f"{number:.4f}" for number in numbers)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)


def robustness(
    module: torch.nn.Module,
    evaluate: Callable[[torch.nn.Module], SupportsFloat],
    mismatch: Sequence[float] = (0.05, 0.10, 0.15),
    trials: int = 10,
    seed: int = 0,
) -> Robustness:
    """Evaluate a module with parameters as on chips, which differ from chip to chip.

    In a trial every floating parameter is multiplied by `1 + N(0, mismatch / 3)`, drawn for each of its elements. So
    nearly all elements are within the mismatch, as in arXiv 2605.15216. A trial writes the parameters in place, and
    `evaluate` may use the module in any way. Afterwards, also after an exception, every parameter has its own values
    again, bit for bit. Buffers and epsilon stay as they are.

    Args:
        module: any module.
        evaluate: called as `evaluate(module)`; returns a number such as an accuracy.
        mismatch: the mismatches, each at least 0.
        trials: number of draws for each mismatch.
        seed: of the draws. Trial i draws the same numbers for every mismatch, on every device.

    Returns:
        A `Robustness`: the result without mismatch, and those of the trials.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Example::

        >>> network, x = mk.MRUNetwork(3, 2, width=8, num_blocks=1), torch.randn(50, 20, 3)
        >>> answers = network(x)[0].argmax(-1)
        >>> table = mk.robustness(network, lambda m: (m(x)[0].argmax(-1) == answers).float().mean(), trials=3)
        >>> table.nominal, len(table.results[0.15])
        (1.0, 3)
        >>> table.mean(0.15) < table.mean(0.05) < 1.0
        True
    """
    _check_module(module)
    if not callable(evaluate):
        raise TypeError(f"evaluate: expected a function of the module, got {type(evaluate).__name__}")
    if isinstance(mismatch, str) or not isinstance(mismatch, Sequence):
        raise TypeError(f"mismatch: expected a sequence of numbers, got {type(mismatch).__name__}")
    sizes = [check_number("mismatch", size, 0.0, float("inf")) for size in mismatch]
    check_sizes(trials=trials)
    generator = torch.Generator("cpu").manual_seed(_check_seed(seed))
    nominal = _number(evaluate(module))
    results: dict[float, list[float]] = {}
    for size in sizes:
        generator.manual_seed(seed)
        results[size] = []
        for _ in range(trials):
            with _perturbed(module, size, generator):
                results[size].append(_number(evaluate(module)))
    return Robustness(nominal, results)


@contextmanager
def _perturbed(module: torch.nn.Module, size: float, generator: torch.Generator) -> Iterator[None]:
    """A context in which the parameters of `module` have a mismatch, written in place."""
    parameters = _floating(module)
    nominal = [p.detach().clone() for p in parameters]
    draws = [torch.randn(p.shape, generator=generator, device="cpu") for p in parameters]
    try:
        with torch.no_grad():
            for p, draw in zip(parameters, draws, strict=True):
                p.copy_(_with_mismatch(p, size, draw.to(p.device)))
        torch.clear_autocast_cache()  # autocast keeps casts of parameters until its context ends
        yield
    finally:
        with torch.no_grad():
            for p, values in zip(parameters, nominal, strict=True):
                p.copy_(values)
        torch.clear_autocast_cache()


def _with_mismatch(p: Tensor, size: float, draw: Tensor) -> Tensor:
    """`p` times `1 + N(0, size / 3)`, from a draw of N(0, 1) in float32."""
    return (p * (1.0 + size / DEVIATIONS * draw)).to(p.dtype)


def mismatch(module: torch.nn.Module, mismatch: float, *, noise: float = 0.0) -> Any:
    """A context to train a module that will run with mismatch: in it every call has parameters of another chip.

    Each call of `module` multiplies every floating parameter by a fresh draw of `1 + N(0, mismatch / 3)`, one for each
    element. The gradient goes to the parameters themselves, so optimisers, `state_dict` and schedules work as without
    the context. The draws are those of torch's generator, as for dropout; `torch.manual_seed` repeats them. Every call
    in the context has mismatch, in the evaluation mode too. A copy of the module that is made in the context has none.

    A call must be one of the whole module. So activation checkpointing may be around the module, but not inside.
    `mru_kernels.blocked(module)` and `step` draw for each of their calls.

    Args:
        module: the module to train, or what `torch.compile` or DistributedDataParallel made of it.
        mismatch: at least 0.
        noise: standard deviation of noise on the thresholds of all units that have an epsilon. It is drawn for every
            step and channel and added to the gate `threshold_t`; for `FirstQuadrantBMRU`, whose thresholds are
            parameters, to `W x_t + b`.

    Raises:
        RuntimeError: the module or a part of it is in such a context already, or a part of the module was called.
        TypeError, ValueError: an argument is not as described; the message names it. ValueError also for `noise` where
            `module` has no unit with an epsilon.

    Example::

        >>> network = mk.MRUNetwork(3, 2, width=8, num_blocks=1)
        >>> optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        >>> x = torch.randn(4, 10, 3)
        >>> with mk.mismatch(network, 0.1, noise=0.05):
        ...     for _ in range(2):
        ...         network(x)[0].square().mean().backward()
        ...         optimizer.step()
        ...     torch.equal(network(x)[0], network(x)[0])
        False
        >>> torch.equal(network(x)[0], network(x)[0])
        True
    """
    _check_module(module)
    size = check_number("mismatch", mismatch, 0.0, float("inf"))
    noise = check_number("noise", noise, 0.0, float("inf"))
    units = [m for m in module.modules() if isinstance(m, WriteOrHold)] if noise else []
    if noise and not units:
        raise ValueError(f"noise: expected 0 for a module without units that have an epsilon, got {noise}")
    return _Mismatch(unwrapped(module), size, noise, units)


class _Mismatch:
    """The context of `mismatch`. Hooks replace the parameters in the modules that own them while a call runs."""

    _inside: set[int] = set()
    """The `id` of every module that is in a context now, with its parts."""

    def __init__(self, module: torch.nn.Module, size: float, noise: float, units: list[WriteOrHold]) -> None:
        self._module = module
        self._size = size
        self._noise = noise
        self._units = units
        self._parts: list[torch.nn.Module] = []
        self._handles: list[Any] = []
        self._nominal: list[tuple[torch.nn.Module, str, torch.nn.Parameter]] = []
        self._runs = False

    def __enter__(self) -> None:
        parts = list(self._module.modules())
        if any(id(part) in self._inside for part in parts):
            raise RuntimeError("mismatch: expected one context at a time for a module and its parts, got a second")
        self._parts = parts
        self._inside.update(map(id, parts))
        for unit in self._units:
            unit._noise = ThresholdNoise(self._noise)
        first = self._module
        self._handles = [
            first.register_forward_pre_hook(self._draw, prepend=True),
            first.register_forward_hook(self._restore, always_call=True),
            *(
                part.register_forward_pre_hook(self._check, prepend=True)
                for part in parts
                if part is not first and (part in self._units or _own(part))
            ),
        ]

    def __exit__(self, *_: object) -> None:
        self._restore()  # no hook runs after a KeyboardInterrupt
        for handle in self._handles:
            handle.remove()
        for unit in self._units:
            del unit._noise
        self._inside.difference_update(map(id, self._parts))
        self._handles, self._parts = [], []

    def _draw(self, *_: object) -> None:
        if not self._parts:
            return  # the hook of a copy
        if self._runs:
            raise RuntimeError("mismatch: expected no call of the module within a call, or after an interrupted one")
        self._runs = True
        drawn: dict[torch.nn.Parameter, Tensor] = {}
        for part in self._parts:
            for name, p in _own(part).items():
                if p not in drawn:
                    draw = torch.randn_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
                    drawn[p] = _with_mismatch(p, self._size, draw)
                self._nominal.append((part, name, p))
        for part, name, p in self._nominal:
            part._parameters[name] = drawn[p]  # type: ignore[assignment]

    def _restore(self, *_: object) -> None:
        for part, name, p in self._nominal:
            part._parameters[name] = p
        self._nominal = []
        self._runs = False

    def _check(self, part: torch.nn.Module, *_: object) -> None:
        if self._parts and not self._runs:
            raise RuntimeError(
                f"mismatch: expected calls of the whole module, got one of its {type(part).__name__}; activation"
                " checkpointing inside the module makes such calls"
            )

    def __reduce__(self) -> Any:
        """A copy of the module gets hooks that do nothing."""
        return _Mismatch, (torch.nn.Module(), 0.0, 0.0, [])


def quantized(module: torch.nn.Module, bits: int) -> torch.nn.Module:
    """A copy of a trained module whose weights have the values that `bits` bits can represent.

    Every floating parameter of at least two dimensions is quantised uniformly and symmetrically, with one scale for
    each row `w`, its values at one index of the first dimension::

        scale = max |w| / (2^(bits - 1) - 1)        w' = scale round(w / scale)

    So 2 bits have the values -1, 0 and 1 times the scale. Parameters of one dimension keep their values: biases,
    thresholds and other inputs per channel, initial states, norms. The copy computes in the dtype of the module. It has
    the accuracy of a program with integer weights, not its speed or size; see `quantizable` and `mru_kernels.export`.

    Args:
        module: any module; it stays as it is.
        bits: from 2 to 8.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Example::

        >>> unit = mk.BMRU(3, 8)
        >>> mk.quantized(unit, 2).weight_ih_l0[0].unique().numel() <= 3
        True
        >>> error = mk.quantized(unit, 8).weight_ih_l0 - unit.weight_ih_l0
        >>> bool((error.abs() <= 1.001 * unit.weight_ih_l0.abs().amax(1, keepdim=True) / 254).all())
        True
    """
    _check_module(module)
    check_sizes(bits=bits)
    if not 2 <= bits <= 8:
        raise ValueError(f"bits: expected an int from 2 to 8, got {bits}")
    result = copy.deepcopy(module)
    largest = 2 ** (bits - 1) - 1
    with torch.no_grad():
        for p in _floating(result):
            if p.dim() >= 2 and p.numel():
                rows = p.flatten(1).to(torch.promote_types(p.dtype, torch.float32))
                scale = rows.abs().amax(1, keepdim=True) / largest
                steps = torch.where(scale == 0.0, rows, rows / scale).round()  # a row of zeros stays
                p.copy_((steps * scale).view_as(p))
    return result


def _floating(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in module.parameters() if p.is_floating_point()]


def _own(part: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The floating parameters that `part` itself owns."""
    return {name: p for name, p in part._parameters.items() if p is not None and p.is_floating_point()}


def _number(value: Any) -> float:
    """What `evaluate` returned, as a float."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return value.item()
    if isinstance(value, Tensor):
        raise TypeError(f"evaluate: expected a number from a call, got a {value.dtype} tensor {list(value.shape)}")
    if isinstance(value, str) or not isinstance(value, SupportsFloat):
        raise TypeError(f"evaluate: expected a number from a call, got {type(value).__name__}")
    return float(value)


def _check_module(module: object) -> None:
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")


def _check_seed(seed: object) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an int, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected an int that torch.manual_seed takes, got {seed}")
    return seed
