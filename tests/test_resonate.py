"""mk.resonate: against a loop, an FFT and autograd, its options, and what it refuses."""

import math

import pytest
import torch

import mru_kernels as mk
from bench.verify import threads
from tests.calls import segments

F64, C128 = torch.float64, torch.complex128


SLOPES = {
    "atan": lambda v, k: k / (1 + (math.pi * k * v) ** 2),
    "fast_sigmoid": lambda v, k: (1 + k * v.abs()) ** -2,
    "sigmoid": lambda v, k: k * torch.sigmoid(k * v) * torch.sigmoid(-k * v),
    "triangle": lambda v, k: (k - k * k * v.abs()).clamp(min=0),
    "straight_through": lambda v, k: torch.ones_like(v),
}


class Spike(torch.autograd.Function):
    """H(v) with the derivative of a surrogate."""

    @staticmethod
    def forward(ctx, v, tie, surrogate, k):
        ctx.save_for_backward(v)
        ctx.slope = SLOPES[surrogate], k
        return torch.where(v.isnan(), v, ((v >= 0) if tie else (v > 0)).to(v.dtype))

    @staticmethod
    def backward(ctx, grad):
        (v,) = ctx.saved_tensors
        slope, k = ctx.slope
        return grad * slope(v, k), None, None, None


def loop(
    input, decay, gain, threshold, state, *, tie=True, surrogate="atan", surrogate_scale=1.0, reverse=False,
    resets=None, reset_state=None,
):  # fmt: skip
    """Spikes, membranes and final state, step by step."""
    u, found = state, {}
    for t in reversed(range(input.shape[1])) if reverse else range(input.shape[1]):
        if resets is not None:
            u = torch.where(resets[:, t, None], torch.zeros_like(u) if reset_state is None else reset_state, u)
        u = decay * u + gain * input[:, t]
        found[t] = u.real
    membranes = torch.stack([found[t] for t in range(input.shape[1])], 1)
    return Spike.apply(membranes - threshold, tie, surrogate, surrogate_scale), membranes, u


def draw(batch=3, time=150, channels=9, seed=0, dtype=F64):
    """Leaves in the order of the arguments: input, decay, gain, threshold, initial state."""
    g = torch.Generator().manual_seed(seed)
    state = dtype if dtype == F64 else torch.float32

    def real(*shape):
        return torch.randn(shape, generator=g, dtype=F64)

    size = 0.9 + 0.099 * torch.rand(channels, generator=g, dtype=F64)
    decay = torch.polar(size, math.pi * real(channels))
    initial = torch.complex(real(batch, channels), real(batch, channels))
    tensors = [
        real(batch, time, channels).to(dtype),
        decay.to(state.to_complex()),
        0.5 + real(channels).abs().to(state),
    ]
    tensors += [0.3 * real(channels).to(state), initial.to(state.to_complex())]
    return [t.to(state.to_complex() if t.is_complex() else t.dtype).requires_grad_() for t in tensors]


def close(got, expected, tolerance=1e-12):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


def gradients(results, leaves, seed=1):
    g = torch.Generator().manual_seed(seed)
    weights = [torch.randn(y.shape, generator=g, dtype=C128 if y.is_complex() else F64).to(y.dtype) for y in results]
    return torch.autograd.grad(results, leaves, weights, retain_graph=True)


@pytest.mark.parametrize("where", ["cpu", "torch"])
@pytest.mark.parametrize("membrane", [False, True, "only"])
@pytest.mark.parametrize("options", [{}, {"reverse": True, "tie": False}], ids=str)
def test_results_and_gradients_are_those_of_the_loop(options, membrane, where):
    leaves = draw()
    first, final = mk.resonate(*leaves, membrane=membrane, backend=where, **options)
    results = [*(first if membrane is True else [first]), final]
    spikes, membranes, u = loop(*leaves, **options)
    expected = [*{False: [spikes], True: [spikes, membranes], "only": [membranes + 0 * leaves[3]]}[membrane], u]
    assert 0.05 < spikes.mean() < 0.95
    assert membrane == "only" or torch.equal(results[0], spikes)
    close(results, expected)
    close(gradients(results, leaves), gradients(expected, leaves))


@pytest.mark.parametrize("where", ["cpu", "torch"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("surrogate", SLOPES)
def test_surrogates(surrogate, scale, where):
    leaves, options = draw(), {"surrogate": surrogate, "surrogate_scale": scale}
    results = mk.resonate(*leaves, backend=where, **options)
    spikes, _, u = loop(*leaves, **options)
    close(gradients(results, leaves), gradients([spikes, u], leaves))


def test_membranes_are_those_of_an_fft():
    input, decay, gain, threshold, _ = (t.detach() for t in draw(time=500))
    (_, membranes), _ = mk.resonate(input, decay, gain, threshold, membrane=True)
    time = input.shape[1]
    kernel = gain * decay ** torch.arange(time).unsqueeze(1)
    convolved = torch.fft.ifft(torch.fft.fft(kernel, 2 * time, 0) * torch.fft.fft(input, 2 * time, 1), dim=1)
    close([membranes], [convolved[:, :time].real])


@pytest.mark.parametrize("reset_state", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_resets(reverse, reset_state):
    leaves = draw(seed=2)
    resets = torch.rand(3, 150, generator=torch.Generator().manual_seed(0)) < 0.05
    state = leaves[-1].detach().flip(0).clone().requires_grad_() if reset_state else None
    results = mk.resonate(*leaves, resets=resets, reset_state=state, reverse=reverse)
    spikes, _, u = loop(*leaves, resets=resets, reset_state=state, reverse=reverse)
    close(results, (spikes, u))
    inputs = leaves + [state] * reset_state
    close(gradients(results, inputs), gradients((spikes, u), inputs))


@pytest.mark.parametrize("reverse", [False, True])
def test_packed_sequences_are_those_apart(reverse):
    input, decay, gain, threshold, initial = draw(batch=1, time=100)
    offsets, initial = torch.tensor([0, 30, 30, 100]), initial.detach().expand(3, -1).contiguous().requires_grad_()
    leaves = [input, decay, gain, threshold, initial]
    results = mk.resonate(*leaves, cu_seqlens=offsets, reverse=reverse)
    parts = [
        mk.resonate(input[:, a:b], decay, gain, threshold, initial[n : n + 1], reverse=reverse)
        for n, (a, b) in enumerate([(0, 30), (30, 30), (30, 100)])
    ]
    expected = [torch.cat([h for h, _ in parts], 1), torch.cat([u for _, u in parts])]
    close(results, expected)
    close(gradients(results, leaves), gradients(expected, leaves))


@pytest.mark.parametrize("segment", [0, 64])
def test_chunks_and_threads_leave_the_results(segment):
    leaves = draw(time=1000, channels=5)
    whole = mk.resonate(*leaves)
    with segments("cpu", segment), threads(2):
        for chunk_size in (16, 64, None):
            results = mk.resonate(*leaves, chunk_size=chunk_size)
            close(results, whole)
            close(gradients(results, leaves), gradients(whole, leaves))


def test_boundaries_have_gradients():
    leaves = draw()
    _, _, boundaries = mk.resonate(*leaves, chunk_size=64, return_boundaries=True)
    states = [loop(leaves[0][:, :t], *leaves[1:])[2] for t in (64, 128)]
    close([boundaries], [torch.stack(states, 1)])
    close(gradients([boundaries], leaves[1:3]), gradients([torch.stack(states, 1)], leaves[1:3]))


def test_a_tie_fires_where_it_is_asked_to():
    ones = torch.ones(4)
    for tie in (True, False):
        spikes, _ = mk.resonate(torch.ones(1, 1, 4), ones + 0j, ones, ones, tie=tie)
        assert torch.equal(spikes, torch.full((1, 1, 4), float(tie)))
        step, _ = mk.resonate_step(torch.ones(1, 4), ones + 0j, ones, ones, torch.zeros(1, 4) + 0j, tie=tie)
        assert torch.equal(step, spikes[:, 0])


def test_nan_stays_and_infinity_fires():
    input = torch.zeros(1, 6, 2)
    input[0, 2, 0], input[0, 2, 1] = math.nan, math.inf
    decay, ones = torch.full((2,), 0.5 + 0j), torch.ones(2)
    spikes, _ = mk.resonate(input, decay, ones, ones)
    assert torch.equal(spikes[0, :2], torch.zeros(2, 2))
    assert spikes[0, 2:, 0].isnan().all()
    assert spikes[0, 2, 1] == 1
    threshold = torch.tensor([math.nan, 1.0])
    spikes, final = mk.resonate(torch.zeros(1, 6, 2), decay, ones, threshold)
    assert spikes[..., 0].isnan().all()
    assert not spikes[..., 1].any()
    assert final.isnan().tolist() == [[True, False]]
    leaf = torch.full((1, 1, 2), math.inf).requires_grad_()
    mk.resonate(leaf, decay, ones, ones)[0].sum().backward()
    assert torch.equal(leaf.grad, torch.zeros(1, 1, 2))


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_empty_calls(shape):
    leaves = draw(*shape)
    spikes, final = mk.resonate(*leaves)
    assert spikes.shape == shape
    if shape[1] == 0:
        assert torch.equal(final, leaves[-1])
    grads = torch.autograd.grad(spikes.sum(), leaves)
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads[:4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_streams_have_single_states(dtype):
    leaves = draw(dtype=dtype)
    spikes, final = mk.resonate(*leaves)
    wide = [t.detach().to(C128 if t.is_complex() else F64).requires_grad_() for t in leaves]
    expected, membranes, u = loop(*wide)
    clear = (membranes - wide[3]).abs() > 1e-4
    assert spikes.dtype == dtype
    assert final.dtype == torch.complex64
    assert torch.equal(spikes[clear], expected[clear].to(dtype))
    torch.testing.assert_close(final, u.to(torch.complex64), rtol=1e-4, atol=1e-5)
    for got, want in zip(
        gradients((spikes, final), leaves), gradients((expected.to(dtype), u.to(C128)), wide), strict=True
    ):
        error = (got.to(want.dtype) - want).abs().square().mean().sqrt()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2) * want.abs().square().mean().sqrt()


def test_steps_are_the_scan_of_one_step():
    leaves = [t.detach() for t in draw(time=1)]
    spikes, final = mk.resonate(*leaves)
    step, after = mk.resonate_step(leaves[0][:, 0], *leaves[1:])
    assert torch.equal(step, spikes[:, 0])
    assert torch.equal(after, final)
    slots = torch.zeros(5, 9, dtype=C128)
    slots[[4, 0]] = leaves[-1][:2]
    indices = torch.tensor([4, 0, -1])
    step, same = mk.resonate_step(leaves[0][:, 0], *leaves[1:4], slots, state_indices=indices)
    assert same is slots
    assert torch.equal(step[:2], spikes[:2, 0])
    assert torch.equal(step[2], torch.zeros(9, dtype=F64))
    assert torch.equal(slots[[4, 0]], final[:2])
    assert not slots[1:4].any()


def test_compiled_calls_are_those_without():
    leaves = draw(time=70)
    run = torch.compile(lambda *x: mk.resonate(*x), fullgraph=True, backend="aot_eager")
    results = run(*leaves)
    close(results, mk.resonate(*leaves))
    close(gradients(results, leaves), gradients(mk.resonate(*leaves), leaves))


def test_vmap_and_forward_mode():
    leaves = [t.detach() for t in draw(batch=2, time=20)]
    mapped, _ = torch.func.vmap(lambda x, *rest: mk.resonate(x, *rest), (0, None, None, None, None))(
        torch.stack([leaves[0], 2 * leaves[0]]), *leaves[1:]
    )
    assert torch.equal(mapped[1], mk.resonate(2 * leaves[0], *leaves[1:])[0])
    _, tangent = torch.func.jvp(lambda x: mk.resonate(x, *leaves[1:])[0], (leaves[0],), (leaves[0],))
    (grad,) = torch.autograd.grad(
        mk.resonate(x := leaves[0].clone().requires_grad_(), *leaves[1:])[0], x, torch.ones_like(x)
    )
    torch.testing.assert_close(tangent.sum(), (grad * leaves[0]).sum())


ONES = torch.ones(3)
ARGUMENTS = {"input": torch.randn(2, 5, 3), "decay": ONES + 0j, "gain": ONES, "threshold": ONES}


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("input", [1.0], TypeError),
        ("input", torch.randn(5, 3), ValueError),
        ("input", torch.randn(2, 5, 3).int(), TypeError),
        ("decay", torch.ones(3), TypeError),
        ("decay", torch.ones(4) + 0j, ValueError),
        ("decay", torch.ones(2, 5, 3) + 0j, ValueError),
        ("gain", torch.ones(3) + 0j, TypeError),
        ("gain", torch.ones(4), ValueError),
        ("threshold", None, TypeError),
        ("threshold", torch.ones(3, dtype=torch.int64), TypeError),
        ("initial_state", torch.zeros(2, 3), TypeError),
        ("initial_state", torch.zeros(1, 3) + 0j, ValueError),
        ("reset_state", torch.zeros(2, 3) + 0j, ValueError),
        ("tie", 1, TypeError),
        ("membrane", 1, ValueError),
        ("surrogate", "triangular", ValueError),
        ("surrogate_scale", 0.0, ValueError),
        ("surrogate_scale", "1", TypeError),
        ("reverse", 1, TypeError),
        ("backend", "none", ValueError),
    ],
)
def test_message_names_the_argument(argument, value, error):
    mk.resonate(**ARGUMENTS)
    with pytest.raises(error, match=f"^{argument}: "):
        mk.resonate(**ARGUMENTS | {argument: value})
