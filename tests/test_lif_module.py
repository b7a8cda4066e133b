"""`mk.LIF`: its equations, initial values, options and errors. tests/test_modules.py tests what every unit has."""

from __future__ import annotations

import pytest
import torch

import mru_kernels as mk


def made(*sizes, **options):
    torch.manual_seed(0)
    return mk.LIF(*sizes, dtype=torch.float64, **options)


def by_lif(unit, x, hx):
    """The output `[B, T, 2 D]` and final membranes of one bidirectional layer, from the op."""
    outputs, finals = [], []
    for direction, suffix in enumerate(("_l0", "_l0_reverse")):
        p = {n.removesuffix(suffix): v for n, v in unit.named_parameters() if n.endswith(suffix)}
        current = x @ p["weight_ih"].T + p["bias_ih"]
        spikes, final = mk.lif(
            current, p["beta"].clamp(0, 1), p["threshold"], hx[direction], reset=unit.reset, tie=unit.tie,
            surrogate=unit.surrogate, surrogate_scale=unit.surrogate_scale, detach_reset=unit.detach_reset,
            reverse=direction == 1,
        )  # fmt: skip
        outputs.append(spikes), finals.append(final)
    return torch.cat(outputs, -1), torch.stack(finals)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reset": "zero", "tie": True, "surrogate": "sigmoid", "surrogate_scale": 3.0, "detach_reset": False},
        {"reset": "none", "beta": 0.5, "threshold": 0.2},
    ],
)
def test_equations_and_gradients(options):
    unit = made(5, 7, bidirectional=True, **options)
    with torch.no_grad():  # beyond the clamp
        for suffix in ("_l0", "_l0_reverse"):
            getattr(unit, "beta" + suffix).copy_(torch.linspace(-0.2, 1.2, 7))
    x, hx = 2 * torch.randn(3, 33, 5, dtype=torch.float64), torch.randn(2, 3, 7, dtype=torch.float64)
    leaves = [x.requires_grad_(), hx.requires_grad_(), *unit.parameters()]
    results = [unit(x, hx), by_lif(unit, x, hx)]
    assert 0.05 < results[0][0].mean() < 0.95
    grads = []
    for output, h_n in results:
        weights = [torch.sin(torch.arange(t.numel(), dtype=t.dtype)).view_as(t) for t in (output, h_n)]
        grads.append(torch.autograd.grad((output, h_n), leaves, weights, allow_unused=True, materialize_grads=True))
    for got, expected in zip(results[0], results[1], strict=True):
        torch.testing.assert_close(got, expected)
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    place = 2 + [name for name, _ in unit.named_parameters()].index("beta_l0")
    assert grads[0][place].count_nonzero() == 5  # not outside of [0, 1]


def test_initial_values_and_repr():
    unit = mk.LIF(3, 4, 2, beta=0.8, threshold=0.5)
    for layer in ("_l0", "_l1"):
        assert getattr(unit, "beta" + layer).eq(0.8).all()
        assert getattr(unit, "threshold" + layer).eq(0.5).all()
        assert getattr(unit, "initial_state" + layer).eq(0.0).all()
    assert repr(mk.LIF(3, 4)) == "LIF(3, 4, beta=0.9, threshold=1, reset='subtract')"
    assert repr(mk.LIF(3, 4, reset="zero", tie=True, detach_reset=False)) == (
        "LIF(3, 4, beta=0.9, threshold=1, reset='zero', tie=True, detach_reset=False)"
    )


def test_the_output_is_spikes_and_the_state_is_the_membrane():
    unit = mk.LIF(3, 8, threshold=0.3)
    spikes, h_n = unit(torch.randn(2, 50, 3))
    assert set(spikes.unique().tolist()) == {0.0, 1.0}
    assert h_n.unique().numel() > 8
    h_n = torch.full_like(h_n, 5.0)  # above the threshold: the first step resets it
    step, after = unit.step(torch.zeros(2, 3), h_n)
    assert step.eq(1).all()
    expected = 0.9 * 5.0 + unit.bias_ih_l0 - 0.3
    torch.testing.assert_close(after[0], expected.expand(2, -1))


def test_a_network_of_lif():
    torch.manual_seed(0)
    network = mk.MRUNetwork(3, 5, width=8, num_blocks=2, units={"lif": {"threshold": 0.3}, "bmru": {}})
    x = torch.randn(2, 10, 3)
    output, state = network(x)
    output.sum().backward()
    unit = network.blocks[0].units[0]
    assert type(unit) is mk.LIF
    assert unit.weight_ih_l0.grad.abs().sum() > 0
    _, state = network(x[:, :9])
    torch.testing.assert_close(network.step(x[:, 9], state)[0], output[:, 9])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"beta": 1.1}, ValueError, r"beta: expected a finite number in \[0, 1\], got 1.1"),
        ({"threshold": "1"}, TypeError, "threshold: expected a float, got str"),
        ({"reset": "soft"}, ValueError, "reset: expected one of 'none', 'subtract', 'subtract_decayed', "),
        ({"surrogate": "SSO"}, ValueError, "surrogate: expected one of 'atan', .* got 'SSO'"),
        ({"surrogate_scale": 0.0}, ValueError, "surrogate_scale: expected a positive finite number, got 0.0"),
        ({"tie": 1}, TypeError, "tie: expected a bool, got int"),
        ({"detach_reset": None}, TypeError, "detach_reset: expected a bool, got NoneType"),
        ({"epsilon": 0.5}, TypeError, "LIF: unknown argument 'epsilon'"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        mk.LIF(3, 4, **options)
