"""The memory units: equations, initial values, layouts and states.

Where two ways to run a module must agree exactly, weights and inputs are small integers. A matrix product then has
one result for every order of summation, and rounding flips no gate.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, unpack_sequence

import mru_kernels as mk
from tests.units import SIGNED, all_classes, integers, make


def loop(module, gates, state, alpha, reverse=False):
    """Output [B, T, D] and final state [B, D] of the equations, for gates [B, T, k D] and a state [B, D]."""
    candidate, threshold, *amplitude = gates.chunk(len(module.gates), -1)
    steps = range(gates.shape[1])
    output = torch.empty_like(candidate)
    for t in reversed(steps) if reverse else steps:
        c, b = candidate[:, t], threshold[:, t]
        value = torch.where(c >= 0, 1.0, -1.0) * (amplitude[0][:, t] if amplitude else 1.0)
        state = torch.where(c.abs() >= b.abs(), value + module.epsilon * state, state)
        output[:, t] = alpha * state
    return output, state


# ------------------------------------------------------------------------------------------------ equations


@pytest.mark.parametrize("cls", SIGNED)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 1.0])
def test_equations(cls, bias, epsilon):
    module = make(cls, 5, 7, bias=bias, bidirectional=True, epsilon=epsilon, dtype=torch.float64)
    has_alpha = "alpha" in module.per_channel
    if has_alpha:
        for suffix in ("", "_reverse"):
            torch.nn.init.normal_(getattr(module, f"alpha_l0{suffix}"))
    x = torch.randn(3, 33, 5, dtype=torch.float64)
    output, h_n = module(x)
    for direction, suffix in enumerate(("_l0", "_l0_reverse")):
        p = {name.removesuffix(suffix): value for name, value in module.named_parameters() if name.endswith(suffix)}
        b = p["bias_ih"] if bias else torch.cat([torch.zeros(7, dtype=torch.float64), p["bias_ih"]])
        gates = F.linear(x, p["weight_ih"], b)
        h, final = loop(module, gates, p["initial_state"].expand(3, 7), p.get("alpha", 1.0), reverse=direction == 1)
        torch.testing.assert_close(output[..., 7 * direction : 7 * (direction + 1)], h, rtol=0, atol=1e-13)
        torch.testing.assert_close(h_n[direction], final, rtol=0, atol=1e-13)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("epsilon", [0.0, 0.5])
def test_equations_of_the_first_quadrant(bias, epsilon):
    module = make(mk.FirstQuadrantBMRU, 5, 7, bias=bias, bidirectional=True, epsilon=epsilon, dtype=torch.float64)
    x = torch.randn(3, 33, 5, dtype=torch.float64)
    for suffix in ("_l0", "_l0_reverse"):
        torch.nn.init.normal_(getattr(module, "alpha" + suffix))
        torch.nn.init.normal_(getattr(module, "width" + suffix), std=0.5)  # of both signs
    output, h_n = module(x)
    for direction, suffix in enumerate(("_l0", "_l0_reverse")):
        p = {name.removesuffix(suffix): value for name, value in module.named_parameters() if name.endswith(suffix)}
        candidate = F.linear(x, p["weight_ih"], p.get("bias_ih")).clamp(min=0)
        state, high = p["initial_state"].expand(3, 7), p["low"] + p["width"].abs()
        for t in reversed(range(33)) if direction else range(33):
            c = candidate[:, t]
            hold = (c >= p["low"]) & (c < high)
            state = torch.where(hold, state, (c >= high) + epsilon * state)
            h = output[:, t, 7 * direction : 7 * (direction + 1)]
            torch.testing.assert_close(h, p["alpha"] * state, rtol=0, atol=1e-13)
        torch.testing.assert_close(h_n[direction], state, rtol=0, atol=1e-13)


def test_initial_values_of_the_first_quadrant():
    module = make(mk.FirstQuadrantBMRU, 9, 400)
    for name, value in (("bias_ih", 0.5), ("low", 0.15), ("width", 0.35)):
        drawn = getattr(module, f"{name}_l0").detach()
        assert torch.all((drawn >= 0.8 * value) & (drawn <= 1.2 * value))
        assert drawn.min() < 0.9 * value < 1.1 * value < drawn.max()
    assert module.weight_ih_l0.min() >= 0
    assert torch.all(module.alpha_l0 == 1)
    assert set(module.initial_state_l0.tolist()) == {0.0, 1.0}


def assert_gradients_are_those_of(op, module) -> None:
    """The module's gradients equal those of `op(input, parameters)`, which returns h and the final state."""
    x = torch.randn(3, 33, 5, dtype=torch.float64, requires_grad=True)
    output, h_n = module(x)
    weights = torch.randn_like(output), torch.randn_like(h_n)
    p = {name.removesuffix("_l0"): value for name, value in module.named_parameters()}
    got = torch.autograd.grad((output, h_n), [x, *p.values()], weights)
    expected = torch.autograd.grad(op(x, p), [x, *p.values()], (weights[0], weights[1][0]))
    for name, a, b in zip(["input", *p], got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
        assert a.abs().max() > 0, name


@pytest.mark.parametrize("cls", SIGNED)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_gradients_are_those_of_the_op(cls, scale):
    module = make(cls, 5, 7, surrogate_scale=scale, dtype=torch.float64)

    def op(x, p):
        gates = F.linear(x, p["weight_ih"], p["bias_ih"])
        candidate, threshold, *amplitude = (g.contiguous() for g in gates.chunk(len(module.gates), -1))
        return mk.bmru(
            candidate, threshold, p["initial_state"].expand(3, 7), epsilon=module.epsilon, alpha=p.get("alpha"),
            amplitude=amplitude[0] if amplitude else None, surrogate_scale=scale,
        )  # fmt: skip

    assert_gradients_are_those_of(op, module)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_gradients_of_the_first_quadrant_are_those_of_the_op(scale):
    def op(x, p):
        candidate, high = F.linear(x, p["weight_ih"], p["bias_ih"]).relu(), p["low"] + p["width"].abs()
        initial_state = p["initial_state"].expand(3, 7)
        return mk.schmitt(candidate, p["low"], high, initial_state, alpha=p["alpha"], surrogate_scale=scale)

    assert_gradients_are_those_of(op, make(mk.FirstQuadrantBMRU, 5, 7, surrogate_scale=scale, dtype=torch.float64))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_layers_and_directions_equal_single_modules_in_turn(dropout):
    """Both directions of a layer read the same input, and dropout acts once on that input."""
    module = make(mk.CMRU, 4, 6, 3, integer=True, bidirectional=True, dropout=dropout)
    singles = [mk.CMRU(4 if layer == 0 else 12, 6, bidirectional=True) for layer in range(3)]
    for layer, single in enumerate(singles):
        mine = {k.replace(f"_l{layer}", "_l0"): v for k, v in module.state_dict().items() if f"_l{layer}" in k}
        single.load_state_dict(mine | {"_extra_state": torch.tensor(1.0)})
    x = integers(2, 20, 4)
    torch.manual_seed(2)
    output, h_n = module(x)
    torch.manual_seed(2)
    finals = []
    for layer, single in enumerate(singles):
        x, final = single(F.dropout(x, dropout) if layer > 0 else x)
        finals.append(final)
    assert torch.equal(output, x)
    assert torch.equal(h_n, torch.cat(finals))


def test_initial_values():
    module = make(mk.AlphaCMRU, 9, 400, dtype=torch.float32)
    candidate, threshold, amplitude = module.bias_ih_l0.detach().split(400)
    assert 0.3 < candidate.abs().max() <= 1 / 3
    assert torch.all(threshold == 1)
    assert torch.all(amplitude == 1)
    assert 0.3 < module.weight_ih_l0.abs().max() <= 1 / 3
    assert set(module.initial_state_l0.tolist()) == {-1.0, 1.0}
    assert torch.all(mk.BMRU(9, 8).alpha_l0 == 1)
    assert [mk.BMRU(1, 1).epsilon, mk.CMRU(1, 1).epsilon, mk.AlphaCMRU(1, 1).epsilon] == [0.0, 1.0, 1.0]


def test_bias_false_removes_only_the_bias_of_the_candidate():
    module = make(mk.AlphaCMRU, 5, 7, bias=False)
    assert module.bias_ih_l0.shape == (14,)
    full = mk.AlphaCMRU(5, 7)
    state = module.state_dict()
    full.load_state_dict(state | {"bias_ih_l0": torch.cat([torch.zeros(7), state["bias_ih_l0"]])})
    x = torch.randn(2, 9, 5)
    assert torch.equal(module(x)[0], full(x)[0])


def test_repr():
    assert repr(mk.BMRU(3, 4)) == "BMRU(3, 4, epsilon=0.0)"
    module = mk.AlphaCMRU(3, 4, 2, bias=False, batch_first=False, dropout=0.5, bidirectional=True,
                          learn_initial_state=False, surrogate_scale=2.0, epsilon=0.25)  # fmt: skip
    assert repr(module) == (
        "AlphaCMRU(3, 4, num_layers=2, bias=False, batch_first=False, dropout=0.5, bidirectional=True, "
        "learn_initial_state=False, epsilon=0.25, surrogate_scale=2.0)"
    )
    assert repr(mk.MinGRU(3, 4, chunk_size=None)) == "MinGRU(3, 4, chunk_size=None, max_time_scale=2)"


@pytest.mark.parametrize("cls", [mk.BMRU, mk.AlphaCMRU, mk.FirstQuadrantBMRU, mk.MinLSTM, mk.LRU])
def test_chunk_size_changes_only_what_is_saved(cls):
    def saved_and_grads(chunk_size: int | None) -> tuple[int, list[torch.Tensor]]:
        torch.manual_seed(0)
        module, x = cls(3, 5, dtype=torch.float64, chunk_size=chunk_size), torch.randn(2, 200, 3, dtype=torch.float64)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            loss = module(x)[0].square().sum()
        return sum(sizes), list(torch.autograd.grad(loss, list(module.parameters())))

    (none, grads), (many, grads_of_many) = saved_and_grads(None), saved_and_grads(16)
    assert many == none + 2 * (199 // 16) * 5
    torch.testing.assert_close(grads, grads_of_many, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------ layouts


@all_classes
def test_time_first_and_unbatched(cls):
    options = {"num_layers": 2, "bidirectional": True, "integer": True}
    module, time_first = make(cls, 4, 6, **options), make(cls, 4, 6, batch_first=False, **options)
    x, hx = integers(3, 17, 4), integers(4, 3, 6)
    output, h_n = module(x, hx)
    time_first_output, time_first_h_n = time_first(x.transpose(0, 1).contiguous(), hx)
    assert torch.equal(time_first_output, output.transpose(0, 1))
    assert torch.equal(time_first_h_n, h_n)
    assert time_first_output.is_contiguous()
    for unbatched in (module, time_first):
        one, one_h_n = unbatched(x[1], hx[:, 1])
        assert torch.equal(one, output[1])
        assert torch.equal(one_h_n, h_n[:, 1])


@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4), (3, 1, 4)])
def test_small_sizes(shape):
    module = make(mk.BMRU, 4, 6, 2, bidirectional=True)
    x = torch.randn(shape, requires_grad=True)
    output, h_n = module(x)
    assert output.shape == (*shape[:2], 12)
    assert h_n.shape == (4, shape[0], 6)
    (output.sum() + h_n.sum()).backward()
    assert x.grad.shape == x.shape
    if shape[1] == 0:
        assert torch.equal(h_n[2], module.initial_state_l1.expand(3, 6))


LENGTHS = [5, 1, 17, 9, 9, 64]


@all_classes
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_sequence_is_one_call_per_sequence(cls, enforce_sorted):
    module = make(cls, 4, 6, 2, integer=True, bidirectional=True, dtype=torch.float64)
    lengths = sorted(LENGTHS, reverse=True) if enforce_sorted else LENGTHS
    sequences = [integers(n, 4, dtype=torch.float64).requires_grad_() for n in lengths]
    hx = integers(4, len(lengths), 6, dtype=torch.float64).requires_grad_()
    for given in (None, hx):
        packed = pack_sequence(sequences, enforce_sorted=enforce_sorted)
        output, h_n = module(packed, given)
        assert isinstance(output, PackedSequence)
        assert h_n.shape == (4, len(lengths), 6)
        parts = unpack_sequence(output)
        alone = [module(x, None if given is None else given[:, i]) for i, x in enumerate(sequences)]
        for i, (o, h) in enumerate(alone):
            assert torch.equal(parts[i], o)
            assert torch.equal(h_n[:, i], h)
        weights = [torch.randn_like(o) for o, _ in alone]
        inputs = [*sequences, *module.parameters()] + ([] if given is None else [hx])
        got = torch.autograd.grad([*parts, h_n], inputs, [*weights, torch.ones_like(h_n)])
        ones = [torch.ones_like(h) for _, h in alone]
        expected = torch.autograd.grad([o for o, _ in alone] + [h for _, h in alone], inputs, weights + ones)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-10)


def test_packed_sequence_unsorted_by_hand():
    module = make(mk.CMRU, 2, 3, integer=True)
    padded = integers(3, 4, 2)
    output, h_n = module(pack_padded_sequence(padded, torch.tensor([2, 4, 1]), batch_first=True, enforce_sorted=False))
    for i, n in enumerate([2, 4, 1]):
        assert torch.equal(h_n[:, i], module(padded[i, :n])[1])
    assert output.batch_sizes.tolist() == [3, 2, 1, 1]
    assert torch.equal(output.data[0], module(padded[1])[0][0])  # the longest sequence comes first


# ------------------------------------------------------------------------------------------------ states


@all_classes
def test_two_halves_equal_the_whole(cls):
    module = make(cls, 4, 6, 3, integer=True)
    x = integers(2, 50, 4)
    output, h_n = module(x)
    first, middle = module(x[:, :23])
    second, last = module(x[:, 23:], middle)
    assert torch.equal(torch.cat([first, second], 1), output)
    assert torch.equal(last, h_n)


@all_classes
@pytest.mark.parametrize("batch_first", [True, False])
def test_steps_equal_the_whole(cls, batch_first):
    module = make(cls, 4, 6, 3, integer=True, batch_first=batch_first)
    x = integers(2, 30, 4)
    output, h_n = module(x if batch_first else x.transpose(0, 1))
    state = None
    for t in range(30):
        y, state = module.step(x[:, t], state)
        assert torch.equal(y, output[:, t] if batch_first else output[t])
    assert torch.equal(state, h_n)
    assert not y.requires_grad
    assert not state.requires_grad


def test_learned_initial_state():
    module = make(mk.BMRU, 4, 6, 2)
    x = torch.randn(3, 10, 4)
    hx = torch.stack([module.initial_state_l0.expand(3, 6), module.initial_state_l1.expand(3, 6)]).detach()
    assert torch.equal(module(x)[0], module(x, hx)[0])
    with torch.no_grad():
        assert torch.equal(module(x)[0], module(x, hx)[0])
    fixed = make(mk.BMRU, 4, 6, 2, learn_initial_state=False)
    assert not any(name.startswith("initial_state") for name, _ in fixed.named_parameters())
    assert torch.equal(fixed(x)[0], fixed(x, torch.zeros(2, 3, 6))[0])


def test_the_learned_state_has_gradient_zero_with_a_given_state():
    module = make(mk.CMRU, 4, 6)
    with torch.no_grad():
        module.initial_state_l0.fill_(float("nan"))
    hx = torch.randn(1, 3, 6, requires_grad=True)
    output, h_n = module(torch.randn(3, 10, 4), hx)
    assert not output.isnan().any()
    (output.sum() + h_n.sum()).backward()
    assert torch.equal(module.initial_state_l0.grad, torch.zeros(6))
    assert torch.all(hx.grad != 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype):
    module = make(mk.BMRU, 4, 6, 2).to(dtype)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(3, 10, 4).to(dtype)
    for hx in (None, torch.ones(2, 3, 6, dtype=dtype), torch.ones(2, 3, 6, dtype=state)):
        output, h_n = module(x, hx)
        assert output.dtype == dtype
        assert h_n.dtype == state
        (output.sum() + h_n.sum()).backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in module.parameters())


def test_dropout_acts_between_layers_in_training_only():
    module = make(mk.BMRU, 4, 64, 2, dropout=0.5)
    x = torch.randn(3, 10, 4)
    torch.manual_seed(1)
    a = module(x)[1]
    torch.manual_seed(2)
    b = module(x)[1]
    assert torch.equal(a[0], b[0])
    assert not torch.equal(a[1], b[1])
    module.eval()
    assert torch.equal(module(x)[0], module(x)[0])
    with pytest.warns(UserWarning, match="dropout"):
        mk.BMRU(4, 6, dropout=0.5)
