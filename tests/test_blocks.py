"""`mk.blocked`: results and gradients of the whole pass.

Comparisons are in float64, where a matrix product of another shape rounds too little to flip a gate.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_leaves

import mru_kernels as mk
from mru_kernels import blocks

pytestmark = pytest.mark.usefixtures("one_thread")  # the tensors are too small for two

HYBRID = {"bmru": {}, "min_gru": {"max_time_scale": 100.0}, "lru": {"r_min": 0.5}}
STEPS = 33
OPTIONS = [
    {"steps": 1}, {"steps": 11}, {"steps": 16}, {"steps": STEPS}, {"steps": 40}, {"steps": 20, "inner": 5},
    {"steps": 16, "inner": 5}, {"steps": 16, "offload": True}, {"steps": 16, "inner": 5, "offload": True},
]  # fmt: skip


POOLS = (None, "last", "mean")


def network(units=HYBRID, **options) -> mk.MRUNetwork:
    torch.manual_seed(0)
    sizes = {"width": 8, "num_blocks": 2, "hidden_size": 12, "conv_size": 3, "dtype": torch.float64} | options
    return mk.MRUNetwork(5, 3, units=units, **sizes)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def leaves(values) -> list[torch.Tensor]:
    """Copies of the floating tensors in `values` that require gradients, and the other tensors as they are."""
    return [v.detach().clone().requires_grad_() if v.is_floating_point() or v.is_complex() else v for v in values]


def results(run, module, x, state=None) -> list[torch.Tensor]:
    """Output, state, and the gradients of input, state and parameters; a random sum of output and state is the loss."""
    (x,) = leaves([x])
    given = None if state is None else leaves(tree_leaves(state))
    output, after = run(x, given[0] if isinstance(state, torch.Tensor) else given)
    torch.manual_seed(1)
    ends = [t for t in [output, *tree_leaves(after)] if t.requires_grad]
    wanted = [t for t in [x, *(given or []), *module.parameters()] if t.requires_grad]
    weights = [torch.randn(t.shape, dtype=t.dtype) for t in ends]  # `randn_like` would depend on strides
    grads = torch.autograd.grad(ends, wanted, weights, allow_unused=True)
    return [output, *tree_leaves(after), *(torch.zeros(()) if g is None else g for g in grads)]


def close(got, expected, tolerance=1e-12) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------ results


@pytest.mark.parametrize(
    ("options", "pool"),
    [(options, POOLS[i % 3]) for i, options in enumerate(OPTIONS)] + [(OPTIONS[6], p) for p in POOLS],
)
def test_blocks_equal_the_whole(options, pool):
    module = network(pool=pool)
    run = mk.blocked(module, **options)
    x = random(2, STEPS, 5)
    state = [s.detach() for s in module(random(2, 7, 5))[1]]
    for given in (None, state):
        close(results(run, module, x, given), results(module, module, x, given))


@pytest.mark.parametrize("kind", ["layers", "time first", "no batch", "block", "cached", "cached network"])
def test_every_module_runs_in_blocks(kind):
    torch.manual_seed(0)
    cache, x = {"segment": 6, "mode": "sparse", "top_k": 2}, random(2, STEPS, 5)
    match kind:
        case "layers":
            module = mk.CMRU(5, 4, 2, epsilon=0.5, dtype=torch.float64)
        case "time first":
            module, x = mk.MinGRU(5, 4, batch_first=False, dtype=torch.float64), x.transpose(0, 1)
        case "no batch":
            module, x = mk.LRU(5, 4, dtype=torch.float64), x[0]
        case "block":
            module = mk.MRUBlock(5, HYBRID, conv_size=3, dtype=torch.float64)
        case "cached":
            module = mk.MemoryCache(mk.MinGRU(5, 4, batch_first=False, dtype=torch.float64), **cache)
            x = x.transpose(0, 1)
        case "cached network":
            module = network(cache=cache)
    state = module(x)[1]
    for options in ({"steps": 8}, {"steps": 20, "inner": 6, "offload": True}):
        run = mk.blocked(module, **options)
        for given in (None, state):
            close(results(run, module, x, given), results(module, module, x, given))


def test_tokens():
    module = network(tokens=True)
    x = torch.randint(0, 5, (2, STEPS))
    close(results(mk.blocked(module, 8, inner=3, offload=True), module, x), results(module, module, x))


@pytest.mark.parametrize("options", [{}, {"inner": 4}, {"offload": True}], ids=str)
def test_dropout_draws_the_same_numbers_again(options):
    """The gradient is that of the same blocks without checkpointing, from the same seed."""
    module = network(dropout=0.3)

    def plainly(x, state):
        outputs = []
        for block in x.split(options.get("inner", 8), 1):
            output, state = module(block, state)
            outputs.append(output)
        return torch.cat(outputs, 1), state

    found = []
    for run in (plainly, mk.blocked(module, 8, **options)):
        torch.manual_seed(2)
        found.append(results(run, module, random(2, 24, 5)))
    close(*found)


def test_epsilon_is_that_of_the_call():
    module = network(("bmru", "cmru"))
    x = random(2, STEPS, 5)
    found = []
    for run in (module, mk.blocked(module, 8), mk.blocked(module, 20, inner=6)):
        module.epsilon = 0.7
        output, _ = run(x)
        module.epsilon = 0.1
        for _ in range(2):  # each backward pass runs the blocks again
            grads = torch.autograd.grad(output.square().sum(), list(module.parameters()), retain_graph=True)
        assert module.epsilon == 0.1
        found.append(grads)
    close(found[1], found[0])
    close(found[2], found[0])


def test_autocast():
    module = network(("bmru", "min_gru"), dtype=torch.float32)
    x = torch.randn(2, STEPS, 5)
    grads = []
    for run in (module, mk.blocked(module, STEPS), mk.blocked(module, 16, inner=5)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output, _ = run(x)
        assert output.dtype == torch.bfloat16
        grads.append(torch.autograd.grad(output.float().square().sum(), list(module.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*grads[:2], strict=True))
    assert all(g.isfinite().all() for g in grads[2])


@pytest.mark.check
@pytest.mark.parametrize("outside", [False, True])
def test_compile(outside):
    torch._dynamo.reset()
    module = network("bmru", num_blocks=1)
    if outside:
        run = torch.compile(mk.blocked(module, 8), fullgraph=True, backend="aot_eager")
    else:
        run = mk.blocked(torch.compile(module, fullgraph=True, backend="aot_eager"), 8)
    x = random(2, 16, 5)
    close(results(run, module, x), results(module, module, x))


def test_distributed_data_parallel_wraps_the_result(group_of_one):
    module = network()
    x = random(2, STEPS, 5)
    module(x)[0].square().sum().backward()
    expected = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    torch.nn.parallel.DistributedDataParallel(mk.blocked(module, 16))(x)[0].square().sum().backward()
    close([p.grad for p in module.parameters()], expected)


def test_without_gradients_nothing_is_saved():
    module = network()
    x = random(2, STEPS, 5)
    with torch.no_grad():
        output, state = mk.blocked(module, 8, inner=3, offload=True)(x)
    assert not output.requires_grad
    whole, after = module(x)
    close([output, *state], [whole.detach(), *(s.detach() for s in after)])


def test_faults_are_caught(monkeypatch):
    """The comparison fails if a block's state is detached, if it starts from another state, or if blocks swap."""
    module = network()
    x = random(2, STEPS, 5)
    expected = results(module, module, x)
    original = blocks.checkpoint
    faults = {
        "detached": lambda f, x, *s, **o: original(f, x, *(t if t is None else t.detach() for t in s), **o),
        "zeroed": lambda f, x, *s, **o: original(f, x, *(t if t is None else 0 * t for t in s), **o),
        "reversed": lambda f, x, *s, **o: original(f, x.flip(1), *s, **o),
    }
    for fault in faults.values():
        monkeypatch.setattr(blocks, "checkpoint", fault)
        with pytest.raises(AssertionError):
            close(results(mk.blocked(module, 16), module, x), expected)
    monkeypatch.setattr(blocks, "checkpoint", original)
    close(results(mk.blocked(module, 16), module, x), expected)


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"steps": 0}, ValueError, "^steps: expected a positive int, got 0"),
        ({"steps": 8.0}, TypeError, "^steps: expected an int, got float"),
        ({"steps": True}, TypeError, "^steps: expected an int, got bool"),
        ({"steps": 8, "inner": 0}, ValueError, "^inner: expected a positive int, got 0"),
        ({"steps": 8, "inner": 8}, ValueError, "^inner: expected fewer than steps=8, got 8"),
        ({"steps": 8, "inner": "2"}, TypeError, "^inner: expected an int, got str"),
        ({"steps": 8, "offload": 1}, TypeError, "^offload: expected a bool, got int"),
    ],
)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        mk.blocked(network(), **options)


def test_bad_modules(group_of_one):
    for other in (torch.nn.GRU(3, 4), torch.nn.Linear(3, 4), torch.compile(torch.nn.GRU(3, 4)), "GRU", None):
        with pytest.raises(TypeError, match=r"^network: expected a recurrent module.* of this package, got"):
            mk.blocked(other, 8)
    for wrap in (lambda m: m, torch.compile):
        with pytest.raises(ValueError, match=r"^network: expected one direction, got a bidirectional one"):
            mk.blocked(wrap(mk.BMRU(3, 4, bidirectional=True)), 8)
    module = mk.MRUNetwork(3, 4, width=4, num_blocks=1, pool="mean")
    with pytest.raises(ValueError, match=r"^network: expected no DistributedDataParallel inside"):
        mk.blocked(torch.compile(torch.nn.parallel.DistributedDataParallel(module)), 8)
    module.head = torch.nn.Sequential(module.head, torch.nn.ReLU())
    with pytest.raises(ValueError, match=r'^network: expected a Linear head with pool="mean", got Sequential'):
        mk.blocked(module, 8)


def test_bad_calls():
    run = mk.blocked(network(), 8)
    x = random(2, 20, 5)
    packed = torch.nn.utils.rnn.pack_sequence([x[0]])
    with pytest.raises(TypeError, match=r"^input: expected a tensor, got PackedSequence"):
        run(packed)
    with pytest.raises(ValueError, match=r"^input: expected at least 2 dimensions, got shape \[5\]"):
        run(x[0, 0])
    with pytest.raises(ValueError, match=r"^input: expected shape .*input_size=5\]"):
        run(x[0])
    with pytest.raises(ValueError, match=r"^input: expected shape"):
        run(x[:, :0])
    with pytest.raises(TypeError, match=r"^state: expected a tuple of tensors.*got Tensor"):
        run(x, x)
    with pytest.raises(ValueError, match=r"^state: expected 8 tensors.*got 1"):
        run(x, (x,))
    with pytest.raises(TypeError, match=r"^state: expected a tuple of tensors.*got int"):
        run(x, 3)
