"""Modules, networks and streams whose sequences contain several episodes."""

from __future__ import annotations

import pytest
import torch

import mru_kernels as mk
from mru_kernels.nn.base import UNITS, MRUBase

KINDS = {name: kind for name, kind in UNITS.items() if issubclass(kind, MRUBase)}
SCANS = {name: kind for name, kind in KINDS.items() if kind is not mk.Aaren}  # with boundaries
TRACED = {name: kind for name, kind in SCANS.items() if kind is not mk.PRF}  # with traces
STARTS = [(0, 9), (0, 4, 5, 8)]  # where the episodes of two sequences of 12 steps begin
TIME = 12


def mask(starts=STARTS) -> torch.Tensor:
    return torch.tensor([[t in row[1:] for t in range(TIME)] for row in starts])


def episodes(starts=STARTS):
    """(sequence, steps) of every episode."""
    for n, row in enumerate(starts):
        for begin, end in zip(row, (*row[1:], TIME), strict=True):
            yield n, slice(begin, end)


def assert_gradients_equal(module, loss, other):
    parameters = list(module.parameters())
    for one, two in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(other, parameters), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("learned", [False, True])
def test_a_unit_equals_its_episodes_apart(name, bidirectional, learned):
    unit = KINDS[name](
        3, 5, num_layers=2, bidirectional=bidirectional, learn_initial_state=learned, dtype=torch.float64
    )  # fmt: skip
    x = torch.randn(2, TIME, 3, dtype=torch.float64)
    output, _ = unit(x, resets=mask())
    apart = torch.empty_like(output)
    pieces = []
    for n, steps in episodes():
        piece, _ = unit(x[n : n + 1, steps])
        apart[n, steps] = piece[0]
        pieces.append(piece.square().sum())
    torch.testing.assert_close(output, apart, rtol=1e-12, atol=1e-12)
    assert_gradients_equal(unit, output.square().sum(), sum(pieces))


@pytest.mark.parametrize("batch_first", [False, True])
def test_resets_have_the_layout_of_the_input(batch_first):
    unit = mk.BMRU(3, 5, batch_first=batch_first)
    x = torch.randn(2, TIME, 3)
    expected, h_n = unit(x if batch_first else x.transpose(0, 1), resets=mask() if batch_first else mask().T)
    for n in range(2):
        output, last = unit(x[n], resets=mask()[n])
        assert torch.equal(output, expected[n] if batch_first else expected[:, n])
        assert torch.equal(last, h_n[:, n])


def test_hx_lasts_until_the_first_reset():
    unit = mk.CMRU(3, 5)
    x, hx = torch.randn(1, TIME, 3), torch.randn(1, 1, 5)
    output, _ = unit(x, hx, resets=mask([(0, 7)]))
    assert torch.equal(output[:, :7], unit(x[:, :7], hx)[0])
    assert torch.equal(output[:, 7:], unit(x[:, 7:])[0])


@pytest.mark.parametrize("units", ["bmru", {"bmru": {}, "min_gru": {}, "lru": {}}])
@pytest.mark.parametrize("conv_size", [0, 1, 4])
def test_a_network_equals_its_episodes_apart(units, conv_size):
    network = mk.MRUNetwork(
        3, 2, width=6, num_blocks=2, units=units, conv_size=conv_size, dtype=torch.float64
    )  # fmt: skip
    x = torch.randn(2, TIME, 3, dtype=torch.float64)
    output, state = network(x, resets=mask())
    apart, pieces, last = torch.empty_like(output), [], {}
    for n, steps in episodes():
        piece, last[n] = network(x[n : n + 1, steps])
        apart[n, steps] = piece[0]
        pieces.append(piece.square().sum())
    torch.testing.assert_close(output, apart, rtol=1e-10, atol=1e-10)
    for i, t in enumerate(state):
        torch.testing.assert_close(t, torch.cat([last[n][i] for n in range(2)]), rtol=1e-10, atol=1e-10)
    parameters = list(network.parameters())
    grads = [torch.autograd.grad(loss, parameters) for loss in (output.square().sum(), sum(pieces))]
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("sizes", [[5, 7], [1] * TIME, [3, 1, 8]])
def test_chunks_and_steps_equal_the_whole(sizes):
    network = mk.MRUNetwork(3, 2, width=6, num_blocks=2, conv_size=3, units=("bmru", "min_gru"), dtype=torch.float64)
    x = torch.randn(2, TIME, 3, dtype=torch.float64)
    with torch.no_grad():
        expected, _ = network(x, resets=mask())
        feed = mk.stream(network)
        output = [feed(c, r) for c, r in zip(x.split(sizes, 1), mask().split(sizes, 1), strict=True)]
        torch.testing.assert_close(torch.cat(output, 1), expected, rtol=1e-10, atol=1e-10)
    state = None
    for t in range(TIME):
        output, state = network.step(x[:, t], state, resets=mask()[:, t])
        torch.testing.assert_close(output, expected[:, t], rtol=1e-10, atol=1e-10)


def test_a_unit_steps_over_resets():
    unit, x = mk.BMRU(3, 5), torch.randn(2, TIME, 3)
    expected, _ = unit(x, resets=mask())
    hx = None
    for t in range(TIME):
        output, hx = unit.step(x[:, t], hx, resets=mask()[:, t])
        assert torch.allclose(output, expected[:, t], rtol=0, atol=1e-6)


@pytest.mark.parametrize("network", [False, True])
def test_steps_in_slots_over_resets(network):
    module = mk.MRUNetwork(3, 5, width=6, num_blocks=1, conv_size=3) if network else mk.BMRU(3, 5, num_layers=2)
    x, indices = torch.randn(3, TIME, 3), torch.tensor([4, -1, 2])
    resets = torch.cat([mask(), mask()[:1]])
    _, state = module.step(x[:, 0])
    slots = tuple(torch.zeros(6, *t.shape[1:]) for t in state) if network else torch.zeros(2, 6, 5)
    state = tuple(torch.zeros_like(t) for t in state) if network else torch.zeros_like(state)
    for t in range(TIME):
        expected, state = module.step(x[:, t], state, resets=resets[:, t])
        output, slots = module.step(x[:, t], slots, resets=resets[:, t], state_indices=indices)
        assert torch.equal(output[[0, 2]], expected[[0, 2]])
    for slot, after in zip(slots, state, strict=True):
        assert torch.equal(slot[[4, 2]], after[[0, 2]])
        assert not slot[[0, 1, 3, 5]].any()


@pytest.mark.parametrize("name", TRACED)
@pytest.mark.parametrize("sizes", [[TIME], [5, 7], [1] * TIME])
def test_traces_equal_the_gradient_of_the_whole(name, sizes):
    unit = TRACED[name](3, 5, dtype=torch.float64)
    x = torch.randn(2, TIME, 3, dtype=torch.float64)
    weights = torch.randn(TIME, dtype=torch.float64)
    whole = (unit(x, resets=mask())[0].square().sum((0, 2)) * weights).sum()
    parameters = list(unit.parameters())
    expected = torch.autograd.grad(whole, parameters)
    feed = mk.stream(unit, gradient="traces")
    unit.zero_grad()
    for chunk, resets, w in zip(x.split(sizes, 1), mask().split(sizes, 1), weights.split(sizes), strict=True):
        (feed(chunk, resets).square().sum((0, 2)) * w).sum().backward()
    for p, grad in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-11, atol=1e-11)


def test_compiled_and_exported():
    network = mk.MRUNetwork(3, 2, width=6, num_blocks=1, conv_size=3)
    x = torch.randn(2, TIME, 3)
    expected, _ = network(x, resets=mask())
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, resets=mask())[0], expected)
    batch, time = (torch.export.Dim(d, min=1, max=64) for d in ("batch", "time"))
    dims = {"input": {0: batch, 1: time}, "resets": {0: batch, 1: time}}
    program = torch.export.export(network, (x,), {"resets": mask()}, dynamic_shapes=dims)
    torch.testing.assert_close(program.module()(x[:1, :7], resets=mask()[:1, :7])[0], network(x[:1, :7])[0])


@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_boundaries_continue_a_sequence(name, batch_first):
    unit = KINDS[name](3, 5, num_layers=2, chunk_size=16, batch_first=batch_first)
    x = torch.randn(2, 40, 3) if batch_first else torch.randn(40, 2, 3)
    output, h_n, boundaries = unit(x, return_boundaries=True)
    assert boundaries.shape == (2, 2, 2, 5)
    assert boundaries.dtype == h_n.dtype
    for k in range(2):
        rest, last = unit(x.narrow(int(batch_first), 16 * (k + 1), 24 - 16 * k), boundaries[:, :, k])
        torch.testing.assert_close(rest, output.narrow(int(batch_first), 16 * (k + 1), 24 - 16 * k))
        torch.testing.assert_close(last, h_n)
    alone = unit(x[0] if batch_first else x[:, 0], return_boundaries=True)
    torch.testing.assert_close(alone[2], boundaries[:, 0])
    boundaries.abs().sum().backward()
    assert all(p.grad is not None for key, p in unit.named_parameters() if key.startswith("weight_ih"))


def test_boundaries_are_refused_by_name():
    x = torch.zeros(2, TIME, 3)
    packed = torch.nn.utils.rnn.pack_sequence([x[0], x[1]])
    with pytest.raises(ValueError, match=r"^return_boundaries: expected False with a PackedSequence"):
        mk.BMRU(3, 5)(packed, return_boundaries=True)
    with pytest.raises(ValueError, match=r"^return_boundaries: expected False for a module whose chunk_size is None"):
        mk.BMRU(3, 5, chunk_size=None)(x, return_boundaries=True)
    with pytest.raises(TypeError, match=r"^return_boundaries: expected a bool"):
        mk.BMRU(3, 5)(x, return_boundaries=1)


ONE = torch.zeros(2, TIME, dtype=torch.bool)
BAD = [
    (torch.zeros(2, TIME), TypeError, "resets: expected dtype bool, got torch.float32"),
    (ONE[:, :-1], ValueError, r"resets: expected shape \[2, 12\] \[batch, time\], got \[2, 11\]"),
    ([True], TypeError, "resets: expected a bool tensor"),
    (ONE.to("meta"), ValueError, "resets: expected the input's device cpu, got meta"),
]


@pytest.mark.parametrize(("resets", "error", "message"), BAD)
def test_bad_resets_are_refused_by_name(resets, error, message):
    for module in (mk.BMRU(3, 5), mk.MRUBlock(3), mk.MRUNetwork(3, 2, width=4, num_blocks=1)):
        with pytest.raises(error, match=f"^{message}"):
            module(torch.zeros(2, TIME, 3), resets=resets)


def test_modules_without_resets_refuse_them_by_name():
    x = torch.zeros(2, TIME, 3)
    packed = torch.nn.utils.rnn.pack_sequence([x[0], x[1]])
    with pytest.raises(ValueError, match=r"^resets: expected None with a PackedSequence"):
        mk.BMRU(3, 5)(packed, resets=ONE)
    with pytest.raises(ValueError, match=r"^resets: expected None for a block with a GRU"):
        mk.MRUBlock(3, "gru")(x, resets=ONE)
    with pytest.raises(ValueError, match=r"^resets: expected None for a block with a MemoryCache"):
        mk.MRUBlock(3, cache={"segment": 4})(x, resets=ONE)
    for resets in (ONE, ONE[:, 0]):
        with pytest.raises(ValueError, match=r"^resets: expected None for a MemoryCache"):
            mk.stream(mk.MemoryCache(mk.BMRU(3, 5), segment=4))(x, resets)
    with pytest.raises(ValueError, match=r"^resets: expected shape \[2\] \[batch\]"):
        mk.BMRU(3, 5).step(x[:, 0], resets=ONE)
