"""The codes of `examples.spiking`, and the example made small."""

from __future__ import annotations

import pytest
import torch

import mru_kernels as mk
from examples import common, spiking
from tests.test_examples import SMALL, page


def test_the_codes():
    levels = torch.tensor([0.0, 1 / 16, 0.5, 1.0]).repeat_interleave(16).unsqueeze(0)
    torch.manual_seed(0)
    spikes = spiking.rate(levels.expand(500, -1))
    assert spikes.shape == (500, spiking.STEPS, 64)
    torch.testing.assert_close(spikes.mean((0, 1)), levels[0], rtol=0, atol=0.02)
    spikes = spiking.latency(levels)[0]
    first = [spikes[:, pixel].nonzero().flatten().tolist() for pixel in (0, 16, 32, 48)]
    assert first == [[], [30], [16], [0]]
    assert torch.equal(spiking.rows(levels)[0, 2], levels[0, 16:24])


def test_the_units_have_equal_parameters():
    for features in set(spiking.FEATURES.values()):
        for name in spiking.UNITS:
            network = spiking.Network(name, features, spiking.channels(name, features))
            assert common.parameters(network) == pytest.approx(spiking.PARAMETERS, rel=0.04)


def test_the_gradient_of_chunks_is_that_of_the_steps_before_too():
    """With one layer and a loss in the last chunk only, it is the gradient of the whole."""
    torch.manual_seed(0)
    network = spiking.Network("LIF, traces", 8, 6)
    network.unit = mk.LIF(8, 6, threshold=0.3)
    x, classes = torch.rand(4, 32, 8), torch.arange(4)
    feed = mk.stream(network.unit, gradient="traces")
    last = [feed(chunk) for chunk in x.split(spiking.CHUNK, 1)][-1]
    (whole,) = torch.autograd.grad(network.unit(x)[0][:, -spiking.CHUNK :].mean(), network.unit.weight_ih_l0)
    (got,) = torch.autograd.grad(last.mean(), network.unit.weight_ih_l0)
    torch.testing.assert_close(got, whole)
    assert network.loss_of_chunks(x, classes).isfinite()


def test_spiking(tmp_path):
    spiking.main([*SMALL, "--steps", "2", "--out", str(tmp_path)])
    header, _, *rows = page(tmp_path, "spiking")[: 2 + len(spiking.UNITS)]
    assert header.strip("| ").split(" | ") == [
        "percent right / rate in percent",
        "channels",
        "parameters",
        *spiking.CODES,
    ]
    for name, row in zip(spiking.UNITS, rows, strict=True):
        first, _, _, *cells = row.strip("| ").split(" | ")
        assert first == name
        for cell in cells:
            accuracy, rate = map(float, cell.split(" / "))
            assert 0 <= accuracy <= 100
            assert 0 <= rate <= 100
