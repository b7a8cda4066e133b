"""`mk.Aaren`: its equations, attention it stands for, states, episodes, tools and bad input."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

import mru_kernels as mk

pytestmark = pytest.mark.usefixtures("one_thread")  # the tensors are too small for two


def make(*sizes, dtype=torch.float64, **options) -> mk.Aaren:
    torch.manual_seed(0)
    return mk.Aaren(*sizes, dtype=dtype, **options)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def close(got, expected, tolerance=1e-12) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def attention(score, value):
    """Softmax over the steps so far, `[B, T, H]`, of `value [B, T, D]`, head by head."""
    heads = value.unflatten(-1, (score.shape[-1], -1))
    seen = torch.ones(score.shape[1], score.shape[1], dtype=torch.bool).tril()
    weights = score.transpose(1, 2).unsqueeze(2).masked_fill(~seen, -math.inf).softmax(-1)  # [B, H, T, T]
    return torch.einsum("bhti,bihg->bthg", weights, heads).flatten(2)


def layer(x, weight, bias, heads, reverse):
    score, value = x @ weight[:heads].T, x @ weight[heads:].T + bias
    return attention(score.flip(1), value.flip(1)).flip(1) if reverse else attention(score, value)


@pytest.mark.parametrize("heads", [1, 2, 6])
def test_a_unit_equals_attention(heads):
    unit, x = make(3, 6, 2, num_heads=heads, bidirectional=True), random(2, 9, 3)
    p = dict(unit.named_parameters())
    expected = x
    for k in range(2):
        directions = [f"_l{k}", f"_l{k}_reverse"]
        outputs = [
            layer(expected, p["weight_ih" + d], p["bias_ih" + d], heads, i) for i, d in enumerate(directions)
        ]  # fmt: skip
        expected = torch.cat(outputs, -1)
    output, h_n = unit(x)
    close(output, expected)
    assert h_n.shape == (4, 2, 6 + 2 * heads)
    parameters = list(p.values())
    weights = torch.randn_like(output)
    close(
        torch.autograd.grad((output * weights).sum(), parameters),
        torch.autograd.grad((expected * weights).sum(), parameters),
    )


@pytest.mark.parametrize("biases", [False, True])
def test_a_trained_attention_becomes_a_unit(biases):
    torch.manual_seed(0)
    source = torch.nn.MultiheadAttention(8, 2, bias=biases, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        source.out_proj.weight.copy_(torch.eye(8))
        if biases:
            source.in_proj_bias.normal_()
    query, x = random(8), random(3, 5, 8)
    query_bias, _, value_bias = source.in_proj_bias.chunk(3) if biases else (None, None, None)
    unit = mk.Aaren.from_attention(
        query, *source.in_proj_weight.chunk(3), num_heads=2, query_bias=query_bias, value_bias=value_bias
    )
    output, _ = unit(x)
    for t in range(5):
        expected, _ = source(query.expand(3, 1, 8), x[:, : t + 1], x[:, : t + 1])
        close(output[:, t : t + 1], expected)


@pytest.mark.parametrize("learned", [False, True])
def test_parts_steps_and_packed_sequences_equal_the_whole(learned):
    unit, x = make(3, 6, 2, num_heads=3, learn_initial_state=learned), random(2, 9, 3)
    if learned:
        for parameter in (unit.initial_state_l0, unit.initial_state_l1):
            torch.nn.init.normal_(parameter)
    whole, last = unit(x)
    first, state = unit(x[:, :4])
    rest, state = unit(x[:, 4:], state)
    close(torch.cat([first, rest], 1), whole)
    close(state, last)
    hx = None
    for t in range(9):
        y, hx = unit.step(x[:, t], hx)
        close(y, whole[:, t].detach())
    close(hx, last.detach())
    sequences = [x[0, :4], x[1], x[0, 2:3]]
    packed, finals = unit(pack_sequence(sequences, enforce_sorted=False))
    for i, (sequence, output) in enumerate(zip(sequences, unpack_sequence(packed), strict=True)):
        expected, final = unit(sequence)
        close(output, expected)
        close(finals[:, i], final)


def test_a_learned_state_is_a_first_token_of_score_0():
    unit, x = make(3, 4, num_heads=2, learn_initial_state=True), random(2, 7, 3)
    assert not unit.initial_state_l0.any()
    torch.nn.init.normal_(unit.initial_state_l0)
    weight = unit.weight_ih_l0
    score = torch.cat([torch.zeros(2, 1, 2, dtype=torch.float64), x @ weight[:2].T], 1)
    value = torch.cat([unit.initial_state_l0.expand(2, 1, 4), x @ weight[2:].T + unit.bias_ih_l0], 1)
    close(unit(x)[0], attention(score, value)[:, 1:])


def test_initial_values():
    unit = make(4096, 16, num_heads=8, dtype=torch.float32)
    score, value = unit.weight_ih_l0.split([8, 16])
    assert score.std().item() == pytest.approx(1 / 64, rel=0.02)
    assert value.abs().max() <= 1 / 64 < 1.01 * value.abs().max()
    assert unit.bias_ih_l0.shape == (16,)
    assert unit.bias_ih_l0.abs().max() <= 1 / 64
    assert [name for name, _ in make(3, 6, bias=False).named_parameters()] == ["weight_ih_l0"]
    assert [mk.Aaren(3, size).num_heads for size in (1, 6, 12, 64)] == [1, 2, 4, 8]
    assert repr(make(3, 8)) == "Aaren(3, 8, num_heads=8)"
    assert repr(make(3, 8, learn_initial_state=True)) == "Aaren(3, 8, learn_initial_state=True, num_heads=8)"


def test_a_stream_starts_new_sequences_from_the_empty_state():
    feed, x = mk.stream(make(3, 4, num_heads=2)), random(2, 7, 3)
    feed(x)
    output = feed(x, resets=torch.tensor([True, False]))
    whole, _ = feed.module(x)
    close(output[0], whole[0].detach())
    close(output[1], feed.module(torch.cat([x, x], 1))[0][1, 7:].detach())


@pytest.mark.parametrize("restart", [False, True])
def test_a_memory_cache(restart):
    cache, x = mk.MemoryCache(make(3, 4, num_heads=2), segment=3, mode="residual", restart=restart), random(2, 8, 3)
    h = torch.cat([cache.unit(part)[0] for part in x.split(3, 1)], 1) if restart else cache.unit(x)[0]
    expected = h + torch.stack([h[:, 2:t:3].sum(1) for t in range(8)], 1)  # and the values at ends of segments before t
    output, state = cache(x)
    close(output, expected)
    first, state = cache(x[:, :4])
    rest, state = cache(x[:, 4:], state)
    close(torch.cat([first, rest], 1), expected)
    assert state[0].shape == (2, 8)


def test_half_precision_and_autocast():
    x = random(2, 9, 4)
    exact, _ = make(4, 8)(x)
    low, state = make(4, 8).bfloat16()(x.bfloat16())
    assert (low.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    close(low.double(), exact, 0.05)
    module = make(4, 8).float()
    with torch.autocast("cpu", torch.bfloat16):
        mixed, state = module(x.float())
        module(x.float(), state)
        module.step(x[:, 0].float(), state)
    assert (mixed.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    mixed.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.check
@pytest.mark.parametrize("learned", [False, True])
def test_compiled_and_exported(learned):
    module, x = make(3, 4, num_heads=2, learn_initial_state=learned), random(2, 5, 3)
    resets = torch.tensor([[False, False, True, False, False]] * 2)
    expected, state = module(x, resets=resets)
    compiled = copy.deepcopy(module)
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    output, same = run(x, resets=resets)
    close(output, expected)
    close(same, state)
    output.sum().backward()
    expected.sum().backward()
    close([p.grad for p in compiled.parameters()], [p.grad for p in module.parameters()])
    exported = torch.export.export(module, (x,), {"resets": resets}).module()
    close(exported(x, resets=resets), (expected, state))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"num_heads": 0}, ValueError, "^num_heads: expected a positive int, got 0"),
        ({"num_heads": 2.0}, TypeError, "^num_heads: expected an int, got float"),
        ({"num_heads": 3}, ValueError, "^num_heads: expected a divisor of hidden_size=4, got 3"),
        ({"heads": 2}, TypeError, "^Aaren: unknown argument 'heads'; did you mean 'num_heads'"),
    ],
)
def test_bad_construction(options, error, match):
    with pytest.raises(error, match=match):
        mk.Aaren(3, 4, **options)


def test_bad_states_and_what_it_does_not_support():
    unit, x = make(3, 4, num_heads=2), random(2, 5, 3)
    columns = r"\[layers \* directions, batch, hidden_size \+ 2 num_heads\]"
    for hx, error, match in (
        (random(1, 2, 4), ValueError, rf"^hx: expected shape \[1, 2, 8\] {columns}, got \[1, 2, 4\]"),
        (random(1, 2, 8).half(), TypeError, "^hx: expected dtype torch.float64, got torch.float16"),
    ):
        with pytest.raises(error, match=match):
            unit(x, hx)
        with pytest.raises(error, match=match):
            unit.step(x[:, 0], hx)
    with pytest.raises(TypeError, match=r"^hx: expected dtype torch.float32, got torch.bfloat16"):
        copy.deepcopy(unit).bfloat16()(x.bfloat16(), random(1, 2, 8).bfloat16())
    with pytest.raises(ValueError, match=r"^hx: expected shape \[layers, slots, hidden_size \+ 2 num_heads\]"):
        unit.step(x[:, 0], random(1, 9, 4), state_indices=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"^return_boundaries: expected False for an Aaren, got True"):
        unit(x, return_boundaries=True)
    with pytest.raises(TypeError, match=r'^module: expected no Aaren with gradient="traces"'):
        mk.stream(unit, gradient="traces")
    with pytest.raises(ValueError, match=r"^state: expected shape \[2, 12\] for tensor 0, got \[2, 4\]"):
        mk.MRUBlock(4, "aaren")(torch.randn(2, 3, 4), [torch.zeros(2, 4)])


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"query": [1.0]}, TypeError, "^query: expected a floating-point tensor, got list"),
        ({"query": torch.ones(8, dtype=torch.int64)}, TypeError, "^query: expected a floating-point tensor, got torch"),
        ({"query": torch.ones(1, 8)}, ValueError, r"^query: expected 1 dimensions, got shape \[1, 8\]"),
        ({"query": torch.ones(7)}, ValueError, r"^query_weight: expected shape \[8, 7\], got \[8, 8\]"),
        ({"key_weight": torch.ones(8, 7)}, ValueError, r"^key_weight: expected shape \[8, 8\], got \[8, 7\]"),
        ({"value_bias": torch.ones(7)}, ValueError, r"^value_bias: expected shape \[8\], got \[7\]"),
        ({"num_heads": 3}, ValueError, "^num_heads: expected a divisor of hidden_size=8, got 3"),
    ],
)
def test_bad_attention(changed, error, match):
    matrices = {name: torch.ones(8, 8) for name in ("query_weight", "key_weight", "value_weight")}
    with pytest.raises(error, match=match):
        mk.Aaren.from_attention(**{"query": torch.ones(8), "num_heads": 2} | matrices | changed)
