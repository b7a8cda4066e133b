"""The numbers: against the float64 reference, and one way of computing against another."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mru_kernels as mk
from bench import errors, inputs
from bench.verify import threads
from mru_kernels import backends
from tests.calls import (
    CELLS,
    SEGMENTS,
    assert_agree,
    assert_right,
    assert_same_bits,
    cases,
    factors_of,
    op_of,
    part_of,
    run,
    segments,
    step_settings,
)

# ------------------------------------------------------------------------------------------------ the reference


@given(st.data())
def test_equals_the_reference(backend, device, largest, data):
    call = data.draw(cases(largest)).build()
    assert_right(call, op_of(call.cell, backend), device)


@given(st.data())
def test_equals_the_reference_when_time_is_cut(backend, device, largest, data):
    steps = data.draw(st.sampled_from([64, 128]))
    call = data.draw(cases(largest)).build()
    with segments(backend, steps):
        assert_right(call, op_of(call.cell, backend), device)


@given(st.data())
def test_equals_the_reference_for_any_chunk_size(backend, device, largest, data):
    """Any chunk size gives right results. Without saved states, results have the same bits as by default."""
    least, most = backends.TABLE[backend].module.CHUNK_SIZES
    steps = data.draw(SEGMENTS)
    chunk_size = data.draw(st.sampled_from([size for size in (16, 32, 48, 64, 128, 256) if least <= size <= most]))
    call = data.draw(cases(largest)).build()
    op = op_of(call.cell, backend)
    with segments(backend, steps):
        assert_right(call, partial(op, chunk_size=chunk_size), device)
        assert_same_bits(run(call, partial(op, chunk_size=None), device), run(call, op, device))


@pytest.mark.parametrize(("cell", "dtype"), [(cell, name) for cell in CELLS for name in inputs.CELLS[cell].dtypes])
def test_equals_the_reference_where_the_backend_cuts_time(backend, device, largest, cell, dtype):
    """The backend chooses the segment size itself, for few channels and many steps."""
    if largest[0] < 200:
        pytest.skip("too long for an interpreted backend")
    factors = inputs.CELLS[cell].factors
    for seed in range(3):
        options = {name: values[seed % len(values)] for name, values in factors.items()}
        options |= {"time": 1900, "channels": 5, "initial_state": "real"}
        case = inputs.case(cell, inputs.CELLS[cell].dtypes[dtype], seed, **options)
        assert_right(case.build(), op_of(cell, backend), device)


def nan_sources() -> list[tuple[str, str, str, dict]]:
    """Cell, dtype, a tensor, and options with which the cell has it: as a stream, and `[D]` where it may be."""
    rows = []
    for cell, declared in inputs.CELLS.items():
        either = [name for name, values in declared.factors.items() if "channel" in values]
        forms = [(name, {name: form}) for name in either for form in ("stream", "channel")]
        forms += [(name, {name: True}) for name in declared.optional]
        forms += [(name, {}) for name in declared.inputs if name not in either]
        forms += [("initial_state", {"initial_state": "integer"})]
        for epsilon in declared.factors.get("epsilon", (None,)):
            more = {} if epsilon is None else {"epsilon": epsilon}
            dtypes = [dtype for dtype in ("fp32", "c64") if dtype in declared.dtypes]
            rows += [(cell, dtype, name, options | more) for dtype in dtypes for name, options in forms]
    return rows


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("batch", [3, "packed"])
@pytest.mark.parametrize(("cell", "dtype", "source", "options"), nan_sources(), ids=str)
def test_nan_stays_from_its_step_on_and_in_its_channel(backend, device, cell, dtype, source, options, batch, reverse):
    """Neither a hold nor a write removes a NaN. Other channels and sequences do not change."""
    options = options | {"batch": batch, "reverse": reverse}
    call = inputs.case(cell, inputs.CELLS[cell].dtypes[dtype], 5, time=150, channels=9, **options).build()
    row, time, channel = (0, 40, 3) if batch == "packed" else (1, 40, 3)
    touched = torch.zeros_like(call.stream, dtype=torch.bool)  # elements of h that must be NaN
    sequence = row
    if batch == "packed":
        cu_seqlens = torch.tensor([0, 10, 10, 120, 150], dtype=torch.int32)
        call = replace(call, settings=call.settings | {"cu_seqlens": cu_seqlens}, grad_final=call.grad_final[:4])
        if "initial_state" in call.tensors:
            call = replace(call, tensors=call.tensors | {"initial_state": call.tensors["initial_state"][:4]})
        sequence, span = 2, slice(10, 120)
    else:
        span = slice(0, 150)
    dirty = call.tensors[source].clone()
    if dirty.dim() == 3:
        dirty[row, time, channel] = math.nan
        since = slice(span.start, time + 1) if reverse else slice(time, span.stop)
        touched[row, since, channel] = True
    elif dirty.dim() == 2:
        dirty[sequence, channel] = math.nan
        touched[row, span, channel] = True
    else:
        dirty[channel] = math.nan
        touched[..., channel] = True
    bad = replace(call, tensors=call.tensors | {source: dirty})
    with segments(backend, 0):
        whole = run(call, op_of(cell, backend), device)
    for steps in (0, 64):
        with segments(backend, steps):
            clean, got = run(call, op_of(cell, backend), device), run(bad, op_of(cell, backend), device)
        assert got["h"][touched].isnan().all()
        assert torch.equal(got["h"][~touched], clean["h"][~touched])
        final = torch.zeros_like(got["final_state"], dtype=torch.bool)
        final[slice(None) if dirty.dim() == 1 else sequence, channel] = True
        if dirty.dim() == 1 and batch == "packed":
            final[1] = False  # an empty sequence returns its initial state
        assert got["final_state"][final].isnan().all()
        assert torch.equal(got["final_state"][~final], clean["final_state"][~final])
        others = [d for d in range(9) if d != channel]
        for argument in call.tensors:  # a call that is scanned again has the bits of a whole scan
            result, *same = (results[argument][..., others] for results in (got, clean, whole))
            assert ((result == same[0]) | (result == same[1])).all(), argument


# ------------------------------------------------------------------------------------------------ metamorphic


@given(st.data())
def test_segments_equal_the_whole(backend, device, largest, data):
    steps = data.draw(st.sampled_from([64, 128]))
    call = data.draw(cases(largest, nonfinite=False)).build()
    with segments(backend, 0):
        whole = run(call, op_of(call.cell, backend), device)
    with segments(backend, steps):
        cut = run(call, op_of(call.cell, backend), device)
    assert_agree(call, cut, whole)


def _seldom_written(cell: str, **options) -> tuple[inputs.Call, inputs.Call]:
    """A call whose channels write about once in 150 steps, and the same call with a NaN in one channel."""
    call = inputs.case(cell, torch.float32, 7, initial_state="integer", **options).build()
    kind = torch.randint(300, call.stream.shape, generator=torch.Generator().manual_seed(0))
    if cell == "bmru":
        gate = {"threshold": torch.ones_like(call.stream)}
        hold, writes = 0.0, (-2.0, 2.0)
    else:
        gate = {name: torch.full_like(call.tensors[name], edge) for name, edge in (("low", 0.25), ("high", 0.75))}
        hold, writes = 0.5, (0.0, 1.0)
    candidate = torch.where(kind == 0, writes[0], torch.where(kind == 1, writes[1], hold))
    dirty = candidate.clone()
    dirty[-1, candidate.shape[1] // 10, 3] = math.nan
    return tuple(replace(call, tensors=call.tensors | gate | {"candidate": c}) for c in (candidate, dirty))


@pytest.mark.parametrize("epsilon", [0.0, 1.0])
@pytest.mark.parametrize("cell", ["bmru", "schmitt"])
def test_states_held_over_many_segments_equal_the_whole(backend, device, largest, cell, epsilon):
    call, bad = _seldom_written(cell, time=min(largest[0], 1000), channels=19, epsilon=epsilon)
    op = op_of(cell, backend)
    with segments(backend, 0), threads(1):
        whole, bad_whole = run(call, op, device), run(bad, op, device)
    assert bad_whole["h"][-1, -1, 3].isnan()
    for count in (1, 2, 5):
        with segments(backend, 64), threads(count):
            assert_agree(call, run(call, op, device), whole)
            got = run(bad, op, device)
        for name in ("h", "final_state"):
            assert errors.same_values(got[name], bad_whole[name]), (count, name)


@pytest.mark.parametrize("batch", [1, "packed"])
@pytest.mark.parametrize("cell", ["bmru", "schmitt"])
def test_fewer_sequences_than_threads_equal_one_thread(backend, device, largest, cell, batch):
    """With epsilon 0 a backend cuts a long time for its threads alone, and bits do not change."""
    if largest[0] < 300:
        pytest.skip("too long for an interpreted backend")
    for call in _seldom_written(cell, time=3000, channels=19, batch=batch, reverse=batch == 1):
        with segments(backend, 0):
            with threads(1):
                alone = run(call, op_of(cell, backend), device)
            with threads(7):
                assert_same_bits(run(call, op_of(cell, backend), device), alone)


@given(st.data())
def test_halves_with_the_state_handed_over_equal_the_whole(backend, device, largest, data):
    steps = data.draw(SEGMENTS)
    case = data.draw(cases(largest, batch=data.draw(st.integers(1, 3)), nonfinite=False, boundaries=False))
    call = case.build()
    at = data.draw(st.integers(0, call.stream.shape[1]))
    op = op_of(call.cell, backend)

    def halves(*, initial_state=None, **arguments):
        def part(times: slice, state):
            return op(**part_of(arguments, times=times), initial_state=state)

        first, second = slice(None, at), slice(at, None)
        if arguments["reverse"]:
            first, second = second, first
        h_first, state = part(first, initial_state)
        # The state and its gradient have the state dtype.
        h_second, state = part(second, state)
        both = (h_second, h_first) if arguments["reverse"] else (h_first, h_second)
        return torch.cat(both, 1), state

    with segments(backend, steps):
        assert_agree(call, run(call, halves, device), run(call, op_of(call.cell, backend), device))


@given(st.data())
def test_reverse_equals_flip_scan_flip(backend, device, largest, data):
    steps = data.draw(SEGMENTS)
    case = data.draw(cases(largest, batch=data.draw(st.integers(1, 3)), reverse=True, nonfinite=False))
    call = case.build()
    op = op_of(call.cell, backend)

    def flipped(*, reverse, **arguments):
        flipped_arguments = {
            name: t.flip(1) if name == "resets" or (isinstance(t, torch.Tensor) and t.dim() == 3) else t
            for name, t in arguments.items()
        }
        h, *states = op(**flipped_arguments, reverse=not reverse)
        return h.flip(1), *states

    with segments(backend, steps):
        assert_agree(call, run(call, flipped, device), run(call, op_of(call.cell, backend), device))


@given(st.data())
def test_packed_sequences_equal_separate_calls(backend, device, largest, data):
    steps = data.draw(SEGMENTS)
    call = data.draw(cases(largest, batch="packed", nonfinite=False, boundaries=False)).build()
    cuts = data.draw(st.lists(st.integers(0, call.stream.shape[1]), min_size=1, max_size=12))
    cuts = sorted([0, *cuts, call.stream.shape[1]])  # many cuts give empty sequences and sequences of one step
    states = {name: t for name, t in call.tensors.items() if name in ("initial_state", "reset_state")}
    generator = torch.Generator().manual_seed(1)

    def states_like(t):
        return torch.randn(len(cuts) - 1, t.shape[1], generator=generator).round().to(t.dtype)

    call = replace(
        call,
        tensors=call.tensors | {name: states_like(t) for name, t in states.items()},
        settings=call.settings | {"cu_seqlens": torch.tensor(cuts, dtype=call.settings["cu_seqlens"].dtype)},
        grad_final=states_like(call.grad_final),
    )
    op = op_of(call.cell, backend)

    def separate(*, cu_seqlens, **arguments):
        results = []
        for n, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
            results.append(op(**part_of(arguments, times=slice(start, end), states=slice(n, n + 1))))
        h, final_state = zip(*results, strict=True)
        return torch.cat(h, 1), torch.cat(final_state, 0)

    with segments(backend, steps):
        assert_agree(call, run(call, separate, device), run(call, op_of(call.cell, backend), device))


@given(st.data())
def test_a_sequence_does_not_depend_on_its_batch(backend, device, largest, data):
    """One call for each row of the batch equals one call for the whole batch."""
    steps = data.draw(SEGMENTS)
    call = data.draw(cases(largest, batch=data.draw(st.integers(2, 3)), nonfinite=False)).build()
    op = op_of(call.cell, backend)

    def alone(**arguments):
        row = [slice(n, n + 1) for n in range(call.stream.shape[0])]
        results = [op(**part_of(arguments, rows=n, states=n)) for n in row]
        return tuple(torch.cat(of_rows, 0) for of_rows in zip(*results, strict=True))

    with segments(backend, steps):
        assert_agree(call, run(call, alone, device), run(call, op, device))


@given(st.data())
def test_no_sequence_at_all(backend, device, data):
    """No sequence (`cu_seqlens` [0]), B = 0, D = 0 and T = 0: the final state is the initial state."""
    steps = data.draw(SEGMENTS)
    call = data.draw(cases((3, 5), batch="packed", reverse=data.draw(st.booleans()))).build()
    empty = data.draw(st.sampled_from(["sequences", "batch", "channels", "time"]))
    tensors, others = dict(call.tensors), dict(call.settings)
    del others["cu_seqlens"]
    for name in ("initial_state", "reset_state"):
        tensors.pop(name, None)
    streams = {name: t for name, t in tensors.items() if t.dim() == 3}
    channel = {name: t for name, t in tensors.items() if t.dim() == 1}
    if empty == "sequences":
        streams = {name: t[:, :0] for name, t in streams.items()}
        others["cu_seqlens"] = torch.zeros(1, dtype=torch.int32)
        states = (0, call.stream.shape[2])
    elif empty == "batch":
        streams = {name: t[:0] for name, t in streams.items()}
        states = (0, call.stream.shape[2])
    elif empty == "time":
        streams = {name: t[:, :0].expand(3, -1, -1) for name, t in streams.items()}
        states = (3, call.stream.shape[2])
    else:
        streams = {name: t[..., :0] for name, t in streams.items()}
        channel = {name: t[:0] for name, t in channel.items()}
        states = (1, 0)
    initial_state = torch.ones(states, dtype=inputs.CELLS[call.cell].state_dtype(call.stream.dtype))
    tensors = streams | channel | {"initial_state": initial_state}
    if "resets" in others:
        others["resets"] = torch.ones(next(iter(streams.values())).shape[:2], dtype=torch.bool)
        tensors["reset_state"] = 2 * initial_state
    call = inputs.call(call.cell, tensors, others)
    with segments(backend, steps):
        got = run(call, op_of(call.cell, backend), device)
    assert got["h"].shape == call.stream.shape
    assert torch.equal(got["final_state"], initial_state)
    for name, t in tensors.items():
        expected = call.grad_final if name == "initial_state" else torch.zeros_like(t)
        assert torch.equal(got[name], expected), name


@given(st.data())
def test_steps_equal_the_scan(backend, device, data):
    """Calls of the step function, one for each time step, agree with one scan."""
    call = data.draw(
        cases((20, 40), batch=data.draw(st.integers(1, 3)), reverse=False, resets="none", boundaries=False)
    ).build()
    tensors = call.to(device).tensors
    settings = step_settings(call)
    step = getattr(mk, f"{call.cell}_step")
    h, final_state = op_of(call.cell, backend)(**tensors, **settings)
    state = tensors.get("initial_state")
    state = torch.zeros_like(final_state) if state is None else state
    rows = []
    for t in range(h.shape[1]):
        row = {name: x[:, t] if x.dim() == 3 else x for name, x in tensors.items() if name != "initial_state"}
        with patch.object(backends, "_CHOSEN", backend):
            h_t, state = step(**row, state=state, **settings)
        rows.append(h_t)
    by_steps = {"h": torch.stack(rows, 1) if rows else h, "final_state": state.to(final_state.dtype)}
    assert_agree(
        call,
        {name: t.cpu() for name, t in by_steps.items()},
        {"h": h.cpu(), "final_state": final_state.cpu()},
    )


@pytest.mark.parametrize("cell", CELLS)
def test_a_default_device_changes_nothing(backend, device, cell):
    """Ops create tensors on the device of their inputs or on the CPU, not on the default device."""
    options = {"batch": "packed", "initial_state": "real"} | (
        {"epsilon": 0.31} if "epsilon" in factors_of(cell) else {}
    )
    call = inputs.case(cell, torch.float32, time=130, channels=3, **options).build().to(device)
    rows = {name: t[:, 0] if t.dim() == 3 else t for name, t in call.tensors.items()}
    rows["state"] = rows.pop("initial_state")[:1]
    settings = step_settings(call)

    def results() -> list[torch.Tensor]:
        leaves = {name: t.detach().requires_grad_() for name, t in call.tensors.items()}
        outputs = op_of(cell, backend)(**leaves, **call.settings)
        gradients = torch.autograd.grad([r.abs().sum() for r in outputs], list(leaves.values()))
        return [*outputs, *gradients, *getattr(mk, f"{cell}_step")(**rows, **settings)]

    with patch.object(backends, "_CHOSEN", backend):
        with torch.device("meta"):
            got = results()
        assert all(torch.equal(a, b) for a, b in zip(got, results(), strict=True))
