"""Training with mismatch: other parameters at every call, and noise on thresholds."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import mru_kernels as mk
from tests.test_hardware import Tied, bits, same
from tests.units import CLASSES, MIXED, UNITS, network, unit

# ------------------------------------------------------------------------------------------------ mismatch


@pytest.mark.parametrize("make", [network, Tied, *(lambda c=c: unit(c) for c in UNITS)])
def test_gradients_go_to_the_parameters(make):
    """In the context a call is one with other parameters, and its gradient is that of the draw times the factor."""
    module = make()
    x = torch.randn(3, 20, 4)
    before, keys = bits(module), list(module.state_dict())
    with mk.mismatch(module, 0.3):
        torch.manual_seed(1)
        output, _ = module(x)
        assert same(module, before)
        assert list(module.state_dict()) == keys
        output.square().sum().backward()
    found = {name: p.grad.clone() for name, p in module.named_parameters()}
    other = copy.deepcopy(module)
    torch.manual_seed(1)
    factors = {name: 1 + 0.1 * torch.randn_like(p) for name, p in _in_order(other)}
    with torch.no_grad():
        for name, p in _in_order(other):
            p.mul_(factors[name])
    other.zero_grad()
    expected, _ = other(x)
    torch.testing.assert_close(output, expected)
    assert (output - module(x)[0]).abs().max() > 1e-3
    expected.square().sum().backward()
    for name, p in _in_order(other):
        torch.testing.assert_close(found[name], p.grad * factors[name], msg=name)


def _in_order(module):
    """The parameters in the order of the draws."""
    return list(module.named_parameters())


def test_torchs_gru_gets_mismatch_too():
    gru, x = torch.nn.GRU(4, 4), torch.randn(2, 9, 4)
    with mk.mismatch(gru, 0.3):
        assert not torch.equal(gru(x)[0], gru(x)[0])
    assert torch.equal(gru(x)[0], gru(x)[0])


def test_every_call_draws_and_torchs_seed_repeats():
    module, x = network(), torch.randn(2, 9, 4)
    with mk.mismatch(module, 0.2):
        torch.manual_seed(3)
        first, second = module(x)[0], module.eval()(x)[0]
        torch.manual_seed(3)
        assert torch.equal(module(x)[0], first)
        assert not torch.equal(first, second)
        with torch.no_grad():
            assert not torch.equal(module.step(x[:, 0])[0], module.step(x[:, 0])[0])
    assert torch.equal(module(x)[0], module(x)[0])
    with mk.mismatch(module, 0.0):
        output = module(x)[0]
    assert torch.equal(output, module(x)[0])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_context_leaves_the_module_as_it_was(error):
    module = network()
    before, objects = bits(module), list(module.parameters())

    def fail(*_):
        assert not same(module, before)
        raise error

    handle = module.norm.register_forward_hook(fail)
    with pytest.raises(error), mk.mismatch(module, 0.2):
        module(torch.randn(2, 9, 4))
    handle.remove()
    assert all(a is b for a, b in zip(module.parameters(), objects, strict=True))
    assert same(module, before)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in module.modules())
    with mk.mismatch(module, 0.2):  # the context can be entered again
        module(torch.randn(2, 9, 4))


def test_an_interrupted_call_is_not_followed_by_another():
    module, x = unit(mk.BMRU), torch.randn(2, 9, 4)

    def fail(*_):
        raise KeyboardInterrupt

    with mk.mismatch(module, 0.2):
        handle = module.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            module(x)
        handle.remove()
        with pytest.raises(RuntimeError, match=r"mismatch: expected no call .* after an interrupted one"):
            module(x)


def test_contexts_do_not_nest():
    module = network()
    with mk.mismatch(module, 0.1):
        for inner in (module, module.blocks[0], torch.nn.Sequential(module)):
            with pytest.raises(RuntimeError, match="mismatch: expected one context"), mk.mismatch(inner, 0.1):
                pass
        with mk.mismatch(network(), 0.1):
            pass
        with pytest.raises(RuntimeError, match="mismatch: expected one context"), mk.mismatch(module.head, 0.1):
            pass


def test_a_copy_that_is_made_in_the_context_has_no_mismatch():
    module, x = network(), torch.randn(2, 9, 4)
    expected = module(x)[0]
    with mk.mismatch(module, 0.2):
        copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
        for other in copies:
            assert torch.equal(other(x)[0], expected)
            assert same(other, bits(module))
    for other in copies:
        assert torch.equal(other(x)[0], expected)


def test_calls_of_a_part_are_refused():
    module, x = network(), torch.randn(2, 9, 4)
    with mk.mismatch(module, 0.2):
        with pytest.raises(RuntimeError, match="mismatch: expected calls of the whole module, got one of its Linear"):
            module.head(x)
        module(x)


def test_checkpointing_around_the_module_repeats_the_draw_and_inside_is_refused():
    module, x = network(), torch.randn(2, 9, 4)
    gradients = []
    for run in (module, lambda x: checkpoint(module, x, use_reentrant=False)):
        torch.manual_seed(0)
        module.zero_grad()
        with mk.mismatch(module, 0.2, noise=0.1):
            run(x)[0].square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in module.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name

    class Inside(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)[0].sum()

    outside = Inside()
    with mk.mismatch(outside, 0.2):
        loss = outside(x)
        with pytest.raises(RuntimeError, match="activation checkpointing"):
            loss.backward()


def test_mismatch_under_autocast():
    module, x = network(), torch.randn(2, 9, 4)
    with mk.mismatch(module, 0.3), torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = [module(x)[0] for _ in range(2)]
        sum(o.float().square().sum() for o in outputs).backward()
    assert not torch.equal(*outputs)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.check
@pytest.mark.parametrize("given", ["module", "compiled"])
def test_mismatch_under_compile(given):
    torch._dynamo.reset()
    module, x = unit(mk.BMRU), torch.randn(2, 9, 4)
    runs = {"module": module, "compiled": torch.compile(module, backend="aot_eager", fullgraph=True)}
    expected = runs["compiled"](x)[0]
    results = []
    with mk.mismatch(runs[given], 0.2, noise=0.1):
        for run in runs.values():
            torch.manual_seed(0)
            module.zero_grad()
            output = run(x)[0]
            output.square().sum().backward()
            results.append((output, module.weight_ih_l0.grad.clone()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert (results[0][0] - expected).abs().max() > 1e-3
    assert torch.equal(runs["compiled"](x)[0], expected)


def test_mismatch_of_a_wrapped_module(group_of_one):
    module, x = unit(mk.BMRU), torch.randn(2, 9, 4)
    wrapped = torch.nn.parallel.DistributedDataParallel(module)
    with mk.mismatch(wrapped, 0.2):
        assert not torch.equal(wrapped(x)[0], wrapped(x)[0])
        wrapped(x)[0].sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    assert torch.equal(wrapped(x)[0], module(x)[0])


def test_training_with_mismatch():
    torch.manual_seed(0)
    module = unit(mk.MinGRU)
    x = torch.randn(8, 12, 4)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    losses = []
    with mk.mismatch(module, 0.1):
        for _ in range(60):
            loss = (module(x)[0][:, :, :4] - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


# ------------------------------------------------------------------------------------------------ noise


@pytest.mark.parametrize("cls", CLASSES)
def test_noise_is_drawn_for_every_step_and_channel_of_the_threshold(cls):
    module = cls(4, 50, learn_initial_state=False)
    seen = []
    scan = module._scan
    module._scan = lambda gates, *a, **k: (seen.append(gates.detach()), scan(gates, *a, **k))[1]
    x = torch.randn(4, 30, 4)
    module(x)
    with mk.mismatch(module, 0.0, noise=0.25):
        module(x)
        module.step(x[:, 0])
    module(x)
    clean, noisy, after = seen[0], seen[1], seen[-1]
    assert torch.equal(clean, after)
    names = list(module.gates)
    for name, difference in zip(names, (noisy - clean).chunk(len(names), -1), strict=True):
        if name == ("threshold" if "threshold" in names else "candidate"):
            assert difference.std().item() == pytest.approx(0.25, rel=0.05)
            assert abs(difference.mean().item()) < 0.02
            assert len(difference.unique()) > 0.9 * difference.numel()
        else:
            assert not difference.any()
    assert module._noise is None


def test_noise_in_a_network_reaches_every_step():
    module, x = network(units=MIXED), torch.randn(2, 9, 4)
    with mk.mismatch(module, 0.0, noise=2.0):
        assert not torch.equal(module(x)[0], module(x)[0])
        _, state = module(x)
        assert not torch.equal(module.step(x[:, 0], state)[0], module.step(x[:, 0], state)[0])
        module(x)[0].sum().backward()
    assert all(p.grad is not None for p in module.parameters())
