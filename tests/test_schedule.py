"""The schedule of epsilon: values, resumption, and modules that contain units."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import mru_kernels as mk
from mru_kernels.distributed import sequence_parallel


def values(schedule: mk.EpsilonSchedule, unit: mk.BMRU, steps: int) -> list[float]:
    """Epsilon of the unit before each of `steps` steps, and after the last step."""
    found = [unit.epsilon]
    for _ in range(steps):
        schedule.step()
        assert unit.epsilon == schedule.epsilon
        found.append(unit.epsilon)
    return found


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"decay_steps": 4}, [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
        ({"decay_steps": 2, "hold_steps": 2}, [1.0, 1.0, 1.0, 0.5, 0.0, 0.0]),
        ({"decay_steps": 1, "hold_steps": 1, "start": 0.5, "end": 0.25}, [0.5, 0.5, 0.25, 0.25]),
        ({"decay_steps": 4, "start": 0, "end": 1}, [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]),
        ({"decay_steps": 3, "start": 0.7, "end": 0.1}, [0.7, 0.7 - 0.6 / 3, 0.7 - 0.6 * 2 / 3, 0.1]),
    ],
)
def test_values(arguments, expected):
    unit = mk.BMRU(2, 3, epsilon=0.125)
    schedule = mk.EpsilonSchedule(unit, **arguments)
    assert values(schedule, unit, len(expected) - 1) == pytest.approx(expected, abs=1e-15)
    assert unit.epsilon == arguments.get("end", 0.0)  # exactly


def test_resume():
    unit = mk.BMRU(2, 3)
    schedule = mk.EpsilonSchedule(unit, 5, hold_steps=2, start=0.9, end=0.2)
    values(schedule, unit, 4)
    saved = schedule.state_dict()
    expected = values(schedule, unit, 5)

    resumed = mk.BMRU(2, 3)
    other = mk.EpsilonSchedule(resumed, 50)
    other.load_state_dict(saved)
    assert values(other, resumed, 5) == expected
    assert other.state_dict() == schedule.state_dict()
    assert saved["step_count"] == 4  # a copy, not a view of the schedule


def test_a_copy_schedules_the_copy_of_the_module():
    unit = mk.BMRU(2, 3)
    schedule = mk.EpsilonSchedule(unit, 4)
    for copied, other in (copy.deepcopy((unit, schedule)), pickle.loads(pickle.dumps((unit, schedule)))):
        other.step()
        assert (unit.epsilon, copied.epsilon) == (1.0, 0.75)


def test_nested_modules():
    network = mk.MRUNetwork(4, 3, width=4, num_blocks=2, units=("bmru", "min_gru", "cmru"))
    layers = torch.nn.ModuleDict({"network": network, "more": torch.nn.Sequential(mk.FirstQuadrantBMRU(3, 2))})
    schedule = mk.EpsilonSchedule(layers, 2)
    layers["late"] = mk.AlphaCMRU(2, 2)
    schedule.step()
    found = [module.epsilon for module in layers.modules() if hasattr(module, "epsilon")]
    assert found == [0.5] * 9  # the network, its two blocks with two units each, two other units


def test_wrapped_modules(group_of_one):
    units = [mk.BMRU(2, 3) for _ in range(4)]
    wrapped = [
        DistributedDataParallel(units[0]),
        torch.compile(units[1]),
        torch.compile(DistributedDataParallel(units[2])),
        sequence_parallel(units[3]),
    ]
    for unit, wrapper in zip(units, wrapped, strict=True):
        mk.EpsilonSchedule(wrapper, 4).step()
        assert unit.epsilon == 0.75


def test_a_step_does_not_compile_again():
    torch.compiler.reset()
    unit = mk.BMRU(2, 3)
    schedule = mk.EpsilonSchedule(unit, 4)
    compiled = torch.compile(unit, backend="eager", fullgraph=True)
    x = torch.randn(2, 5, 2)
    compiled(x)
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(5):
            schedule.step()
            torch.testing.assert_close(compiled(x), unit(x), rtol=0, atol=0)


BAD = [
    ({"module": "unit"}, TypeError, "module: expected a torch.nn.Module, got str"),
    ({"module": torch.nn.Linear(2, 2)}, ValueError, "module: expected a module with units .* got Linear"),
    ({"module": mk.MinGRU(2, 2)}, ValueError, "module: expected .* got MinGRU"),
    ({"decay_steps": 0}, ValueError, "decay_steps: expected a positive int, got 0"),
    ({"decay_steps": 1.0}, TypeError, "decay_steps: expected an int, got float"),
    ({"hold_steps": -1}, ValueError, "hold_steps: expected a non-negative int, got -1"),
    ({"start": 1.5}, ValueError, r"start: expected a finite number in \[0, 1\], got 1.5"),
    ({"end": float("nan")}, ValueError, "end: expected a finite number .* got nan"),
    ({"end": "0"}, TypeError, "end: expected a float, got str"),
]


@pytest.mark.parametrize(("wrong", "kind", "message"), BAD)
def test_bad_arguments(wrong, kind, message):
    unit = mk.BMRU(2, 3, epsilon=0.25)
    with pytest.raises(kind, match=f"^{message}"):
        mk.EpsilonSchedule(**{"module": unit, "decay_steps": 4} | wrong)
    assert unit.epsilon == 0.25


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        (lambda state: [*state], TypeError, "state_dict: expected a mapping, got list"),
        (lambda _: {"start": 1.0}, ValueError, "state_dict: expected the entries step_count, .*, end, got start$"),
        (lambda state: state | {"more": 0}, ValueError, "state_dict: expected the entries .*, got .*, more$"),
        (lambda state: state | {"step_count": -1}, ValueError, "step_count: expected a non-negative int, got -1"),
        (lambda state: state | {"start": 2.0}, ValueError, "start: expected"),
    ],
)
def test_bad_state(wrong, kind, message):
    unit = mk.BMRU(2, 3)
    schedule = mk.EpsilonSchedule(unit, 4)
    state = schedule.state_dict()
    with pytest.raises(kind, match=f"^{message}"):
        schedule.load_state_dict(wrong(state))
    assert schedule.state_dict() == state
    assert unit.epsilon == 1.0
