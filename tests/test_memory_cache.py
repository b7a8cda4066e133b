"""`mk.MemoryCache`: a definition of one step at a time, chunks and steps, and causality.

Comparisons are in float64, where a matrix product of another shape rounds too little to flip a gate.
"""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch

import mru_kernels as mk
from mru_kernels.nn import memory_cache

pytestmark = pytest.mark.usefixtures("one_thread")  # the tensors are too small for two

UNITS = {
    "bmru": mk.BMRU, "cmru": mk.CMRU, "alpha_cmru": mk.AlphaCMRU, "schmitt": mk.FirstQuadrantBMRU, "min_gru": mk.MinGRU,
    "min_lstm": mk.MinLSTM, "lif": mk.LIF, "lru": mk.LRU,
}  # fmt: skip
MODES = ("gated", "residual", "sparse", "average")
FEATURES, CHANNELS, SEGMENT, STEPS = 5, 4, 4, 22
CUTS = [3, 1, 0, 7, 11]  # a segment ends inside, at the end and at the start of a chunk


def cached(unit="min_gru", mode="gated", features=FEATURES, seed=0, **options) -> mk.MemoryCache:
    """A cache with large W_u, so that the weights of different caches differ."""
    torch.manual_seed(seed)
    made = UNITS[unit](features, CHANNELS, dtype=torch.float64)
    module = mk.MemoryCache(made, SEGMENT, mode=mode, top_k=2 if mode == "sparse" else None, **options)
    if module.query is not None:
        torch.nn.init.normal_(module.query.weight)
        torch.nn.init.normal_(module.now_bias)
    return module


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def close(got, expected, tolerance=1e-12) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def by_definition(module: mk.MemoryCache, x: torch.Tensor) -> torch.Tensor:
    """The output, one step, sequence and cache at a time."""
    unit, mode = module.unit, module.mode
    rows = []
    for sequence in x:
        hx, caches, means, outputs = None, [], [], []
        for t, x_t in enumerate(sequence):
            start = t - t % SEGMENT
            if module.restart and t == start:
                hx = None
            h, hx = unit(x_t.view(1, 1, -1), hx)
            h = value = h.flatten()
            if isinstance(unit, mk.LRU):
                skip = unit.skip_l0
                value = h - (skip * x_t if skip.dim() == 1 else skip @ x_t)
            now = sequence[start : t + 1].mean(0)
            if mode in ("residual", "average"):
                y = h + sum(caches)
                outputs.append(y / (len(caches) + 1) if mode == "average" else y)
            else:
                u = module.query.weight @ x_t
                scores = [u @ mean for mean in means]
                read = range(len(means))
                if mode == "sparse":
                    read = sorted(read, key=lambda i: -scores[i].item())[: module.top_k]
                weights = [(u @ now + module.now_bias).exp()] + [scores[i].exp() for i in read]
                total = sum(w * v for w, v in zip(weights, [h] + [caches[i] for i in read], strict=True))
                outputs.append(total / sum(weights))
            if t % SEGMENT == SEGMENT - 1:
                caches.append(value)
                means.append(now)
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


def gradients(output: torch.Tensor, wanted) -> list[torch.Tensor]:
    torch.manual_seed(1)
    found = torch.autograd.grad(output, wanted, torch.randn(output.shape, dtype=output.dtype), allow_unused=True)
    return [torch.zeros(()).double() if g is None else g for g in found]


def in_chunks(module, x, cuts=CUTS):
    state, outputs = None, []
    for chunk in x.split(cuts, 1):
        output, state = module(chunk, state)
        outputs.append(output)
    return torch.cat(outputs, 1), state


# ------------------------------------------------------------------------------------------------ results


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("mode", MODES)
def test_a_pass_equals_the_definition(unit, mode):
    for restart in (False, True):
        for features in (FEATURES, CHANNELS):  # of the LRU also the skip connection that is a vector
            if features == CHANNELS and unit != "lru":
                continue
            module = cached(unit, mode, features, restart=restart)
            x = random(2, STEPS, features).requires_grad_()
            wanted = [x, *module.parameters()]
            output, _ = module(x)
            expected = by_definition(module, x)
            close(output, expected)
            close(gradients(output, wanted), gradients(expected, wanted))


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("unit", ["bmru", "min_gru", "lru"])
def test_chunks_and_steps_equal_the_pass(unit, mode, restart):
    module = cached(unit, mode, restart=restart)
    x = random(2, STEPS, FEATURES).requires_grad_()
    wanted = [x, *module.parameters()]
    whole, last = module(x)
    output, state = in_chunks(module, x)
    close(output, whole)
    close(state, last)
    close(gradients(output, wanted), gradients(whole, wanted))
    feed, state = mk.stream(module), None
    with torch.no_grad():
        close(torch.cat([feed(chunk) for chunk in x.split(CUTS, 1)], 1), whole)
        close(feed.state, last)
        for t in range(STEPS):
            y, state = module.step(x[:, t], state)
            close(y, whole[:, t])
    close(state, last)
    assert not y.requires_grad


def test_empty_calls():
    module = cached("bmru", restart=True)
    _, state = module(random(2, 9, FEATURES))
    output, after = module(random(2, 0, FEATURES), state)
    assert output.shape == (2, 0, CHANNELS)
    close(after, state)
    assert module(random(2, 0, FEATURES))[0].shape == (2, 0, CHANNELS)
    output, state = module(random(0, 9, FEATURES))
    assert module(random(0, 9, FEATURES), state)[0].shape == (0, 9, CHANNELS)


def test_time_first():
    """`batch_first` of the unit holds for the input and the output."""
    torch.manual_seed(0)
    unit = mk.LRU(FEATURES, CHANNELS, batch_first=False, dtype=torch.float64)
    module, other = (mk.MemoryCache(u, SEGMENT) for u in (unit, mk.LRU(FEATURES, CHANNELS, dtype=torch.float64)))
    other.load_state_dict(module.state_dict())
    x = random(2, STEPS, FEATURES)
    output, state = module(x.transpose(0, 1))
    expected, last = other(x)
    close(output.transpose(0, 1), expected)
    close(state, last)
    close(module.step(x[:, 0], state)[0], other.step(x[:, 0], last)[0])


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_the_first_segment_is_the_unit(mode, restart):
    """All parameters still have gradients, which DistributedDataParallel needs."""
    module = cached("lru", mode, restart=restart)
    x = random(2, SEGMENT, FEATURES)
    output, _ = module(x)
    assert torch.equal(output, module.unit(x)[0])
    output.sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_the_initial_weights():
    """With one cache gamma_0 is near 0.9."""
    module = mk.MemoryCache(mk.MinGRU(FEATURES, CHANNELS, dtype=torch.float64), SEGMENT)
    assert module.now_bias.item() == pytest.approx(math.log(9.0))
    assert 0.01 < module.query.weight.std() < 0.03
    x = random(64, 2 * SEGMENT, FEATURES)
    with torch.no_grad():
        module.query.weight.zero_()
        h = module.unit(x)[0]
        close(module(x)[0][:, SEGMENT:], 0.9 * h[:, SEGMENT:] + 0.1 * h[:, SEGMENT - 1 : SEGMENT])


def test_equal_scores_select_the_earliest_segments():
    module = cached(mode="sparse")
    with torch.no_grad():
        module.query.weight.zero_()
        x = random(1, STEPS, FEATURES)
        output, (*_, caches, _) = module(x)
        h = module.unit(x)[0]
        w = module.now_bias.exp()
        close(output[:, 16:20], (w * h[:, 16:20] + caches[:, :2].sum(1, keepdim=True)) / (w + 2))


# ------------------------------------------------------------------------------------------------ causality


@pytest.mark.parametrize("value", [1.0, math.nan, math.inf])
@pytest.mark.parametrize("mode", MODES)
def test_no_step_reads_a_later_one(mode, value):
    for restart in (False, True):
        module = cached("bmru", mode, restart=restart)
        x = random(2, STEPS, FEATURES).requires_grad_()
        changed = x.detach().clone()
        changed[:, 13] += value
        before, after = module(x)[0], module(changed)[0]
        close(after[:, :13], before[:, :13])
        assert not torch.equal(after[:, 13:], before[:, 13:])
        (gradient,) = torch.autograd.grad(before[:, 13].sum(), x)
        assert gradient[:, 14:].eq(0.0).all()


@pytest.mark.parametrize("mode", MODES)
def test_a_nan_in_a_cache_stays_in_its_channel(mode):
    """It reaches all later segments of that channel, selected or not, and no others."""
    module = cached("min_gru", mode)
    x = random(2, STEPS, FEATURES)
    _, state = module(x[:, :6])
    caches = 2 if mode in ("residual", "average") else 3
    state[caches].view(2, -1, CHANNELS)[:, 0, 1] = math.nan
    output, _ = module(x[:, 6:], state)
    assert output[..., 1].isnan().all()
    assert not output[..., [0, 2, 3]].isnan().any()


def test_faults_are_caught():
    """The comparison with the definition fails for a segment that sees its own future, and for other faults."""
    span = memory_cache._Span
    past, sums, counts = span.past, span.sums, span.counts

    def whole_mean(self, x, total):
        """The sum over the whole segment, which the paper writes."""
        ends = [min(t - t % SEGMENT + SEGMENT, STEPS) - 1 for t in range(STEPS)]
        return sums(self, x, total)[:, ends]

    def own_segment_too(self, rows):
        return rows[:, (self.past("cpu") + 1).clamp(max=STEPS // SEGMENT)]

    faults = [
        ("sums", whole_mean),
        ("past", lambda self, device: past(self, device) + 1),  # reads the cache of its own segment
        ("past", lambda self, device: (past(self, device) - 1).clamp(min=0)),
        ("counts", lambda self, device: counts(self, device) + 1),
    ]
    module, x = cached("min_gru", "gated"), random(2, STEPS, FEATURES)
    expected = by_definition(module, x)
    for name, fault in faults:
        with mock.patch.object(span, name, fault), pytest.raises(AssertionError):
            close(module(x)[0], expected)
    close(module(x)[0], expected)
    for mode in ("residual", "average"):
        module = cached("min_gru", mode)
        expected = by_definition(module, x)
        with mock.patch.object(span, "spread", own_segment_too), pytest.raises(AssertionError):
            close(module(x)[0], expected)
        close(module(x)[0], expected)


# ------------------------------------------------------------------------------------------------ the state


@pytest.mark.parametrize("mode", MODES)
def test_the_growth_of_the_state(mode):
    """D + E numbers a segment and sequence, or none; no tensor keeps other memory."""
    module = cached("bmru", mode)
    sizes = []
    with torch.no_grad():
        for segments in (10, 11):
            _, state = module(random(3, segments * SEGMENT + 2, FEATURES))
            assert all(t.untyped_storage().nbytes() == t.nbytes for t in state)
            sizes.append(sum(t.numel() for t in state))
    assert sizes[1] - sizes[0] == (3 * (CHANNELS + FEATURES) if mode in ("gated", "sparse") else 0)


def test_half_precision_and_autocast():
    for options in ({"dtype": torch.bfloat16}, {}):
        for unit in (mk.BMRU, mk.MinGRU) if options else (mk.BMRU, mk.MinGRU, mk.LRU):
            for mode in MODES:
                made = mk.MemoryCache(unit(4, 6, **options), 4, mode=mode, top_k=2 if mode == "sparse" else None)
                x = torch.randn(2, 18, 4, **options)
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not options):
                    whole, _ = made(x)
                    output, state = in_chunks(made, x, [7, 11])
                assert output.dtype == torch.bfloat16
                assert state[2].dtype == torch.float32  # sums
                torch.testing.assert_close(output, whole, rtol=0.1, atol=0.1)
                output.float().sum().backward()
                assert all(p.grad.isfinite().all() for p in made.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_blocks_and_networks_have_caches(mode):
    torch.manual_seed(0)
    cache = {"segment": 5, "mode": mode, "top_k": 1 if mode == "sparse" else None}
    units = {"bmru": {"epsilon": 0.5}, "lru": {}}
    module = mk.MRUNetwork(3, 2, width=4, num_blocks=2, units=units, conv_size=3, cache=cache, dtype=torch.float64)
    assert module.epsilon == 0.5
    x = random(2, STEPS, 3)
    whole, last = module(x)
    per_unit = 5 if mode in ("gated", "sparse") else 3
    assert len(last) == 2 * (1 + 2 * per_unit)
    assert all(t.shape[0] == 2 for t in last)
    output, state = in_chunks(module, x, [3, 8, 11])
    close(output, whole)
    close(state, last)
    state = None
    for t in range(STEPS):
        y, state = module.step(x[:, t], state)
        close(y, whole[:, t].detach())
    plain = mk.MRUBlock(4, units, dtype=torch.float64)
    block = mk.MRUBlock(4, units, cache=cache, dtype=torch.float64)
    inside = {name.replace("units.0.unit.", "units.0."): p for name, p in block.state_dict().items()}
    plain.load_state_dict({n.replace("units.1.unit.", "units.1."): p for n, p in inside.items()}, strict=False)
    x = random(2, 5, 4)  # one segment
    close(block(x)[0], plain(x)[0])


@pytest.mark.check
def test_compile():
    torch._dynamo.reset()
    module = cached("bmru", "sparse", restart=True)
    x = random(2, 10, FEATURES)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    close(gradients(compiled(x)[0], list(module.parameters())), gradients(module(x)[0], list(module.parameters())))
