"""RWKV-4's mixings and network: equations, initial values, states, tools and bad input."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import mru_kernels as mk
from tests.rwkv_public import channel_mix, close, random, time_mix

pytestmark = pytest.mark.usefixtures("one_thread")  # the tensors are too small for two


def drawn(module: torch.nn.Module) -> torch.nn.Module:
    """The module in float64 with random parameters: some are zero at first."""
    torch.manual_seed(0)
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    return module


# ------------------------------------------------------------------------------------------------ equations


@pytest.mark.parametrize(
    ("module", "equations"), [(mk.RWKV4TimeMix(5), time_mix), (mk.RWKV4ChannelMix(5, hidden_size=7), channel_mix)]
)
def test_a_mixing_equals_the_public_code(module, equations):
    module, x = drawn(module), random(2, 9, 5)
    p = dict(module.named_parameters())
    output, expected = module(x)[0], equations(x, p)
    close(output, expected)
    weights = torch.randn_like(output)
    got = torch.autograd.grad((output * weights).sum(), list(p.values()))
    close(got, torch.autograd.grad((expected * weights).sum(), list(p.values())), 1e-10)


@pytest.mark.parametrize(("layer", "layers"), [(0, 1), (0, 3), (1, 3), (2, 3)])
def test_initial_values_are_those_of_the_public_code(layer, layers):
    width = 7
    module = mk.RWKV4TimeMix(width, layer, layers, dtype=torch.float64)
    other = mk.RWKV4ChannelMix(width, layer, layers, dtype=torch.float64)
    depth, fades = (layer / (layers - 1) if layers > 1 else 0.0), 1.0 - layer / layers
    for i in range(width):
        expected = {
            "time_decay": -5 + 8 * (i / (width - 1)) ** (0.7 + 1.3 * depth),
            "time_first": math.log(0.3) + ((i + 1) % 3 - 1) * 0.5,
            "time_mix_k": (i / width) ** fades,
            "time_mix_v": (i / width) ** fades + 0.3 * depth,
            "time_mix_r": (i / width) ** (0.5 * fades),
        }
        for name, value in expected.items():
            assert getattr(module, name)[i].item() == pytest.approx(value, abs=1e-6), name
        assert other.time_mix_k[i].item() == pytest.approx((i / width) ** fades, abs=1e-6)
        assert other.time_mix_r[i].item() == pytest.approx((i / width) ** fades, abs=1e-6)
    assert not any(part.weight.any() for part in (module.key, module.receptance, module.output))
    assert not any(part.weight.any() for part in (other.receptance, other.value))
    close(module.value.weight @ module.value.weight.T, torch.eye(width, dtype=torch.float64))
    close(other.key.weight.T @ other.key.weight, 4 * torch.eye(width, dtype=torch.float64))
    network = mk.RWKV4(20, 5, 2, dtype=torch.float64)
    assert 0.5e-4 < network.emb.weight.abs().max() <= 1e-4
    close(network.head.weight.T @ network.head.weight, torch.eye(5, dtype=torch.float64))  # (0.5 sqrt(20 / 5))^2


def test_a_network_sets_the_initial_values_of_its_layers():
    network = mk.MRUNetwork(3, 2, width=6, num_blocks=3, units={"rwkv4": {}, "bmru": {}})
    for layer, block in enumerate(network.blocks):
        expected = mk.RWKV4TimeMix(6, layer, 3)
        for name in ("time_decay", "time_first", "time_mix_k", "time_mix_v", "time_mix_r"):
            close(getattr(block.units[0], name), getattr(expected, name), 0)


# ------------------------------------------------------------------------------------------------ states


MODULES = {
    "time": lambda: mk.RWKV4TimeMix(4, chunk_size=16),
    "channel": lambda: mk.RWKV4ChannelMix(4),
    "network": lambda: mk.RWKV4(9, 4, 2),
    "units": lambda: mk.MRUNetwork(4, 3, width=4, num_blocks=2, units={"rwkv4": {}, "min_gru": {}}, conv_size=2),
}
all_modules = pytest.mark.parametrize("name", MODULES)


def sequence(name: str, time: int) -> torch.Tensor:
    return torch.randint(9, (2, time)) if name == "network" else random(2, time, 4)


@all_modules
def test_chunks_and_steps_equal_the_pass(name):
    module, x = drawn(MODULES[name]()), sequence(name, 13)
    whole, last = module(x)
    state, outputs = None, []
    for chunk in x.split((3, 1, 9), 1):
        output, state = module(chunk, state)
        outputs.append(output)
    output = torch.cat(outputs, 1)
    close(output, whole, 1e-10)
    close(state, last, 1e-10)
    wanted = list(module.parameters())
    close(torch.autograd.grad(output.sum(), wanted), torch.autograd.grad(whole.sum(), wanted), 1e-9)
    state = None
    for t in range(13):
        output, state = module.step(x[:, t], state)
        assert not output.requires_grad
        close(output, whole[:, t].detach(), 1e-10)
    close(state, tuple(t.detach() for t in last), 1e-10)


@all_modules
def test_streams_and_blocks_of_time(name):
    module, x = drawn(MODULES[name]()), sequence(name, 9)
    whole, last = module(x)
    close(mk.blocked(module, steps=4)(x)[0], whole, 1e-10)
    feed = mk.stream(module)
    with torch.no_grad():
        close(torch.cat([feed(chunk) for chunk in x.split(4, 1)], 1), whole, 1e-10)
        output = feed(x, resets=torch.tensor([True, False]))
        close(output[0], whole[0], 1e-10)
        close(output[1], module(x, last)[0][1], 1e-10)
    kind = {"time": "RWKV4TimeMix", "channel": "RWKV4ChannelMix", "network": "RWKV4", "units": "RWKV4Unit"}[name]
    with pytest.raises(ValueError, match=rf"^resets: expected shape \[batch\] for a {kind}, got \[2, 9\]"):
        feed(x, resets=torch.zeros(2, 9, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"^module: expected no RWKV4"):
        mk.stream(module, gradient="traces")


# ------------------------------------------------------------------------------------------------ tools, bad input


@pytest.mark.check
@pytest.mark.parametrize("name", ["time", "channel"])
def test_compiled_and_exported(name):
    module, x = drawn(MODULES[name]()), sequence(name, 3)
    expected, state = module(x)
    compiled = copy.deepcopy(module)
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    output, same = run(x)
    close(output, expected, 1e-10)
    close(same, state, 1e-10)
    close(run(x, state)[0], module(x, state)[0], 1e-10)
    output.sum().backward()
    expected.sum().backward()
    close([p.grad for p in compiled.parameters()], [p.grad for p in module.parameters()], 1e-9)
    exported = torch.export.export(module, (x,)).module()
    close(exported(x), (expected, state), 1e-10)


@all_modules
def test_half_precision_and_autocast(name):
    torch.manual_seed(0)
    module, x = MODULES[name](), sequence(name, 9)
    x = x if name == "network" else x.float()
    output, state = copy.deepcopy(module).bfloat16()(x if name == "network" else x.bfloat16())
    assert output.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        output, state = module(x)
        module(x, state)
        module.step(x[:, 0], state)
        if name != "units":
            assert [t.dtype for t in state] == [torch.float32] * len(state)
    output.float().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: mk.RWKV4TimeMix(0), ValueError, "^width: expected a positive int, got 0"),
        (lambda: mk.RWKV4TimeMix(4, 2, 2), ValueError, "^layer: expected an int below layers=2, got 2"),
        (lambda: mk.RWKV4TimeMix(4, -1, 2), ValueError, "^layer: expected a non-negative int, got -1"),
        (lambda: mk.RWKV4TimeMix(4, chunk_size=3), ValueError, "^chunk_size: expected a positive multiple of 16"),
        (lambda: mk.RWKV4TimeMix(4, dtype=torch.int64), TypeError, "^dtype: expected float32"),
        (lambda: mk.RWKV4TimeMix(4, depth=3), TypeError, "^RWKV4TimeMix: unknown argument 'depth'"),
        (lambda: mk.RWKV4ChannelMix(4, hidden_size=0), ValueError, "^hidden_size: expected a positive int, got 0"),
        (lambda: mk.RWKV4(0, 4, 1), ValueError, "^tokens: expected a positive int, got 0"),
        (
            lambda: mk.MRUBlock(4, "rwkv4", hidden_size=8),
            ValueError,
            "^hidden_size: expected the width 4 with",
        ),
        (lambda: mk.MRUBlock(4, "rwkv4", cache={}), TypeError, "^unit: expected a recurrent module of this package"),
    ],
)
def test_bad_construction(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_bad_calls():
    module, x = drawn(mk.RWKV4TimeMix(4)), random(2, 5, 4)
    last, state = module(x)[1]
    for bad, error, match in (
        (x[0], ValueError, r"^input: expected 3 dimensions \[batch, time, width\]"),
        (x[..., :2], ValueError, r"^input: expected shape \[batch, time >= 1, width=4\], got \[2, 5, 2\]"),
        (x[:, :0], ValueError, r"^input: expected shape \[batch, time >= 1, width=4\], got \[2, 0, 4\]"),
        (x.float(), TypeError, "^input: expected the module's dtype torch.float64"),
    ):
        with pytest.raises(error, match=match):
            module(bad)
    for bad, error, match in (
        ((last,), ValueError, "^state: expected 2 tensors"),
        (last, TypeError, "^state: expected a tuple of tensors"),
        ((last[:1], state), ValueError, r"^state: expected shape \[2, 4\] for tensor 0, got \[1, 4\]"),
        ((last, state[:, :4]), ValueError, r"^state: expected shape \[2, 12\] for tensor 1, got \[2, 4\]"),
        ((last.float(), state), TypeError, "^state: expected dtype torch.float64 for tensor 0"),
        ((last, state.float()), TypeError, "^state: expected dtype torch.float64 for tensor 1"),
    ):
        with pytest.raises(error, match=match):
            module(x, bad)
    network = mk.RWKV4(9, 4, 1)
    for call, error, match in (
        (lambda: network(torch.randn(2, 5)), TypeError, "^input: expected token numbers, an int64 tensor"),
        (lambda: network(torch.ones(2, dtype=torch.int64)), ValueError, r"^input: expected shape \[batch, time >= 1\]"),
        (
            lambda: network.step(torch.ones(2, 1, dtype=torch.int64)),
            ValueError,
            r"^input: expected shape \[batch\]",
        ),
        (lambda: network(torch.ones(2, 3, dtype=torch.int64), (last,)), ValueError, "^state: expected 3 tensors"),
    ):
        with pytest.raises(error, match=match):
            call()
