"""The softmax recurrence as a torch op: opcheck, compile, export, vmap, and errors that name the argument."""

from __future__ import annotations

import pytest
import torch

import mru_kernels as mk
from mru_kernels import ops
from mru_kernels.softmax import empty_state, run, scan_gates
from mru_kernels.softmax.registration import BACKWARD, FORWARD
from mru_kernels.softmax.state import SegmentMap
from tests.softmax_calls import draw, leaves, scan

B, T, H, D = 2, 40, 3, 6


def op_arguments(packed=False, decay="stream", cu_seqlens=None, save=True):
    sequences = None if cu_seqlens is None else len(cu_seqlens) - 1
    batch = B if cu_seqlens is None else 1
    call = draw(batch, T, H, D // H, decay=decay, bonus=True, state=True, sequences=sequences, dtype=torch.float32)
    call = leaves(call)
    score, value, heads = call["score"], call["value"], 0
    if packed:
        score, value, heads = torch.cat([score, value], -1).detach().requires_grad_(), None, H
    return [score, value, heads, call["decay"], call["bonus"], call["initial_state"], cu_seqlens, False, 16, -1, save]


@pytest.mark.parametrize(
    ("packed", "decay", "offsets"),
    [
        (False, "head", None),
        (True, "stream", None),
        (False, "stream", [0, 15, 15, 40]),
        (True, "head", [0, 15, 15, 40]),
    ],
)
def test_opcheck(packed, decay, offsets):
    cu_seqlens = None if offsets is None else torch.tensor(offsets)
    arguments = op_arguments(packed, decay, cu_seqlens)
    torch.library.opcheck(FORWARD["cpu"], arguments, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        y, final, borders = FORWARD["cpu"](*arguments)
    *call, _save = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments]
    backward = [torch.randn_like(y), torch.randn_like(final), *call, borders]
    torch.library.opcheck(BACKWARD["cpu"], backward)


def loss(call, **options):
    y, final = mk.softmax_recurrence(**call, **options)
    return (y * y).sum() + final[:, :-H].sum()


@pytest.mark.parametrize("chunk_size", [16, None])
def test_compiled_without_a_break(chunk_size):
    call = draw(B, T, H, D // H, decay="head", bonus=True, state=True, dtype=torch.float32)
    call["initial_state"][:] = 0.5
    eager, compiled = leaves(call), leaves(call)
    wanted = torch.autograd.grad(loss(eager, chunk_size=chunk_size), list(eager.values()))
    function = torch.compile(loss, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(function(compiled, chunk_size=chunk_size), list(compiled.values()))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


class Mean(torch.nn.Module):
    def forward(self, score, value):
        return mk.softmax_recurrence(score, value, decay=torch.full((H,), -0.1))[0]


def test_exported_for_any_length():
    score, value = torch.randn(B, T, H), torch.randn(B, T, D)
    time = torch.export.Dim("time", min=2)
    program = torch.export.export(Mean(), (score, value), dynamic_shapes=({1: time}, {1: time}))
    longer = torch.randn(B, 100, H), torch.randn(B, 100, D)
    assert torch.equal(program.module()(*longer), Mean()(*longer))


@pytest.mark.parametrize("packed", [False, True])
def test_vmap_of_the_call_and_of_its_gradient(packed):
    torch.manual_seed(0)
    score, value = torch.randn(4, B, T, H), torch.randn(B, 4, T, D)
    decay, bonus = -torch.rand(4, H), torch.randn(H)
    state = empty_state(value, B, D, H) if packed else torch.randn(B, D + 2 * H)

    def call(score, value, decay):
        if packed:
            gates = torch.cat([score, value], -1)
            y, final = scan_gates(gates, H, state, decay=decay, bonus=bonus, chunk_size=16)
        else:
            y, final = mk.softmax_recurrence(score, value, state, decay=decay, bonus=bonus, chunk_size=16)
        return (y * y).sum() + final[:, : D + H].square().sum()

    gradient = torch.func.grad(call, argnums=(0, 1, 2))
    got = torch.func.vmap(gradient, in_dims=(0, 1, 0))(score, value, decay)
    for i in range(4):
        wanted = gradient(score[i], value[:, i], decay[i])
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a[i], b, atol=1e-5, rtol=1e-5)


def test_gradients_of_a_batch_of_cotangents():
    call = leaves(draw(B, T, H, D // H, decay="head", dtype=torch.float32))
    y, _ = scan(call, "cpu", chunk_size=16)
    g = torch.randn(3, *y.shape)
    got = torch.autograd.grad(y, list(call.values()), g, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        for a, b in zip(got, torch.autograd.grad(y, list(call.values()), g[i], retain_graph=True), strict=True):
            torch.testing.assert_close(a[i], b, atol=1e-5, rtol=1e-5)


def test_gradcheck():
    call = leaves(draw(1, 20, 2, 2, decay="stream", bonus=True, state=True))
    call["initial_state"] = torch.randn(1, 8, dtype=torch.float64, requires_grad=True)

    def function(*tensors):
        y, final = scan(dict(zip(call, tensors, strict=True)), "cpu", chunk_size=16)
        return y, final[:, :6]

    assert torch.autograd.gradcheck(function, list(call.values()))


def test_there_is_no_second_derivative_and_no_forward_mode():
    call = leaves(draw(1, 5, 2, 1))
    y, _ = scan(call, "cpu")
    (grad,) = torch.autograd.grad(y.square().sum(), [call["score"]], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda s: mk.softmax_recurrence(s, s)[0], (torch.randn(1, 5, 2),), (torch.randn(1, 5, 2),))


def test_autocast_casts_the_streams():
    score, value = torch.randn(B, T, H), torch.randn(B, T, D).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = mk.softmax_recurrence(score, value, decay=torch.full((H,), -0.1).bfloat16())
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32


def test_meta_tensors_have_shapes():
    y, state = mk.softmax_recurrence(torch.empty(B, T, H, device="meta"), torch.empty(B, T, D, device="meta"))
    assert y.shape == (B, T, D)
    assert state.shape == (B, D + 2 * H)


# ------------------------------------------------------------------------------------------------ bad input

SCORE, VALUE = torch.randn(B, T, H), torch.randn(B, T, D)
BAD = {
    "score: expected a tensor": {"score": 3},
    "score: expected 3 dimensions": {"score": SCORE[0]},
    "score: expected a dtype of": {"score": SCORE.int()},
    "value: expected a tensor": {"value": None},
    "value: expected 3 dimensions": {"value": VALUE[0]},
    "value: expected score's dtype": {"value": VALUE.double()},
    "value: expected shape": {"value": VALUE[:, 1:]},
    "value: expected channels that 3 heads divide, one or more each, got 5": {"value": VALUE[..., 1:]},
    "value: expected channels that 3 heads divide, one or more each, got 0": {"value": VALUE[..., :0]},
    r"decay: expected shape \[3\]": {"decay": torch.randn(4)},
    r"decay: expected shape \[2, 40, 3\] or \[3\]": {"decay": torch.randn(B, T, D)},
    "decay: expected score's dtype": {"decay": SCORE.bfloat16()},
    "decay: expected a dtype of": {"decay": torch.zeros(H, dtype=torch.int64)},
    "bonus: expected 1 dimensions": {"bonus": SCORE},
    r"initial_state: expected shape \[2, 12\]": {"initial_state": torch.zeros(B, D)},
    "initial_state: expected a dtype of": {"initial_state": torch.zeros(B, D + 2 * H).double()},
    "cu_seqlens: expected streams of batch 1": {"cu_seqlens": torch.tensor([0, T])},
    "reverse: expected a bool": {"reverse": 1},
    "chunk_size: expected a positive multiple of 16": {"chunk_size": 20},
    "chunk_size: expected an int": {"chunk_size": 16.0},
    "backend: expected None or one of": {"backend": "fpga"},
}


@pytest.mark.parametrize("message", BAD)
def test_an_error_names_the_argument(message):
    with pytest.raises((TypeError, ValueError), match=message):
        mk.softmax_recurrence(**{"score": SCORE, "value": VALUE} | BAD[message])


@pytest.mark.parametrize("offsets", [[0, 3], [1, T], [0, 30, 20, T]])
def test_offsets_rise_to_the_length(offsets):
    with pytest.raises(ValueError, match="cu_seqlens: expected offsets that rise from 0 to the total length"):
        mk.softmax_recurrence(SCORE[:1], VALUE[:1], cu_seqlens=torch.tensor(offsets))


def test_errors_of_the_other_functions():
    with pytest.raises(ValueError, match="value: expected key's shape"):
        mk.wkv(SCORE, VALUE, torch.zeros(H), torch.zeros(H))
    with pytest.raises(TypeError, match="bonus: expected a tensor"):
        mk.wkv(SCORE, SCORE, torch.zeros(H), None)
    with pytest.raises(TypeError, match="key: expected a tensor"):
        mk.wkv(None, SCORE, torch.zeros(H), torch.zeros(H))
    with pytest.raises(ValueError, match="score: expected 2 dimensions"):
        mk.softmax_recurrence_step(SCORE, VALUE[:, 0], None)
    with pytest.raises(ValueError, match=r"^state: expected shape"):
        mk.softmax_recurrence_step(SCORE[:, 0], VALUE[:, 0], torch.zeros(B, D))
    with pytest.raises(ValueError, match="heads: expected 0 to 6"):
        scan_gates(VALUE, 7)
    with pytest.raises(RuntimeError, match="chunk_size from 16 to 4096"):
        mk.softmax_recurrence(SCORE, VALUE, chunk_size=8192)


RAW = {
    "score: expected 3 dimensions": {0: SCORE[0]},
    "score: expected float32": {0: SCORE.to(torch.complex64)},
    "value: expected": {1: VALUE[:, 1:]},
    "decay: expected": {3: torch.zeros(D)},
    "bonus: expected": {4: torch.zeros(D)},
    "initial_state: expected": {5: torch.zeros(B, D)},
    "cu_seqlens: expected": {6: torch.zeros(3)},
    "chunk: expected a positive multiple of 16 up to 4096, got 20": {8: 20},
    "segment: expected": {9: -2},
}


@pytest.mark.parametrize("message", RAW)
def test_the_op_checks_its_arguments(message):
    arguments = [SCORE, VALUE, 0, None, None, None, None, False, 16, -1, False]
    for place, value in RAW[message].items():
        arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        FORWARD["cpu"](*arguments)


def test_the_backward_op_checks_its_arguments():
    call = [SCORE, VALUE, 0, None, None, None, None, False, 16, -1]
    y, final, borders = FORWARD["cpu"](*call, True)
    for message, (place, t) in {
        "grad_y": (0, y[:, 1:]),
        "grad_final": (1, final[:, 1:]),
        "borders": (2, borders[:, 1:]),
    }.items():
        grads = [y, final, borders]
        grads[place] = t
        with pytest.raises(RuntimeError, match=f"{message}: expected"):
            BACKWARD["cpu"](*grads[:2], *call, grads[2])


def test_backends_without_kernels_are_refused():
    with pytest.raises(RuntimeError, match="backend: 'cuda' cannot run this call"):
        mk.softmax_recurrence(SCORE, VALUE, backend="cuda")
    assert "cpu" in run._with_kernels()


def test_a_map_is_a_state_and_a_sum_of_decays():
    call = draw(group=2, decay="stream", dtype=torch.float32)
    with ops.as_maps():
        map_ = mk.softmax_recurrence(**call)
    assert isinstance(map_, SegmentMap)
    assert torch.equal(map_.state, mk.softmax_recurrence(**call)[1])
    high, low = map_.decay.double().chunk(2, -1)
    torch.testing.assert_close(high + low, call["decay"].double().sum(1), rtol=1e-8, atol=0.0)
    with ops.as_maps(), pytest.raises(RuntimeError, match="'torch' cannot run this call: it has no sequence parall"):
        mk.softmax_recurrence(**call, backend="torch")
