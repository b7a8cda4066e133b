"""The linear recurrent units: equations against a loop, initial values, layouts, states, and the tools of torch."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

from mru_kernels.nn import LRU, MinGRU, MinLSTM

CLASSES = [MinGRU, MinLSTM, LRU]
all_classes = pytest.mark.parametrize("cls", CLASSES)
gated = pytest.mark.parametrize("cls", [MinGRU, MinLSTM])


def make(cls, *sizes, seed=0, dtype=torch.float64, **options):
    """A module with random initial states."""
    torch.manual_seed(seed)
    module = cls(*sizes, dtype=dtype, **options)
    for name, parameter in module.named_parameters():
        if name.startswith("initial_state"):
            torch.nn.init.normal_(parameter)
    return module


def random(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


def states(cls, *shape):
    return random(*shape, dtype=torch.complex128 if cls is LRU else torch.float64)


def close(got, expected, tolerance=1e-12):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------ equations


def g(x):
    return torch.where(x >= 0, x + 0.5, 1 / (1 + torch.exp(-x)))


def decay_and_update(cls, x, p, hidden):
    """Decay and update of one step."""
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
    """The equations of one layer and direction, step by step: output [B, T, D] and final state."""
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
        (LRU, 7, {"r_min": 0.9, "r_max": 0.99, "max_phase": 0.5}),  # D is a vector
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
        if cls is MinLSTM:  # both gates are equal, so the decay is 1/2
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
    turned, turned_h_n = time_first(x.transpose(0, 1).contiguous(), hx)
    close(turned, output.transpose(0, 1))
    close(turned_h_n, h_n)
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


# ------------------------------------------------------------------------------------------------ dtypes and errors


@gated
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.filterwarnings("ignore:hx. expected torch.float32:UserWarning")
def test_dtypes(cls, dtype):
    module = make(cls, 4, 6, 2).to(dtype)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(3, 10, 4).to(dtype)
    for hx in (None, torch.ones(2, 3, 6, dtype=dtype), torch.ones(2, 3, 6, dtype=state)):
        output, h_n = module(x, hx)
        assert output.dtype == dtype
        assert h_n.dtype == state
        (output.sum() + h_n.sum()).backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize(("dtype", "state"), [(torch.float32, torch.complex64), (torch.float64, torch.complex128)])
def test_dtypes_of_complex_states(dtype, state):
    module = LRU(4, 6, 2).to(dtype)
    x = torch.randn(3, 10, 4, dtype=dtype)
    output, h_n = module(x, torch.ones(2, 3, 6, dtype=state))
    assert (output.dtype, h_n.dtype) == (dtype, state)
    assert all(p.dtype == dtype for p in module.parameters())
    for wrong in (dtype, torch.complex64 if state == torch.complex128 else torch.complex128):
        with pytest.raises(TypeError, match=f"hx: expected dtype {state}, got {wrong}"):
            module(x, torch.ones(2, 3, 6, dtype=wrong))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_complex_states_reject_half_precision(dtype):
    with pytest.raises(TypeError, match=f"dtype: expected float32 or float64, got {dtype}"):
        LRU(4, 6, dtype=dtype)
    with pytest.raises(TypeError, match=f"dtype: expected float32 or float64, got {dtype}"):
        LRU(4, 6).to(dtype)(torch.ones(1, 2, 4, dtype=dtype))


@all_classes
def test_autocast(cls):
    module = make(cls, 4, 6, 2, dtype=torch.float32)
    x = torch.randn(2, 33, 4)
    exact, exact_h_n = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, h_n = module(x)
        again, _ = module(x, h_n)
        # The scan needs a complex64 update, so the projection is float32.
        assert cls is not LRU or module._project(x, module._parameters_by_scan()[0]).dtype == torch.float32
    assert output.dtype == again.dtype == torch.bfloat16
    assert h_n.dtype == exact_h_n.dtype
    torch.testing.assert_close(output.float(), exact, rtol=0.1, atol=0.1)
    (again.float().sum() + h_n.abs().sum()).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize(
    ("cls", "options", "error", "match"),
    [
        (
            MinGRU,
            {"max_time_scale": 1.5},
            ValueError,
            r"max_time_scale: expected a finite .* \[2, inf\], got 1.5",
        ),
        (MinLSTM, {"max_time_scale": math.inf}, ValueError, "max_time_scale: expected a finite"),
        (MinGRU, {"max_time_scale": math.nan}, ValueError, "max_time_scale: expected a finite"),
        (MinGRU, {"max_time_scale": "9"}, TypeError, "max_time_scale: expected a float, got str"),
        (LRU, {"r_max": True}, TypeError, "r_max: expected a float, got bool"),
        (MinGRU, {"epsilon": 0.5}, TypeError, "epsilon"),
        (LRU, {"r_max": 1.1}, ValueError, r"r_max: expected a finite number in \[0, 1\], got 1.1"),
        (LRU, {"r_min": 0.9, "r_max": 0.5}, ValueError, r"r_min: expected a finite number in \[0, 0.5\], got 0.9"),
        (LRU, {"max_phase": -1.0}, ValueError, "max_phase: expected a finite"),
        (
            LRU,
            {"bias": False},
            TypeError,
            "LRU: unknown argument 'bias'; it takes input_size, hidden_size, num_layers, r_min",
        ),
        (LRU, {"num_layers": 0}, ValueError, "num_layers: expected a positive int, got 0"),
    ],
)
def test_bad_construction(cls, options, error, match):
    with pytest.raises(error, match=match):
        cls(4, 6, **options)


@pytest.mark.parametrize(
    ("x", "hx", "error", "match"),
    [
        (torch.ones(2, 3, 5), None, ValueError, r"input: expected 4 features, got shape \[2, 3, 5\]"),
        (torch.ones(2, 3, 4).double(), None, TypeError, "input: expected the module's dtype torch.float32"),
        (torch.ones(2, 3, 4), torch.ones(1, 2, 6).cfloat(), ValueError, r"hx: expected shape \[2, 2, 6\]"),
    ],
)
def test_bad_input(x, hx, error, match):
    with pytest.raises(error, match=match):
        LRU(4, 6, 2)(x, hx)


# ------------------------------------------------------------------------------------------------ tools of torch


@all_classes
def test_compile(cls):
    torch._dynamo.reset()
    module = make(cls, 4, 6)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for time in (17, 65):
        x, hx = random(2, time, 4), states(cls, 1, 2, 6)
        results = []
        for run in (compiled, module):
            module.zero_grad()
            output, h_n = run(x, hx)
            (output.square().sum() + h_n.abs().sum()).backward()
            results.append([output, h_n, *(p.grad for p in module.parameters())])
        for a, b in zip(*results, strict=True):
            close(a, b)


@all_classes
def test_vmap_over_an_ensemble(cls):
    modules = [make(cls, 4, 6, seed=i) for i in range(3)]
    parameters, buffers = torch.func.stack_module_state(modules)
    x = random(2, 33, 4)
    output, h_n = torch.vmap(lambda p, b: torch.func.functional_call(modules[0], (p, b), (x,)))(parameters, buffers)
    for i, module in enumerate(modules):
        close(output[i], module(x)[0])
        close(h_n[i], module(x)[1])


@all_classes
def test_copies_and_checkpoints(cls):
    module = make(cls, 4, 6, 2, bidirectional=True)
    x = random(2, 9, 4)
    expected = module(x)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    loaded = make(cls, 4, 6, 2, bidirectional=True, seed=1)
    assert not torch.equal(loaded(x)[0], expected[0])
    loaded.load_state_dict(torch.load(file, weights_only=True), strict=True)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert all(torch.equal(a, b) for a, b in zip(twin(x), expected, strict=True))


@all_classes
def test_learns_to_recall(cls):
    torch.manual_seed(0)
    options = {"r_min": 0.9} if cls is LRU else {"max_time_scale": 50.0}
    module, head = cls(1, 16, **options), torch.nn.Linear(16, 1)
    optimizer = torch.optim.Adam([*module.parameters(), *head.parameters()], lr=1e-2)
    for _ in range(150):
        x = torch.randint(0, 2, (32, 1, 1)) * 2.0 - 1.0
        stream = F.pad(x, (0, 0, 0, 19))  # a sign, then 19 zeros
        loss = F.mse_loss(head(module(stream)[0][:, -1]), x[:, 0])
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert loss < 0.05
