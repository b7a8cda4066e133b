"""The softmax recurrence: its definition and gradients in float64, exact rules, layouts, and cuts of time."""

from __future__ import annotations

import itertools

import pytest
import torch

import mru_kernels as mk
from bench import verify
from mru_kernels.softmax import empty_state, scan_gates, split_state
from python_ref import softmax_recurrence as reference
from tests.softmax_calls import draw, error, gradients, leaves, scan, segments

INF, NAN = torch.inf, torch.nan
OFFSETS = torch.tensor([0, 0, 37, 101, 101, 150], dtype=torch.int32)
#: Options of a call: (decay, bonus).
FORMS = list(itertools.product((None, "head", "stream"), (False, True)))


def check(call, backend, limit=1e-11, wanted=None, **options) -> None:
    """The results and all gradients equal those of the definition."""
    ours, theirs = leaves(call), leaves(call)
    got = scan(ours, backend, **options)
    wanted = wanted or reference.scan(
        reference.definition, **theirs, **{k: options[k] for k in options if k != "chunk_size"}
    )
    heads = call["score"].shape[-1]
    for result, right in zip(
        (got[0], *split_state(got[1], heads)[:2]), (wanted[0], *split_state(wanted[1], heads)[:2]), strict=True
    ):
        assert error(result, right) < limit
    of_ours, of_theirs = gradients(ours, got), gradients(theirs, wanted)
    for name, grad in of_ours.items():
        assert grad.dtype == call[name].dtype
        assert error(grad, of_theirs[name]) < limit, name


@pytest.mark.parametrize("group", [1, 2, 64])
@pytest.mark.parametrize(("decay", "bonus"), FORMS)
def test_definition_and_gradients(backend, group, decay, bonus):
    sizes = {"heads": 19, "time": 80} if group == 1 else {"batch": 1, "heads": 2, "time": 80}
    call = draw(group=group, decay=decay, bonus=bonus, state=True, masked=0.3, scale=30.0, **sizes)
    check(call, backend, chunk_size=32)


@pytest.mark.parametrize("scale", [1.0, 300.0])
@pytest.mark.parametrize("decay", ["head", "stream"])
@pytest.mark.parametrize(("shift", "fastest"), [(1000.0, -1.0), (0.0, -80.0), (0.0, -2000.0)])
def test_definition_of_large_scores_and_decays(backend, scale, decay, shift, fastest):
    call = draw(decay=decay, bonus=True, scale=scale, shift=shift, masked=0.3, fastest=fastest, slowest=-1e-6)
    call["decay"][..., -1] = fastest
    check(call, backend, chunk_size=32)


@pytest.mark.parametrize("group", [1, 5])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("decay", ["head", "stream"])
def test_directions_and_packed_sequences(backend, group, reverse, packed, decay):
    offsets = OFFSETS if packed else None
    options = {"batch": 1, "sequences": 5} if packed else {}
    call = draw(group=group, decay=decay, bonus=True, state=True, **options)
    check(call, backend, reverse=reverse, cu_seqlens=offsets, chunk_size=16)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("decay", "bonus"), FORMS)
def test_time_cut_into_segments(backend, group, reverse, packed, decay, bonus):
    offsets = OFFSETS if packed else None
    options = {"batch": 1, "sequences": 5} if packed else {}
    call = draw(group=group, decay=decay, bonus=bonus, state=True, masked=0.2, scale=10.0, fastest=-20.0, **options)
    with segments(32):
        check(call, backend, reverse=reverse, cu_seqlens=offsets, chunk_size=16)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("bonus", [False, True])
def test_plain_torch_equals_the_definition(group, bonus):
    call = draw(time=40, group=group, decay="stream", bonus=bonus, state=True, masked=0.3, scale=30.0)
    check(call, "torch", chunk_size=16)
    packed = draw(batch=1, sequences=5, group=group, decay="head", bonus=bonus, state=True)
    check(packed, "torch", reverse=True, cu_seqlens=OFFSETS)


# ------------------------------------------------------------------------------------------------ exact rules

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("decay", "bonus"), FORMS)
def test_the_first_value_is_copied(backend, dtype, decay, bonus):
    call = draw(time=1, group=3, decay=decay, bonus=bonus, scale=100.0, dtype=dtype)
    y, state = scan(call, backend)
    assert torch.equal(y, scan(call, "torch")[0])
    assert torch.equal(y, call["value"])
    mean, high, low = split_state(state, 3)
    assert torch.equal(mean, call["value"][:, 0].to(state.dtype))
    assert torch.equal(high, call["score"][:, 0].to(state.dtype))
    assert not low.any()


@pytest.mark.parametrize("group", [1, 2, 20])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_decay_of_minus_infinity_ends_the_past(backend, group, dtype):
    call = draw(group=group, decay="stream", state=True, dtype=dtype)
    ends = torch.rand(call["decay"].shape) < 0.2
    call["decay"][ends] = -INF
    y, _ = scan(call, backend, chunk_size=16)
    of_channels = ends.repeat_interleave(group, -1)
    assert torch.equal(y[of_channels], call["value"][of_channels])


@pytest.mark.parametrize("group", [1, 2])
def test_a_vast_decay_with_a_vast_bonus(backend, group):
    call = draw(group=group, decay="head", bonus=True, dtype=torch.float32)
    call["decay"].fill_(-3e38), call["bonus"].fill_(3e38)
    y, final = scan(call, backend)
    assert torch.equal(y, call["value"])
    assert torch.equal(final[:, : y.shape[-1]], y[:, -1])


@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("group", [1, 2])
def test_gradients_where_the_past_ends(backend, bonus, group):
    call = draw(group=group, decay="stream", bonus=bonus, state=True)
    call["decay"][torch.rand(call["decay"].shape) < 0.2] = -INF
    ours = leaves(call)
    y, final = scan(ours, backend, chunk_size=16)
    wide = dict.fromkeys(("bonus",)) | {name: t.detach() for name, t in call.items()}
    wide["state"] = wide.pop("initial_state")
    right, last = reference.loop(**wide)
    assert error(y, right) < 1e-11
    assert error(final[:, :-3], last[:, :-3]) < 1e-11
    torch.manual_seed(1)
    of_y, of_final = torch.randn_like(y), torch.randn_like(final)
    got = dict(zip(ours, torch.autograd.grad([y, final], list(ours.values()), [of_y, of_final]), strict=True))
    wanted = reference.gradients(of_y, of_final, **wide)
    assert not got["decay"][call["decay"] == -INF].any()
    for name, grad in got.items():
        right = wanted[name].sum((0, 1)) if name == "bonus" else wanted[name]
        assert error(grad, right) < 1e-11, name


@pytest.mark.parametrize("group", [1, 20])
def test_a_score_far_above_all_others_holds_its_value(backend, group):
    call = draw(group=group, dtype=torch.float32)
    call["score"][:, 40] += 130.0
    y, _ = scan(call, backend, chunk_size=16)
    assert torch.equal(y[:, 40:], call["value"][:, 40:41].expand(-1, 110, -1))


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("group", [1, 5])
@pytest.mark.parametrize(("decay", "bonus"), FORMS)
def test_a_split_at_a_chunk_changes_no_bit(backend, dtype, group, decay, bonus):
    call = draw(group=group, decay=decay, bonus=bonus, state=True, dtype=dtype, masked=0.1)
    with segments(0):
        whole, final = scan(call, backend, chunk_size=16)
        first = {name: t[:, :48] if t.dim() == 3 else t for name, t in call.items()}
        y1, state = scan(first, backend, chunk_size=16)
        rest = {name: t[:, 48:] if t.dim() == 3 else t for name, t in call.items()} | {"initial_state": state}
        y2, last = scan(rest, backend, chunk_size=16)
    assert torch.equal(torch.cat([y1, y2], 1), whole)
    assert torch.equal(last, final)


def test_gradients_pass_through_a_split(backend):
    call = draw(group=2, decay="head", bonus=True, scale=5.0)
    whole, parts = leaves(call), leaves(call)
    results = scan(whole, backend, chunk_size=16)
    first = {name: t[:, :50] if t.dim() == 3 else t for name, t in parts.items()}
    y1, state = scan(first, backend, chunk_size=16)
    rest = {name: t[:, 50:] if t.dim() == 3 else t for name, t in parts.items()} | {"initial_state": state}
    y2, last = scan(rest, backend, chunk_size=16)
    wanted = gradients(whole, results)
    for name, grad in gradients(parts, (torch.cat([y1, y2], 1), last)).items():
        assert error(grad, wanted[name]) < 1e-11, name


@pytest.mark.parametrize("group", [1, 20])
def test_only_differences_of_scores_count(backend, group):
    torch.manual_seed(0)
    call = draw(time=64, group=group, dtype=torch.float32)
    integers = torch.randint(-9, 9, call["score"].shape).float()
    options = {"decay": torch.tensor([-1.0, 0.0, -2.0]), "bonus": torch.tensor([2.0, -3.0, 1.0])}
    y, _ = scan(call | options | {"score": integers}, backend)
    shifted, _ = scan(call | options | {"score": integers + 1024.0}, backend)
    assert torch.equal(y, shifted)


@pytest.mark.parametrize("group", [1, 5])
def test_packed_sequences_and_directions_are_exact(backend, group):
    call = draw(batch=1, sequences=5, group=group, decay="stream", bonus=True, state=True, dtype=torch.float32)
    offsets = OFFSETS.tolist()
    with segments(0):
        packed, finals = scan(call, backend, cu_seqlens=OFFSETS, chunk_size=16)
        for n, (start, stop) in enumerate(itertools.pairwise(offsets)):
            own = {name: t[:, start:stop] if t.dim() == 3 else t for name, t in call.items()}
            y, final = scan(own | {"initial_state": call["initial_state"][n : n + 1]}, backend, chunk_size=16)
            assert torch.equal(y, packed[:, start:stop])
            assert torch.equal(final, finals[n : n + 1])
        one = call | {"initial_state": call["initial_state"][:1]}
        flipped = {name: t.flip(1) if t.dim() == 3 else t for name, t in one.items()}
        y, final = scan(one, backend, reverse=True, chunk_size=16)
        there, last = scan(flipped, backend, chunk_size=16)
    assert torch.equal(y, there.flip(1))
    assert torch.equal(final, last)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("bonus", [False, True])
def test_nothing_but_masks_is_zero(backend, group, bonus):
    call = leaves(draw(time=40, group=group, decay="head", bonus=bonus, masked=1.1))
    y, state = scan(call, backend, chunk_size=16)
    assert torch.equal(y, torch.zeros_like(y))
    assert torch.equal(state, empty_state(call["value"], 2, 3 * group, 3))
    for grad in torch.autograd.grad(y.sum() + state[:, : 3 * group].sum(), list(call.values())):
        assert not grad.any()


@pytest.mark.parametrize("group", [1, 20])
@pytest.mark.parametrize("masked", [0.0, 0.5])
@pytest.mark.parametrize("bonus", [False, True])
def test_nan(backend, group, masked, bonus):
    call = draw(group=group, bonus=bonus, masked=masked, dtype=torch.float32)
    clean, _ = scan(call, backend, chunk_size=16)
    bad = {name: t.clone() for name, t in call.items()}
    bad["score"][0, 70, 1] = NAN
    y, state = scan(bad, backend, chunk_size=16)
    head = slice(group, 2 * group)
    assert y[0, 70:, head].isnan().all()
    assert state[0, head].isnan().all()
    assert split_state(state, 3)[1][0].isnan().tolist() == [False, True, False]
    y[0, 70:, head] = clean[0, 70:, head]
    assert torch.equal(y, clean)

    bad = {name: t.clone() for name, t in call.items()}
    bad["value"][0, 70, group] = NAN
    y, state = scan(bad, backend, chunk_size=16)
    assert y[0, 70:, group].isnan().all()
    assert state.isnan().sum() == 1
    y[0, 70:, group] = clean[0, 70:, group]
    assert torch.equal(y, clean)


def test_no_steps_and_no_sequences(backend):
    call = leaves(draw(time=0, group=2, decay="head", bonus=True, state=True))
    y, final = scan(call, backend)
    assert y.shape == (2, 0, 6)
    assert torch.equal(final, call["initial_state"])
    grads = torch.autograd.grad(final[:, :9].sum(), list(call.values()))
    assert not grads[2].any()
    assert not grads[3].any()
    assert torch.equal(grads[4][:, :9], torch.where(final[:, :9].isinf(), 0.0, 1.0)) or torch.equal(
        grads[4][:, :9], torch.ones(2, 9)
    )
    none = draw(batch=1, time=0, sequences=0, state=True)
    y, final = scan(none, backend, cu_seqlens=torch.tensor([0]))
    assert y.shape == (1, 0, 3)
    assert final.shape == (0, 9)
    y, _ = mk.softmax_recurrence(torch.randn(0, 5, 3), torch.randn(0, 5, 3), backend=backend)
    assert y.shape == (0, 5, 3)


# ------------------------------------------------------------------------------------------------ threads, layouts


@pytest.mark.parametrize("fastest", [-5.0, -80.0])
@pytest.mark.parametrize("group", [1, 4])
def test_results_do_not_depend_on_the_number_of_threads(backend, group, fastest):
    call = draw(time=200, heads=37, group=group, decay="head", bonus=True, state=True, dtype=torch.float32)
    call["decay"][0] = fastest
    found = []
    for threads in (1, 2, 3):
        with verify.threads(threads):
            ours = leaves(call)
            results = scan(ours, backend, chunk_size=16)
            found.append([*results, *gradients(ours, results).values()])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("group", [1, 4])
def test_layouts_and_packed_gates(backend, group):
    call = draw(group=group, heads=5, decay="stream", dtype=torch.float32)
    wanted = scan(call, backend)
    strided = {name: t.transpose(0, 1).contiguous().transpose(0, 1) for name, t in call.items()}
    strided["score"] = torch.stack([call["score"], call["score"]], -1)[..., 0]
    got = scan(strided, backend)
    assert torch.equal(got[0], wanted[0])
    assert got[0].stride() == strided["value"].stride()
    gates = torch.cat([call["score"], call["value"]], -1).requires_grad_()
    ours = leaves(call)
    wanted = scan(ours, backend)
    got = scan_gates(gates, 5, decay=call["decay"], backend=backend)
    assert all(map(torch.equal, got, wanted))
    torch.manual_seed(1)
    of_y = torch.randn_like(wanted[0])
    of_score, of_value = torch.autograd.grad(wanted[0], [ours["score"], ours["value"]], of_y)
    (of_gates,) = torch.autograd.grad(got[0], [gates], of_y)
    assert torch.equal(of_gates, torch.cat([of_score, of_value], -1))


def test_steps_equal_a_scan(backend):
    call = draw(time=20, group=2, decay="stream", bonus=True, dtype=torch.float32)
    y, final = scan(call, backend)
    state, outputs = None, []
    for t in range(20):
        out, state = mk.softmax_recurrence_step(
            call["score"][:, t], call["value"][:, t], state, decay=call["decay"][:, t], bonus=call["bonus"]
        )
        outputs.append(out)
    torch.testing.assert_close(torch.stack(outputs, 1), y)
    torch.testing.assert_close(state[:, :9], final[:, :9])


def test_wkv_is_the_recurrence_with_a_score_for_each_channel(backend):
    call = draw(decay="head", bonus=True, dtype=torch.float32)
    wanted = scan(call, backend)
    got = mk.wkv(call["score"], call["value"], call["decay"], call["bonus"], backend=backend)
    assert all(map(torch.equal, got, wanted))
    one = [call[name][:, 0] for name in ("score", "value")]
    y, state = mk.wkv_step(*one, call["decay"], call["bonus"], None)
    assert torch.equal(y, one[1])
    assert state.shape == (2, 9)


def test_sums_of_gradients(backend):
    """Without a state the gradients of scores add up to 0, and those of values to those of y; dw = du - sum t dk."""
    call = leaves(draw(decay="head", bonus=True))
    y, _ = scan(call, backend)
    torch.manual_seed(1)
    g = torch.randn_like(y)
    of = dict(zip(call, torch.autograd.grad(y, list(call.values()), g), strict=True))
    assert of["score"].sum(1).abs().max() < 1e-12
    assert (of["value"].sum(1) - g.sum(1)).abs().max() < 1e-12
    t = torch.arange(150, dtype=torch.float64)[:, None]
    assert (of["decay"] - (of["bonus"] - (t * of["score"]).sum((0, 1)))).abs().max() < 1e-10
