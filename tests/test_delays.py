"""`mk.delay_conv`: the sum over taps, gradients by hand, DCLS's kernel, pasts, packed sequences and bad input."""

from __future__ import annotations

import math

import pytest
import torch

import mru_kernels as mk
from mru_kernels import delays

pytestmark = pytest.mark.usefixtures("one_thread")  # the tensors are too small for two

COUNT = 3
#: In float64, and in float32; see DIRECT_TAPS.
forms = pytest.mark.parametrize("taps", [1, 6, 20], ids=["one", "conv1d", "fft"])
forms_of_float32 = pytest.mark.parametrize("taps", [1, 20, 300], ids=["one", "conv1d", "fft"])


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def case(taps: int, batch: int = 2, time: int = 15, channels: int = 4, sequences: int | None = None):
    """The arguments of a call, all with gradients: input, weight, position, sigma and past."""
    torch.manual_seed(0)
    position = torch.rand(channels, COUNT, dtype=torch.float64) * (taps - 1)
    sigma = torch.rand(channels, COUNT, dtype=torch.float64) + 0.5
    past = drawn(batch if sequences is None else sequences, taps - 1, channels)
    made = [drawn(batch, time, channels), drawn(channels, COUNT), position, sigma, past]
    return [t.requires_grad_() for t in made]


def close(got, expected, tolerance=1e-12) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def bumps(position, sigma, taps: int, normalised: bool):
    """The bumps `[D, J, taps]`, and u."""
    u = (torch.arange(taps) - position.unsqueeze(-1)) / sigma.unsqueeze(-1)
    phi = torch.exp(-u * u / 2)
    return (phi / (phi.sum(-1, keepdim=True) + 1e-7) if normalised else phi), u


def by_loops(input, weight, position, sigma, past, normalised=False):
    """The definition, one step and tap at a time."""
    taps = past.shape[1] + 1
    kernel = (weight.unsqueeze(-1) * bumps(position, sigma, taps, normalised)[0]).sum(1)
    rows = torch.cat([past, input], 1)
    steps = [sum(kernel[:, tau] * rows[:, t + taps - 1 - tau] for tau in range(taps)) for t in range(input.shape[1])]
    return torch.stack(steps, 1), rows[:, input.shape[1] :]


@forms
@pytest.mark.parametrize("normalised", [False, True])
def test_a_call_equals_the_definition(taps, normalised):
    """Also the gradients, those of the past and those through the returned past."""
    x, weight, position, sigma, past = wanted = case(taps)
    y, after = mk.delay_conv(x, weight, position, sigma, taps, past, normalised=normalised, reach=math.inf)
    expected, rows = by_loops(x, weight, position, sigma, past, normalised)
    close(y, expected)
    assert torch.equal(after, rows)
    assert after.untyped_storage().nbytes() == after.nbytes
    g, g_after = drawn(*y.shape), drawn(*after.shape)
    close(*(torch.autograd.grad(r, wanted, (g, g_after)) for r in ((y, after), (expected, rows))))


@forms
@pytest.mark.parametrize("normalised", [False, True])
def test_gradients_by_hand(taps, normalised):
    x, weight, position, sigma, past = wanted = case(taps)
    y, _ = mk.delay_conv(x, weight, position, sigma, taps, past, normalised=normalised, reach=math.inf)
    g = drawn(*y.shape)
    got = torch.autograd.grad(y, wanted, g)
    with torch.no_grad():
        phi, u = bumps(position, sigma, taps, normalised)
        kernel = (weight.unsqueeze(-1) * phi).sum(1)
        rows, time = torch.cat([past, x], 1), x.shape[1]
        d_rows, d_kernel = torch.zeros_like(rows), torch.zeros_like(kernel)
        for tau in range(taps):
            read = slice(taps - 1 - tau, taps - 1 - tau + time)
            d_rows[:, read] += kernel[:, tau] * g
            d_kernel[:, tau] = (g * rows[:, read]).sum((0, 1))
        d_position, d_sigma = u / sigma.unsqueeze(-1), u.square() / sigma.unsqueeze(-1)
        if normalised:
            d_position, d_sigma = (v - (phi * v).sum(-1, keepdim=True) for v in (d_position, d_sigma))
        weighted = d_kernel.unsqueeze(1) * phi
        expected = [
            d_rows[:, taps - 1 :], weighted.sum(-1), weight * (weighted * d_position).sum(-1),
            weight * (weighted * d_sigma).sum(-1), d_rows[:, : taps - 1],
        ]  # fmt: skip
    close(list(got), expected)


def test_the_normalised_kernel_is_that_of_dcls():
    """DCLS's "gauss": index i of its kernel is a delay of taps - 1 - i, and positions count from taps // 2."""
    taps = 25
    weight, position, sigma = drawn(4, COUNT), drawn(4, COUNT) * 5, torch.rand(4, COUNT, dtype=torch.float64) + 0.3
    x = torch.arange(taps).view(-1, 1, 1) - (position + taps // 2)
    gauss = (-0.5 * (x / sigma) ** 2).exp()
    dcls = (weight * (gauss / (gauss.sum(0) + 1e-7))).sum(-1).T
    got = delays.delay_kernel(weight, taps - 1 - (position + taps // 2), sigma, taps, normalised=True, reach=math.inf)
    close(got, dcls.flip(1))


@forms
def test_position_p_is_a_delay_of_p(taps):
    p = taps // 2
    x = torch.zeros(1, 40, 1)
    x[0, 3] = 1.0
    y, _ = mk.delay_conv(x, torch.ones(1, 1), torch.full((1, 1), float(p)), 0.05, taps)
    assert y[0, :, 0].argmax() == 3 + p
    close(y[0, 3 + p, 0], torch.tensor(1.0), 1e-6)


def test_reach_cuts_the_bumps():
    weight, position = torch.ones(1, 1).double(), torch.full((1, 1), 10.0).double()
    kernel = delays.delay_kernel(weight, position, 0.7, 32)
    assert (kernel[0].nonzero().flatten() == torch.arange(6, 15)).all()
    assert (kernel - delays.delay_kernel(weight, position, 0.7, 32, reach=math.inf)).abs().max() < 9e-9


# ------------------------------------------------------------------------------------------------ pieces of time


@forms
def test_chunks_and_steps_equal_the_pass(taps):
    x, *parameters, past = case(taps, time=30)
    expected, last = mk.delay_conv(x, *parameters, taps, past)
    for cuts in ([7, 0, 1, 22], [1] * 30):
        state, parts = past, []
        for chunk in x.split(cuts, 1):
            y, state = mk.delay_conv(chunk, *parameters, taps, state)
            parts.append(y)
        close(torch.cat(parts, 1), expected)
        assert torch.equal(state, last)
    grads = [torch.autograd.grad(y.square().sum(), [x, *parameters, past]) for y in (torch.cat(parts, 1), expected)]
    close(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("taps", [6, 20, 256])
@pytest.mark.parametrize("channels", [2, 5, 16])
def test_steps_of_conv1d_are_bit_equal_to_the_pass(channels, taps, dtype):
    x, *parameters, past = [t.detach().float() for t in case(taps, time=30, channels=channels)]
    x, past = x.to(dtype), past.to(dtype)
    expected, _ = mk.delay_conv(x, *parameters, taps, past)
    state = past
    for t in range(30):
        y, state = mk.delay_conv(x[:, t : t + 1], *parameters, taps, state)
        assert torch.equal(y[:, 0], expected[:, t])
    chunks = []
    for chunk in x.split([7, 1, 22], 1):
        y, past = mk.delay_conv(chunk, *parameters, taps, past)
        chunks.append(y)
    assert torch.equal(torch.cat(chunks, 1), expected)


@forms
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_sequences_equal_the_sequences_apart(taps, dtype):
    offsets = [0, 0, 4, 4, 5, 26, 26]  # empty ones at the start, inside and at the end
    x, *parameters, past = wanted = case(taps, 1, 26, sequences=6)
    offset = torch.tensor(offsets, dtype=dtype)
    y, after = mk.delay_conv(x, *parameters, taps, past, cu_seqlens=offset)
    apart = [mk.delay_conv(x[:, offsets[n] : offsets[n + 1]], *parameters, taps, past[n : n + 1]) for n in range(6)]
    expected, last = torch.cat([a for a, _ in apart], 1), torch.cat([b for _, b in apart])
    close(y, expected)
    assert torch.equal(after, last)
    g, g_after = drawn(*y.shape), drawn(*after.shape)
    close(*(torch.autograd.grad(r, wanted, (g, g_after)) for r in ((y, after), (expected, last))))
    assert mk.delay_conv(x, *parameters, taps, cu_seqlens=offset)[1].shape == past.shape


@forms
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_reaches_taps_steps(taps, value):
    x, *parameters, _ = [t.detach() for t in case(taps, time=60)]
    clean, _ = mk.delay_conv(x, *parameters, taps)
    x[0, 20, 1] = value
    y, _ = mk.delay_conv(x, *parameters, taps)
    bad = torch.zeros_like(y, dtype=torch.bool)
    bad[0, 20 : 20 + taps, 1] = True
    assert not y[bad].isfinite().any()
    close(y[~bad], clean[~bad])
    packed, _ = mk.delay_conv(x[:1], *parameters, taps, cu_seqlens=torch.tensor([0, 21, 60]))
    assert packed[0, 21:].isfinite().all()


@forms
def test_empty_calls(taps):
    x, *parameters, past = case(taps)
    y, after = mk.delay_conv(x[:, :0], *parameters, taps, past)
    assert y.shape == (2, 0, 4)
    assert torch.equal(after, past)
    assert mk.delay_conv(x[:0], *parameters, taps)[0].shape == (0, 15, 4)
    y, after = mk.delay_conv(x[:1, :0], *parameters, taps, past[:0], cu_seqlens=torch.zeros(1, dtype=torch.int64))
    assert (y.shape, after.shape) == ((1, 0, 4), (0, taps - 1, 4))


# ------------------------------------------------------------------------------------------------ dtypes and tools


def test_gradients_of_conv1d_by_hand_in_float64():
    """Calls use them in float32 only."""
    x, kernel = drawn(2, 3, 12).requires_grad_(), drawn(3, 5).requires_grad_()
    assert torch.equal(delays._Direct.apply(x, kernel), delays._direct(x, kernel))
    assert torch.autograd.gradcheck(delays._Direct.apply, (x, kernel))
    assert torch.autograd.gradgradcheck(delays._Direct.apply, (x, kernel))


@forms_of_float32
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_in_float32(taps, dtype):
    x, weight, position, _, past = (t.detach().float() for t in case(taps, time=taps + 15))
    leaves = [t.requires_grad_() for t in (x.to(dtype), weight, position, past.to(dtype))]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    g = torch.randn(x.shape).to(dtype)
    results = [mk.delay_conv(x, w, p, 0.7, taps, past)[0] for x, w, p, past in (leaves, exact)]
    got = torch.autograd.grad(results[0], leaves, g)
    for one, other in zip(got, torch.autograd.grad(results[1], exact, g.double()), strict=True):
        assert (one.double() - other).norm() <= 8 * torch.finfo(dtype).eps * other.norm()


def test_derivatives_of_torch_func():
    """Forward mode, and gradients under vmap, in float32."""
    x, weight, position = (t.detach().float() for t in case(20)[:3])

    def loss(weight, x):
        return mk.delay_conv(x.unsqueeze(0), weight, position, 0.7, 20)[0].square().sum()

    tangent = torch.randn_like(x)
    with torch.autograd.forward_ad.dual_level():
        y, _ = mk.delay_conv(torch.autograd.forward_ad.make_dual(x, tangent), weight, position, 0.7, 20)
        moved = torch.autograd.forward_ad.unpack_dual(y).tangent
    expected, _ = mk.delay_conv(tangent, weight, position, 0.7, 20)  # linear in the input
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-4)
    of_weight = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, x)
    leaf = weight.clone().requires_grad_()
    expected = torch.stack([torch.autograd.grad(loss(leaf, row), leaf)[0] for row in x])
    torch.testing.assert_close(of_weight, expected, rtol=1e-4, atol=1e-4)


@forms_of_float32
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(taps, dtype):
    x, *parameters, past = [t.detach().float() for t in case(taps)]
    expected, _ = mk.delay_conv(x.double(), *(p.double() for p in parameters), taps, past.double())
    y, after = mk.delay_conv(x.to(dtype), *parameters, taps, past.to(dtype))
    assert (y.dtype, after.dtype) == (dtype, dtype)
    bound = 40 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=bound, atol=bound)


@forms_of_float32
def test_autocast(taps):
    x, *parameters, past = [t.detach().float() for t in case(taps)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, after = mk.delay_conv(x, *parameters, taps, past)
        assert mk.delay_conv(x[:, :0], *parameters, taps)[0].dtype == torch.bfloat16
    assert (y.dtype, after.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(y.float(), mk.delay_conv(x, *parameters, taps, past)[0], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("taps", "dtype"), [(6, torch.float64), (20, torch.float64), (20, torch.float32)])
def test_compile(taps, dtype, packed):
    torch._dynamo.reset()
    offset = torch.tensor([0, 4, 15]) if packed else None
    made = case(taps, 1 if packed else 2, sequences=2)
    x, *parameters, past = wanted = [t.detach().to(dtype).requires_grad_() for t in made]

    def call():
        return mk.delay_conv(x, *parameters, taps, past, cu_seqlens=offset)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = [(*r, *torch.autograd.grad(sum(t.sum() for t in r), wanted)) for r in (compiled(), call())]
    close(*results, tolerance=1e-12 if dtype == torch.float64 else 1e-5)


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"taps": 0}, ValueError, "taps: expected a positive int, got 0"),
        ({"taps": 6.0}, TypeError, "taps: expected an int, got float"),
        ({"taps": 7}, ValueError, r"past: expected shape \[2, 6, 4\] .*, got \[2, 5, 4\]"),
        ({"past": torch.zeros(2, 5, 4)}, TypeError, "past: expected the input's dtype torch.float64"),
        ({"past": 3}, TypeError, "past: expected a tensor"),
        ({"reach": 0.0}, ValueError, "reach: expected a positive number, got 0.0"),
        ({"reach": math.nan}, ValueError, "reach: expected a positive number, got nan"),
        ({"reach": "6"}, TypeError, "reach: expected a number, got str"),
        ({"sigma": 0.0}, ValueError, "sigma: expected a finite number of at least 1e-30, got 0.0"),
        ({"sigma": None}, TypeError, "sigma: expected a tensor or a number, got NoneType"),
        ({"sigma": drawn(4, 2)}, ValueError, r"sigma: expected shape \[4, 3\] \[channels, count\], got \[4, 2\]"),
        ({"position": drawn(4)}, ValueError, r"position: expected 2 dimensions \[channels, count\]"),
        ({"weight": torch.ones(4, 3).long()}, TypeError, "weight: expected a floating dtype, got torch.int64"),
        ({"weight": torch.ones(5, 3), "position": torch.ones(5, 3), "sigma": 1.0}, ValueError, "weight: expected 4"),
        ({"input": torch.zeros(2, 15, 4)}, TypeError, "weight: expected float32 or the input's dtype torch.float32"),
        ({"input": drawn(2, 15)}, ValueError, "input: expected 3 dimensions"),
        ({"normalised": 1}, TypeError, "normalised: expected a bool, got int"),
        ({"cu_seqlens": torch.tensor([0, 15])}, ValueError, "cu_seqlens: expected streams of batch 1, got batch 2"),
        (
            {"input": drawn(1, 15, 4), "cu_seqlens": torch.tensor([0, 9, 14])},
            ValueError,
            "cu_seqlens: expected offsets that rise from 0 to the total length 15",
        ),
    ],
)  # fmt: skip
def test_bad_input(changed, error, match):
    names = ("input", "weight", "position", "sigma", "past")
    arguments = dict(zip(names, case(6), strict=True)) | {"taps": 6} | changed
    with pytest.raises(error, match=match):
        mk.delay_conv(**arguments)
