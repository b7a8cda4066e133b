"""`mk.DelayConv`, and blocks and networks with delays: streaming, episodes, training and the tools of torch."""

from __future__ import annotations

import copy

import pytest
import torch

import mru_kernels as mk

pytestmark = pytest.mark.usefixtures("one_thread")  # the tensors are too small for two

TIME = 30
STARTS = [(0, 11), (0, 4, 5, 29)]  # where the episodes of two sequences begin
taps_of_both_forms = pytest.mark.parametrize("taps", [5, 24])  # conv1d and the FFT


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def layer(taps: int = 5, **options) -> mk.DelayConv:
    torch.manual_seed(0)
    return mk.DelayConv(4, taps, 3, **{"dtype": torch.float64} | options)


def network(taps: int = 5, **options) -> mk.MRUNetwork:
    torch.manual_seed(0)
    options = {"units": ("bmru", "min_gru"), "num_blocks": 2, "dtype": torch.float64} | options
    return mk.MRUNetwork(3, 2, width=4, delay={"taps": taps, "count": 3}, **options)


def mask() -> torch.Tensor:
    return torch.tensor([[t in row[1:] for t in range(TIME)] for row in STARTS])


def close(got, expected, tolerance=1e-10) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def apart(module, x):
    """Output and last state of the module, one episode at a time."""
    output, states = [], []
    for n, row in enumerate(STARTS):
        pieces = [module(x[n : n + 1, a:b]) for a, b in zip(row, (*row[1:], TIME), strict=True)]
        output.append(torch.cat([y for y, _ in pieces], 1))
        states.append(pieces[-1][1])
    return torch.cat(output), tuple(torch.cat(parts) for parts in zip(*states, strict=True))


# ------------------------------------------------------------------------------------------------ the layer


@taps_of_both_forms
def test_a_layer_is_the_op(taps):
    for module in (layer(taps), layer(taps, learn_sigma=True, sigma=1.5)):
        x, past = drawn(2, TIME, 4), drawn(2, taps - 1, 4)
        y, (after,) = module(x, (past,))
        expected = mk.delay_conv(x, module.weight, module.position, module.sigma, taps, past)
        assert torch.equal(y, expected[0])
        assert torch.equal(after, expected[1])


def test_the_initial_parameters():
    module = mk.DelayConv(500, 64, 8, learn_sigma=True)
    assert module.position[3].tolist() == [0, 8, 16, 24, 32, 40, 48, 56]
    assert 0.28 < module.weight.std() < 0.34  # of a normal distribution cut at two standard deviations: 0.88 of 8^-0.5
    assert module.weight.abs().max() <= 2 * 8**-0.5
    assert module.sigma.eq(0.7).all()
    assert layer().sigma == 0.7
    assert mk.DelayConv(2, 1, 8).position.eq(0).all()


def test_positions_are_clamped_on_request():
    module = layer(5)
    with torch.no_grad():
        module.position[0] = torch.tensor([-1.0, 2.0, 9.0])
    module(drawn(1, 3, 4))
    assert module.position[0].tolist() == [-1.0, 2.0, 9.0]
    module.clamp_positions()
    assert module.position[0].tolist() == [0.0, 2.0, 4.0]


# ------------------------------------------------------------------------------------------------ pieces of time


@taps_of_both_forms
@pytest.mark.parametrize("make", [layer, network], ids=["layer", "network"])
def test_chunks_steps_and_streams_equal_the_pass(make, taps):
    module = make(taps)
    x = drawn(2, TIME, 4 if make is layer else 3)
    with torch.no_grad():
        expected, last = module(x)
        feed = mk.stream(module)
        close(torch.cat([feed(chunk) for chunk in x.split([7, 1, 22], 1)], 1), expected)
    close(feed.state, last)
    state = None
    for t in range(TIME):
        y, state = module.step(x[:, t], state)
        close(y, expected[:, t])
    close(state, last)


@taps_of_both_forms
def test_the_gradient_flows_through_states(taps):
    module = network(taps, units="min_gru", num_blocks=1)
    x = drawn(2, TIME, 3)
    parameters = list(module.parameters())
    whole = torch.autograd.grad(module(x)[0][:, 10:].square().sum(), parameters)
    _, state = module(x[:, :10])
    close(torch.autograd.grad(module(x[:, 10:], state)[0].square().sum(), parameters), whole)


@taps_of_both_forms
@pytest.mark.parametrize("make", [layer, network], ids=["layer", "network"])
def test_episodes_equal_the_episodes_apart(make, taps):
    module = make(taps)
    x = drawn(2, TIME, 4 if make is layer else 3)
    output, state = module(x, resets=mask())
    expected, last = apart(module, x)
    close(output, expected)
    close(state, last)
    parameters = list(module.parameters())
    close(*(torch.autograd.grad(y.square().sum(), parameters) for y in (output, expected)))
    feed = mk.stream(module)
    with torch.no_grad():
        sizes = [3, 1, 26]
        got = [feed(c, r) for c, r in zip(x.split(sizes, 1), mask().split(sizes, 1), strict=True)]
    close(torch.cat(got, 1), expected.detach())
    state = None
    for t in range(TIME):
        y, state = module.step(x[:, t], state, resets=mask()[:, t])
        close(y, expected[:, t].detach())


def test_a_nan_does_not_pass_a_reset():
    x = drawn(2, TIME, 4)
    x[0, 10] = torch.nan
    y, (past,) = layer(24)(x, resets=mask())
    assert y[0, 11:].isfinite().all()
    assert past.isfinite().all()


# ------------------------------------------------------------------------------------------------ tools of torch


def test_every_parameter_of_a_network_has_a_gradient():
    module = network(units=("bmru", "lru"))
    module(drawn(2, TIME, 3))[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


@pytest.mark.parametrize(("taps", "resets"), [(5, False), (5, True), (24, False)])
def test_compile(taps, resets):
    torch._dynamo.reset()
    module = network(taps, num_blocks=1)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, options = drawn(2, TIME, 3), {"resets": mask()} if resets else {}
    results = []
    for run in (compiled, module):
        module.zero_grad()
        output, state = run(x, **options)
        output.square().sum().backward()
        results.append([output, *state, *(p.grad for p in module.parameters())])
    close(*results)


@taps_of_both_forms
def test_export(taps):
    time = torch.export.Dim("time", min=2, max=4096)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        module = network(taps, num_blocks=1, dtype=dtype)
        program = torch.export.export(module, (drawn(2, 9, 3).to(dtype),), dynamic_shapes=({1: time},))
        for steps in (4, TIME):
            x = drawn(2, steps, 3).to(dtype)
            close(program.module()(x), module(x), tolerance)


@taps_of_both_forms
@pytest.mark.parametrize("resets", [False, True])
def test_autocast_and_half_precision(taps, resets):
    options = {"resets": mask()} if resets else {}
    module, x = network(taps, dtype=torch.float32), torch.randn(2, TIME, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, state = module(x, **options)
        output, _ = module(x, state, **options)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    half = network(taps, dtype=torch.bfloat16)
    output, state = half(x.bfloat16(), **options)
    assert half(x.bfloat16(), state, **options)[0].dtype == torch.bfloat16


def test_copies_and_checkpoints():
    module = network(24)
    other = network(24)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1)
    other.load_state_dict(module.state_dict(), strict=True)
    x = drawn(2, TIME, 3)
    for twin in (other, copy.deepcopy(module)):
        assert torch.equal(twin(x)[0], module(x)[0])


# ------------------------------------------------------------------------------------------------ learning


@pytest.mark.parametrize(("first_sigma", "is_learned"), [(4.0, True), (0.7, False)])
def test_a_layer_learns_its_delays(first_sigma, is_learned):
    """Sigma begins wide. Where it is narrow from the start, delays 4 steps away have no gradient."""
    torch.manual_seed(0)
    module, wanted, steps = mk.DelayConv(2, 16, 2), torch.tensor([[4.0], [12.0]]), 150
    assert module.position[0].tolist() == [0.0, 8.0]
    torch.nn.init.constant_(module.weight, 0.3)
    optimizer = torch.optim.Adam([{"params": module.weight, "lr": 0.1}, {"params": module.position, "lr": 0.2}])
    for step in range(steps):
        module.sigma = first_sigma * (0.7 / first_sigma) ** min(1.0, 2.0 * step / steps)
        x = torch.randn(4, 64, 2)
        expected = torch.stack([x[:, 16 - int(d) : 64 - int(d), i] for i, d in enumerate(wanted)], -1)
        error = (module(x)[0][:, 16:] - expected).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        module.clamp_positions()
    distance = (module.position - wanted).abs().amin(1)
    if is_learned:  # one bump of sigma 0.7 alone leaves an error of 0.2
        assert distance.max() < 0.2
        assert error < 0.3
    else:
        assert distance.min() > 2.0
        assert error > 0.8


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"delay": 128}, TypeError, "delay: expected a mapping of arguments or None, got int"),
        ({"delay": {"taps": 8}, "conv_size": 4}, ValueError, "delay: expected None with conv_size=4, got"),
        ({"delay": {}}, TypeError, "DelayConv: .*taps"),
        ({"delay": {"taps": 0}}, ValueError, "taps: expected a positive int, got 0"),
        ({"delay": {"taps": 8, "count": 1.0}}, TypeError, "count: expected an int, got float"),
        ({"delay": {"taps": 8, "sigma": 0}}, ValueError, "sigma: expected a finite number of at least 1e-30, got 0"),
        ({"delay": {"taps": 8, "sigma": "1"}}, TypeError, "sigma: expected a float, got str"),
        ({"delay": {"taps": 8, "learn_sigma": 1}}, TypeError, "learn_sigma: expected a bool, got int"),
        ({"delay": {"taps": 8, "counts": 1}}, TypeError, "DelayConv: unknown argument 'counts'; did you mean 'count'"),
    ],
)
def test_bad_construction(options, error, match):
    with pytest.raises(error, match=match):
        mk.MRUBlock(4, **options)


def test_bad_input():
    module, x = layer(), drawn(2, 9, 4)
    with pytest.raises(ValueError, match=r"input: expected 4 channels, got shape \[2, 9, 3\]"):
        module(x[..., :3])
    with pytest.raises(TypeError, match="input: expected the module"):
        module(x.float())
    with pytest.raises(ValueError, match=r"state: expected shape \[2, 4, 4\] for tensor 0, got \[2, 5, 4\]"):
        module(x, (drawn(2, 5, 4),))
    with pytest.raises(TypeError, match="state: expected a tuple of tensors"):
        module(x, drawn(2, 4, 4))
    with pytest.raises(TypeError, match="state: expected dtype"):
        module(x, (drawn(2, 4, 4).float(),))
    with pytest.raises(TypeError, match="resets: expected dtype bool"):
        module(x, resets=torch.ones(2, 9))
    with pytest.raises(ValueError, match=r"state: expected shape \[2, 4, 4\] for tensor 0"):
        network(num_blocks=1)(drawn(2, 9, 3), (drawn(2, 5, 4), drawn(2, 4), drawn(2, 4)))
