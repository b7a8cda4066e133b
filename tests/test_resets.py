"""Resets of the state inside a sequence, and states at boundaries as results."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mru_kernels as mk
from bench import compare, inputs
from mru_kernels import backends
from tests import raw
from tests.calls import (
    CELLS,
    SEGMENTS,
    assert_agree,
    assert_same_bits,
    cases,
    op_of,
    part_of,
    run,
    segments,
)

CHUNK = 64


def piecewise(op, *, resets, reset_state=None, initial_state=None, reverse=False, **arguments):
    """What `op` computes with resets, by one call for each piece between them, of streams [1, T, D]."""
    time = resets.shape[1]
    starts = [t for t in range(time) if resets[0, time - 1 - t if reverse else t]]
    bounds = sorted({0, *starts, time})
    outputs, state = [], initial_state
    unused = sum(0 * x.sum() for x in (initial_state, reset_state) if x is not None)  # so that it has a gradient
    for start, stop in pairwise(bounds):
        times = slice(time - stop, time - start) if reverse else slice(start, stop)
        if start in starts:
            state = reset_state
        h, state = op(**part_of(arguments, times=times), initial_state=state, reverse=reverse)
        outputs.append(h)
    return torch.cat(outputs[::-1] if reverse else outputs, 1), state + unused


@given(st.data())
def test_equal_the_pieces_scanned_apart(backend, device, largest, data):
    steps = data.draw(SEGMENTS)
    resets = data.draw(st.sampled_from(["to zeros", "to a state"]))
    call = data.draw(cases(largest, batch=1, resets=resets, boundaries=False, nonfinite=False)).build()
    time = call.stream.shape[1]
    if time == 0:
        return
    at = data.draw(st.sampled_from([set(), {0}, {time - 1}, {0, time - 1}, set(range(time)), set(range(0, time, 5))]))
    mask = torch.tensor([[t in at for t in range(time)]])
    call = replace(call, settings=call.settings | {"resets": mask})
    op = op_of(call.cell, backend)
    with segments(backend, steps):
        whole = run(call, op, device)
        apart = run(call, lambda **arguments: piecewise(op, **arguments), device)
    assert_agree(call, apart, whole)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("steps", [0, 64])
def test_a_mask_without_resets_changes_no_bit(backend, device, cell, reverse, steps):
    call = inputs.case(
        cell, torch.float32, batch=2, time=200, channels=5, initial_state="real", reverse=reverse
    ).build()
    masked = replace(call, settings=call.settings | {"resets": torch.zeros(2, 200, dtype=torch.bool)})
    op = op_of(cell, backend)
    with segments(backend, steps):
        assert_same_bits(run(masked, op, device), run(call, op, device))


@pytest.mark.parametrize("epsilon", [0.0, 0.5])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("steps", [0, 64])
def test_a_reset_is_held_over_many_segments(backend, device, epsilon, reverse, steps):
    """Nothing is written, so that the initial state lasts until the reset, and the reset state to the end."""
    time, at = 400, 150
    candidate = torch.zeros(1, time, 3, device=device)
    resets = torch.zeros(1, time, dtype=torch.bool, device=device)
    resets[0, time - 1 - at if reverse else at] = True
    initial, reset_state = (torch.full((1, 3), x, device=device, requires_grad=True) for x in (2.0, 3.0))
    settings = {"epsilon": epsilon, "resets": resets, "reset_state": reset_state, "reverse": reverse}
    with segments(backend, steps):
        h, state = mk.bmru(candidate, candidate + 1, initial, **settings, backend=backend)
        weights = torch.arange(1.0, time + 1, device=device)
        in_order = (h.flip(1) if reverse else h)[0, :, 0]
        grads = torch.autograd.grad((in_order * weights).sum(), (initial, reset_state))
    assert in_order.tolist() == [2.0] * at + [3.0] * (time - at)
    assert state.tolist() == [[3.0] * 3]
    assert [g[0, 0].item() for g in grads] == [weights[:at].sum().item(), weights[at:].sum().item()]


@pytest.mark.parametrize("channels", [5, 40])
def test_a_write_just_before_a_reset_is_remembered(backend, device, channels):
    """Both are in one word of write codes."""
    call = inputs.case("bmru", torch.float32, batch=1, time=300, channels=channels, initial_state="real").build()
    call.tensors["candidate"].zero_()
    call.tensors["candidate"][:, 65] = 9.0
    resets = torch.zeros(1, 300, dtype=torch.bool)
    resets[0, 70] = True
    call = replace(call, settings=call.settings | {"resets": resets})
    with segments(backend, 64):
        assert not [r for r in compare.judge(call, run(call, op_of("bmru", backend), device)) if not r.passed]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("steps", [0, 64])
def test_a_nan_does_not_pass_a_reset(backend, device, cell, steps):
    call = inputs.case(cell, torch.float32, batch=1, time=300, channels=3).build().to(device)
    call.stream[0, 20, 1] = float("nan")
    resets = torch.zeros(1, 300, dtype=torch.bool, device=device)
    resets[0, 210] = True
    with segments(backend, steps):
        h, state = op_of(cell, backend)(**call.tensors, **call.settings, resets=resets)
        after, _ = op_of(cell, backend)(**part_of(call.tensors, times=slice(210, None)), **call.settings)
    assert h[0, 20:210, 1].isnan().all()
    assert torch.allclose(h[:, 210:], after, rtol=0, atol=1e-5)
    assert state.isfinite().all()


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("steps", [0, 64])
def test_the_reset_state_may_be_nan(backend, device, cell, steps):
    call = inputs.case(cell, torch.float32, batch=1, time=200, channels=2).build().to(device)
    resets = torch.zeros(1, 200, dtype=torch.bool, device=device)
    resets[0, 70] = True
    state = torch.tensor([1.0, float("nan")], dtype=inputs.CELLS[cell].state_dtype(torch.float32), device=device)
    with segments(backend, steps):
        h, _ = op_of(cell, backend)(**call.tensors, **call.settings, resets=resets, reset_state=state)
    assert h[..., 0].isfinite().all()
    assert h[0, :70, 1].isfinite().all()
    assert h[0, 70:, 1].isnan().all()


def test_one_reset_state_for_all_sequences(backend, device):
    """`[D]` is the same as `[N, D]`; its gradient is the sum over the sequences."""
    call = inputs.case("linear_recurrence", torch.float64, batch=3, time=100, channels=4, resets="to a state").build()
    call = call.to(device)
    state = call.tensors["reset_state"][0].double().detach().requires_grad_()
    rows = state.detach().expand(3, -1).clone().requires_grad_()
    settings = call.settings | {name: call.tensors[name] for name in ("update", "decay")}
    op = op_of("linear_recurrence", backend)
    one, several = op(**settings, reset_state=state), op(**settings, reset_state=rows)
    assert torch.equal(one[0], several[0])
    (grad,) = torch.autograd.grad(one[0].sum(), state)
    (of_rows,) = torch.autograd.grad(several[0].sum(), rows)
    torch.testing.assert_close(grad, of_rows.sum(0), rtol=1e-14, atol=0)


@pytest.mark.parametrize("steps", [None, 64])
def test_the_gradient_of_many_resets_is_summed_precisely(backend, device, steps):
    time = 1 << (16 if backend == "cpu" else 9)
    decay = torch.full((1, time, 2), 0.3, device=device)
    resets = torch.ones(1, time, dtype=torch.bool, device=device)
    state = torch.zeros(2, device=device, requires_grad=True)
    with segments(backend, steps):
        h, _ = mk.linear_recurrence(decay, decay, resets=resets, reset_state=state, backend=backend)
        (grad,) = torch.autograd.grad(h, state, torch.full_like(h, 0.1))
    expected = time * float(torch.tensor(0.3)) * float(torch.tensor(0.1))
    torch.testing.assert_close(grad.cpu().double(), torch.full((2,), expected).double(), rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("batch", [2, "packed"])
@pytest.mark.parametrize("reverse", [False, True])
def test_second_derivatives_with_resets(backend, device, dtype, batch, reverse):
    options = {"time": 9, "channels": 2, "initial_state": "real", "resets": "to a state", "parameters": "as streams"}
    call = inputs.case("linear_recurrence", dtype, seed=4, batch=batch, reverse=reverse, **options).build().to(device)
    call.settings["resets"][:, [0, 4, 8]] = torch.tensor([True, True, False], device=device)
    tensors = [t.detach().to(dtype).requires_grad_() for t in call.tensors.values()]

    def op(*tensors):
        named = dict(zip(call.tensors, tensors, strict=True))
        return op_of("linear_recurrence", backend)(**named, **call.settings)

    assert torch.autograd.gradcheck(op, tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(op, tensors)


@pytest.mark.parametrize("resets", [None, "to a state"])
@pytest.mark.parametrize(
    ("offsets", "reverse"), [(None, False), (None, True), ([0, 5, 21, 39], False), ([0, 5, 39], True)]
)
def test_second_derivatives_through_boundaries(backend, device, offsets, reverse, resets):
    options = {"time": 39, "channels": 2, "initial_state": "real", "resets": resets, "parameters": "as streams"}
    call = inputs.case("linear_recurrence", torch.float64, seed=4, batch=2, reverse=reverse, **options).build()
    call = call.to(device)
    if offsets is not None:
        sequences = len(offsets) - 1
        tensors = {name: t[:1] if t.dim() == 3 else t[:1].expand(sequences, -1) for name, t in call.tensors.items()}
        masks = {name: t[:1] for name, t in call.settings.items() if name == "resets" and t is not None}
        settings = call.settings | masks | {"cu_seqlens": torch.tensor(offsets, device=device)}
        call = replace(call, tensors=tensors, settings=settings)
    leaves = [t.detach().clone().requires_grad_() for t in call.tensors.values()]

    def op(*leaves):
        named = dict(zip(call.tensors, leaves, strict=True))
        return op_of("linear_recurrence", backend)(
            **named, **call.settings | {"chunk_size": 16}, return_boundaries=True
        )

    assert op(*leaves)[2].any()
    options = {"fast_mode": True}
    assert torch.autograd.gradcheck(op, leaves, check_forward_ad=True, **options)
    assert torch.autograd.gradgradcheck(op, leaves, check_fwd_over_rev=True, check_rev_over_rev=True, **options)


# ---------------------------------------------------------------------------------------------- boundaries


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("time", [1, 64, 65, 128, 200])
@pytest.mark.parametrize("steps", [0, 64, 128])
def test_boundaries_are_the_states_after_every_chunk(backend, device, cell, reverse, time, steps):
    call = inputs.case(cell, torch.float64, batch=2, time=time, channels=5, reverse=reverse).build().to(device)
    op = op_of(cell, backend)
    with segments(backend, steps):
        h, state, boundaries = op(**call.tensors, **call.settings, return_boundaries=True)
        same_h, same_state = op(**call.tensors, **call.settings)
        assert torch.equal(h, same_h)
        assert torch.equal(state, same_state)
        assert boundaries.shape == (2, (time - 1) // CHUNK, 5)
        for k in range(boundaries.shape[1]):
            steps_before = (k + 1) * CHUNK
            times = slice(time - steps_before, None) if reverse else slice(None, steps_before)
            _, expected = op(**part_of(call.tensors, times=times), **call.settings)
            torch.testing.assert_close(boundaries[:, k], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("steps", [0, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradients_of_boundaries_join_the_adjoint(backend, device, reverse, steps, dtype):
    """The state of a linear recurrence is its output, so that a gradient may come by either."""
    call = inputs.case("linear_recurrence", dtype, batch=2, time=200, channels=3, reverse=reverse).build().to(device)
    leaves = [t.detach().requires_grad_() for t in call.tensors.values()]
    named = dict(zip(call.tensors, leaves, strict=True))
    op = op_of("linear_recurrence", backend)
    with segments(backend, steps):
        h, _, boundaries = op(**named, **call.settings, return_boundaries=True)
        in_order = h.flip(1) if reverse else h
        g = torch.randn_like(boundaries)
        by_boundaries = torch.autograd.grad(boundaries, leaves, g)
        h, _ = op(**named, **call.settings)
        in_order = h.flip(1) if reverse else h
        by_output = torch.autograd.grad(in_order[:, CHUNK - 1 :: CHUNK], leaves, g)
    for one, other in zip(by_boundaries, by_output, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [16, 48, 128])
def test_boundaries_every_few_steps(backend, device, chunk_size):
    least, most = backends.TABLE[backend].module.CHUNK_SIZES
    if not least <= chunk_size <= most:
        pytest.skip(f"the backend takes chunk sizes from {least} to {most}")
    options = {"batch": "packed", "time": 300, "channels": 5, "epsilon": 0.5, "initial_state": "real"}
    for resets in ("none", "to a state"):
        call = inputs.case("bmru", torch.float32, seed=3, boundaries=True, resets=resets, **options).build()
        rows = torch.randn(1, 299 // chunk_size, 5)
        call = replace(call, settings=call.settings | {"chunk_size": chunk_size}, grad_boundaries=rows)
        assert not [r for r in compare.judge(call, run(call, op_of("bmru", backend), device)) if not r.passed]


@pytest.mark.parametrize("epsilon", [0.0, 0.5])
@pytest.mark.parametrize("resets", ["none", "to a state"])
def test_gradients_of_boundaries_where_time_is_cut(backend, device, epsilon, resets):
    options = {"time": 300, "channels": 5, "initial_state": "real", "boundaries": True, "resets": resets}
    call = inputs.case("bmru", torch.float32, batch=2, epsilon=epsilon, **options).build()
    call.tensors["candidate"].mul_(1e-3)  # hardly any write
    with segments(backend, 64):
        assert not [r for r in compare.judge(call, run(call, op_of("bmru", backend), device)) if not r.passed]


def test_boundaries_serve_inference(backend, device):
    x = torch.randn(2, 130, 3, device=device)
    with torch.no_grad():
        *_, boundaries = mk.bmru(x, x, return_boundaries=True, backend=backend)
    assert boundaries.shape == (2, 2, 3)


# ---------------------------------------------------------------------------------------------- torch


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(backend, device, cell, dynamic):
    call = inputs.case(cell, torch.float32, batch=2, time=150, channels=5, resets="to a state", boundaries=True).build()

    def op(**arguments):
        return op_of(cell, backend)(**arguments)

    torch._dynamo.reset()  # the limit of recompilations is one for `op` of all cells
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert_same_bits(run(call, compiled, device), run(call, op, device))


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(backend, device, packed):
    options = {"batch": "packed" if packed else 2, "resets": "to a state", "initial_state": "real", "epsilon": 0.5}
    call = inputs.case("bmru", torch.float32, time=150, channels=5, **options).build().to(device)
    arguments = raw.scan(call, segment=64)
    for t in raw.tensors_of(arguments):
        t.requires_grad_()
    torch.library.opcheck(raw.ops.CELLS["bmru"].forward[backend], tuple(arguments.values()))
    named = raw.backward(arguments, raw.run(raw.ops.CELLS["bmru"].forward[backend], arguments))
    named["grad_checkpoints"] = torch.ones_like(named["checkpoints"])
    frozen = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, named)
    torch.library.opcheck(raw.ops.CELLS["bmru"].backward[backend], tuple(frozen.values()))


def test_the_map_of_a_sequence_with_a_reset_is_a_constant(backend, device):
    call = inputs.case("linear_recurrence", torch.float64, batch=2, time=200, channels=3).build().to(device)
    resets = torch.zeros(2, 200, dtype=torch.bool, device=device)
    resets[0, 150] = True
    reset_state = torch.full((2, 3), 7.0, dtype=torch.float64, device=device)
    without = raw.scan(call, segment=64)
    arguments = without | {"resets": resets, "reset_state": reset_state}
    factor, offset = raw.run(raw.ops.CELLS["linear_recurrence"].map[backend], arguments)
    _, state, *_ = raw.run(raw.ops.CELLS["linear_recurrence"].forward[backend], arguments)
    assert (factor[0] == 0).all()
    assert torch.equal(factor[1], raw.run(raw.ops.CELLS["linear_recurrence"].map[backend], without)[0][1])
    torch.testing.assert_close(offset, state, rtol=1e-12, atol=1e-12)


def test_vmap_over_the_reset_state(backend, device):
    x = torch.randn(2, 70, 3, device=device)
    resets = torch.rand(2, 70, device=device) < 0.2
    states = torch.randn(4, 2, 3, device=device)

    def op(state):
        return mk.bmru(x, x, epsilon=0.5, resets=resets, reset_state=state, backend=backend)[0]

    assert torch.equal(torch.vmap(op)(states), torch.stack([op(s) for s in states]))
    with pytest.raises(ValueError, match=r"^resets: expected one tensor for the whole batch"):
        torch.vmap(lambda r: mk.bmru(x, x, resets=r, backend=backend)[0])(resets.expand(2, 2, 70))


B, T, D = 2, 5, 3
BAD = [
    ({"resets": torch.zeros(B, T)}, TypeError, "resets: expected dtype bool, got torch.float32"),
    ({"resets": torch.zeros(B, T + 1).bool()}, ValueError, r"resets: expected shape \[2, 5\].*got \[2, 6\]"),
    ({"resets": torch.zeros(B, T, D).bool()}, ValueError, r"resets: expected 2 dimensions"),
    ({"resets": [True]}, TypeError, "resets: expected a tensor.*got list"),
    ({"resets": torch.zeros(B, T, device="meta").bool()}, ValueError, "resets: expected the streams' device"),
    ({"reset_state": torch.zeros(B, D)}, ValueError, "reset_state: expected resets with it, got None"),
    ({"reset_state": torch.zeros(D)}, ValueError, "reset_state: expected resets with it, got None"),
    (
        {"reset_state": torch.zeros(B + 1, D), "resets": torch.zeros(B, T).bool()},
        ValueError,
        r"reset_state: expected shape",
    ),
    (
        {"reset_state": torch.zeros(D + 1), "resets": torch.zeros(B, T).bool()},
        ValueError,
        r"reset_state: expected shape",
    ),
    ({"reset_state": 1.0, "resets": torch.zeros(B, T).bool()}, TypeError, "reset_state: expected a tensor"),
    (
        {"reset_state": torch.zeros(D).int(), "resets": torch.zeros(B, T).bool()},
        TypeError,
        "reset_state: expected a dtype",
    ),
    ({"return_boundaries": 1}, TypeError, "return_boundaries: expected a bool, got int"),
    (
        {"return_boundaries": True, "chunk_size": None},
        ValueError,
        "chunk_size: expected the steps between two boundaries",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_input_is_refused_by_name(arguments, error, message):
    x = torch.zeros(B, T, D)
    for backend in (None, "torch"):
        with pytest.raises(error, match=f"^{message}"):
            mk.bmru(x, x, backend=backend, **arguments)
