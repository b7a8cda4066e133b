"""Blocks and networks: equations, streaming, epsilon, argument checks, and use with the tools of torch.

Streaming is compared in float64, where a matrix product of another shape rounds too little to flip a gate.
"""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from mru_kernels.nn import BMRU, LRU, UNITS, MinGRU, MRUBlock, MRUNetwork, WriteOrHold

HYBRID = {"bmru": {}, "min_gru": {"max_time_scale": 100.0}, "lru": {"r_min": 0.5}}


def make(cls, *sizes, seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    return cls(*sizes, dtype=dtype, **options)


def network(units="bmru", **options):
    hidden_size = 8 if "rwkv4" in str(units) else 12  # it has the width of its input
    sizes = {"width": 8, "num_blocks": 2, "hidden_size": hidden_size} | options
    return make(MRUNetwork, 5, 3, units=units, **sizes)


def random(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


def close(got, expected, tolerance=1e-12):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------ equations


@pytest.mark.parametrize("combine", ["sum", "concatenate"])
@pytest.mark.parametrize("conv_size", [0, 1, 4])
def test_block_equals_its_equations(combine, conv_size):
    block = make(MRUBlock, 6, HYBRID, hidden_size=10, combine=combine, conv_size=conv_size, mlp_size=9)
    for name, parameter in block.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    p = dict(block.named_parameters())
    x = random(3, 20, 6)
    output, state = block(x)

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt() * weight

    u = v = norm(x, p["norm.weight"])
    if conv_size:
        v = p["conv.bias"].expand_as(u)
        for lag in range(conv_size):
            v = v + p["conv.weight"][:, 0, conv_size - 1 - lag] * F.pad(u, (0, 0, lag, 0))[:, :20]
        v = v * v.sigmoid()
    parts, finals = zip(*(unit(v) for unit in block.units), strict=True)
    assert [type(unit) for unit in block.units] == [BMRU, MinGRU, LRU]
    mixed = parts[0] + parts[1] + parts[2] if combine == "sum" else torch.cat(parts, -1)
    gate = u @ p["gate.weight"].T
    x = x + (mixed * gate.sigmoid()) @ p["out.weight"].T
    value, switch = (norm(x, p["mlp_norm.weight"]) @ p["mlp_in.weight"].T + p["mlp_in.bias"]).split(9, -1)
    expected = x + (value * switch.sigmoid()) @ p["mlp_out.weight"].T + p["mlp_out.bias"]
    close(output, expected)
    assert len(state) == block.num_states == 3 + (conv_size > 0)
    if conv_size:
        close(state[0], u[:, 20 - (conv_size - 1) :].transpose(1, 2))
    for after, final in zip(state[-3:], finals, strict=True):
        close(after, final[0])


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("pool", [None, "last", "mean"])
def test_network_equals_its_parts_in_turn(tokens, pool):
    module = network(tokens=tokens, pool=pool, units=("bmru", "min_gru"))
    x = torch.randint(0, 5, (2, 9)) if tokens else random(2, 9, 5)
    output, state = module(x)
    y = module.input_map.weight[x] if tokens else module.input_map(x)
    states = []
    for block in module.blocks:
        y, after = block(y)
        states += after
    every = module.head(module.norm(y))
    close(output, {None: every, "last": every[:, -1], "mean": every.mean(1)}[pool])
    assert all(torch.equal(a, b) for a, b in zip(state, states, strict=True))


def test_a_unit_class_registers_its_names(monkeypatch):
    for name in ("two", "twice"):
        monkeypatch.setitem(UNITS, name, None)  # monkeypatch removes the name after the test

    class Twice(MinGRU, names=("two", "twice")):
        def _output(self, h, x, p):
            return 2.0 * h

    class Derived(Twice):
        pass

    assert UNITS["two"] is UNITS["twice"] is Twice
    assert Derived not in UNITS.values()
    assert [type(unit) for unit in MRUBlock(4, ("twice", "min_gru")).units] == [Twice, MinGRU]


@pytest.mark.parametrize("name", UNITS)
def test_every_unit_has_its_options_and_gradients(name):
    options = {"lru": {"r_max": 0.5}, "min_gru": {"max_time_scale": 9.0}, "gru": {"bias": False}}
    options["prf"] = {"threshold": 0.0}
    module = network({name: options.get(name, {})}, conv_size=3)
    if name == "rwkv4":
        for block in module.blocks:
            for part in (block.units[0].key, block.units[0].receptance, block.units[0].output):
                part.reset_parameters()  # they are zero at first
    output, state = module(random(2, 17, 5))
    assert output.shape == (2, 17, 3)
    shapes = {
        "aaren": [(2, 12 + 2 * 4)],
        "mesa": [(2, 1, 12, 12), (2, 1, 12, 12), (2, 24, 3)],
        "rwkv4": [(2, 8), (2, 24)],
    }
    assert [tuple(s.shape) for s in state] == [(2, 8, 2), *shapes.get(name, [(2, 12)])] * 2
    output.square().sum().backward()
    for key, parameter in module.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 0, key


# ------------------------------------------------------------------------------------------------ streaming


@pytest.mark.parametrize("units", [*UNITS, HYBRID], ids=str)
def test_chunks_and_steps_equal_the_whole(units):
    module = network(units, conv_size=4, combine="concatenate")
    x = random(2, 30, 5)
    output, last = module(x)
    state, parts = None, []
    for chunk in x.split([7, 1, 2, 20], 1):  # shorter and longer than the convolution
        part, state = module(chunk, state)
        parts.append(part)
    close(torch.cat(parts, 1), output)
    close(state, last)
    state = None
    for t in range(30):
        y, state = module.step(x[:, t], state)
        close(y, output[:, t].detach())
    close(state, tuple(s.detach() for s in last))
    assert not y.requires_grad


def test_steps_over_tokens_and_pooled_steps():
    module = network(HYBRID, tokens=True, pool="last")
    x = torch.randint(0, 5, (2, 12))
    state = None
    for t in range(12):
        y, state = module.step(x[:, t], list(state) if state else None)
        close(y, module(x[:, : t + 1])[0].detach())
    with pytest.raises(RuntimeError, match='step: the mean over all steps, pool="mean", is not known after one'):
        network(pool="mean").step(random(2, 5))


def test_the_gradient_flows_through_states():
    module = network(HYBRID, conv_size=3)
    x = random(2, 20, 5)
    whole = module(x)[0][:, 10:].square().sum()
    expected = torch.autograd.grad(whole, list(module.parameters()), allow_unused=True)
    _, state = module(x[:, :10])
    got = torch.autograd.grad(module(x[:, 10:], state)[0].square().sum(), list(module.parameters()))
    for a, b in zip(got, expected, strict=True):
        close(a, b, 1e-10)


def test_a_state_holds_no_other_memory():
    with torch.no_grad():
        _, state = network("bmru", conv_size=4)(random(2, 1000, 5))
    assert all(s.untyped_storage().nbytes() == s.nbytes for s in state)


def test_causality():
    module = network(HYBRID, conv_size=4)
    x = random(2, 20, 5)
    changed = x.clone()
    changed[:, 12] += 1
    before, after = module(x)[0], module(changed)[0]
    close(before[:, :12], after[:, :12])
    assert torch.all((before != after)[:, 12:].any(-1))


# ------------------------------------------------------------------------------------------------ epsilon, training


def test_epsilon():
    module = network({"bmru": {}, "cmru": {"epsilon": 0.25}, "schmitt": {}, "lru": {}})
    with pytest.raises(ValueError, match=r"epsilon: the units differ: \[0.0, 0.25\]"):
        _ = module.epsilon
    module.epsilon = 0.5
    units = [m for m in module.modules() if isinstance(m, WriteOrHold)]
    assert len(units) == 6
    assert {unit.epsilon for unit in units} == {0.5}
    assert module.epsilon == module.blocks[0].epsilon == 0.5
    module.blocks[1].epsilon = torch.tensor(1.0)
    assert [block.epsilon for block in module.blocks] == [0.5, 1.0]
    with pytest.raises(ValueError, match="epsilon: expected a value in"):
        module.epsilon = 2.0
    linear = network("lru")
    assert not hasattr(linear, "epsilon")
    with pytest.raises(AttributeError, match="epsilon: no unit has one"):
        linear.epsilon = 0.5


def test_dropout_acts_in_training_only():
    module = network(dropout=0.5)
    x = random(2, 9, 5)
    assert not torch.equal(module(x)[0], module(x)[0])
    module.eval()
    assert torch.equal(module(x)[0], module(x)[0])
    nothing_added = make(MRUBlock, 5, dropout=1.0)
    assert torch.equal(nothing_added(x)[0], x)


@pytest.mark.parametrize("units", [("bmru", "min_gru"), ("lru", "cmru"), "gru"], ids=str)
def test_autocast(units):
    module = network(units, conv_size=3, dtype=torch.float32)
    streams = []
    for block in module.blocks:
        block.register_forward_hook(lambda block, given, result: streams.append(result[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, state = module(random(2, 9, 5, dtype=torch.float32))
        output, _ = module(random(2, 9, 5, dtype=torch.float32), state)
    assert output.dtype == torch.bfloat16
    assert streams == [torch.float32] * 4
    output.float().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def test_half_precision():
    module = network(("bmru", "min_lstm"), conv_size=3, dtype=torch.bfloat16)
    output, state = module(random(2, 9, 5).bfloat16())
    output, _ = module(random(2, 9, 5).bfloat16(), state)
    assert output.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="dtype: expected float32 or float64, got torch"):
        network("lru", dtype=torch.bfloat16)


@pytest.mark.parametrize("units", [("bmru", "min_gru"), "min_gru"], ids=str)
def test_learns_to_hold(units):
    """Recall a sign after 49 zeros: a network with a bistable unit learns it, one with a short memory does not."""
    torch.manual_seed(0)
    module = MRUNetwork(1, 1, width=16, num_blocks=1, units=units, pool="last")
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for i in range(100):
        if hasattr(module, "epsilon"):
            module.epsilon = max(0.0, 1.0 - i / 50)
        sign = torch.randint(0, 2, (32, 1, 1)) * 2.0 - 1.0
        output, _ = module(F.pad(sign, (0, 0, 0, 49)))
        loss = F.binary_cross_entropy_with_logits(output[:, 0], (sign[:, 0, 0] > 0).float())
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert (loss < 0.1) == ("bmru" in units)


# ------------------------------------------------------------------------------------------------ tools of torch


def test_compile():
    torch._dynamo.reset()
    module = network(HYBRID, num_blocks=1, conv_size=3)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = random(2, 17, 5)
    _, state = module(random(2, 4, 5))
    state = [s.detach() for s in state]
    results = []
    for run in (compiled, module):
        module.zero_grad()
        output, after = run(x, state)
        output.square().sum().backward()
        results.append([output, *after, *(p.grad for p in module.parameters())])
    for a, b in zip(*results, strict=True):
        close(a, b)


def test_checkpoints():
    units = {**HYBRID, "cmru": {}, "schmitt": {}, "gru": {}}
    module = network(units, conv_size=3)
    module.epsilon = 0.3
    x = random(2, 9, 5)
    expected, _ = module(x)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    loaded = make(MRUNetwork, 5, 3, units=units, width=8, num_blocks=2, hidden_size=12, conv_size=3, seed=1)
    loaded.load_state_dict(torch.load(file, weights_only=True), strict=True)
    for twin in (copy.deepcopy(module), loaded):
        assert twin.epsilon == 0.3
        assert torch.equal(twin(x)[0], expected)
    with torch.device("meta"):
        elsewhere = MRUNetwork(5, 3, units=units, width=8, num_blocks=2, hidden_size=12, conv_size=3)
    elsewhere.load_state_dict(module.state_dict(), strict=True, assign=True)
    assert torch.equal(elsewhere(x)[0], expected)


@pytest.mark.parametrize("where", ["meta", "fake"])
def test_on_meta_and_fake(where):
    def shapes() -> list[torch.Size]:
        torch.manual_seed(0)
        module = MRUNetwork(5, 3, units=HYBRID, width=8, num_blocks=2, conv_size=3)
        output, state = module(torch.ones(2, 9, 5))
        output.sum().backward()
        stepped, after = module.step(torch.ones(2, 5), [t.detach() for t in state])
        return [t.shape for t in (output, *state, stepped, *after, *(p.grad for p in module.parameters()))]

    expected = shapes()
    with torch.device("meta") if where == "meta" else FakeTensorMode():
        assert shapes() == expected


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"units": "lstm"}, ValueError, "units: expected one of 'aaren', 'alpha_cmru', .*'gru', .*, got 'lstm'"),
        ({"units": ("bmru", "mru")}, ValueError, "units: expected one of .*got 'mru'"),
        ({"units": {"bmru": {}, "mru": {}}}, ValueError, "units: expected one of .*got 'mru'"),
        ({"units": ()}, ValueError, "units: expected at least one, got none"),
        ({"units": 3}, TypeError, "units: expected a name, several, or a mapping from names, got int"),
        ({"units": {"bmru": {"max_time_scale": 9.0}}}, TypeError, "max_time_scale"),
        ({"units": {"bmru": {"bidirectional": True}}}, ValueError, "units: expected one layer and direction of 'bmru'"),
        ({"units": {"bmru": {"num_layers": 2}}}, ValueError, "units: expected one layer and direction of 'bmru'"),
        ({"width": -8}, ValueError, "width: expected a positive int, got -8"),
        ({"width": 8.0}, TypeError, "width: expected an int, got float"),
        ({"num_blocks": 0}, ValueError, "num_blocks: expected a positive int, got 0"),
        ({"hidden_size": 0}, ValueError, "hidden_size: expected a positive int, got 0"),
        ({"mlp_size": -1}, ValueError, "mlp_size: expected a positive int, got -1"),
        ({"conv_size": -1}, ValueError, "conv_size: expected a non-negative int, got -1"),
        ({"combine": "mean"}, ValueError, "combine: expected one of 'sum', 'concatenate', got 'mean'"),
        ({"pool": "max"}, ValueError, "pool: expected one of None, 'last', 'mean', got 'max'"),
        ({"dropout": 1.5}, ValueError, "dropout"),
    ],
)
def test_bad_construction(options, error, match):
    with pytest.raises(error, match=match):
        network(**options)


@pytest.mark.parametrize(
    ("tokens", "x", "state", "error", "match"),
    [
        (False, [1.0], None, TypeError, "input: expected a tensor, got list"),
        (False, torch.ones(2, 3, 4), None, ValueError, r"input: expected shape .*input_size=5\], got \[2, 3, 4\]"),
        (False, torch.ones(3, 5), None, ValueError, r"input: expected shape \[batch, time >= 1, input_size=5\]"),
        (False, torch.ones(2, 0, 5), None, ValueError, r"input: expected shape .*got \[2, 0, 5\]"),
        (False, torch.ones(2, 3, 5).half(), None, TypeError, "input: expected the module's dtype torch.float64"),
        (
            True,
            torch.ones(2, 3),
            None,
            TypeError,
            "input: expected token numbers, an int64 tensor, got a torch.float32",
        ),
        (True, torch.ones(2, 3, 5).long(), None, ValueError, r"input: expected shape \[batch, time >= 1\]"),
        (True, torch.ones(2, 0).long(), None, ValueError, r"input: expected shape \[batch, time >= 1\]"),
        (True, torch.ones(2, 3).long(), torch.ones(2, 12), TypeError, "state: expected a tuple of tensors.*got Tensor"),
        (True, torch.ones(2, 3).long(), (None, None), TypeError, "state: expected a tuple of tensors"),
        (True, torch.ones(2, 3).long(), [torch.ones(2, 12)], ValueError, "state: expected 2 tensors.*got 1"),
        (
            True,
            torch.ones(2, 3).long(),
            [torch.ones(2, 12).double(), torch.ones(3, 12).double()],
            ValueError,
            r"state: expected shape \[2, 12\] for tensor 0, got \[3, 12\]",
        ),
    ],
)
def test_bad_input(tokens, x, state, error, match):
    with pytest.raises(error, match=match):
        network(tokens=tokens)(x, state)


def test_a_network_passes_its_options_to_its_blocks():
    module = network(("bmru", "lru"), combine="concatenate", conv_size=3, mlp_size=7, dropout=0.25)
    for block in module.blocks:
        assert (block.hidden_size, block.combine, block.conv_size, block.dropout.p) == (12, "concatenate", 3, 0.25)
        assert (block.mlp_in.out_features, block.mlp_out.in_features, block.out.in_features) == (14, 7, 24)


def test_bad_steps():
    with pytest.raises(ValueError, match=r"input: expected shape \[batch, input_size=5\], got \[2, 1, 5\]"):
        network().step(random(2, 1, 5))
    with pytest.raises(ValueError, match=r"input: expected shape \[batch\], got \[2, 1\]"):
        network(tokens=True).step(torch.ones(2, 1).long())
