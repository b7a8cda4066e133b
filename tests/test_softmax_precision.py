"""The softmax recurrence: its errors in float32 and half precision, against float64."""

from __future__ import annotations

import pytest
import torch

import mru_kernels as mk
from tests.softmax_calls import draw, gradients, leaves, scan


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (30.0, 0.0), (1.0, 1000.0), (300.0, 0.0)])
@pytest.mark.parametrize(("decay", "group"), [(None, 1), ("head", 1), ("stream", 1), (None, 8)])
def test_precision_of_float32(backend, scale, shift, decay, group):
    """The figures of a kernel with two floats of log weight; one float loses 3 to 6 digits here."""
    call = draw(
        batch=1, time=2048, heads=2, group=group, decay=decay, bonus=decay is not None, scale=scale, shift=shift,
        slowest=-4.5e-5, dtype=torch.float32,
    )  # fmt: skip
    ours, theirs = leaves(call), leaves(call, torch.float64)
    got, wanted = scan(ours, backend), reference_scan(theirs)
    of_y, _ = reference_scan(theirs | {"value": theirs["value"].detach().abs()})
    assert rms(got[0] - wanted[0]) < 4e-7 * rms(of_y)
    of_ours, of_theirs = gradients(ours, got), gradients(theirs, wanted)
    terms = sums_of_terms(theirs, wanted[0], of_theirs)
    for name, grad in of_ours.items():
        assert rms(grad - of_theirs[name]) < 2e-6 * rms(terms[name]), name


def reference_scan(call):
    return mk.softmax_recurrence(**call, backend="cpu")  # in float64, which other tests compare with the definition


def rms(t) -> float:
    return t.double().square().mean().sqrt().item()


def sums_of_terms(call, y, grads) -> dict[str, torch.Tensor]:
    """About the sums of the absolute terms of each gradient, which may cancel."""
    heads = call["score"].shape[-1]
    of_channels = grads["value"].abs() * (call["value"].abs() + y.abs())
    of_scores = of_channels.unflatten(-1, (heads, -1)).sum(-1)
    terms = {"score": of_scores, "value": grads["value"], "bonus": of_scores.sum((0, 1))}
    if call.get("decay") is not None:
        later = of_scores.flip(1).cumsum(1).flip(1)  # a decay moves all later scores
        terms["decay"] = later if call["decay"].dim() == 3 else later.sum((0, 1))
    return terms


@pytest.mark.check
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1.0, 1000.0)])
@pytest.mark.parametrize("decay", [None, -4.5e-5])
def test_precision_of_a_million_steps(backend, scale, shift, decay):
    call = draw(batch=1, time=1 << 20, heads=1, scale=scale, shift=shift, dtype=torch.float32)
    if decay is not None:
        call["decay"] = torch.tensor([decay])
    got = scan(call, backend)
    wanted = reference_scan({name: t.double() for name, t in call.items()})
    assert rms(got[0] - wanted[0]) < 2e-5 * rms(wanted[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [1, 6])
def test_half_precision_is_rounded_once(backend, dtype, group):
    call = draw(group=group, decay="stream", bonus=True, state=True, dtype=dtype)
    ours = leaves(call)
    wide = leaves(call, torch.float32)
    got, wanted = scan(ours, backend), scan(wide, backend)
    assert torch.equal(got[0], wanted[0].to(dtype))
    assert torch.equal(got[1], wanted[1])
    torch.manual_seed(1)
    of_y = torch.randn(got[0].shape).to(dtype)
    of_ours = torch.autograd.grad(got[0], list(ours.values()), of_y)
    of_wide = torch.autograd.grad(wanted[0], list(wide.values()), of_y.float())
    for a, b, t in zip(of_ours, of_wide, ours.values(), strict=True):
        assert torch.equal(a, b.to(t.dtype))


def test_exponential_over_its_whole_range(backend):
    """The share e / (1 + e) of a second step, from which e is found, against float64."""
    x = torch.cat([torch.linspace(-87, 0, 40001), -torch.logspace(-9, 0, 4001), torch.tensor([-200.0, -torch.inf])])
    score = torch.stack([torch.zeros_like(x), x]).unsqueeze(0)
    value = torch.stack([torch.zeros_like(x), torch.ones_like(x)]).unsqueeze(0)
    y, _ = scan({"score": score, "value": value}, backend)
    wanted = torch.sigmoid(x.double())
    normal = wanted > 2e-38
    assert ((y[0, 1].double() - wanted) / wanted)[normal].abs().max() < 2.5 * 2**-23
    assert not y[0, 1][-2:].any()
