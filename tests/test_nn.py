"""The modules: equations, layouts, states, argument checks, and use with the tools of torch.

Where two ways of running a module must agree exactly, weights and inputs are small integers: a matrix product
then has one result, however it is split, and no gate flips by rounding.
"""

import copy
import io
import itertools
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
import torch._dynamo.testing
import torch.distributed.checkpoint
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, unpack_sequence
from torch.optim.swa_utils import AveragedModel

import mru_kernels as mk
from tests import processes

SIGNED = [mk.BMRU, mk.CMRU, mk.AlphaCMRU]
CLASSES = [*SIGNED, mk.FirstQuadrantBMRU]
all_classes = pytest.mark.parametrize("cls", CLASSES)


def make(cls, *sizes, integer=False, seed=0, **options):
    torch.manual_seed(seed)
    module = cls(*sizes, **options)
    if integer:
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if not name.startswith(("alpha", "initial_state")):
                    parameter.copy_(torch.randint(-2, 3, parameter.shape))
    return module


def integers(*shape, dtype=torch.float32):
    return torch.randint(-3, 4, shape).to(dtype)


def loop(module, gates, state, alpha, reverse=False):
    """The equations, step by step, for gates [B, T, k D] and a state [B, D]."""
    candidate, threshold, *amplitude = gates.chunk(len(module.gates), -1)
    steps = range(gates.shape[1])
    output = torch.empty_like(candidate)
    for t in reversed(steps) if reverse else steps:
        c, b = candidate[:, t], threshold[:, t]
        value = torch.where(c >= 0, 1.0, -1.0) * (amplitude[0][:, t] if amplitude else 1.0)
        state = torch.where(c.abs() >= b.abs(), value + module.epsilon * state, state)
        output[:, t] = alpha * state
    return output, state


# -------------------------------------------------------------------------------- equations


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
        torch.nn.init.normal_(getattr(module, "width" + suffix), std=0.5)  # of either sign
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
    """Compare the module's gradients with those of `op(input, parameters)`, which returns h and the final state."""
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
def test_layers_and_directions_are_single_modules_in_turn(dropout):
    """Both directions of a layer read the same input, on which dropout acts once."""
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


# -------------------------------------------------------------------------------- layouts


@all_classes
def test_time_first_and_unbatched(cls):
    options = {"num_layers": 2, "bidirectional": True, "integer": True}
    module, time_first = make(cls, 4, 6, **options), make(cls, 4, 6, batch_first=False, **options)
    x, hx = integers(3, 17, 4), integers(4, 3, 6)
    output, h_n = module(x, hx)
    turned, turned_h_n = time_first(x.transpose(0, 1).contiguous(), hx)
    assert torch.equal(turned, output.transpose(0, 1))
    assert torch.equal(turned_h_n, h_n)
    assert turned.is_contiguous()
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


# -------------------------------------------------------------------------------- states


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


def test_bad_steps():
    with pytest.raises(RuntimeError, match="step: not supported by a bidirectional module, whose second"):
        make(mk.BMRU, 4, 6, bidirectional=True).step(torch.ones(2, 4))
    module = make(mk.BMRU, 4, 6)
    with pytest.raises(ValueError, match=r"input: expected \[batch, features\], got shape \[2, 1, 4\]"):
        module.step(torch.ones(2, 1, 4))
    with pytest.raises(TypeError, match=r"input: expected a tensor \[batch, features\], got PackedSequence"):
        module.step(pack_sequence([torch.ones(3, 4)]))
    with pytest.raises(ValueError, match=r"hx: expected shape \[1, 2, 6\]"):
        module.step(torch.ones(2, 4), torch.ones(2, 6))


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


def test_the_learned_state_has_gradient_zero_where_a_state_is_given():
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


# -------------------------------------------------------------------------------- epsilon


def test_moves_leave_epsilon_unchanged():
    module = make(mk.BMRU, 4, 6, epsilon=0.1)
    for move in ("half", "bfloat16", "double", "float", "cpu"):
        getattr(module, move)()
        assert module.epsilon == 0.1
    assert copy.deepcopy(module).to("meta").epsilon == 0.1
    assert copy.deepcopy(module).to_empty(device="cpu").epsilon == 0.1
    with torch.device("meta"):
        assert mk.BMRU(4, 6, epsilon=0.1).epsilon == 0.1


def test_epsilon_has_an_effect_and_is_checked():
    module = make(mk.BMRU, 4, 6)
    x = torch.randn(3, 40, 4)
    module.epsilon = 1.0
    assert module(x)[1].abs().max() > 1
    assert torch.equal(module(x)[0], make(mk.CMRU, 4, 6)(x)[0])
    module.epsilon = torch.tensor(0.25)
    assert module.epsilon == 0.25
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="epsilon"):
            module.epsilon = bad
        with pytest.raises(ValueError, match="epsilon"):
            mk.CMRU(4, 6, epsilon=bad)
    with pytest.raises(TypeError, match="epsilon"):
        module.epsilon = "0.5"
    assert module.epsilon == 0.25


@all_classes
def test_copies_and_checkpoints(cls):
    module = make(cls, 4, 6, 2, bidirectional=True, epsilon=0.3)
    x = torch.randn(2, 9, 4)
    expected = module(x)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    loaded = make(cls, 4, 6, 2, bidirectional=True, seed=1)
    loaded.load_state_dict(torch.load(file, weights_only=True), strict=True)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert twin.epsilon == 0.3
        assert all(torch.equal(a, b) for a, b in zip(twin(x), expected, strict=True))
        twin.epsilon = 0.7
        assert module.epsilon == 0.3


@pytest.mark.parametrize("cls", [mk.BMRU, mk.FirstQuadrantBMRU])
@pytest.mark.parametrize("value", [0.5, 0.25])
@pytest.mark.parametrize("loaded", [False, True])
def test_epsilon_may_change_before_the_backward_pass(cls, value, loaded):
    """Gradients are those for the epsilon of the forward pass."""
    module, x = make(cls, 4, 6, epsilon=0.5), torch.randn(2, 9, 4)
    gradients = []
    for change in (False, True):
        module.zero_grad()
        output, _ = module(x)
        if change and loaded:
            module.set_extra_state(torch.tensor(value))
        elif change:
            module.epsilon = value
        output.sum().backward()
        gradients.append([p.grad for p in module.parameters()])
    assert module.epsilon == value
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_epsilon_set_in_compiled_code(kind):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    module, eager = make(mk.CMRU, 4, 6), make(mk.CMRU, 4, 6)

    @torch.compile(fullgraph=True, backend=counter)
    def run(x, epsilon):
        module.epsilon = epsilon
        return module(x)[0]

    x, compilations = torch.randn(2, 9, 4), []
    for i in range(20):
        output = run(x, kind(i / 32))
        module.epsilon = eager.epsilon = i / 32  # outside the compiled code, as a schedule does
        assert torch.equal(output, eager(x)[0])
        assert torch.equal(run(x, kind(1 - i / 32)), module(x)[0])
        assert module.epsilon == 1 - i / 32
        output.sum().backward()
        compilations.append(counter.frame_count)
    assert compilations[-1] == compilations[0]
    with pytest.raises(RuntimeError, match=r"epsilon: expected a value in \[0, 1\], got 1.5"):
        run(x, kind(1.5))


def test_epsilon_set_under_a_mode_is_a_number_afterwards():
    module, x = make(mk.BMRU, 4, 6), torch.randn(2, 9, 4)

    def under_grad(scale):
        module.epsilon = 0.75
        return scale * module(x)[0].sum()

    for number, mode in {0.1: FakeTensorMode(), 0.2: torch.inference_mode(), 0.3: torch.device("meta")}.items():
        with mode:
            module.epsilon = number
            assert module.epsilon == mk.BMRU(1, 1, epsilon=number).epsilon == number
            assert f"epsilon={number}" in repr(module)
        module(x)[0].sum().backward()
    torch.func.grad(torch.func.grad(under_grad))(torch.ones(()))
    assert module.epsilon == 0.75
    module(x)[0].sum().backward()
    with FakeTensorMode(), pytest.raises(ValueError, match="epsilon: expected a number, got a fake tensor"):
        module.epsilon = torch.tensor(0.5)


def test_a_state_dict_without_epsilon():
    module = torch.nn.Sequential(make(mk.BMRU, 4, 6, epsilon=0.3))
    whole = module.state_dict()
    missing = {name: value for name, value in whole.items() if not name.endswith("extra_state")}
    for strict in (True, False):
        with pytest.warns(UserWarning, match=r"epsilon: the state_dict has no '0._extra_state'; it stays 0.3"):
            keys = module.load_state_dict(missing, strict=strict)
        assert not keys.missing_keys
    with pytest.warns(UserWarning, match="epsilon"), pytest.raises(RuntimeError, match=r"Missing.*: \"0.alpha_l0\"\."):
        module.load_state_dict({name: value for name, value in missing.items() if name != "0.alpha_l0"})
    with pytest.raises(ValueError, match=r"epsilon: expected a value in \[0, 1\], got 2.0"):
        module.load_state_dict(whole | {"0._extra_state": torch.tensor(2.0)})
    assert module[0].epsilon == 0.3


def test_a_distributed_checkpoint_is_loaded_in_place(tmp_path):
    module, loaded = make(mk.BMRU, 4, 6, epsilon=0.3), make(mk.BMRU, 4, 6, seed=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process")
        torch.distributed.checkpoint.save(module.state_dict(), checkpoint_id=tmp_path)
        torch.distributed.checkpoint.load(loaded.state_dict(), checkpoint_id=tmp_path)
    x = torch.randn(2, 9, 4)
    assert loaded.epsilon == 0.3
    assert torch.equal(loaded(x)[0], module(x)[0])
    assert mk.BMRU(4, 6, epsilon=0.0).epsilon == 0.0  # the load wrote into no other module's tensor


@pytest.mark.parametrize("use_buffers", [False, True])
def test_the_epsilon_of_an_averaged_model_and_of_an_ensemble(use_buffers):
    """Torch averages and stacks only parameters and buffers, so epsilon is assigned, as the documentation says."""
    model, x = make(mk.CMRU, 4, 6), torch.randn(2, 9, 4)
    averaged = AveragedModel(model, use_buffers=use_buffers)
    for epsilon in (1.0, 0.5, 0.0):
        model.epsilon = epsilon
        averaged.update_parameters(model)
        averaged.module.epsilon = model.epsilon
    torch.testing.assert_close(averaged(x), model(x))
    state = torch.func.stack_module_state([model, model])
    base = make(mk.CMRU, 4, 6).to("meta")
    base.epsilon = model.epsilon
    output = torch.vmap(lambda *state: torch.func.functional_call(base, state, (x,))[0])(*state)
    torch.testing.assert_close(output, model(x)[0].expand(2, -1, -1, -1))


# -------------------------------------------------------------------------------- meta and fake tensors

UNITS = [*CLASSES, mk.MinGRU, mk.MinLSTM, mk.LRU]
all_units = pytest.mark.parametrize("cls", UNITS)


def run_all(module, like):
    """Shapes of all results and gradients of a module, for tensors with the dtype and device of `like`."""
    x, hx = like.new_ones(2, 9, 4, requires_grad=True), module(like.new_ones(2, 9, 4))[1]
    output, h_n = module(x, hx.detach())
    (output.sum() + h_n.abs().sum()).backward()
    stepped = module.step(x[:, 0], hx)
    return [t.shape for t in (output, h_n, x.grad, *stepped, *(p.grad for p in module.parameters()))]


@all_units
def test_on_meta(cls):
    expected = run_all(make(cls, 4, 6, 2), torch.ones(()))
    module = cls(4, 6, 2, device="meta")
    assert run_all(module, torch.empty((), device="meta")) == expected
    with torch.autocast("cpu"), torch.device("meta"):
        module = cls(4, 6, 2)
        assert all(p.is_meta for p in module.parameters())
        assert run_all(module, torch.ones(())) == expected
    for lengths in ([5, 3, 2], [2, 5, 3]):
        packed = pack_padded_sequence(torch.ones(3, 5, 4), torch.tensor(lengths), True, enforce_sorted=False)
        output, h_n = module(packed.to("meta"))
        assert (output.data.shape, h_n.shape, h_n.is_meta) == ((10, 6), (2, 3, 6), True)
    with pytest.raises(ValueError, match="input: expected the module's device meta, got cpu"):
        module(torch.ones(2, 9, 4))


@all_units
def test_fake(cls):
    expected = run_all(make(cls, 4, 6, 2), torch.ones(()))
    with FakeTensorMode():
        assert run_all(cls(4, 6, 2), torch.ones(())) == expected
    assert run_all(cls(4, 6, 2), torch.ones(())) == expected


@all_units
def test_load_from_meta_and_to_meta(cls):
    module, x = make(cls, 4, 6, 2), torch.randn(2, 9, 4)
    options = {"epsilon": 0.3} if cls in CLASSES else {}
    if options:
        module.epsilon = 0.3
    empty = cls(4, 6, 2, device="meta", **options).to_empty(device="cpu")
    empty.reset_parameters()
    empty.load_state_dict(module.state_dict())
    assigned = cls(4, 6, 2, device="meta")
    assigned.load_state_dict(module.state_dict(), assign=True)
    for twin in (empty, assigned):
        assert all(map(torch.equal, twin(x), module(x)))
        assert not options or twin.epsilon == 0.3
    assigned.load_state_dict(cls(4, 6, 2, device="meta", **options).state_dict(), assign=True)
    assert assigned.weight_ih_l0.is_meta
    shapes = {name: t.to("meta") for name, t in module.state_dict().items()}
    with pytest.warns(UserWarning, match="without a value; it stays 0.3") if options else warnings.catch_warnings():
        module.load_state_dict(shapes, assign=True)
    assert module(x.to("meta"))[0].is_meta
    assert not options or module.epsilon == 0.3


# -------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        ((0, 4), {}, ValueError, "input_size: expected a positive int, got 0"),
        ((4, -1), {}, ValueError, "hidden_size: expected a positive int, got -1"),
        ((4, 4, 0), {}, ValueError, "num_layers: expected a positive int, got 0"),
        ((4, 4.0), {}, TypeError, "hidden_size: expected an int, got float"),
        ((4, 4), {"dropout": 1.5}, ValueError, "dropout: expected a probability"),
        ((4, 4), {"dropout": "x"}, TypeError, "dropout: expected a float, got str"),
        ((4, 4), {"dropout": True}, TypeError, "dropout: expected a float, got bool"),
        ((4, True), {}, TypeError, "hidden_size: expected an int, got bool"),
        ((4, 4), {"chunk_size": 17}, ValueError, "chunk_size: expected a positive multiple of 16"),
        ((4, 4), {"surrogate_scale": True}, TypeError, "surrogate_scale: expected a float, got bool"),
        ((4, 4), {"surrogate_scale": 0.0}, ValueError, "surrogate_scale: expected a positive"),
        ((4, 4), {"dtype": torch.int32}, TypeError, "dtype: expected float32"),
        ((4, 4), {"batchfirst": True}, TypeError, "batchfirst"),
    ],
)
@all_classes
def test_bad_construction(cls, arguments, options, error, match):
    with pytest.raises(error, match=match):
        cls(*arguments, **options)


@pytest.mark.parametrize(
    ("x", "hx", "error", "match"),
    [
        ([1.0], None, TypeError, "input: expected a tensor or a PackedSequence, got list"),
        (torch.ones(4), None, ValueError, r"input: expected \[batch, time, features\] or .*got shape \[4\]"),
        (torch.ones(1, 2, 3, 4), None, ValueError, "input: expected"),
        (torch.ones(2, 3, 5), None, ValueError, r"input: expected 4 features, got shape \[2, 3, 5\]"),
        (torch.ones(2, 3, 4).double(), None, TypeError, "input: expected the module's dtype torch.float32"),
        (torch.ones(2, 3, 4).long(), None, TypeError, "input: expected the module's dtype torch.float32"),
        (
            torch.ones(2, 3, 4, device="meta"),
            None,
            ValueError,
            "input: expected the module's device cpu, got meta",
        ),
        (torch.ones(2, 3, 4), torch.ones(2, 6), ValueError, r"hx: expected shape \[2, 2, 6\]"),
        (
            torch.ones(2, 3, 4),
            torch.ones(2, 3, 6),
            ValueError,
            r"hx: expected shape \[2, 2, 6\].*got \[2, 3, 6\]",
        ),
        (torch.ones(3, 4), torch.ones(2, 1, 6), ValueError, r"hx: expected shape \[2, 6\]"),
        (torch.ones(2, 3, 4), 0.0, TypeError, "hx: expected a tensor or None, got float"),
        (torch.ones(2, 3, 4), torch.ones(2, 2, 6).double(), TypeError, "hx: expected dtype torch.float32"),
        (torch.ones(2, 3, 4), torch.ones(2, 2, 6).half(), TypeError, "hx: expected dtype torch.float32"),
        (
            torch.ones(2, 3, 4),
            torch.ones(2, 2, 6, device="meta"),
            ValueError,
            "hx: expected the input's device",
        ),
        (pack_sequence([torch.ones(3, 5)]), None, ValueError, "input: expected 4 features"),
        (pack_sequence([torch.ones(3)]), None, ValueError, "input: expected packed data"),
        (
            pack_sequence([torch.ones(3, 4)]),
            torch.ones(2, 2, 6),
            ValueError,
            r"hx: expected shape \[2, 1, 6\]",
        ),
    ],
)
def test_bad_input(x, hx, error, match):
    with pytest.raises(error, match=match):
        make(mk.BMRU, 4, 6, 2)(x, hx)


# -------------------------------------------------------------------------------- tools of torch


def step(module, x, hx=None):
    """Output, states and all gradients of a training step."""
    module.zero_grad()
    output, h_n = module(x, hx)
    (output.square().sum() + h_n.sum()).backward()
    return [output, h_n, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize(
    ("cls", "options", "given"),
    [
        (mk.BMRU, {"num_layers": 2, "bidirectional": True}, True),
        (mk.CMRU, {"batch_first": False}, False),
        (mk.AlphaCMRU, {"bias": False}, False),
    ],
)
def test_compile(cls, options, given):
    torch._dynamo.reset()
    module = make(cls, 4, 6, epsilon=0.5, **options)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for time in (17, 65):
        x = torch.randn(time, 2, 4) if "batch_first" in options else torch.randn(2, time, 4)
        hx = torch.randn(4, 2, 6) if given else None
        for a, b in zip(step(compiled, x, hx), step(module, x, hx), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_one_compilation_serves_all_epsilons():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    module = make(mk.CMRU, 4, 6)
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    x = torch.randn(2, 30, 4)
    outputs, compilations = [], []
    for i in range(20):
        module.epsilon = i / 19
        outputs.append(compiled(x)[0])
        compilations.append(counter.frame_count)
        assert torch.equal(outputs[-1], module(x)[0])
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(outputs))
    assert compilations[0] > 0
    assert compilations[-1] == compilations[0]


@pytest.mark.slow
def test_compile_with_inductor():
    torch._dynamo.reset()
    module = make(mk.BMRU, 4, 6, 2, integer=True)
    x = integers(2, 33, 4)
    for a, b in zip(step(torch.compile(module, fullgraph=True), x), step(module, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_export():
    module = make(mk.BMRU, 4, 6, 2, integer=True)
    x = integers(2, 33, 4)
    time = torch.export.Dim("time", min=2, max=1000)
    with torch.no_grad():
        exported = torch.export.export(module, (x,), dynamic_shapes={"input": {1: time}})
    for steps in (33, 70):
        x = integers(2, steps, 4)
        assert all(torch.equal(a, b) for a, b in zip(exported.module()(x), module(x), strict=True))


def test_autocast():
    module = make(mk.BMRU, 4, 6, 2)
    x = torch.randn(2, 33, 4)
    for hx in (None, torch.ones(2, 2, 6), torch.ones(2, 2, 6, dtype=torch.bfloat16)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output, h_n = module(x, hx)
        assert output.dtype == torch.bfloat16
        assert h_n.dtype == torch.float32
        (output.float().sum() + h_n.sum()).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in module.parameters())


def test_vmap_over_an_ensemble():
    modules = [make(mk.CMRU, 4, 6, 2, integer=True, seed=i) for i in range(3)]
    parameters, buffers = torch.func.stack_module_state(modules)
    x = integers(2, 33, 4)

    def run(p, b):
        return torch.func.functional_call(modules[0], (p, b), (x,))

    output, h_n = torch.vmap(run)(parameters, buffers)
    for i, module in enumerate(modules):
        assert torch.equal(output[i], module(x)[0])
        assert torch.equal(h_n[i], module(x)[1])


@pytest.mark.parametrize("cls", SIGNED)
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_training_step_copies_no_stream_and_runs_no_cat(cls, batch_first):
    module = make(cls, 16, 32, batch_first=batch_first)
    sizes = (4, 128) if batch_first else (128, 4)
    x = torch.randn(*sizes, 16, requires_grad=True)
    gradient = torch.randn(*sizes, 32)
    module(x)[0].backward(gradient)  # one-time allocations happen here
    module.zero_grad(), setattr(x, "grad", None)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        output, _ = module(x)
        output.backward(gradient)
    names = [event.name for event in profile.events()]
    assert sum("mru::bmru" in name for name in names) == 2, names
    assert "aten::cat" not in names
    stream, gates = output.numel() * output.element_size(), len(module.gates)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    needed = (2 * gates + 1) * stream + x.grad.nbytes  # gates, their gradient, the output, the input's gradient
    parameters = sum(p.nbytes for p in module.parameters())
    assert needed <= allocated < needed + parameters + stream / 4


def _train_in_two_processes(rank, results):
    module = make(mk.BMRU, 4, 6, 2, bidirectional=True, epsilon=0.5, dtype=torch.float64)
    parallel = torch.nn.parallel.DistributedDataParallel(module)
    torch.manual_seed(7)
    x, hx = torch.randn(4, 33, 4, dtype=torch.float64), torch.randn(4, 4, 6, dtype=torch.float64)
    mine = slice(2 * rank, 2 * rank + 2)
    for given in (None, hx):
        module.zero_grad()
        part = None if given is None else given[:, mine]
        parallel(x[mine], part)[0].square().mean().backward()
        got = [p.grad.clone() for p in module.parameters()]
        module.zero_grad()
        module(x, given)[0].square().mean().backward()
        for a, p in zip(got, module.parameters(), strict=True):
            torch.testing.assert_close(a, p.grad, rtol=1e-12, atol=1e-12)
    results.put(rank)


@pytest.mark.check
def test_distributed_data_parallel(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    processes.run(_train_in_two_processes, tmp_path / "rendezvous", results)
    assert {results.get(timeout=10), results.get(timeout=10)} == {0, 1}


def test_environment_report():
    done = subprocess.run([sys.executable, "-m", "mru_kernels"], capture_output=True, text=True, check=True)
    assert f"mru_kernels        {mk.__version__}" in done.stdout
    assert "backend cpu      available" in done.stdout
