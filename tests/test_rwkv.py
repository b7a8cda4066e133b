"""RWKV-4's mixings and network: equations, initial values, states, checkpoints, tools and bad input."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import mru_kernels as mk

pytestmark = pytest.mark.usefixtures("one_thread")  # the tensors are too small for two


def drawn(module: torch.nn.Module) -> torch.nn.Module:
    """The module in float64 with random parameters: some are zero at first."""
    torch.manual_seed(0)
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    return module


def random(*shape: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype)


def close(got, expected, tolerance=1e-12) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------ public code


def sums(key, value, time_decay, time_first, state=None):
    """The loop of the public code: outputs, and the sums (aa, bb, pp) after the last step."""
    aa, bb, pp = state or (0 * key[:, 0], 0 * key[:, 0], torch.full_like(key[:, 0], -1e38))
    outputs = []
    for k, v in zip(key.unbind(1), value.unbind(1), strict=True):
        most = torch.maximum(pp, time_first + k)
        e1, e2 = (pp - most).exp(), (time_first + k - most).exp()
        outputs.append((e1 * aa + e2 * v) / (e1 * bb + e2))
        most = torch.maximum(pp - time_decay.exp(), k)
        e1, e2 = (pp - time_decay.exp() - most).exp(), (k - most).exp()
        aa, bb, pp = e1 * aa + e2 * v, e1 * bb + e2, most
    return torch.stack(outputs, 1), (aa, bb, pp)


def shifted(x):
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


def time_mix(x, p, prefix=""):
    w = {name.removeprefix(prefix): t for name, t in p.items() if name.startswith(prefix)}
    mixed = {c: x * w["time_mix_" + c] + shifted(x) * (1 - w["time_mix_" + c]) for c in "kvr"}
    k, v, r = (mixed[n[0]] @ w[n + ".weight"].T for n in ("key", "value", "receptance"))
    return (r.sigmoid() * sums(k, v, w["time_decay"], w["time_first"])[0]) @ w["output.weight"].T


def channel_mix(x, p, prefix=""):
    w = {name.removeprefix(prefix): t for name, t in p.items() if name.startswith(prefix)}
    mixed = {c: x * w["time_mix_" + c] + shifted(x) * (1 - w["time_mix_" + c]) for c in "kr"}
    k = (mixed["k"] @ w["key.weight"].T).clamp(min=0) ** 2
    return (mixed["r"] @ w["receptance.weight"].T).sigmoid() * (k @ w["value.weight"].T)


def model(tokens, p):
    """The authors' network, by the names of their parameters."""

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p[name + ".weight"] + p[name + ".bias"]

    x, layer = p["emb.weight"][tokens], 0
    x = norm(x, "blocks.0.ln0")
    while (block := f"blocks.{layer}.") + "ln1.weight" in p:
        x = x + time_mix(norm(x, block + "ln1"), p, block + "att.")
        x = x + channel_mix(norm(x, block + "ln2"), p, block + "ffn.")
        layer += 1
    return norm(x, "ln_out") @ p["head.weight"].T


def checkpoint(layers=2, width=6, tokens=11, hidden=24) -> dict[str, torch.Tensor]:
    """Random parameters with the names and shapes of a file of the authors."""
    torch.manual_seed(3)
    matrix = {"emb.weight": (tokens, width), "head.weight": (tokens, width)}
    shapes: dict[str, tuple[int, ...]] = matrix | {"ln_out.weight": (width,), "ln_out.bias": (width,)}
    for i in range(layers):
        block = f"blocks.{i}."
        for norm in ("ln0",) * (i == 0) + ("ln1", "ln2"):
            shapes |= {f"{block}{norm}.{part}": (width,) for part in ("weight", "bias")}
        shapes |= {f"{block}att.time_{name}": (width,) for name in ("decay", "first")}
        shapes |= {f"{block}att.time_mix_{c}": (1, 1, width) for c in "kvr"}
        shapes |= {f"{block}att.{name}.weight": (width, width) for name in ("key", "value", "receptance", "output")}
        shapes |= {f"{block}ffn.time_mix_{c}": (1, 1, width) for c in "kr"}
        shapes |= {f"{block}ffn.key.weight": (hidden, width), f"{block}ffn.value.weight": (width, hidden)}
        shapes[block + "ffn.receptance.weight"] = (width, width)
    return {name: random(*shape) for name, shape in shapes.items()}


HUGGING_FACE = {
    "emb.": "embeddings.",
    ".ln0.": ".pre_ln.",
    ".att.": ".attention.",
    ".ffn.": ".feed_forward.",
    ".time_mix_k": ".time_mix_key",
    ".time_mix_v": ".time_mix_value",
    ".time_mix_r": ".time_mix_receptance",
}


def renamed(name: str) -> str:
    for old, new in HUGGING_FACE.items():
        name = name.replace(old, new)
    return name if name == "head.weight" else "rwkv." + name


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


# ------------------------------------------------------------------------------------------------ checkpoints


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
