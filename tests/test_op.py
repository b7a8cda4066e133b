"""The numbers: against the float64 reference, and one way of computing against another."""

from __future__ import annotations

import ctypes
import math
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mru_kernels as mk
import python_ref
from bench import compare, errors, inputs
from mru_kernels import backends
from mru_kernels.cells.bmru import bmru_packed

CELLS = list(inputs.CELLS)
SEGMENTS = st.sampled_from([0, 64])


@st.composite
def cases(draw, largest: tuple[int, int], cell: str | None = None, **fixed) -> inputs.Case:
    """A case of any cell with any value of each factor: sizes up to `largest`, any epsilon. `fixed` sets factors."""
    cell = cell or draw(st.sampled_from(CELLS))
    factors = {name: st.sampled_from(values) for name, values in inputs.CELLS[cell].factors.items()}
    factors |= {name: st.sampled_from(values) for name, values in inputs.COMMON_FACTORS.items()}
    factors["time"] = st.integers(0, largest[0])
    factors["channels"] = st.integers(1, largest[1])
    factors["batch"] |= st.integers(1, 4)
    if "epsilon" in factors:
        factors["epsilon"] |= st.floats(0.0, 1.0)
    factors |= {name: st.just(value) for name, value in fixed.items()}
    options = {name: draw(values) for name, values in factors.items()}
    dtype = draw(st.sampled_from(list(inputs.CELLS[cell].dtypes.values())))
    return inputs.Case(cell, dtype, options, draw(st.integers(0, 2**31)))


@contextmanager
def segments(backend: str, steps: int | None):
    """Have time cut into segments of so many steps; 0: not at all; None: as the backend chooses."""
    with ExitStack() as stack:
        module = backends.TABLE[backend].module
        for name in ("segment", "adjoint_segment"):
            if steps is not None and hasattr(module, name):
                stack.enter_context(patch.object(module, name, lambda *sizes: steps))
        yield


def op_of(cell: str, backend: str):
    return partial(getattr(mk, cell), backend=backend)


def run(call: inputs.Call, op, device: torch.device) -> dict[str, torch.Tensor]:
    """Results of a call under their names and its gradients under the arguments', on the CPU."""
    call = call.to(device)
    leaves = {name: t.detach().requires_grad_() for name, t in call.tensors.items()}
    h, final_state = op(**leaves, **call.settings)
    grads = torch.autograd.grad((h, final_state), list(leaves.values()), (call.grad_h, call.grad_final))
    results = {"h": h.detach(), "final_state": final_state.detach()} | dict(zip(leaves, grads, strict=True))
    return {name: t.cpu() for name, t in results.items()}


def assert_right(call: inputs.Call, op, device: torch.device) -> None:
    """The results and every gradient agree with the reference."""
    failed = [result for result in compare.judge(call, run(call, op, device)) if not result.passed]
    assert not failed


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    def bits(t: torch.Tensor) -> torch.Tensor:
        return t.clone(memory_format=torch.contiguous_format).view(torch.uint8)

    differ = [name for name in a if not torch.equal(bits(a[name]), bits(b[name]))]
    assert not differ


def assert_agree(call: inputs.Call, one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Two ways to the same results: equal where the forward pass is exact, elsewhere within the limit."""
    terms = python_ref.CELLS[call.cell].adjoint(
        **call.tensors, **call.settings, grad_h=call.grad_h, grad_final=call.grad_final, term=abs
    )
    exact = is_exact(call)
    for name, result in one.items():
        if exact and name in ("h", "final_state"):
            assert errors.same_values(result, other[name]), name
        else:
            verdict = errors.judge(result, errors.wide(other[name]), terms[name])
            assert verdict.passed, (name, verdict)


def is_exact(call: inputs.Call) -> bool:
    return errors.is_exact(
        epsilon=call.settings.get("epsilon"),
        amplitude="amplitude" in call.tensors,
        initial_state=call.tensors.get("initial_state"),
        time=call.stream.shape[1],
        state=errors.state_dtype(call.stream.dtype),
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
    """Whatever states are saved, and if none are, then with the same bits."""
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
    """Few channels and a long time, with the segments of the backend's own choice."""
    if largest[0] < 200:
        pytest.skip("too long for an interpreted backend")
    factors = inputs.CELLS[cell].factors
    for seed in range(3):
        options = {name: values[seed % len(values)] for name, values in factors.items()}
        options |= {"time": 1900, "channels": 5, "initial_state": "real"}
        case = inputs.case(cell, inputs.CELLS[cell].dtypes[dtype], seed, **options)
        assert_right(case.build(), op_of(cell, backend), device)


NAN_SOURCES = {
    "candidate": {},
    "threshold": {},
    "threshold per channel": {"threshold": "channel"},
    "amplitude": {"amplitude": True},
    "alpha": {"alpha": True},
    "initial_state": {"initial_state": "integer"},
}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("batch", [3, "packed"])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("source", NAN_SOURCES)
def test_nan_stays_from_its_step_on_and_in_its_channel(backend, device, source, epsilon, batch, reverse):
    """In its sequence, not hidden by a hold nor undone by a write; and all else is as without it."""
    options = NAN_SOURCES[source] | {"epsilon": epsilon, "batch": batch, "reverse": reverse, "alpha": True}
    call = inputs.case("bmru", torch.float32, 5, time=150, channels=9, **options).build()
    row, time, channel = (0, 40, 3) if batch == "packed" else (1, 40, 3)
    touched = torch.zeros_like(call.stream, dtype=torch.bool)  # of h
    sequence = row
    if batch == "packed":
        cu_seqlens = torch.tensor([0, 10, 10, 120, 150], dtype=torch.int32)
        call = replace(call, settings=call.settings | {"cu_seqlens": cu_seqlens}, grad_final=call.grad_final[:4])
        if "initial_state" in call.tensors:
            call = replace(call, tensors=call.tensors | {"initial_state": call.tensors["initial_state"][:4]})
        sequence, span = 2, slice(10, 120)
    else:
        span = slice(0, 150)
    name = source.split()[0]
    dirty = call.tensors[name].clone()
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
    bad = replace(call, tensors=call.tensors | {name: dirty})
    for steps in (0, 64):
        with segments(backend, steps):
            clean, got = run(call, op_of("bmru", backend), device), run(bad, op_of("bmru", backend), device)
        assert got["h"][touched].isnan().all()
        assert torch.equal(got["h"][~touched], clean["h"][~touched])
        final = torch.zeros_like(got["final_state"], dtype=torch.bool)
        final[slice(None) if dirty.dim() == 1 else sequence, channel] = True
        if dirty.dim() == 1 and batch == "packed":
            final[1] = False  # of an empty sequence
        assert got["final_state"][final].isnan().all()
        assert torch.equal(got["final_state"][~final], clean["final_state"][~final])
        others = [d for d in range(9) if d != channel]
        for argument in call.tensors:
            assert torch.equal(got[argument][..., others], clean[argument][..., others]), argument


@pytest.mark.parametrize("steps", [0, 64])
@pytest.mark.parametrize("source", ["update", "decay", "decay per channel", "initial_state"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "c64"])
def test_nan_stays_in_a_linear_recurrence(backend, device, source, dtype, steps):
    name, *per_channel = source.split(maxsplit=1)
    options = {"decay": "channel" if per_channel else "stream", "initial_state": "real"}
    call = inputs.case("linear_recurrence", inputs.CELLS["linear_recurrence"].dtypes[dtype], 5, time=150, channels=9,
                       **options).build()  # fmt: skip
    dirty = call.tensors[name].clone()
    dirty[(1, 40, 3)[3 - dirty.dim() :] if dirty.dim() == 3 else (1, 3)[2 - dirty.dim() :]] = math.nan
    touched = torch.zeros_like(call.stream, dtype=torch.bool)
    touched[slice(None) if per_channel else 1, slice(40, None) if dirty.dim() == 3 else slice(None), 3] = True
    with segments(backend, steps):
        clean = run(call, op_of(call.cell, backend), device)
        got = run(replace(call, tensors=call.tensors | {name: dirty}), op_of(call.cell, backend), device)
    assert got["h"][touched].isnan().all()
    assert torch.equal(got["h"][~touched], clean["h"][~touched])
    others = [d for d in range(9) if d != 3]
    for result in got:
        assert torch.equal(got[result][..., others], clean[result][..., others]), result


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
    """A call whose channels write once in 150 steps, and the same with a NaN in one of them."""
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


@contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
    """Where time is long: what a backend cuts for its threads alone, with epsilon 0."""
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
    case = data.draw(cases(largest, batch=data.draw(st.integers(1, 3)), nonfinite=False))
    call = case.build()
    at = data.draw(st.integers(0, call.stream.shape[1]))
    op = op_of(call.cell, backend)

    def halves(*, initial_state=None, **arguments):
        def part(times: slice, state):
            cut = {
                name: t[:, times] if isinstance(t, torch.Tensor) and t.dim() == 3 else t
                for name, t in arguments.items()
            }
            return op(**cut, initial_state=state)

        first, second = slice(None, at), slice(at, None)
        if arguments["reverse"]:
            first, second = second, first
        h_first, state = part(first, initial_state)
        # State in the state dtype; its gradient comes back in it.
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
        turned = {
            name: t.flip(1) if isinstance(t, torch.Tensor) and t.dim() == 3 else t for name, t in arguments.items()
        }
        h, final_state = op(**turned, reverse=not reverse)
        return h.flip(1), final_state

    with segments(backend, steps):
        assert_agree(call, run(call, flipped, device), run(call, op_of(call.cell, backend), device))


@given(st.data())
def test_packed_sequences_equal_separate_calls(backend, device, largest, data):
    steps = data.draw(SEGMENTS)
    call = data.draw(cases(largest, batch="packed", nonfinite=False)).build()
    cuts = data.draw(st.lists(st.integers(0, call.stream.shape[1]), min_size=1, max_size=12))
    cuts = sorted([0, *cuts, call.stream.shape[1]])  # twelve of them: empty sequences, sequences of one step
    states = {name: t for name, t in call.tensors.items() if name == "initial_state"}
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

    def separate(*, cu_seqlens, initial_state=None, **arguments):
        results = []
        for n, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
            one = {
                name: t[:, start:end] if isinstance(t, torch.Tensor) and t.dim() == 3 else t
                for name, t in arguments.items()
            }
            state = None if initial_state is None else initial_state[n : n + 1]
            results.append(op(**one, initial_state=state))
        h, final_state = zip(*results, strict=True)
        return torch.cat(h, 1), torch.cat(final_state, 0)

    with segments(backend, steps):
        assert_agree(call, run(call, separate, device), run(call, op_of(call.cell, backend), device))


@given(st.data())
def test_a_sequence_does_not_depend_on_its_batch(backend, device, largest, data):
    """One call for each row of the batch gives what one call for all gives."""
    steps = data.draw(SEGMENTS)
    call = data.draw(cases(largest, batch=data.draw(st.integers(2, 3)), nonfinite=False)).build()
    op = op_of(call.cell, backend)

    def alone(*, initial_state=None, **arguments):
        results = []
        for n in range(call.stream.shape[0]):
            row = {
                name: t[n : n + 1] if isinstance(t, torch.Tensor) and t.dim() == 3 else t
                for name, t in arguments.items()
            }
            results.append(op(**row, initial_state=None if initial_state is None else initial_state[n : n + 1]))
        h, final_state = zip(*results, strict=True)
        return torch.cat(h, 0), torch.cat(final_state, 0)

    with segments(backend, steps):
        assert_agree(call, run(call, alone, device), run(call, op, device))


@given(st.data())
def test_no_sequence_at_all(backend, device, data):
    """T = 0 with `cu_seqlens` [0]; B = 0; D = 0."""
    steps = data.draw(SEGMENTS)
    call = data.draw(cases((3, 5), batch="packed", reverse=data.draw(st.booleans()))).build()
    empty = data.draw(st.sampled_from(["sequences", "batch", "channels", "time"]))
    tensors, others = dict(call.tensors), dict(call.settings)
    del others["cu_seqlens"]
    tensors.pop("initial_state", None)
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
    initial_state = torch.ones(states, dtype=errors.state_dtype(call.stream.dtype))
    tensors = streams | channel | {"initial_state": initial_state}
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
    """The step function time after time, in every dtype: each h, and the state, as exactly as any two ways agree."""
    call = data.draw(cases((20, 40), batch=data.draw(st.integers(1, 3)), reverse=False)).build()
    tensors = call.to(device).tensors
    settings = {name: x for name, x in call.settings.items() if name == "epsilon"}
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


def test_a_default_device_changes_nothing(backend, device):
    """Everything is made where the inputs are, or on the CPU."""
    x = torch.randn(1, 130, 3, device=device, requires_grad=True)
    channel, state = torch.rand(3, device=device), torch.randn(2, 3, device=device)
    options = {"cu_seqlens": torch.tensor([0, 70, 130], device=device), "backend": backend}
    row = x.detach()[:, 0].contiguous()

    def run() -> list[torch.Tensor]:
        results = [
            *mk.bmru(x, x, state, epsilon=0.31, alpha=channel, **options),  # an epsilon that no call has met
            *mk.schmitt(x, channel, channel + 0.5, state, epsilon=0.31, **options),
            *mk.linear_recurrence(channel, x, state, **options),
        ]
        (gradient,) = torch.autograd.grad([r.sum() for r in results], x)
        steps = [
            *mk.bmru_step(row, row, state[:1], epsilon=0.31),
            *mk.schmitt_step(row, channel, channel, state[:1], epsilon=0.31),
            *mk.linear_recurrence_step(channel, row, state[:1]),
        ]
        return [*results, gradient, *steps]

    with patch.object(backends, "_CHOSEN", backend):
        with torch.device("meta"):
            got = run()
        assert all(torch.equal(a, b) for a, b in zip(got, run(), strict=True))


# ------------------------------------------------------------------------------------------------ strides


@st.composite
def odd_views(draw, t: torch.Tensor) -> torch.Tensor:
    """A view of the shape and dtype of `t` with any strides, over values of `t`; most of them occur in users' code."""
    order = draw(st.permutations(range(t.dim())))
    steps = draw(st.tuples(*(st.sampled_from([0, 1, 1, 1, 2, 3]) for _ in order)))
    overlaps = draw(st.sampled_from([False, False, True]))  # as those of unfold do
    strides, extent = [0] * t.dim(), 1
    for dim, step in zip(order, steps, strict=True):
        strides[dim] = step * extent
        if t.shape[dim] == 1 and draw(st.booleans()):
            strides[dim] = draw(st.sampled_from([0, 1, 7, 2**40]))  # it is never taken
        elif not overlaps:
            extent *= max(t.shape[dim], 1) * max(step, 1)
    offset = draw(st.integers(0, 3))
    needed = offset + 1 + sum((n - 1) * stride for n, stride in zip(t.shape, strides, strict=True) if n > 0)
    values = t.flatten() if t.numel() else t.new_zeros(1)
    memory = values.repeat(max(-(-needed // values.numel()), 1))
    view = memory.as_strided(t.shape, strides, offset)
    if t.is_complex() and draw(st.booleans()):
        view = view.conj()
    return torch._neg_view(view) if draw(st.integers(0, 3)) == 0 else view


def contiguous(t: torch.Tensor) -> torch.Tensor:
    return t.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)


def assert_dense(result: torch.Tensor, stream: torch.Tensor) -> None:
    """`result` lies in memory as the docstrings say of a result for `stream`."""
    stream = stream.resolve_conj().resolve_neg()  # as torch does before an op runs, with strides of its own
    has_units = stream.shape[2] <= 1 or stream.stride(2) == 1
    time_major = has_units and stream.stride(1) > stream.stride(0) > 0
    assert result.stride(2) == 1
    assert (result.transpose(0, 1) if time_major else result).is_contiguous()


@given(st.data())
def test_strides_do_not_change_a_bit(backend, device, largest, data):
    """Neither in results nor in gradients, which are dense."""
    steps = data.draw(SEGMENTS)
    call = data.draw(cases(largest, layout="contiguous", nonfinite=False)).build().to(device)
    odd = replace(
        call,
        tensors={name: data.draw(odd_views(t)) for name, t in call.tensors.items()},
        grad_h=data.draw(odd_views(call.grad_h)),
        grad_final=data.draw(odd_views(call.grad_final)),
    )
    plain = replace(
        odd,
        tensors={name: contiguous(t) for name, t in odd.tensors.items()},
        grad_h=contiguous(odd.grad_h),
        grad_final=contiguous(odd.grad_final),
    )
    with segments(backend, steps):
        results = run(odd, op_of(call.cell, backend), device)
        assert_same_bits(results, run(plain, op_of(call.cell, backend), device))
    assert_dense(results["h"], odd.stream)
    for name, t in odd.tensors.items():
        if t.dim() == 3:
            assert_dense(results[name], t)
        else:
            assert results[name].is_contiguous()


@given(st.data())
def test_strides_of_packed_gates_do_not_change_a_bit(backend, device, largest, data):
    steps, gates = data.draw(SEGMENTS), data.draw(st.sampled_from([2, 3]))
    case = data.draw(cases(largest, cell="bmru", layout="contiguous", nonfinite=False))
    values = case.build().to(device).stream.repeat(1, 1, gates)
    odd = data.draw(odd_views(values))
    weight = odd.narrow(2, 0, values.shape[2] // gates)
    results = []
    for view in (odd, contiguous(odd)):
        leaf = view.detach().requires_grad_()
        with segments(backend, steps):
            h, final_state = bmru_packed(leaf, epsilon=0.5, amplitude=gates == 3, backend=backend)
            (grad,) = torch.autograd.grad((h, final_state), leaf, (weight, torch.ones_like(final_state)))
        results.append({"h": h.detach().cpu(), "final_state": final_state.detach().cpu(), "gates": grad.cpu()})
    assert_same_bits(*results)
    assert_dense(results[0]["gates"], odd)
    if odd.stride(2) == 1 or odd.shape[2] <= 1:
        assert_dense(results[0]["h"], weight)


@given(st.data())
def test_strides_do_not_change_a_bit_of_a_step(backend, device, data):
    call = data.draw(cases((1, 40), time=1, batch=data.draw(st.integers(1, 3)), nonfinite=False)).build().to(device)
    odd = {name: data.draw(odd_views(t[:, 0] if t.dim() == 3 else t)) for name, t in call.tensors.items()}
    odd["state"] = odd.pop("initial_state", None)
    if odd["state"] is None:
        odd["state"] = data.draw(odd_views(call.grad_final))
    step = getattr(mk, f"{call.cell}_step")
    with patch.object(backends, "_CHOSEN", backend):
        results = step(**odd)
        expected = step(**{name: contiguous(t) for name, t in odd.items()})
    assert all(t.is_contiguous() for t in results)
    assert_same_bits(*({"h": h.cpu(), "state": state.cpu()} for h, state in (results, expected)))


@pytest.mark.parametrize("name", ["candidate", "threshold"])
def test_windows_over_time(backend, device, name):
    """They overlap, and have one stride over time and channels: `empty_like` would give channels another than 1."""
    windows = torch.randn(2, 100, generator=torch.Generator().manual_seed(0)).unfold(1, 80, 1).to(device)
    assert torch.empty_like(windows).stride(2) != 1
    odd = inputs.call("bmru", {"candidate": contiguous(windows), "threshold": contiguous(windows.flip(1))}, {})
    odd = replace(odd, tensors=odd.tensors | {name: windows})
    plain = replace(odd, tensors={name: contiguous(t) for name, t in odd.tensors.items()})
    results = run(odd, op_of("bmru", backend), device)
    assert_same_bits(results, run(plain, op_of("bmru", backend), device))
    assert_dense(results["h"], odd.stream)
    assert_dense(results[name], windows)


# ------------------------------------------------------------------------------------------------ determinism


def _large(cell: str, largest: tuple[int, int], **options) -> inputs.Call:
    """A call large enough for several threads."""
    time, channels = largest
    options = {"time": time, "channels": channels, "batch": 4, "initial_state": "real"} | options
    return inputs.case(cell, torch.float32, **options).build()


VARIANTS = [
    {"epsilon": 0.9, "alpha": True},
    {"epsilon": 0.9, "alpha": True, "amplitude": True},
    {"epsilon": 0.9, "alpha": True, "threshold": "channel", "decay": "channel"},
    {"epsilon": 0.9, "alpha": True, "threshold": "channel", "batch": "packed", "reverse": True},
    {"epsilon": 0.0, "alpha": True},
]


def variants(cell: str) -> list[dict]:
    """`VARIANTS` as far as a cell has the factors."""
    factors = inputs.COMMON_FACTORS | inputs.CELLS[cell].factors
    reduced = [{name: value for name, value in options.items() if name in factors} for options in VARIANTS]
    return [options for i, options in enumerate(reduced) if options not in reduced[:i]]


@pytest.mark.parametrize("steps", [0, 64])
@pytest.mark.parametrize(("cell", "options"), [(cell, x) for cell in CELLS for x in variants(cell)], ids=str)
def test_same_bits_from_run_to_run_and_for_any_number_of_threads(backend, device, largest, cell, options, steps):
    call = _large(cell, largest, **options)
    with segments(backend, steps):
        with threads(1):
            alone = run(call, op_of(call.cell, backend), device)
        for count in (1, 2, 2, 3, 5):
            with threads(count):
                assert_same_bits(run(call, op_of(call.cell, backend), device), alone)


# ------------------------------------------------------------------------------------------------ memory


@contextmanager
def poisoned(device: torch.device):
    """Fresh memory is NaN."""
    if device.type == "cpu":
        perturb = -6  # glibc's M_PERTURB: fresh bytes are the complement of the value's lowest byte
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(perturb, 0x100)
        try:
            yield
        finally:
            mallopt(perturb, 0)
    else:  # by torch where it allocates; else by blocks of the caching allocator that held NaN
        for elements in (2**6, 2**10, 2**14, 2**18, 2**22):
            blocks = [torch.full((elements,), math.nan, device=device) for _ in range(16)]
            del blocks
        torch.use_deterministic_algorithms(True)  # fills uninitialised memory
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


class Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


def test_a_long_chunk_leaves_no_scratch():
    """The scratch of a chunk of 4096 steps is 16 MiB a thread, and would stay with the thread."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        pytest.skip("memory is counted by glibc")
    mallinfo.restype = Mallinfo

    def allocated() -> int:
        info = mallinfo()
        return info.uordblks + info.hblkhd

    x = torch.randn(1, 20, 1024)
    with threads(1):
        before = allocated()
        for chunk_size in (64, 4096):
            leaf = x.clone().requires_grad_()
            h, _ = mk.bmru(leaf, x, chunk_size=chunk_size, backend="cpu")
            h.sum().backward()
            del h, leaf
        assert allocated() - before < 2**20


@pytest.mark.parametrize("steps", [0, 64])
@pytest.mark.parametrize(("cell", "dtype"), [(cell, name) for cell in CELLS for name in inputs.CELLS[cell].dtypes])
def test_every_element_of_every_result_is_written(backend, device, largest, cell, dtype, steps):
    sizes = {"time": min(largest[0], 200), "channels": 19}
    for seed, options in enumerate([*variants(cell), {"batch": "packed"}, {"time": 0}, {"time": 1, "channels": 1}]):
        options = sizes | {"initial_state": "real"} | options
        call = inputs.case(cell, inputs.CELLS[cell].dtypes[dtype], seed, **options).build()
        with segments(backend, steps):
            clean = run(call, op_of(call.cell, backend), device)
            with poisoned(device):
                assert torch.empty(1000, device=device).isnan().all()
                dirty = run(call, op_of(call.cell, backend), device)
        assert not any(t.isnan().any() for t in clean.values())
        assert_same_bits(dirty, clean)
