"""The check of a call that is timed: right results pass, and it finds faults of every kind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from unittest.mock import patch

import pytest
import torch

import mru_kernels as mk
from bench import aside, compare, inputs, verify
from bench.inputs import Call
from mru_kernels.ops import entry

STEPS = (60, 200)  # the reference computes the first whole, and only both ends of the second: see `short`
CELLS = [
    (cell, epsilon)
    for cell, declared in inputs.CELLS.items()
    for epsilon in ((0.0, 0.5) if "epsilon" in declared.factors else (None,))
]

#: Cells and steps whose faults the quick tests look for. `make check` looks for those of all.
QUICK = [("bmru", 0.5, 200), ("linear_recurrence", None, 200), ("leaky_integrator", None, 60)]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """The reference computes 64 steps at each end of a scan."""
    monkeypatch.setattr(verify, "_STEPS", 64)


def call_of(cell: str, epsilon: float | None = None, dtype: torch.dtype = torch.float32, **sizes: int) -> Call:
    given = {} if epsilon is None else {"epsilon": epsilon}
    return inputs.case(cell, dtype, **{"batch": 2, "time": 200, "channels": 17} | sizes, **given).build()


def changed(name: str, change, when=lambda: True):
    """A context in which `change` changes the result or gradient `name` of the kernels while `when()` is true."""
    right = compare.results_of

    def results_of(call, op):
        results = right(call, op)
        if getattr(op, "keywords", {}).get("backend") == "cpu" and when():  # not the reference
            results[name] = change(results[name])
        return results

    return patch.object(compare, "results_of", results_of)


def calls_of(cell: str, epsilon: float | None, steps: int) -> Iterator[tuple[Call, Call]]:
    """For each dtype: a call of `steps` steps, and a small one for a comparison."""
    for dtype in {torch.float32, torch.bfloat16, torch.complex64} & set(inputs.CELLS[cell].dtypes.values()):
        yield call_of(cell, epsilon, dtype, time=steps), call_of(cell, epsilon, dtype, time=128)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("cell", "epsilon"), CELLS)
def test_right_results_pass(cell, epsilon, steps):
    for call, _ in calls_of(cell, epsilon, steps):
        assert verify.faults(call, "cpu") == []


@pytest.mark.parametrize(
    ("cell", "epsilon", "steps"),
    [
        pytest.param(*of, steps, marks=() if (*of, steps) in QUICK else pytest.mark.check)
        for of in CELLS
        for steps in STEPS
    ],
)
def test_faults_are_found_that_a_comparison_of_a_small_case_finds(cell, epsilon, steps):
    for call, small in calls_of(cell, epsilon, steps):
        for name in ("h", "final_state", *call.tensors):
            for size in (1e-1, 1e-3, 1e-5):
                with changed(name, lambda t, size=size: t * (1 + size)):
                    (row,) = compare.run([small], "cpu")
                if not row.passed:
                    label = name if name in compare.FORWARD else f"d {name}"
                    with changed(name, lambda t, size=size: t * (1 + 2 * size)):  # limits depend on the numbers
                        assert f"{label} is not that of the reference" in verify.faults(call, "cpu"), (
                            call.stream.dtype,
                            size,
                        )


@pytest.mark.parametrize("steps", STEPS)
def test_one_wrong_channel_of_the_last_step_is_found(steps):
    def change(t: torch.Tensor) -> torch.Tensor:
        t = t.clone()
        t[..., -1, -1] += 1
        return t

    call = call_of("bmru", 0.0, time=steps)
    for name in ("h", "candidate", "threshold"):
        with changed(name, change):
            assert verify.faults(call, "cpu")


@pytest.mark.parametrize("name", ["h", "final_state", "candidate", "threshold"])
def test_a_fault_outside_the_sample_is_found(name):
    """The fault is in a channel and a step that the reference does not compute, and under one setting only."""

    def change(t: torch.Tensor) -> torch.Tensor:
        t = t.clone()
        (t[:, 100] if t.dim() == 3 else t)[:, 1] += 1
        return t

    call = call_of("bmru", 0.0)
    threads = torch.get_num_threads()
    with changed(name, change, when=lambda: torch.get_num_threads() != threads):
        assert verify.faults(call, "cpu") == [f"{name} depends on the number of threads"]
    with changed(name, change, when=lambda: entry.SEGMENT != -1):
        assert verify.faults(call, "cpu") == [f"{name} depends on where time is cut"]


@pytest.mark.parametrize("steps", STEPS)
def test_a_wrong_sum_of_the_last_channel_is_found(steps):
    """A kernel may compute the last of 17 channels in another way, so fewer channels would not show its fault."""

    def change(t: torch.Tensor) -> torch.Tensor:
        return torch.cat([t[:-1], 2 * t[-1:]]) if len(t) == 17 else t

    call = inputs.case(
        "bmru", torch.float32, batch=2, time=steps, channels=17, epsilon=0.5, threshold="channel"
    ).build()
    assert call.tensors["threshold"].dim() == 1
    with changed("threshold", change):
        assert verify.faults(call, "cpu") == ["d threshold is not that of the reference"]


def test_a_lost_gradient_of_a_cut_is_found():
    call = call_of("linear_recurrence", dtype=torch.bfloat16)
    with changed("decay", torch.zeros_like, when=lambda: entry.SEGMENT != -1):
        assert verify.faults(call, "cpu") == ["decay depends on where time is cut"]


@pytest.mark.parametrize("name", ["h", "decay"])
def test_a_wrong_chunk_of_a_long_scan_in_half_precision_is_found(name):
    """Its norm is below the limit times the norm of all 2^21 steps."""

    def change(t: torch.Tensor) -> torch.Tensor:
        t = t.clone()
        t[:, 2**19 : 2**19 + 64] = 0
        return t

    call = call_of("linear_recurrence", dtype=torch.bfloat16, batch=1, time=2**21, channels=1)
    right = compare.results_of(call, partial(mk.linear_recurrence, backend="cpu"))[name]
    assert (change(right) - right).norm() < 1e-2 * right.norm()
    assert verify.faults(call, "cpu") == []
    with changed(name, change, when=lambda: entry.SEGMENT != -1):
        assert verify.faults(call, "cpu") == [f"{name} depends on where time is cut"]


@pytest.mark.parametrize("steps", [1, 63, 64, 65, 200])
def test_each_block_of_steps_has_a_limit(steps):
    """Half of the limit passes in every block, and twice the limit fails in any, also in a shorter last one."""
    right = torch.randn(2, steps, 5, generator=torch.Generator().manual_seed(0)).clamp_min(1)
    assert verify._agree(right * (1 + 0.5e-4), right, exact=False)
    for row, first in product(range(2), range(0, steps, 64)):
        wrong = right.clone()
        wrong[row, first : first + 64] *= 1 + 2e-4
        assert not verify._agree(wrong, right, exact=False)
        assert not verify._agree(right.index_fill(1, torch.tensor(first), float("nan")), right, exact=False)


def test_a_block_of_small_numbers_may_have_the_error_of_the_others():
    right = torch.ones(1, 200, 5)
    right[:, 64:128] = 1e-6
    for error, agree in ((0.5e-4, True), (2e-4, False)):
        wrong = right.clone()
        wrong[:, 64:128] += error * right.square().mean().sqrt()
        assert verify._agree(wrong, right, exact=False) == agree


def test_one_channel_of_part_of_a_complex_tensor_is_compared():
    """Gradients of parts of a complex tensor have a last stride of 2. With one channel they count as contiguous."""
    call = call_of("resonate", dtype=torch.float32, channels=1, time=60)
    assert verify.faults(call, "cpu") == []
    parts = torch.view_as_real(torch.randn(2, 60, 1, dtype=torch.complex64))
    assert verify._same_bits(parts[..., 0], parts[..., 0].clone())
    assert not verify._same_bits(parts[..., 0], parts[..., 1])


def test_other_instructions_must_give_the_same_values_where_these_are_exact():
    exact, rounded = call_of("bmru", 0.0), call_of("bmru", 0.5)
    for call in (exact, rounded):
        assert verify.faults(call, "cpu", lambda call=call: verify.digest(call, "cpu")) == []
    assert verify.faults(rounded, "cpu", lambda: "another") == []
    assert verify.faults(exact, "cpu", lambda: "another") == ["the forward pass depends on the instruction set"]
    flipped = replace(exact, tensors=exact.tensors | {"candidate": -exact.tensors["candidate"]})
    assert verify.digest(flipped, "cpu") != verify.digest(exact, "cpu")


@pytest.mark.parametrize("name", ["candidate", "threshold"])
def test_a_repeated_call_has_the_shape_of_its_case_and_sequences_that_differ(name):
    case = inputs.case("bmru", torch.float32, batch=3, time=700, channels=17, threshold="stream")
    with patch.object(inputs, "_DRAWN", 6000):
        call = inputs.repeated(case)
    x = call.tensors[name]
    assert x.shape == case.shape
    assert verify.faults(call, "cpu") == []
    assert len({tuple(row.tolist()) for row in x.flatten(1)}) == 3
    assert len({tuple(row.tolist()) for row in x[:, :640].unflatten(1, (10, 64)).flatten(0, 1).flatten(1)}) == 30


def test_a_short_case_is_drawn_as_it_is():
    case = inputs.case("bmru", torch.float32)
    drawn, expected = inputs.repeated(case), case.build()
    assert all(torch.equal(t, expected.tensors[name]) for name, t in drawn.tensors.items())


@pytest.mark.check
def test_a_process_with_other_settings_answers():
    call = call_of("bmru", 0.0)
    with aside.Others("cpu") as others:
        assert others.digest(call) == verify.digest(call, "cpu")
        with pytest.raises(RuntimeError, match="the process with other settings failed"):
            others.digest(replace(call, cell="no_such_cell"))
        assert others.digest(call) == verify.digest(call, "cpu")  # by another process
