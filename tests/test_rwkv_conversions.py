"""RWKV-4's states and checkpoints from and to those of public code."""

from __future__ import annotations

import math

import pytest
import torch

import mru_kernels as mk
from tests.rwkv_public import checkpoint, close, model, random, renamed, sums

pytestmark = pytest.mark.usefixtures("one_thread")  # the tensors are too small for two


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_states_convert_both_ways(dtype):
    key, value = 30 * random(2, 9, 4, dtype=dtype), random(2, 9, 4, dtype=dtype)
    time_decay, first = random(4, dtype=dtype), random(4, dtype=dtype)
    expected, (aa, bb, pp) = sums(key, value, time_decay, first)
    decay = -time_decay.exp()
    tolerance = 1e-4 if dtype == torch.float32 else 1e-12
    _, state = mk.wkv(key[:, :5], value[:, :5], decay, first)
    rest, _ = sums(key[:, 5:], value[:, 5:], time_decay, first, mk.wkv_sums_from_state(state))
    close(rest, expected[:, 5:], tolerance)
    _, before = sums(key[:, :5], value[:, :5], time_decay, first)
    stacked = torch.stack(before, -1)  # Hugging Face's [B, C, 3]
    rest, final = mk.wkv(key[:, 5:], value[:, 5:], decay, first, mk.wkv_state_from_sums(*stacked.unbind(-1)))
    close(rest, expected[:, 5:], tolerance)
    again = mk.wkv_state_from_sums(aa, bb, pp)
    mean, total, low = again.split(4, -1)
    close(mean, aa / bb)
    close(total.double() + low, pp.double() + bb.double().log(), 1e-6 if dtype == torch.float32 else 1e-15)
    close(again, final, tolerance)


def test_a_converted_state_keeps_what_one_float_loses():
    """At a log scale near 1000 one float32 has steps of 6e-5; the two parts of the state have 1e-9 and less."""
    bb = torch.linspace(1.0, 2.0, 100).unsqueeze(0)
    pp = torch.full_like(bb, 1000.0)
    _, total, low = mk.wkv_state_from_sums(bb, bb, pp).split(100, -1)
    exact = pp.double() + bb.double().log()
    assert (total.double() - exact).abs().max() > 1e-5
    assert (total.double() + low - exact).abs().max() < 1e-6
    aa, back, scale = mk.wkv_sums_from_state(mk.wkv_state_from_sums(3 * bb, bb, pp))
    close(scale.double() + back.double().log(), exact, 1e-9)
    close(aa / back, torch.full_like(bb, 3.0), 1e-6)


def test_an_empty_state_converts_both_ways():
    zeros = torch.zeros(2, 3)
    state = mk.wkv_state_from_sums(zeros, zeros, zeros - 1e38)
    assert state.tolist() == [[0.0] * 3 + [-math.inf] * 3 + [0.0] * 3] * 2
    assert [t.tolist() for t in mk.wkv_sums_from_state(state)] == [t.tolist() for t in (zeros, zeros, zeros - 1e38)]


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda t: mk.wkv_state_from_sums(t, t[0], t), ValueError, r"^bb: expected 2 dimensions \[batch, channels\]"),
        (lambda t: mk.wkv_state_from_sums(t, t[:1], t), ValueError, r"^bb: expected aa's shape \[2, 3\], got \[1, 3\]"),
        (lambda t: mk.wkv_state_from_sums(t, t, t.half()), TypeError, "^pp: expected float32 or float64 as aa, got"),
        (
            lambda t: mk.wkv_sums_from_state(t.half()),
            TypeError,
            "^state: expected float32 or float64, got",
        ),
        (lambda t: mk.wkv_sums_from_state(t[:, :2]), ValueError, r"^state: expected \[batch, 3 channels\], got shape"),
        (lambda t: mk.wkv_sums_from_state(None), TypeError, r"^state: expected a tensor \[batch, 3 channels\]"),
    ],
)
def test_bad_conversions(call, error, match):
    with pytest.raises(error, match=match):
        call(torch.ones(2, 3))


@pytest.mark.parametrize("names", ["BlinkDL", "Hugging Face"])
def test_a_public_checkpoint_becomes_a_network(names, tmp_path):
    parameters = checkpoint()
    file = tmp_path / "checkpoint.pth"
    torch.save({renamed(n) if names == "Hugging Face" else n: t for n, t in parameters.items()}, file)
    network = mk.RWKV4.from_checkpoint(torch.load(file, map_location="cpu", weights_only=True))
    tokens = torch.randint(11, (2, 9))
    close(network(tokens)[0], model(tokens, parameters), 1e-9)
    assert network.extra_repr() == "11, 6, layers=2"
    again = mk.RWKV4.from_checkpoint(network.state_dict(), dtype=torch.float32)
    assert again.head.weight.dtype == torch.float32
    close(again(tokens)[0].double(), network(tokens)[0], 1e-3)


def test_a_checkpoint_in_half_precision_keeps_its_decay_in_float32():
    network = mk.RWKV4.from_checkpoint({name: t.bfloat16() for name, t in checkpoint().items()})
    assert network.head.weight.dtype == torch.bfloat16
    assert network.blocks[0].att.time_decay.dtype == torch.float32
    assert network.blocks[0].att.time_first.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda c: [c], TypeError, "^checkpoint: expected a mapping from names to tensors, got list"),
        (lambda c: c | {"emb.weight": 3}, TypeError, "^checkpoint: expected a tensor for emb.weight, got int"),
        (lambda c: {}, ValueError, "^checkpoint: expected a parameter emb.weight, got none"),
        (lambda c: c | {"emb.weight": torch.ones(3)}, ValueError, r"^checkpoint: expected a matrix for emb.weight"),
        (
            lambda c: {n: t for n, t in c.items() if n != "blocks.1.ln2.bias"},
            ValueError,
            "^checkpoint: expected a parameter blocks.1.ln2.bias, got none",
        ),
        (lambda c: c | {"head_q.weight": torch.ones(3, 6)}, ValueError, "^checkpoint: expected no parameter head_q"),
        (lambda c: c | {"blocks.x": torch.ones(3)}, ValueError, "^checkpoint: expected no parameter blocks.x"),
        (
            lambda c: c | {"blocks.1.att.time_decay": torch.ones(5)},
            ValueError,
            r"^checkpoint: expected shape \[6\] for blocks.1.att.time_decay, got \[5\]",
        ),
    ],
)
def test_bad_checkpoints(change, error, match):
    with pytest.raises(error, match=match):
        mk.RWKV4.from_checkpoint(change(checkpoint()))
