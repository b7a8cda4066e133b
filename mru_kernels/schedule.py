"""A schedule of epsilon over the steps of training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .nn.arguments import check_number, check_sizes, constructor
from .nn.write_or_hold import WriteOrHold

__all__ = ["EpsilonSchedule"]


class EpsilonSchedule:
    """Epsilon of all units in a module: constant at first, then linear from one value to another.

    It is used like the schedulers of `torch.optim.lr_scheduler`. The constructor sets epsilon of every unit to `start`,
    and each `step()` sets it to the next value. After n calls of `step()`, epsilon is::

        start                                                  for n <= hold_steps
        start + (end - start) (n - hold_steps) / decay_steps   until n = hold_steps + decay_steps
        end                                                    from then on

    A write multiplies the gradient of the state before it by epsilon. A schedule from 1 to 0 therefore starts with a
    cumulative unit, which passes gradients over long times, and ends with a bistable one. Let the schedule end well
    before training does, so that training also covers the unit that is used.

    The schedule finds the units at each step, also in modules that `torch.compile`, DistributedDataParallel, FSDP2 or
    `mru_kernels.distributed.sequence_parallel` wrap. A compiled module is not compiled again when epsilon changes.
    Under activation checkpointing call `step()` after the backward pass.

    Args:
        module: a module that contains units with an epsilon: `BMRU`, `CMRU`, `AlphaCMRU` or `FirstQuadrantBMRU`.
        decay_steps: steps from `start` to `end`, at least 1.
        hold_steps: steps at `start` before them, at least 0.
        start, end: in [0, 1]; `start` may be less than `end`.

    Attributes:
        step_count: number of calls of `step()`.
        epsilon: the value that the schedule has set.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it. ValueError also where `module`
            contains no unit with an epsilon.

    Example::

        >>> model = mk.MRUNetwork(3, 2, width=8, num_blocks=2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> schedule = mk.EpsilonSchedule(model, decay_steps=4, hold_steps=1)
        >>> values = []
        >>> for _ in range(6):
        ...     values.append(model.epsilon)
        ...     model(torch.randn(4, 10, 3))[0].square().mean().backward()
        ...     optimizer.step()
        ...     schedule.step()
        >>> values
        [1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """

    step_count: int
    decay_steps: int
    hold_steps: int
    start: float
    end: float

    @constructor
    def __init__(
        self, module: torch.nn.Module, decay_steps: int, *, hold_steps: int = 0, start: float = 1.0, end: float = 0.0
    ) -> None:
        if not isinstance(module, torch.nn.Module):
            raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
        self._module = module
        if not self._units():
            raise ValueError(f"module: expected a module with units that have an epsilon, got {type(module).__name__}")
        self._set(step_count=0, decay_steps=decay_steps, hold_steps=hold_steps, start=start, end=end)

    @property
    def epsilon(self) -> float:
        decayed = self.step_count - self.hold_steps
        if decayed >= self.decay_steps:
            return self.end
        return self.start + (self.end - self.start) * max(0, decayed) / self.decay_steps

    def step(self) -> None:
        """Set the next value of epsilon. Call it once for each step of the optimiser, after it.

        Example::

            >>> unit = mk.BMRU(4, 8)
            >>> schedule = mk.EpsilonSchedule(unit, decay_steps=10)
            >>> schedule.step()
            >>> unit.epsilon
            0.9
        """
        self.step_count += 1
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        """The arguments and the number of steps so far, as numbers; it does not contain the module.

        Example::

            >>> mk.EpsilonSchedule(mk.BMRU(4, 8), decay_steps=10).state_dict()
            {'step_count': 0, 'decay_steps': 10, 'hold_steps': 0, 'start': 1.0, 'end': 0.0}
        """
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a `state_dict()`: take over its arguments and steps, and set epsilon of every unit.

        Args:
            state_dict: the result of `state_dict()`.

        Raises:
            TypeError, ValueError: `state_dict` is not such a result; the message names the entry. Nothing changes then.

        Example::

            >>> unit = mk.BMRU(4, 8)
            >>> schedule = mk.EpsilonSchedule(unit, decay_steps=10)
            >>> schedule.load_state_dict(schedule.state_dict() | {"step_count": 5})
            >>> unit.epsilon
            0.5
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict: expected a mapping, got {type(state_dict).__name__}")
        if set(state_dict) != set(_STATE):
            raise ValueError(f"state_dict: expected the entries {', '.join(_STATE)}, got {', '.join(state_dict)}")
        self._set(**state_dict)

    def _set(self, step_count: int, decay_steps: int, hold_steps: int, start: float, end: float) -> None:
        check_sizes(decay_steps=decay_steps)
        check_sizes(0, hold_steps=hold_steps, step_count=step_count)
        start, end = check_number("start", start, 0.0, 1.0), check_number("end", end, 0.0, 1.0)
        self.step_count, self.decay_steps, self.hold_steps = step_count, decay_steps, hold_steps
        self.start, self.end = start, end
        self._apply()

    def _units(self) -> list[WriteOrHold]:
        return [module for module in self._module.modules() if isinstance(module, WriteOrHold)]

    def _apply(self) -> None:
        value = self.epsilon
        for unit in self._units():
            unit.epsilon = value

    def __repr__(self) -> str:
        arguments = f"decay_steps={self.decay_steps}, hold_steps={self.hold_steps}, start={self.start}, end={self.end}"
        return f"{type(self).__name__}({type(self._module).__name__}, {arguments}, step_count={self.step_count})"


_STATE = ("step_count", "decay_steps", "hold_steps", "start", "end")
