"""`write_rates`: how often each channel of a unit writes, and how long it holds."""

from __future__ import annotations

import builtins

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import mru_kernels as mk
from tests.units import CLASSES, network, unit


def set_gates(module: torch.nn.Module) -> None:
    """Candidates of the three channels: x_0, 1 and 0.5; thresholds: 0.75."""
    with torch.no_grad():
        module.weight_ih_l0.zero_()
        module.weight_ih_l0[0, 0] = 1.0
        module.bias_ih_l0[:6] = torch.tensor([0.0, 1.0, 0.5, 0.75, 0.75, 0.75])


X = torch.tensor([[0.0, 0.0, -1.0, 0.75, 0.0], [0.0, -0.75, 0.5, 0.0, 0.0]]).unsqueeze(-1).repeat(1, 1, 2)


@pytest.mark.parametrize("cls", [mk.BMRU, mk.CMRU, mk.AlphaCMRU])
def test_writes_are_counted(cls):
    module = cls(2, 3)
    set_gates(module)
    with torch.no_grad():
        module.initial_state_l0[0] = 1.0
    (layer,) = mk.write_rates(module, X).layers
    assert layer.name == f"{cls.__name__} l0"
    assert layer.rate.tolist() == pytest.approx([0.3, 1.0, 0.0])
    assert layer.first.tolist() == [1, 0, -1]
    assert layer.longest.tolist() == [3, 0, 5]
    assert not layer.constant[0]
    assert layer.constant[2]


def test_writes_of_a_first_quadrant_unit_are_outside_of_its_band():
    module = mk.FirstQuadrantBMRU(1, 1)
    with torch.no_grad():
        for name, value in {"weight_ih": 1.0, "bias_ih": 0.0, "low": 0.25, "width": -0.5}.items():
            getattr(module, f"{name}_l0").fill_(value)
    x = torch.tensor([0.25, 0.5, 0.75, 0.5, 0.0, -1.0, 0.74]).reshape(1, -1, 1)
    (layer,) = mk.write_rates(module, x).layers
    assert layer.rate.item() == pytest.approx(3 / 7)
    assert (layer.first.item(), layer.longest.item(), layer.constant.item()) == (2, 2, False)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_step_that_changes_the_state_is_a_write(cls):
    """The counts against the outputs: with epsilon 1 and unit amplitude every write of a signed unit changes them."""
    module = cls(4, 6, epsilon=1.0)
    x = torch.randn(3, 40, 4)
    (layer,) = mk.write_rates(module, x).layers
    states = torch.cat([module.initial_state_l0.expand(3, 1, 6), module(x)[0].detach()], 1)
    changes = states.diff(dim=1).ne(0.0)
    share = changes.float().mean((0, 1))
    if cls is mk.FirstQuadrantBMRU:  # a write of 0 adds nothing
        assert (layer.rate >= share).all()
    else:
        torch.testing.assert_close(layer.rate, share)
    assert torch.equal(layer.constant, ~states[:, 1:].ne(states[:1, 1:2]).any(0).any(0))


def test_constant_channels_may_write():
    module = mk.BMRU(2, 3)
    set_gates(module)
    with torch.no_grad():
        module.initial_state_l0.fill_(1.0)
    (layer,) = mk.write_rates(module, X.abs()).layers
    assert layer.rate.tolist() == pytest.approx([0.3, 1.0, 0.0])
    assert layer.constant.all()


def test_directions_layers_and_packed_sequences():
    module = unit(mk.BMRU, bidirectional=True)
    sequences = [torch.randn(n, 4) for n in (4, 9, 2)]
    packed = mk.write_rates(module, pack_sequence(sequences, enforce_sorted=False)).layers
    alone = [mk.write_rates(module, x).layers for x in sequences]
    assert [layer.name for layer in packed] == ["BMRU l0", "BMRU l0_reverse", "BMRU l1", "BMRU l1_reverse"]
    for layer, *parts in zip(packed, *alone, strict=True):
        steps = torch.tensor([float(len(x)) for x in sequences])
        torch.testing.assert_close(layer.rate, (torch.stack([p.rate for p in parts], 1) @ steps) / steps.sum())
        assert torch.equal(layer.longest, torch.stack([p.longest for p in parts]).amax(0))
        first = torch.stack([p.first for p in parts])
        assert torch.equal(layer.first, first.masked_fill(first < 0, 99).amin(0).where((first >= 0).any(0), -1))


def test_the_second_direction_begins_at_the_last_step():
    module = mk.BMRU(2, 3, bidirectional=True)
    set_gates(module)
    with torch.no_grad():
        module.weight_ih_l0_reverse.copy_(module.weight_ih_l0)
        module.bias_ih_l0_reverse.copy_(module.bias_ih_l0)
    forward, backward = mk.write_rates(module, X).layers
    assert forward.first[0] == 1
    assert backward.first[0] == 1
    forward, backward = mk.write_rates(module, X[:1]).layers
    assert (forward.first[0], backward.first[0]) == (2, 1)


def test_networks_and_their_options():
    module, x = network(), torch.randn(2, 9, 4)
    before = {name: list(vars(m)) for name, m in module.named_modules()}
    expected = module(x)[0]
    rates = mk.write_rates(module, x)
    assert [layer.name for layer in rates.layers] == [f"blocks.{b}.units.{u} l0" for b in (0, 1) for u in (0, 1, 2)]
    assert before == {name: list(vars(m)) for name, m in module.named_modules()}
    assert torch.equal(module(x)[0], expected)
    cached = mk.MRUNetwork(4, 3, width=4, num_blocks=1, cache={"segment": 4})
    assert [layer.name for layer in mk.write_rates(cached, x).layers] == ["blocks.0.units.0.unit l0"]
    half = mk.write_rates(unit(mk.CMRU, dtype=torch.bfloat16), x.bfloat16()).layers[0]
    assert half.rate.dtype == torch.float32


def test_time_first():
    x = torch.randn(2, 9, 4)
    first, second = (
        mk.write_rates(unit(mk.BMRU, batch_first=order), x if order else x.transpose(0, 1)) for order in (True, False)
    )
    assert str(first) == str(second)


def test_a_failed_call_leaves_the_module_as_it_was():
    module = unit(mk.BMRU)
    with pytest.raises(ValueError, match="input: expected 4 features"):
        mk.write_rates(module, torch.randn(2, 9, 3))
    assert "_scan" not in vars(module)


def test_the_table_is_aligned():
    lines = str(mk.write_rates(network(), torch.randn(2, 9, 4))).splitlines()
    assert lines[0].split()[:2] == ["layer", "channels"]
    assert len(lines) == 7
    assert len({len(line) for line in lines}) == 1


def test_the_plot(tmp_path, monkeypatch):
    rates = mk.write_rates(unit(mk.BMRU), torch.randn(2, 9, 4))
    rates.plot(tmp_path / "rates.png")
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")
    real = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ImportError, match="plot: needs matplotlib"):
        rates.plot(tmp_path / "other.png")


class _Unused(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.unit = mk.BMRU(2, 3)

    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        ("unit", TypeError, "module: expected a torch.nn.Module, got str"),
        (mk.MinGRU(2, 3), ValueError, "module: expected one with units that write or hold, got MinGRU"),
        (_Unused(), ValueError, "module: expected a call that runs its units, got none in that of _Unused"),
    ],
)
def test_bad_input(module, error, message):
    with pytest.raises(error, match=message):
        mk.write_rates(module, X)
