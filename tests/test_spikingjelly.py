"""`mk.lif` against `LIFNode` of SpikingJelly 2.0: spikes and gradients."""

from __future__ import annotations

import pytest
import torch

import mru_kernels as mk

pytest.importorskip("spikingjelly", reason="spikingjelly, the peer of these tests, is not installed")
from spikingjelly.activation_based import neuron, surrogate

SURROGATES = {
    ("atan", 1.5): lambda: surrogate.ATan(alpha=3.0),
    ("sigmoid", 4.0): lambda: surrogate.Sigmoid(alpha=4.0),
    ("triangle", 1.0): lambda: surrogate.PiecewiseQuadratic(alpha=1.0),
}
RESETS = {None: "subtract_decayed", 0.0: "zero"}


@pytest.mark.parametrize("tau", [2.0, 3.7])
@pytest.mark.parametrize("decay_input", [True, False])
@pytest.mark.parametrize("detach_reset", [True, False])
@pytest.mark.parametrize("v_reset", RESETS)
def test_spikes_and_gradients_are_those_of_lif_nodes(v_reset, detach_reset, decay_input, tau):
    torch.manual_seed(0)
    x = (3 * torch.randn(2, 50, 5, dtype=torch.float64)).requires_grad_()
    g = torch.randn_like(x)
    channels = torch.ones(5, dtype=torch.float64)
    for (name, scale), make in SURROGATES.items():
        node = neuron.LIFNode(
            tau, decay_input, v_threshold=1.0, v_reset=v_reset, surrogate_function=make(), detach_reset=detach_reset,
            step_mode="m",
        )  # fmt: skip
        expected = node(x.transpose(0, 1)).transpose(0, 1)
        current = x / tau if decay_input else x
        spikes, _ = mk.lif(
            current, (1 - 1 / tau) * channels, channels, reset=RESETS[v_reset], tie=True, surrogate=name,
            surrogate_scale=scale, detach_reset=detach_reset,
        )  # fmt: skip
        assert torch.equal(spikes, expected)
        assert 0.05 < spikes.mean() < 0.6
        grads = [torch.autograd.grad(s, x, g)[0] for s in (spikes, expected)]
        torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-11)
