"""`mk.mesa`: a direct solve per token, its gradients, chunks, packed sequences and bad input."""

from __future__ import annotations

import pytest
import torch

import mru_kernels as mk

pytestmark = pytest.mark.usefixtures("one_thread")  # the tensors are too small for two

BATCH, TIME, HEADS, KEY, VALUE = 2, 21, 2, 5, 3


def inputs(time=TIME, dtype=torch.float64, key=KEY, state=True, batch=BATCH, seed=0) -> list[torch.Tensor]:
    """q, k, v, decay, beta, regularizer, kk, kv; forget gates from 0.01 to 1, and some beta = 0."""
    torch.manual_seed(seed)
    q, k = torch.randn(2, batch, time, HEADS, key, dtype=torch.float64).unbind(0)
    q, k = (torch.nn.functional.normalize(s, dim=-1) for s in (q, k))
    v = torch.randn(batch, time, HEADS, VALUE, dtype=torch.float64)
    decay = (0.01 + 0.99 * torch.rand(batch, time, HEADS, dtype=torch.float64).sqrt()).log()
    beta = torch.rand(batch, time, HEADS, dtype=torch.float64)
    beta[:, ::5] = 0
    regularizer = 0.25 + torch.rand(HEADS, key, dtype=torch.float64)
    tensors = [q, k, v, decay, beta, regularizer]
    if state:
        root = torch.randn(batch, HEADS, key, key, dtype=torch.float64)
        tensors += [root @ root.mT, torch.randn(batch, HEADS, key, VALUE, dtype=torch.float64)]
    return [t.to(dtype).requires_grad_() for t in tensors]


def run(tensors, **options):
    return mk.mesa(*tensors[:6], tuple(tensors[6:]) or None, **options)


def by_definition(q, k, v, decay, beta, regularizer, kk, kv):
    """One step and one direct solve at a time."""
    outputs = []
    for t in range(q.shape[1]):
        gamma, write = decay[:, t].exp()[..., None, None], beta[:, t, :, None, None]
        kk = gamma * kk + write * k[:, t].unsqueeze(-1) * k[:, t].unsqueeze(-2)
        kv = gamma * kv + write * k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        x = torch.linalg.solve(kk + torch.diag_embed(regularizer), q[:, t].unsqueeze(-1))
        outputs.append((kv.mT @ x).squeeze(-1))
    return torch.stack(outputs, 1), (kk, kv)


def close(got, expected, tolerance=1e-12) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def gradients(result, tensors, **options):
    output, state = result[:2]
    torch.manual_seed(1)
    wanted = [torch.randn(t.shape, dtype=t.dtype) for t in (output, *state)]
    return torch.autograd.grad([output, *state], tensors, wanted, **options)


@pytest.mark.parametrize("solver", ["direct", "cg"])
@pytest.mark.parametrize("chunk_size", [1, 4, 7, 64])
def test_results_and_gradients_equal_a_direct_solve_per_token(solver, chunk_size):
    tensors = inputs()
    got, expected = run(tensors, solver=solver, chunk_size=chunk_size), by_definition(*tensors)
    close(got[:2], expected)
    close(gradients(got, tensors), gradients(expected, tensors))


def test_steps_taken():
    tensors = inputs(state=False)
    *_, taken = run(tensors, solver="direct")
    assert taken.shape == (BATCH, TIME, HEADS)
    assert taken.dtype == torch.int64
    assert not taken.any()
    exact = run(tensors, solver="direct")[0]
    output, _, taken = run(tensors, tolerance=1e-4)
    assert 0 < taken.min() <= taken.max() <= KEY < 30
    assert 1e-12 < (output - exact).abs().max() < 1e-3
    tensors[0] = torch.zeros_like(tensors[0])
    output, _, taken = run(tensors)
    assert not taken.any()
    assert not output.any()


def test_calls_in_parts_and_single_steps_equal_the_pass():
    tensors = inputs()
    whole = run(tensors, chunk_size=4)
    streams, rest, state = tensors[:5], tensors[5], tuple(tensors[6:])
    outputs, each = [], state
    for parts in zip(*(s.split([3, 0, 10, 8], 1) for s in streams), strict=True):
        output, state, _ = mk.mesa(*parts, rest, state, chunk_size=4)
        outputs.append(output)
    got = (torch.cat(outputs, 1), state)
    close(got, whole[:2])
    close(gradients(got, tensors), gradients(whole, tensors))
    for t in range(TIME):
        output, each, taken = mk.mesa_step(*(s[:, t] for s in streams), rest, each)
        close(output, whole[0][:, t])
    close(each, whole[1])
    assert taken.shape == (BATCH, HEADS)


def test_packed_sequences():
    lengths = [9, 0, 4, 8]
    tensors = inputs(batch=len(lengths))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    packed = [torch.cat([s[i, :n] for i, n in enumerate(lengths)]).unsqueeze(0) for s in tensors[:5]]
    got = mk.mesa(*packed, tensors[5], tuple(tensors[6:]), cu_seqlens=offsets, chunk_size=4)
    outputs, states = [], []
    for i, n in enumerate(lengths):
        alone = (s[i : i + 1, :n] for s in tensors[:5])
        output, state, _ = mk.mesa(*alone, tensors[5], tuple(s[i : i + 1] for s in tensors[6:]), chunk_size=4)
        outputs.append(output)
        states.append(state)
    expected = torch.cat(outputs, 1), tuple(torch.cat(s) for s in zip(*states, strict=True))
    close(got[:2], expected)
    close(gradients(got, tensors), gradients(expected, tensors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_streams_of_less_precision_have_float32_states(dtype):
    tensors = inputs(dtype=dtype)
    exact = by_definition(*(t.detach().double() for t in tensors))
    output, state, _ = run(tensors)
    assert output.dtype == dtype
    assert {s.dtype for s in state} == {torch.float32}
    close(output.double(), exact[0], 1e-4 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps)
    close([s.double() for s in state], list(exact[1]), 1e-4)
    found = gradients((output, state), tensors)
    assert [g.dtype for g in found] == [dtype] * 8
    assert all(g.isfinite().all() for g in found)


def test_small_gradients_and_correlated_keys_in_float32():
    tensors = inputs(dtype=torch.float32)
    output = run(tensors)[0]
    large = torch.autograd.grad(output.sum(), tensors, retain_graph=True)
    small = torch.autograd.grad(output.sum() * 1e-25, tensors)
    for a, b in zip(small, large, strict=True):
        close(a * 1e25, b, 1e-4)
    with torch.no_grad():
        tensors[1][:] = tensors[1][:, :1] + 1e-3 * tensors[1]
        close(run(tensors)[0], run(tensors, solver="direct")[0], 1e-4)


def test_a_nan_stays_in_its_head_and_sequence():
    tensors = [t.detach() for t in inputs()]
    for solver in ("cg", "direct"):
        right = run(tensors, solver=solver)[0]
        bad = tensors[1].clone()
        bad[0, 7, 1, 0] = torch.nan
        output = run([tensors[0], bad, *tensors[2:]], solver=solver)[0]
        assert output[0, 7:, 1].isnan().all()
        close(output[:, :, 0], right[:, :, 0])
        close(output[1], right[1])


def test_empty_calls():
    for time, batch in ((0, 2), (3, 0)):
        tensors = inputs(time=time, batch=batch)
        output, (kk, kv), taken = run(tensors)
        assert output.shape == (batch, time, HEADS, VALUE)
        assert taken.shape == (batch, time, HEADS)
        close([kk, kv], tensors[6:], 0)


def stream(*shape: int, **options) -> torch.Tensor:
    return torch.ones(shape, **({"dtype": torch.float64} | options))


ROWS = (BATCH, TIME, HEADS)
BAD = [
    ("q", None, TypeError, "expected a tensor .* got NoneType"),
    ("q", stream(2, 3, 4), ValueError, "expected 4 dimensions"),
    ("q", stream(*ROWS, KEY).long(), TypeError, "expected a dtype of float32, .*got torch.int64"),
    ("k", 1.0, TypeError, "expected a tensor .* got float"),
    ("k", stream(*ROWS), ValueError, "expected 4 dimensions"),
    ("k", stream(*ROWS, 4), ValueError, "expected q's sizes .* 5], got .* 4]"),
    ("k", stream(*ROWS, KEY).float(), TypeError, "expected q's dtype torch.float64, got torch.float32"),
    ("k", stream(*ROWS, KEY, device="meta"), ValueError, "expected q's device cpu, got meta"),
    ("v", stream(*ROWS), ValueError, "expected 4 dimensions"),
    ("v", stream(BATCH, 3, HEADS, VALUE), ValueError, "expected q's sizes"),
    ("v", stream(*ROWS, VALUE).float(), TypeError, "expected q's dtype torch.float64, got torch.float32"),
    ("v", stream(*ROWS, VALUE, device="meta"), ValueError, "expected q's device cpu, got meta"),
    ("regularizer", 1.0, TypeError, "expected a tensor .* got float"),
    ("regularizer", stream(KEY), ValueError, "expected 2 dimensions"),
    ("regularizer", stream(HEADS, 4), ValueError, r"expected shape \[2, 5\]"),
    ("regularizer", stream(HEADS, KEY).half(), TypeError, "expected a dtype of float64, float32, got torch.float16"),
    ("regularizer", stream(HEADS, KEY, device="meta"), ValueError, "expected the streams' device cpu, got meta"),
    ("regularizer", 0 * stream(HEADS, KEY), ValueError, "expected positive numbers, got 0"),
    ("regularizer", -stream(HEADS, KEY), ValueError, "expected positive numbers, got -1"),
    ("regularizer", torch.nan * stream(HEADS, KEY), ValueError, "expected positive numbers, got nan"),
    ("initial_state", stream(1), TypeError, "expected a pair of tensors, got Tensor"),
    ("initial_state", (stream(1),), ValueError, "expected a pair of tensors, got 1"),
    ("initial_state", (None, None), TypeError, "expected a tensor .* got NoneType"),
    ("initial_state", (stream(2, 2, 5, 4),) * 2, ValueError, r"expected shape \[2, 2, 5, 5\] .* got \[2, 2, 5, 4\]"),
    ("initial_state", (stream(2, 2, 5, 5),) * 2, ValueError, r"expected shape \[2, 2, 5, 3\] .* got \[2, 2, 5, 5\]"),
    ("initial_state", (stream(2, 2, 5, 5).half(),) * 2, TypeError, "expected a dtype of float64, float32, got"),
    ("initial_state", (stream(2, 2, 5, 5, device="meta"),) * 2, ValueError, "expected the streams' device cpu"),
    ("steps", 0, ValueError, "expected a positive int, got 0"),
    ("steps", 2.5, TypeError, "expected an int, got float"),
    ("steps", True, TypeError, "expected an int, got bool"),
    ("chunk_size", -1, ValueError, "expected a positive int, got -1"),
    ("chunk_size", None, TypeError, "expected an int, got NoneType"),
    ("tolerance", 1.0, ValueError, r"expected a number in \[0, 1\), got 1.0"),
    ("tolerance", -1e-3, ValueError, r"expected a number in \[0, 1\), got -0.001"),
    ("tolerance", float("nan"), ValueError, "expected a number"),
    ("tolerance", "small", TypeError, "expected a float, got str"),
    ("solver", "jacobi", ValueError, "expected one of 'cg', 'direct', got 'jacobi'"),
    ("solver", None, ValueError, "expected one of 'cg', 'direct', got None"),
    ("cu_seqlens", torch.tensor([0, TIME]), ValueError, "expected streams of batch 1, got batch 2"),
    ("cu_seqlens", [0, TIME], TypeError, "expected a tensor .* got list"),
    ("cu_seqlens", stream(2), TypeError, "expected dtype int32 or int64, got torch.float64"),
]
for gate in ("decay", "beta"):
    BAD += [
        (gate, None, TypeError, "expected a tensor .* got NoneType"),
        (gate, stream(*ROWS, 1), ValueError, "expected 3 dimensions"),
        (gate, stream(BATCH, TIME, 1), ValueError, "expected q's sizes"),
        (gate, stream(*ROWS).float(), TypeError, "expected q's dtype torch.float64, got torch.float32"),
        (gate, stream(*ROWS, device="meta"), ValueError, "expected q's device cpu, got meta"),
    ]


@pytest.mark.parametrize(("name", "bad", "error", "match"), BAD)
def test_bad_input(name, bad, error, match):
    names = ("q", "k", "v", "decay", "beta", "regularizer")
    arguments = dict(zip(names, inputs(state=False), strict=True)) | {name: bad}
    with pytest.raises(error, match=f"^{name}: {match}"):
        mk.mesa(**arguments)


@pytest.mark.parametrize(
    ("name", "bad", "error", "match"),
    [
        ("q", stream(BATCH, 1, HEADS, KEY), ValueError, r"expected 3 dimensions \[batch, heads, key size\]"),
        ("k", stream(BATCH, HEADS, 4), ValueError, r"expected q's sizes \[2, 2, 5\], got \[2, 2, 4\]"),
        ("v", stream(BATCH, 1, VALUE), ValueError, r"expected q's sizes \[2, 2, 3\], got \[2, 1, 3\]"),
        ("decay", stream(BATCH, HEADS, 1), ValueError, r"expected 2 dimensions \[batch, heads\]"),
        ("beta", stream(BATCH, 1), ValueError, r"expected q's sizes \[2, 2\], got \[2, 1\]"),
        ("regularizer", 0 * stream(HEADS, KEY), ValueError, "expected positive numbers, got 0"),
        ("state", (stream(2, 2, 5, 4),) * 2, ValueError, r"expected shape \[2, 2, 5, 5\] .* got \[2, 2, 5, 4\]"),
        ("state", stream(1), TypeError, "expected a pair of tensors, got Tensor"),
        ("steps", 0, ValueError, "expected a positive int, got 0"),
        ("tolerance", 2, ValueError, r"expected a number in \[0, 1\), got 2"),
        ("solver", "qr", ValueError, "expected one of 'cg', 'direct', got 'qr'"),
    ],
)
def test_bad_input_of_a_step(name, bad, error, match):
    names = ("q", "k", "v", "decay", "beta", "regularizer")
    q, k, v, decay, beta, regularizer = inputs(state=False)
    tensors = (*(s[:, 0] for s in (q, k, v, decay, beta)), regularizer)
    arguments = dict(zip(names, tensors, strict=True)) | {name: bad}
    with pytest.raises(error, match=f"^{name}: {match}"):
        mk.mesa_step(**arguments)


def test_sizes_that_the_direct_solver_does_not_take():
    wide = [t.detach() for t in inputs(time=1, key=257, state=False)]
    one = (*(s[:, 0] for s in wide[:5]), wide[5])
    for function, tensors in ((mk.mesa, wide), (mk.mesa_step, one)):
        with pytest.raises(ValueError, match=r'^q: expected a key size of at most 256 with solver="direct", got 257'):
            function(*tensors, solver="direct")
        function(*tensors, steps=1)


def test_bad_offsets():
    tensors = inputs(batch=1, state=False)
    for wrong in ([0, 9], [0, 30, TIME], [1, TIME]):
        with pytest.raises(ValueError, match=r"^cu_seqlens: expected offsets"):
            run(tensors, cu_seqlens=torch.tensor(wrong))
    empty = inputs(batch=1, time=0, state=False)
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected offsets"):
        run(empty, cu_seqlens=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"^initial_state: expected shape \[2, 2, 5, 5\]"):
        mk.mesa(*tensors, (stream(1, 2, 5, 5), stream(1, 2, 5, 3)), cu_seqlens=torch.tensor([0, 9, TIME]))
