"""`mk.MesaNet`: chunks and steps, networks and streams, compiled and exported programs, and bad input."""

from __future__ import annotations

import copy

import pytest
import torch

import mru_kernels as mk

pytestmark = pytest.mark.usefixtures("one_thread")  # the tensors are too small for two


def layer(dtype=torch.float64, **options) -> mk.MesaNet:
    torch.manual_seed(0)
    return mk.MesaNet(3, 7, heads=2, dtype=dtype, **({"chunk_size": 4, "steps": 6} | options))


def network(dtype=torch.float64, **options) -> mk.MRUNetwork:
    torch.manual_seed(0)
    units = {"mesa": {"heads": 2, "chunk_size": 4, "steps": 6} | options, "bmru": {}}
    return mk.MRUNetwork(3, 2, width=4, num_blocks=1, units=units, conv_size=2, dtype=dtype)


def random(*shape: int) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(shape, dtype=torch.float64)


def close(got, expected, tolerance=1e-12) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def in_chunks(module, x, cuts=(3, 1, 9)):
    state, outputs = None, []
    for chunk in x.split(cuts, 1):
        output, state = module(chunk, state)
        outputs.append(output)
    return torch.cat(outputs, 1), state


@pytest.mark.parametrize("options", [{}, {"conv_size": 0}, {"conv_size": 1}, {"solver": "direct", "key_size": 5}])
def test_chunks_and_steps_equal_the_pass(options):
    module, x = layer(**options), random(2, 13, 3)
    whole, last = module(x)
    output, state = in_chunks(module, x)
    close(output, whole)
    close(state, last)
    wanted = list(module.parameters())
    close(torch.autograd.grad(output.sum(), wanted), torch.autograd.grad(whole.sum(), wanted))
    state = None
    for t in range(13):
        output, state = module.step(x[:, t], state)
        close(output, whole[:, t])
    close(state, last)
    assert module.taken.shape == (2, 1, 2)


def test_a_pass_equals_the_definition():
    module, x = layer(), random(2, 9, 3)
    padded = torch.nn.functional.pad(module.keys(x), (0, 0, 3, 0))
    convolved = sum(padded[:, tap : tap + 9] * module.conv.weight[:, 0, tap] for tap in range(4))
    q, k = torch.nn.functional.silu(convolved).chunk(2, -1)
    gate_beta, gate_gamma = module.gates(x).sigmoid().chunk(2, -1)
    regularizer = 0.25 + torch.nn.functional.softplus(module.regularizer)
    close(regularizer, torch.ones_like(regularizer))
    heads = []
    for h in range(2):
        kk, kv, outputs = torch.zeros(2, 4, 4).double(), torch.zeros(2, 4, 4).double(), []
        for t in range(9):
            q_t, k_t = (s[:, t, 4 * h : 4 * h + 4] for s in (q, k))
            q_t, k_t = (s / s.norm(dim=-1, keepdim=True) for s in (q_t, k_t))
            beta = gate_beta[:, t, h, None, None]
            gamma = gate_gamma[:, t, h, None, None] * (1 - 0.0025 * beta**2)
            v_t = module.values(x)[:, t, 4 * h : 4 * h + 4]
            kk = gamma * kk + beta * torch.einsum("bi,bj->bij", k_t, k_t)
            kv = gamma * kv + beta * torch.einsum("bi,bj->bij", k_t, v_t)
            read = torch.linalg.solve(kk + torch.diag(regularizer[h]), q_t.unsqueeze(-1)).mT @ kv
            outputs.append(read / (read.square().mean(-1, keepdim=True) + 1e-6).sqrt())
        heads.append(torch.cat(outputs, 1))
    close(module(x)[0], module.out(torch.cat(heads, -1)))


def test_time_first():
    x = random(2, 9, 3)
    output, state = layer()(x)
    other = layer(batch_first=False)
    turned, same = other(x.transpose(0, 1))
    close(turned.transpose(0, 1), output)
    close(same, state)
    close(other.step(x[:, 0])[0], output[:, 0])


@pytest.mark.parametrize(
    "units", [{"mesa": {"steps": 5}}, {"bmru": {}, "mesa": {"heads": 2, "chunk_size": 4, "steps": 4}, "min_gru": {}}]
)
def test_networks_and_streams(units):
    torch.manual_seed(0)
    network = mk.MRUNetwork(3, 2, width=4, num_blocks=2, units=units, conv_size=2, dtype=torch.float64)
    x = random(2, 13, 3)
    whole, last = network(x)
    output, state = in_chunks(network, x)
    close(output, whole)
    close(state, last)
    blocked = mk.blocked(network, steps=5)(x)[0]
    close(blocked, whole)
    wanted = list(network.parameters())
    close(torch.autograd.grad(blocked.sum(), wanted), torch.autograd.grad(whole.sum(), wanted))
    feed, state = mk.stream(network), None
    with torch.no_grad():
        close(torch.cat([feed(chunk) for chunk in x.split(5, 1)], 1), whole)
        for t in range(13):
            output, state = network.step(x[:, t], state)
            close(output, whole[:, t])
        feed(x, resets=torch.tensor([True, False]))
        for got, alone, before in zip(feed.state, network(x)[1], network(x, last)[1], strict=True):
            close(got[0], alone[0])
            close(got[1], before[1])


def test_resets_and_traces_are_refused():
    mask = torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"^resets: expected None for a block with a MesaNet, got a mask"):
        mk.MRUBlock(4, "mesa")(torch.randn(2, 3, 4), resets=mask)
    for module in (mk.MRUBlock(4, "mesa"), mk.MesaNet(4, 4)):
        with pytest.raises(ValueError, match=r"^resets: expected shape \[batch\] for a MesaNet, got \[2, 3\]"):
            mk.stream(module)(torch.randn(2, 3, 4), resets=mask)
        with pytest.raises(TypeError, match=r"^module: expected .*MesaNet"):
            mk.stream(module, gradient="traces")
    with pytest.raises(TypeError, match=r"^unit: expected a recurrent module of this package, got MesaNet"):
        mk.MRUBlock(4, "mesa", cache={})


def test_half_precision_and_autocast():
    x = random(2, 9, 3)
    right = layer()
    exact, state = right(x)
    low, low_state = copy.deepcopy(right).bfloat16()(x.bfloat16())
    assert [t.dtype for t in (low, *low_state)] == [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]
    close(low.double(), exact, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        module = copy.deepcopy(right).float()
        mixed, mixed_state = module(x.float())
        module(x.float(), mixed_state)
    assert [t.dtype for t in (mixed, *mixed_state)] == [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]
    close(mixed.double(), exact, 0.1)
    mixed.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())
    assert state[0].dtype == torch.float64


def test_the_solver_stays_exact_under_autocast():
    q, k, v = torch.randn(3, 1, 9, 2, 4).unbind(0)
    gates, regularizer = torch.rand(1, 9, 2), torch.ones(2, 4)
    q.requires_grad_()
    right = mk.mesa(q, k, v, -gates, gates, regularizer)[0]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = mk.mesa(q, k, v, -gates, gates, regularizer)[0]
        (grad,) = torch.autograd.grad(mixed.sum(), q)
    close(mixed, right, 0)
    close(grad, torch.autograd.grad(right.sum(), q)[0], 0)


def test_a_network_under_autocast():
    x = random(2, 9, 3)
    exact = network()(x)[0]
    module = network(torch.float32)
    module.load_state_dict(network().state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        mixed, state = module(x.float())
        module(x.float(), state)
        module.step(x[:, 0].float(), state)
    close(mixed.double(), exact, 0.1)
    mixed.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("make", [layer, network])
def test_compiled_and_exported(make):
    module, x = make(steps=2, tolerance=1e-4, chunk_size=2), random(2, 3, 3)
    with torch.no_grad():
        state = module(x)[1]
    expected, last = module(x, state)
    compiled = copy.deepcopy(module)
    output, same = torch.compile(compiled, fullgraph=True, backend="aot_eager")(x, state)
    close(output, expected)
    close(same, last)
    output.sum().backward()
    expected.sum().backward()
    close([p.grad for p in compiled.parameters()], [p.grad for p in module.parameters()])
    exported = torch.export.export(module, (x, state)).module()
    close(exported(x, state), (expected, last))


def test_copies_and_parameters():
    module = layer()
    module(random(2, 5, 3))
    again = copy.deepcopy(module)
    again.load_state_dict(module.state_dict())
    assert again.gates.bias[2:].sigmoid().tolist() == pytest.approx([1 - 1 / 16, 1 - 1 / 1024])
    module(random(2, 5, 3))[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"heads": 0}, ValueError, "^heads: expected a positive int, got 0"),
        ({"key_size": 2.0}, TypeError, "^key_size: expected an int, got float"),
        ({"key_size": 257, "solver": "direct"}, ValueError, "^key_size: expected at most 256 with solver"),
        ({"conv_size": -1}, ValueError, "^conv_size: expected a non-negative int, got -1"),
        ({"steps": 0}, ValueError, "^steps: expected a positive int, got 0"),
        ({"tolerance": 2}, ValueError, "^tolerance: expected a finite number"),
        ({"solver": "qr"}, ValueError, "^solver: expected one of 'cg', 'direct', got 'qr'"),
        ({"batch_first": 1}, TypeError, "^batch_first: expected a bool, got int"),
        ({"dtype": torch.int64}, TypeError, "^dtype: expected float32, bfloat16, float16 or float64, got torch.int64"),
        ({"head": 2}, TypeError, "^MesaNet: unknown argument 'head'; did you mean 'heads'"),
    ],
)
def test_bad_construction(options, error, match):
    with pytest.raises(error, match=match):
        mk.MesaNet(3, 4, **options)


def test_bad_calls():
    module, x = layer(), random(2, 5, 3)
    kk, kv, past = module(x)[1]
    for bad, error, match in (
        (x[0], ValueError, r"^input: expected 3 dimensions \[batch, time, features\]"),
        (x[..., :2], ValueError, r"^input: expected 3 features, got 2"),
        (x[:, :0], ValueError, r"^input: expected at least one step"),
        (x.float(), TypeError, r"^input: expected the module's dtype torch.float64"),
    ):
        with pytest.raises(error, match=match):
            module(bad)
    for bad, error, match in (
        ((kk, kv), ValueError, r"^state: expected 3 tensors"),
        (kk, TypeError, r"^state: expected a tuple of tensors"),
        ((kk[:1], kv, past), ValueError, r"^state: expected shape \[2, 2, 4, 4\] for tensor 0, got \[1, 2"),
        ((kk, kv.float(), past), TypeError, r"^state: expected dtype torch.float64 for tensor 1"),
        ((kk, kv, past.float()), TypeError, r"^state: expected dtype torch.float64 for tensor 2"),
        ((kk, kv, past[..., :1]), ValueError, r"^state: expected shape \[2, 16, 3\] for tensor 2"),
    ):
        with pytest.raises(error, match=match):
            module(x, bad)
    block = mk.MRUBlock(4, {"mesa": {}, "bmru": {}}, conv_size=2)
    state = list(block(torch.randn(2, 3, 4))[1])
    state[4] = state[4][:, :3]
    with pytest.raises(ValueError, match=r"^state: expected shape \[2, 4\] for tensor 4, got \[2, 3\]"):
        block(torch.randn(2, 3, 4), state)
