"""mk.PRF and the spiking block: equations, initial values, dtypes, states and what users do with modules."""

import copy
import math

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

import mru_kernels as mk

F64, C128 = torch.float64, torch.complex128


def make(*sizes, seed=0, dtype=F64, **options):
    """A module that fires: with larger weights and random initial states."""
    torch.manual_seed(seed)
    module = mk.PRF(*sizes, **{"dt_min": 0.05, "dt_max": 0.5, "threshold": 0.3, "dtype": dtype} | options)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.startswith(("weight_ih", "initial_state")):
                p.normal_()
    return module


def loop(module, x, suffix, state, reverse=False):
    """Membranes and the final state of the equations of one layer and direction, step by step."""
    p = {name.removesuffix(suffix): q for name, q in module.named_parameters() if name.endswith(suffix)}
    dt = p["log_dt"].exp()
    a = torch.exp(dt * torch.complex(torch.full_like(dt, -1 / module.tau), p["theta_log"].exp()))
    u = torch.complex(*p["initial_state"].unbind(-1)) if state is None else state
    found = {}
    for t in reversed(range(x.shape[1])) if reverse else range(x.shape[1]):
        u = a * u + dt * (x[:, t] @ p["weight_ih"].T + p.get("bias_ih", 0.0))
        found[t] = u.real
    return torch.stack([found[t] for t in range(x.shape[1])], 1), u


def close(got, expected, tolerance=1e-11):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"tau": 5.0, "threshold": -0.1}], ids=str)
@pytest.mark.parametrize("given", [False, True])
def test_equations_and_gradients(options, given):
    module = make(5, 7, bidirectional=True, **options)
    x = torch.randn(3, 40, 5, dtype=F64, requires_grad=True)
    hx = torch.randn(2, 3, 7, dtype=C128, requires_grad=True) if given else None
    output, h_n = module(x, hx)
    spikes, finals = [], []
    for direction, suffix in enumerate(("_l0", "_l0_reverse")):
        membranes, u = loop(module, x, suffix, hx[direction] if given else None, reverse=direction == 1)
        v = membranes - module.threshold
        smooth = (math.pi * v).atan() / math.pi
        spikes.append((v >= 0).to(F64) + (smooth - smooth.detach()))
        finals.append(u)
    expected, final = torch.cat(spikes, -1), torch.stack(finals)
    assert 0.02 < expected.mean() < 0.98
    assert torch.equal(output, expected)
    close(h_n, final.expand_as(h_n))
    inputs = [x, *([hx] if given else []), *module.parameters()]
    weights = torch.randn_like(output), torch.randn_like(h_n)
    got = torch.autograd.grad((output, h_n), inputs, weights)
    wanted = torch.autograd.grad((expected, final.expand_as(h_n)), inputs, weights, allow_unused=True)
    for a, b in zip(got, wanted, strict=True):
        close(a, torch.zeros_like(a) if b is None else b)


def test_initial_values():
    torch.manual_seed(0)
    module = mk.PRF(3, 2000, 2)
    for layer in range(2):
        dt, theta = (getattr(module, f"{name}_l{layer}").exp() for name in ("log_dt", "theta_log"))
        assert dt.min() >= 0.99e-3
        assert dt.max() <= 1.01e-1
        assert abs(dt.log().mean() - math.log(1e-2)) < 0.1  # log-uniform
        assert theta.max() <= 2 * math.pi
        assert abs(theta.mean() - math.pi) < 0.15
        assert not getattr(module, f"initial_state_l{layer}").any()
    decay = module._vectors(module._parameters_by_scan()[0])["decay"].abs()
    assert decay.min() > 0.951
    assert decay.max() < 0.9996


def test_the_decay_is_as_exact_as_its_dtype():
    module = make(3, 500, dtype=torch.float32, dt_min=1e-3, dt_max=1e-1)
    p = module._parameters_by_scan()[0]
    dt, theta = p["log_dt"].double().exp(), p["theta_log"].double().exp()
    exact = torch.exp(dt * torch.complex(torch.full_like(dt, -0.5), theta))
    assert torch.equal(module._vectors(p)["decay"], exact.to(torch.complex64))


def test_amplitude():
    module = make(4, 6, amplitude=True)
    x = torch.randn(2, 30, 4, dtype=F64)
    spikes, _ = module(x)
    assert torch.equal(spikes.unique(), torch.tensor([0.0, 1.0], dtype=F64))
    with torch.no_grad():
        module.alpha_l0.copy_(torch.arange(6))
    output, _ = module(x)
    close(output, spikes * torch.arange(6))
    output.sum().backward()
    close(module.alpha_l0.grad, spikes.sum((0, 1)))


def test_layers_and_time_first():
    torch.manual_seed(0)
    module = make(4, 6, 2)
    x = torch.randn(3, 20, 4, dtype=F64)
    output, h_n = module(x)
    first = make(4, 6)
    second = make(6, 6)
    for layer, one in enumerate((first, second)):
        one.load_state_dict(
            {name.replace(f"_l{layer}", "_l0"): p for name, p in module.state_dict().items() if f"_l{layer}" in name}
        )
    h, a = first(x)
    again, b = second(h)
    assert torch.equal(output, again)
    assert torch.equal(h_n, torch.cat([a, b]))
    module.batch_first = False
    output_t, _ = module(x.transpose(0, 1))
    assert torch.equal(output_t.transpose(0, 1), output)


def test_steps_and_chunks_are_the_whole():
    module = make(4, 6, 2)
    x = torch.randn(3, 40, 4, dtype=F64)
    with torch.no_grad():
        output, h_n = module(x)
        state, steps = None, []
        for t in range(40):
            h, state = module.step(x[:, t], state)
            steps.append(h)
        feed = mk.stream(module)
        chunks = torch.cat([feed(chunk) for chunk in x.split(17, 1)], 1)
    assert torch.equal(torch.stack(steps, 1), output)
    assert torch.equal(chunks, output)
    close(state, h_n), close(feed.state, h_n)


def test_packed_sequences_and_resets():
    module = make(4, 6, bidirectional=True)
    xs = [torch.randn(n, 4, dtype=F64) for n in (7, 20, 12)]
    packed, h_n = module(pack_sequence(xs, enforce_sorted=False))
    for i, (x, h) in enumerate(zip(xs, unpack_sequence(packed), strict=True)):
        alone, final = module(x)
        assert torch.equal(h, alone)
        close(h_n[:, i], final)
    resets = torch.zeros(1, 39, dtype=torch.bool)
    resets[0, [7, 27]] = True
    output, _ = module(torch.cat(xs).unsqueeze(0), resets=resets)
    assert torch.equal(output[0], torch.cat([module(x)[0] for x in xs]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, F64])
def test_dtypes(dtype):
    module = make(4, 6, 2, dtype=torch.float32, amplitude=True).to(dtype)
    x = torch.randn(3, 10, 4).to(dtype)
    output, h_n = module(x)
    state = C128 if dtype == F64 else torch.complex64
    assert (output.dtype, h_n.dtype) == (dtype, state)
    output, h_n = module(x, h_n)
    (output.sum() + h_n.abs().sum()).backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in module.parameters())
    with pytest.raises(TypeError, match=f"hx: expected dtype {state}, got torch.float32"):
        module(x, torch.zeros(2, 3, 6))


def test_autocast():
    module = make(4, 6, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, h_n = module(torch.randn(2, 33, 4))
        output.sum().backward()
    assert (output.dtype, h_n.dtype) == (torch.bfloat16, torch.complex64)
    assert module.weight_ih_l0.grad.isfinite().all()


def test_compiled():
    module = make(4, 6, dtype=torch.float32)
    x = torch.randn(3, 20, 4)
    run = torch.compile(module, fullgraph=True, backend="aot_eager")
    output, h_n = run(x)
    expected, final = module(x)
    assert torch.equal(output, expected)
    close(h_n, final, 1e-5)
    grads = [torch.autograd.grad(y.sum(), list(module.parameters())) for y in (output, expected)]
    for a, b in zip(*grads, strict=True):
        close(a, b, 1e-4)


def test_copies_and_the_state_dict():
    module = make(4, 6, amplitude=True)
    names = {"weight_ih_l0", "bias_ih_l0", "log_dt_l0", "theta_log_l0", "alpha_l0", "initial_state_l0"}
    assert set(module.state_dict()) == names
    other = mk.PRF(4, 6, threshold=0.3, amplitude=True, dtype=F64)
    other.load_state_dict(module.state_dict())
    x = torch.randn(2, 9, 4, dtype=F64)
    assert torch.equal(other(x)[0], module(x)[0])
    assert torch.equal(copy.deepcopy(module)(x)[0], module(x)[0])
    assert "threshold=0.3" in repr(module)
    assert "amplitude=True" in repr(module)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tau": 0.0}, ValueError, "tau"),
        ({"dt_min": 1.0}, ValueError, "dt_min"),
        ({"dt_max": 0.0}, ValueError, "dt_max"),
        ({"threshold": "1"}, TypeError, "threshold"),
        ({"threshold": math.nan}, ValueError, "threshold"),
        ({"amplitude": 1}, TypeError, "amplitude"),
        ({"treshold": 1.0}, TypeError, "PRF: unknown argument 'treshold'"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        mk.PRF(3, 4, **options)


def test_traces_are_refused():
    with pytest.raises(TypeError, match="module: expected no PRF"):
        mk.stream(mk.PRF(3, 4), gradient="traces")


# ------------------------------------------------------------------------------------------------ the block


def spiking(**options):
    torch.manual_seed(0)
    return mk.MRUBlock(
        6, {"prf": {"dt_min": 0.05, "dt_max": 0.5, "threshold": 0.1}}, mlp="spiking", dtype=F64, **options
    )


def test_spiking_block_by_hand():
    block = spiking()
    x = torch.randn(2, 15, 6, dtype=F64, requires_grad=True)
    output, (state,) = block(x)
    u = block.norm(x)
    h, h_n = block.units[0](u)
    r = x + block.out(h * block.gate(u).sigmoid())
    v = block.mlp_norm(r) - 1
    smooth = (math.pi * v).atan() / math.pi
    expected = r + block.mlp_out(block.alpha * ((v >= 0).to(F64) + (smooth - smooth.detach())))
    close(output, expected)
    assert torch.equal(state, h_n[0])
    assert state.dtype == C128
    inputs = [x, *block.parameters()]
    for a, b in zip(
        torch.autograd.grad(output.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        close(a, b)
    assert not hasattr(block, "mlp_in")
    assert torch.equal(block.alpha, torch.ones(6, dtype=F64))


def test_spiking_network_in_steps():
    torch.manual_seed(0)
    network = mk.MRUNetwork(
        3, 2, width=6, num_blocks=2, units=("prf", "min_gru"), mlp="spiking", conv_size=3, dtype=F64
    )
    x = torch.randn(2, 12, 3, dtype=F64)
    output, state = network(x)
    after, steps = None, []
    for t in range(12):
        h, after = network.step(x[:, t], after)
        steps.append(h)
    close(torch.stack(steps, 1), output, 1e-9)
    assert [t.dtype for t in state] == [t.dtype for t in after]


def test_bad_arguments_of_a_spiking_block():
    with pytest.raises(ValueError, match="mlp: expected"):
        mk.MRUBlock(4, mlp="relu")
    with pytest.raises(ValueError, match="mlp_size: expected None"):
        mk.MRUBlock(4, mlp="spiking", mlp_size=8)
