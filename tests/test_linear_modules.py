"""The linear units: equations step by step, initial values, layouts and states."""

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

from mru_kernels.nn import LRU, MinGRU, MinLSTM
from tests.linear_units import all_classes, close, gated, make, random, states


def g(x):
    return torch.where(x >= 0, x + 0.5, 1 / (1 + torch.exp(-x)))


def decay_and_update(cls, x, p, hidden):
    """Decay and update of one step, both [B, D]."""
    weight, bias = p["weight_ih"].split(hidden), p["bias_ih"].split(hidden)
    if len(bias) < len(weight):
        bias = (torch.zeros(hidden, dtype=x.dtype), *bias)
    candidate, *others = (x @ w.T + b for w, b in zip(weight, bias, strict=True))
    if cls is MinGRU:
        z = torch.sigmoid(others[0])
        return 1 - z, z * g(candidate)
    i, f = map(torch.sigmoid, others)
    return f / (f + i), i / (f + i) * g(candidate)


def loop(module, x, p, state, reverse):
    """Output [B, T, D] and final state [B, D] of the equations of one layer and direction, step by step."""
    hidden = module.hidden_size
    output = [None] * x.shape[1]
    for t in reversed(range(x.shape[1])) if reverse else range(x.shape[1]):
        if type(module) is LRU:
            a = torch.exp(torch.complex(-p["nu_log"].exp(), p["theta_log"].exp()))
            b = torch.complex(p["weight_ih"][0::2], p["weight_ih"][1::2])
            c = torch.complex(p["weight_ho"][:, 0::2], -p["weight_ho"][:, 1::2])
            state = a * state + p["gamma_log"].exp() * (x[:, t].to(b.dtype) @ b.T)
            through = p["skip"] * x[:, t] if p["skip"].dim() == 1 else x[:, t] @ p["skip"].T
            output[t] = (state @ c.T).real + through
        else:
            keep, write = decay_and_update(type(module), x[:, t], p, hidden)
            state = output[t] = keep * state + write
    return torch.stack(output, 1), state


@pytest.mark.parametrize(
    ("cls", "inputs", "options"),
    [
        (MinGRU, 5, {}),
        (MinGRU, 5, {"bias": False}),
        (MinLSTM, 5, {"max_time_scale": 50.0}),
        (MinLSTM, 5, {"bias": False}),
        (LRU, 5, {}),
        (LRU, 7, {"r_min": 0.9, "r_max": 0.99, "max_phase": 0.5}),  # `skip` has shape [D]
    ],
)
@pytest.mark.parametrize("given", [True, False])
def test_equations_and_gradients(cls, inputs, options, given):
    module = make(cls, inputs, 7, bidirectional=True, **options)
    x = random(3, 33, inputs).requires_grad_()
    hx = states(cls, 2, 3, 7).requires_grad_() if given else None
    output, h_n = module(x, hx)
    outputs, finals = [], []
    for direction, suffix in enumerate(("_l0", "_l0_reverse")):
        p = {name.removesuffix(suffix): value for name, value in module.named_parameters() if name.endswith(suffix)}
        learned = p["initial_state"] if cls is not LRU else torch.complex(*p["initial_state"].unbind(-1))
        state = hx[direction] if given else learned.expand(3, 7)
        h, final = loop(module, x, p, state, reverse=direction == 1)
        outputs.append(h), finals.append(final)
    close(output, torch.cat(outputs, -1))
    close(h_n, torch.stack(finals))

    inputs = [x, *module.parameters()] + ([hx] if given else [])
    weights = torch.randn_like(output), torch.randn_like(h_n)
    got = torch.autograd.grad((output, h_n), inputs, weights)
    expected = torch.autograd.grad((torch.cat(outputs, -1), torch.stack(finals)), inputs, weights, allow_unused=given)
    names = ["input", *dict(module.named_parameters()), "hx"]
    for name, a, b in zip(names, got, expected, strict=False):
        unused = given and name.startswith("initial_state")
        close(a, torch.zeros_like(a) if unused else b, 1e-11)
        assert unused or a.abs().max() > 0, name


@gated
def test_gates_near_0_and_1_are_finite(cls):
    module = make(cls, 3, 4)
    for scale in (1e3, -1e3):
        with torch.no_grad():
            module.weight_ih_l0.fill_(scale)
        x = torch.ones(1, 5, 3, dtype=torch.float64, requires_grad=True)
        output, h_n = module(x)
        (output.sum() + h_n.sum()).backward()
        assert output.isfinite().all()
        assert x.grad.isfinite().all()
        if cls is MinLSTM:  # the two gates are equal, so the decay is 1/2
            start = module.initial_state_l0
            write = 3000.5 if scale > 0 else 0.0
            bias = module.bias_ih_l0[:4] if scale > 0 else 0.0
            close(output[0, 0], 0.5 * start + 0.5 * (write + bias))


# ------------------------------------------------------------------------------------------------ initial values


@gated
def test_time_scales(cls):
    module = cls(9, 500)
    assert torch.all(module._biases("_l0")["update"] == 0)
    module = cls(9, 500, max_time_scale=1000, bias=False, num_layers=2)
    for suffix in ("_l0", "_l1"):
        zero = torch.zeros(500)
        gates = {"candidate": zero, **module._biases(suffix)}
        _, kept = module._scan(torch.cat(list(gates.values())).detach().view(1, 1, -1), torch.full((1, 500), 1e6),
                               reverse=False, cu_seqlens=None)  # fmt: skip
        scale = 1 / (1 - kept / 1e6)
        assert 2 * 0.99 < scale.min() < 100
        assert 900 < scale.max() < 1010
        assert scale.mean().item() == pytest.approx(501, rel=0.1)


@all_classes
def test_initial_states_are_zero_and_learned(cls):
    module = cls(5, 7, num_layers=2)
    assert torch.all(module.initial_state_l1 == 0)
    fixed = cls(5, 7, num_layers=2, learn_initial_state=False)
    missing = fixed.load_state_dict(module.state_dict(), strict=False)
    assert missing.unexpected_keys == ["initial_state_l0", "initial_state_l1"]
    x = torch.randn(2, 9, 5)
    assert torch.equal(module(x)[0], fixed(x)[0])


def test_initial_values_of_the_ring():
    module = LRU(16, 2000, r_min=0.6, r_max=0.95, max_phase=1.0, dtype=torch.float64)
    decay = torch.polar(module.nu_log_l0.exp().neg().exp(), module.theta_log_l0.exp()).detach()
    assert 0.6 <= decay.abs().min() < 0.61
    assert 0.94 < decay.abs().max() <= 0.95
    assert decay.abs().square().mean().item() == pytest.approx((0.6**2 + 0.95**2) / 2, rel=0.02)  # uniform in area
    assert 0 <= decay.angle().min() < 0.01
    assert 0.99 < decay.angle().max() <= 1
    close(module.gamma_log_l0.exp().detach(), (1 - decay.abs().square()).sqrt())
    for name, variance in (("weight_ih", 1 / 32), ("weight_ho", 1 / 2000), ("skip", 1 / 16)):
        assert getattr(module, f"{name}_l0").var().item() == pytest.approx(variance, rel=0.05), name
    assert LRU(8, 8).skip_l0.shape == (8,)
    assert LRU(16, 8, 2).skip_l1.shape == (8,)
    assert LRU(16, 8, 2, bidirectional=True).skip_l1.shape == (8, 16)


@pytest.mark.parametrize("options", [{}, {"r_min": 1.0}, {"r_max": 0.0, "max_phase": 0.0}])
def test_parameters_are_finite_at_the_ends_of_the_ring(options):
    module = LRU(3, 500, **options)
    module(torch.randn(1, 20, 3))[0].sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.isfinite().all(), name
        assert parameter.grad.isfinite().all(), name


def test_repr():
    assert repr(MinGRU(3, 4)) == "MinGRU(3, 4, max_time_scale=2)"
    assert repr(MinLSTM(3, 4, 2, max_time_scale=100)) == "MinLSTM(3, 4, num_layers=2, max_time_scale=100)"
    assert repr(LRU(3, 4)) == "LRU(3, 4, r_min=0, r_max=1, max_phase=6.28319)"


# ------------------------------------------------------------------------------------------------ layouts and states


@all_classes
def test_time_first_and_unbatched(cls):
    options = {"num_layers": 2, "bidirectional": True}
    module, time_first = make(cls, 4, 6, **options), make(cls, 4, 6, batch_first=False, **options)
    x, hx = random(3, 17, 4), states(cls, 4, 3, 6)
    output, h_n = module(x, hx)
    time_first_output, time_first_h_n = time_first(x.transpose(0, 1).contiguous(), hx)
    close(time_first_output, output.transpose(0, 1))
    close(time_first_h_n, h_n)
    for unbatched in (module, time_first):
        one, one_h_n = unbatched(x[1], hx[:, 1])
        close(one, output[1])
        close(one_h_n, h_n[:, 1])


@all_classes
@pytest.mark.parametrize("given", [True, False])
def test_packed_sequence_is_one_call_per_sequence(cls, given):
    module = make(cls, 4, 6, 2, bidirectional=True)
    lengths = [5, 1, 17, 9, 9, 64]
    sequences = [random(n, 4).requires_grad_() for n in lengths]
    hx = states(cls, 4, len(lengths), 6) if given else None
    output, h_n = module(pack_sequence(sequences, enforce_sorted=False), hx)
    alone = [module(x, hx[:, i] if given else None) for i, x in enumerate(sequences)]
    parts = unpack_sequence(output)
    for i, (o, h) in enumerate(alone):
        close(parts[i], o)
        close(h_n[:, i], h)
    weights = [torch.randn_like(o) for o in parts]
    inputs = [*sequences, *module.parameters()]
    expected = torch.autograd.grad([o for o, _ in alone], inputs, weights)
    for a, b in zip(torch.autograd.grad(parts, inputs, weights), expected, strict=True):
        close(a, b, 1e-11)


@all_classes
@pytest.mark.parametrize("batch_first", [True, False])
def test_the_state_continues_in_chunks_and_steps(cls, batch_first):
    module = make(cls, 4, 6, 3, batch_first=batch_first)
    time = 1 if batch_first else 0
    x = random(2, 30, 4) if batch_first else random(30, 2, 4)
    output, h_n = module(x)
    first, middle = module(x.narrow(time, 0, 13))
    second, last = module(x.narrow(time, 13, 17), middle)
    close(torch.cat([first, second], time), output)
    close(last, h_n)
    state = None
    for t in range(30):
        y, state = module.step(x.select(time, t), state)
        close(y, output.select(time, t).detach())
    close(state, h_n.detach())
    assert not y.requires_grad
    with pytest.raises(RuntimeError, match="step: not supported by a bidirectional"):
        make(cls, 4, 6, bidirectional=True).step(random(2, 4))


@all_classes
@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4), (3, 1, 4)])
def test_small_sizes(cls, shape):
    module = make(cls, 4, 6, 2, bidirectional=True)
    x = random(*shape).requires_grad_()
    output, h_n = module(x)
    assert output.shape == (*shape[:2], 12)
    assert h_n.shape == (4, shape[0], 6)
    (output.sum() + h_n.abs().sum()).backward()
    assert x.grad.shape == x.shape
