"""Modules as hardware has them: mismatch of the parameters, quantised weights."""

from __future__ import annotations

import pytest
import torch

import mru_kernels as mk
from tests.units import network, unit


class Tied(torch.nn.Module):
    """Two modules that share a weight, and a unit that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(4, 4)
        self.second = torch.nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.unit = mk.BMRU(4, 4)

    def forward(self, x):
        return self.unit(self.second(self.unit(self.first(x))[0]))


def bits(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in module.named_parameters()}


def same(module: torch.nn.Module, expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(t, expected[name]) for name, t in module.named_parameters())


# ------------------------------------------------------------------------------------------------ robustness


def test_a_trial_multiplies_every_element_by_its_own_draw():
    module = torch.nn.ParameterDict({"a": torch.full((100, 400), 2.0), "b": torch.tensor([0.0, -1.0])})
    module.register_buffer("c", torch.ones(3))
    module.register_parameter("d", torch.nn.Parameter(torch.arange(3), requires_grad=False))
    factors = []

    def evaluate(module):
        factors.append(module["a"].detach() / 2.0)
        assert module["b"][0] == 0.0
        assert torch.equal(module.c, torch.ones(3))
        assert torch.equal(module.d, torch.arange(3))
        return 1.0

    mk.robustness(module, evaluate, mismatch=(0.15, 0.3), trials=2)
    nominal, *drawn = factors
    assert torch.equal(nominal, torch.ones(100, 400))
    for factor, size in zip(drawn, (0.15, 0.15, 0.3, 0.3), strict=True):
        assert factor.mean().item() == pytest.approx(1.0, abs=0.002)
        assert factor.std().item() == pytest.approx(size / 3, rel=0.02)
    assert not torch.equal(drawn[0], drawn[1])
    torch.testing.assert_close(2 * (drawn[0] - 1), drawn[2] - 1)  # the same draw for another mismatch


def test_results_repeat_with_the_seed_and_do_not_touch_torchs_generator():
    module, x = network(), torch.randn(3, 20, 4)
    before = torch.random.get_rng_state()
    runs = [mk.robustness(module, lambda m: m(x)[0].mean(), trials=3, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert runs[0] == runs[1]
    assert runs[0].nominal == runs[2].nominal
    assert runs[0].results != runs[2].results
    assert mk.robustness(module, lambda m: m(x)[0].mean(), (0.1,), trials=3).results[0.1] == runs[0].results[0.1]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_parameters_are_restored_bit_for_bit(error):
    module = Tied().to(torch.bfloat16)
    with torch.no_grad():
        module.unit.alpha_l0[0], module.first.bias[0] = float("nan"), -0.0
    before = {name: t.view(torch.int16).clone() for name, t in module.named_parameters()}
    calls = []

    def evaluate(module):
        calls.append(module.first.weight.detach().clone())
        assert module.second.weight is module.first.weight
        if len(calls) == 3:
            raise error
        return 0.0

    with pytest.raises(error):
        mk.robustness(module, evaluate)
    assert len({t.float().sum().item() for t in calls}) == 3
    assert all(torch.equal(t.view(torch.int16), before[name]) for name, t in module.named_parameters())


def test_a_trial_within_autocast_uses_its_own_parameters():
    module, x = unit(mk.MinGRU), torch.randn(2, 10, 4)
    plain = mk.robustness(module, lambda m: m(x)[0].float().std(), (0.5,), trials=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = mk.robustness(module, lambda m: m(x)[0].float().std(), (0.5,), trials=3)
        after = module(x)[0]
    assert cast.results[0.5] == pytest.approx(plain.results[0.5], rel=0.02)
    assert len(set(cast.results[0.5])) == 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(x)[0], after)


def test_a_table_has_aligned_columns():
    table = mk.robustness(torch.nn.Linear(2, 2), lambda m: 100 * m.weight.abs().sum(), (0.0, 0.125), trials=1)
    lines = str(table).splitlines()
    assert [line.split()[0] for line in lines] == ["mismatch", "0", "0", "12.5"]
    assert len({len(lines[i]) for i in (0, 2, 3)}) == 1
    assert table.results[0.0] == [table.nominal]
    assert table.spread(0.125) == 0.0


# ------------------------------------------------------------------------------------------------ quantised weights


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("make", [network, Tied, lambda: unit(mk.BMRU, dtype=torch.bfloat16)])
def test_rows_are_quantised_to_the_nearest_level(bits, make):
    module = make()
    with torch.no_grad():
        module.zeros = torch.nn.Parameter(torch.zeros(3, 4))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    result = mk.quantized(module, bits)
    assert same(module, before)
    levels = 2 ** (bits - 1) - 1
    for name, p in result.named_parameters():
        if p.dim() < 2:
            assert torch.equal(p, before[name]), name
            continue
        for row, was in zip(p.detach().flatten(1).double(), before[name].flatten(1).double(), strict=True):
            scale = was.abs().max() / levels
            rounding = was.abs().max() * torch.finfo(p.dtype).eps
            if scale > 0:
                torch.testing.assert_close(row / scale, (row / scale).round(), atol=levels * 1e-2, rtol=0)
            assert (row - was).abs().max() <= scale / 2 + rounding, name
            assert len(row.unique()) <= 2 * levels + 1
    assert result.zeros.eq(0).all()


def test_a_quantised_copy_keeps_sharing_epsilon_and_runs():
    module = Tied()
    module.unit.epsilon = 0.25
    result = mk.quantized(module, 4)
    assert result.first.weight is result.second.weight
    assert result.unit.epsilon == 0.25
    x = torch.randn(2, 9, 4)
    assert not torch.equal(result.first(x), module.first(x))
    assert result(x)[0].shape == (2, 9, 4)
    again = mk.quantized(result, 4)
    for a, b in zip(again.parameters(), result.parameters(), strict=True):
        torch.testing.assert_close(a, b)


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: mk.robustness(3, float), TypeError, "module: expected a torch.nn.Module, got int"),
        (lambda m: mk.robustness(m, 3), TypeError, "evaluate: expected a function"),
        (
            lambda m: mk.robustness(m, lambda m: None),
            TypeError,
            "evaluate: expected a number from a call, got NoneType",
        ),
        (lambda m: mk.robustness(m, lambda m: "1"), TypeError, "evaluate: expected a number .*, got str"),
        (lambda m: mk.robustness(m, lambda m: torch.ones(2)), TypeError, "evaluate: expected a number .* tensor"),
        (lambda m: mk.robustness(m, float, 0.1), TypeError, "mismatch: expected a sequence"),
        (lambda m: mk.robustness(m, float, (-0.1,)), ValueError, "mismatch: expected a finite number"),
        (lambda m: mk.robustness(m, float, trials=0), ValueError, "trials: expected a positive int"),
        (lambda m: mk.robustness(m, float, seed=0.5), TypeError, "seed: expected an int, got float"),
        (lambda m: mk.quantized(None, 8), TypeError, "module: expected a torch.nn.Module, got NoneType"),
        (lambda m: mk.quantized(m, 1), ValueError, "bits: expected an int from 2 to 8, got 1"),
        (lambda m: mk.quantized(m, 9), ValueError, "bits: expected an int from 2 to 8, got 9"),
        (lambda m: mk.quantized(m, 4.0), TypeError, "bits: expected an int, got float"),
        (lambda m: mk.mismatch("m", 0.1), TypeError, "module: expected a torch.nn.Module, got str"),
        (lambda m: mk.mismatch(m, "0.1"), TypeError, "mismatch: expected a float"),
        (lambda m: mk.mismatch(m, -0.1), ValueError, "mismatch: expected a finite number"),
        (lambda m: mk.mismatch(m, 0.1, noise=float("nan")), ValueError, "noise: expected a finite number"),
        (lambda m: mk.mismatch(mk.LRU(2, 2), 0.1, noise=0.1), ValueError, "noise: expected 0 for a module without"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(unit(mk.BMRU))
