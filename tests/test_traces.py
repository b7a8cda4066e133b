"""`mk.stream(module, gradient="traces")`: the gradients of all chunks sum to those of one pass over the whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import mru_kernels as mk
from mru_kernels.nn import traces
from mru_kernels.streaming import traced
from tests import processes

CUTS = {"one step": [1] * 24, "equal": [8] * 3, "unequal": [5, 0, 12, 7], "whole": [24]}
KINDS: dict[str, tuple[type, dict]] = {
    "BMRU": (mk.BMRU, {}),
    "BMRU, epsilon 0.5": (mk.BMRU, {"epsilon": 0.5, "bias": False}),
    "CMRU": (mk.CMRU, {"learn_initial_state": False}),
    "AlphaCMRU": (mk.AlphaCMRU, {"batch_first": False}),
    "FirstQuadrantBMRU": (mk.FirstQuadrantBMRU, {}),
    "FirstQuadrantBMRU, epsilon 0.5": (mk.FirstQuadrantBMRU, {"epsilon": 0.5, "bias": False}),
    "MinGRU": (mk.MinGRU, {"bias": False}),
    "MinLSTM": (mk.MinLSTM, {"chunk_size": None}),
    "LRU": (mk.LRU, {}),
}
Gradients = dict[str, Tensor]


class Leaky(mk.nn.MRUBase):
    """A unit of a user. Both of its vectors have the same gradient."""

    gates = {"update": None}
    per_channel = {"decay": 0.5, "more_decay": 0.3}

    def _scan(self, gates, initial_state, *, decay, more_decay, **options):
        return mk.linear_recurrence(decay + more_decay, gates, initial_state, **options)


def drawn(cls: type, *sizes: int, **options) -> torch.nn.Module:
    """A float64 module with random parameters, initial states included."""
    torch.manual_seed(0)
    module = cls(*sizes, **{"dtype": torch.float64} | options)
    for name, parameter in module.named_parameters():
        if "initial_state" in name:
            torch.nn.init.normal_(parameter)
    return module


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(module: torch.nn.Module) -> Gradients:
    """The gradients since the last call."""
    found = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    return found


def whole(module: torch.nn.Module, x: Tensor) -> Gradients:
    output, _ = module(x)
    loss(output).backward()
    return gradients(module)


def loss(output: Tensor, start: int = 0, time: int = 1) -> Tensor:
    """A loss that differs from step to step; the output starts at step `start`."""
    steps = torch.arange(start, start + output.shape[time], dtype=torch.float64).reshape(
        -1, *[1] * (output.dim() - 1 - time)
    )
    channels = torch.arange(output.shape[-1], dtype=torch.float64)
    return (output * torch.sin(1.0 + 0.7 * steps + 1.3 * channels)).sum() + 0.1 * output.square().sum()


def streamed(
    feed: mk.streaming.Stream, x: Tensor, cuts: Sequence[int], resets: dict[int, Tensor] | None = None, time: int = 1
) -> None:
    """A backward pass after every chunk. `resets` by the step at which a chunk begins."""
    start = 0
    for chunk in x.split(list(cuts), time):
        loss(feed(chunk, (resets or {}).get(start)), start, time).backward()
        start += chunk.shape[time]


def close(got: Gradients, expected: Gradients, names: Callable[[str], bool] = lambda name: True) -> None:
    for name in filter(names, expected):
        error = (got[name] - expected[name]).norm() / expected[name].norm().clamp(min=1e-30)
        assert error < 1e-12, f"{name}: {error}"


def differ(got: Gradients, expected: Gradients, name: str) -> bool:
    return bool((got[name] - expected[name]).norm() > 1e-3 * expected[name].norm())


# ------------------------------------------------------------------------------------------------ exact


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_one_layer_is_exact(kind, batch):
    cls, options = KINDS[kind]
    module, x = drawn(cls, 4, 6, **options), draw(batch, 24, 4)
    time = 1
    if not module.batch_first:
        x, time = x.transpose(0, 1), 0
    output, h_n = module(x)
    loss(output, time=time).backward()
    expected = gradients(module)
    for name, cuts in CUTS.items():
        feed = mk.stream(module, gradient="traces")
        streamed(feed, x, cuts, time=time)
        close(gradients(module), expected)
        torch.testing.assert_close(feed.state, h_n, rtol=1e-12, atol=1e-12)
        streamed(mk.stream(module), x, cuts, time=time)
        assert differ(gradients(module), expected, "weight_ih_l0") == (name != "whole")


def test_a_unit_of_a_user_is_exact():
    module, x = drawn(Leaky, 4, 6), draw(3, 24, 4)
    expected = whole(module, x)
    streamed(mk.stream(module, gradient="traces"), x, CUTS["unequal"])
    close(gradients(module), expected)


def test_real_vectors_of_complex_states_raise():
    class Rotating(mk.LRU):
        def _vectors(self, p):
            return super()._vectors(p) | {"nu": p["nu_log"]}

        def _scan(self, gates, initial_state, *, nu, **options):
            return super()._scan(gates, initial_state, **options)

    with pytest.raises(TypeError, match=r"^nu: expected a complex tensor"):
        mk.stream(Rotating(3, 4), gradient="traces")(torch.randn(2, 5, 3))


def test_units_side_by_side_are_exact():
    """So is all above the units; what is below them has the gradient of the chunks only."""
    units = ("bmru", "alpha_cmru", "schmitt", "min_lstm", "lru")
    module, x = drawn(mk.MRUBlock, 4, units=units, conv_size=3), draw(3, 24, 4)
    expected = whole(module, x)
    streamed(mk.stream(module, gradient="traces"), x, CUTS["one step"])
    got = gradients(module)
    close(got, expected, lambda name: not name.startswith(("norm.", "conv.")))
    assert differ(got, expected, "norm.weight")
    assert differ(got, expected, "conv.weight")


def test_no_batch():
    module, x = drawn(mk.MinGRU, 4, 6), draw(24, 4)
    loss(module(x)[0], time=0).backward()
    expected = gradients(module)
    feed = mk.stream(module, gradient="traces")
    resets = {8: torch.tensor(False)}
    streamed(feed, x, CUTS["equal"], resets, time=0)
    close(gradients(module), expected)
    feed(x[:8], torch.tensor(True))
    torch.testing.assert_close(feed.state, module(x[:8])[1])


def test_chunks_without_gradient_advance_the_traces():
    module, x = drawn(mk.FirstQuadrantBMRU, 4, 6), draw(3, 24, 4)
    loss(module(x)[0][:, 16:], 16).backward()
    expected = gradients(module)
    feed = mk.stream(module, gradient="traces")
    with torch.no_grad():
        assert not feed(x[:, :16]).requires_grad
    loss(feed(x[:, 16:]), 16).backward()
    close(gradients(module), expected)


def test_parameters_that_are_frozen_have_no_gradient():
    module, x = drawn(mk.BMRU, 4, 6, epsilon=0.5), draw(3, 24, 4)
    expected = whole(module, x)
    module.weight_ih_l0.requires_grad_(False)
    streamed(mk.stream(module, gradient="traces"), x, CUTS["equal"])
    assert module.weight_ih_l0.grad is None
    torch.testing.assert_close(module.bias_ih_l0.grad, expected["bias_ih_l0"], rtol=1e-12, atol=1e-12)
    assert not mk.stream(module.requires_grad_(False), gradient="traces")(x).requires_grad


# ------------------------------------------------------------------------------------------------ several layers


def through_the_layer_above(module: mk.nn.MRUBase, x: Tensor, cuts: Sequence[int]) -> Gradients:
    """Of the gradients of layer 0 of 2, what passes the starts of chunks in the state of layer 1."""
    lower = {name: p for name, p in module.named_parameters() if name.endswith("_l0")}
    missing = {name: torch.zeros_like(p) for name, p in lower.items()}
    start = cuts[0]
    for steps in cuts[1:]:
        _, state = module(x[:, :start])
        entry = state.detach().requires_grad_()
        output, _ = module(x[:, start : start + steps], entry)
        (of_state,) = torch.autograd.grad(loss(output, start), entry)
        found = torch.autograd.grad(state[1], list(lower.values()), of_state[1], materialize_grads=True)
        for name, grad in zip(lower, found, strict=True):
            missing[name] += grad
        start += steps
    return missing


@pytest.mark.parametrize("kind", ["BMRU, epsilon 0.5", "FirstQuadrantBMRU", "MinGRU", "LRU"])
def test_of_two_layers_the_lower_one_misses_the_paths_through_the_state_above(kind):
    cls, options = KINDS[kind]
    module, x = drawn(cls, 4, 6, 2, **options), draw(3, 24, 4)
    expected = whole(module, x)
    for cuts in ([1] * 24, [5, 12, 7]):
        streamed(mk.stream(module, gradient="traces"), x, cuts)
        got = gradients(module)
        close(got, expected, lambda name: name.endswith("_l1"))
        missing = through_the_layer_above(module, x, cuts)
        recurrent = [n for n in missing if not n.startswith(("weight_ho", "skip", "alpha"))]  # these act on the output
        close({n: got[n] + missing[n] for n in recurrent}, {n: expected[n] for n in recurrent})
        assert any(differ(got, expected, n) for n in recurrent)


def test_of_a_network_the_last_units_and_all_above_are_exact():
    module, x = drawn(mk.MRUNetwork, 4, 3, width=4, num_blocks=2, units=("cmru", "min_gru"), pool=None), draw(3, 24, 4)
    expected = whole(module, x)
    streamed(mk.stream(module, gradient="traces"), x, [5, 12, 7])
    got = gradients(module)
    exact = ("blocks.1.units", "blocks.1.gate", "blocks.1.out", "blocks.1.mlp", "norm", "head")
    close(got, expected, lambda name: name.startswith(exact))
    others = [name for name in expected if not name.startswith(exact)]
    assert all(differ(got, expected, name) for name in others if "alpha" not in name)
    streamed(mk.stream(module), x, [5, 12, 7])
    truncated = gradients(module)

    def distance(other: Gradients) -> float:
        return sum((other[n] - expected[n]).norm().item() for n in others)

    assert distance(got) < distance(truncated)


# ------------------------------------------------------------------------------------------------ new sequences

RESETS = {8: torch.tensor([True, False, False]), 16: torch.tensor([True, False, True])}
SEQUENCES = [[8, 8, 8], [24], [16, 8]]  # steps of the sequences in each row


def alone(module: torch.nn.Module, x: Tensor) -> tuple[Gradients, Tensor]:
    """Gradients and outputs of the sequences of `SEQUENCES`, each in a call of its own."""
    outputs = []
    for row, steps in zip(x, SEQUENCES, strict=True):
        pieces = [module(piece.unsqueeze(0))[0] for piece in row.split(steps)]
        outputs.append(torch.cat(pieces, 1))
    output = torch.cat(outputs)
    loss(output).backward()
    return gradients(module), output.detach()


@pytest.mark.parametrize("kind", KINDS)
def test_resets_begin_new_sequences(kind):
    cls, options = KINDS[kind]
    module, x = drawn(cls, 4, 6, **options | {"batch_first": True}), draw(3, 24, 4)
    expected, _ = alone(module, x)
    streamed(mk.stream(module, gradient="traces"), x, CUTS["equal"], RESETS)
    close(gradients(module), expected)


@pytest.mark.parametrize("gradient", [None, "traces"])
def test_resets_restart_every_state(gradient):
    module, x = (
        drawn(mk.MRUNetwork, 4, 3, width=4, num_blocks=2, units=("cmru", "lru", "gru"), conv_size=3),
        draw(3, 24, 4),
    )
    if gradient:
        module = drawn(mk.MRUNetwork, 4, 3, width=4, num_blocks=2, units=("cmru", "lru"), conv_size=3)
    _, expected = alone(module, x)
    feed = mk.stream(module, gradient=gradient)
    outputs = [feed(chunk, RESETS.get(8 * i)) for i, chunk in enumerate(x.split(8, 1))]
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=1e-12, atol=1e-12)


def test_after_a_reset_the_first_state_has_its_gradient_without_traces_too():
    module, x = drawn(mk.CMRU, 4, 6, 2), draw(3, 8, 4)
    expected = whole(module, x)
    feed = mk.stream(module)
    feed(x)
    loss(feed(x, torch.ones(3, dtype=torch.bool))).backward()
    close(gradients(module), expected)


def test_reset_drops_the_traces():
    module, x = drawn(mk.BMRU, 4, 6), draw(3, 24, 4)
    expected = whole(module, x)
    feed = mk.stream(module, gradient="traces")
    feed(x)
    feed.reset()
    assert feed.traces is None
    streamed(feed, x, CUTS["equal"])
    close(gradients(module), expected)


@pytest.mark.parametrize(
    ("resets", "error"),
    [
        ([True], TypeError), (torch.ones(3), TypeError), (torch.ones(2, dtype=torch.bool), ValueError),
        (torch.ones(1, 3, dtype=torch.bool), ValueError), (torch.ones(3, dtype=torch.bool, device="meta"), ValueError),
    ],
)  # fmt: skip
def test_resets_that_do_not_fit_raise(resets, error):
    feed, x = mk.stream(drawn(mk.LRU, 4, 6), gradient="traces"), draw(3, 8, 4)
    feed(x)
    before = feed.state
    with pytest.raises(error, match=r"^resets: expected"):
        feed(x, resets)
    assert feed.state is before


# ------------------------------------------------------------------------------------------------ faults are seen


def decay_dropped(past, before, x, of_gates, of_state, of_vectors):
    return ADVANCED(past, before, x, of_gates, torch.ones_like(of_state), of_vectors)


def inputs_dropped(past, before, x, of_gates, of_state, of_vectors):
    return ADVANCED(past, before, x, torch.zeros_like(of_gates), of_state, of_vectors)


def vectors_dropped(past, before, x, of_gates, of_state, of_vectors):
    return ADVANCED(past, before, x, of_gates, of_state, {n: torch.zeros_like(t) for n, t in of_vectors.items()})


def all_to_zero(before, resets):
    return {name: t * ~resets.reshape(-1, *[1] * (t.dim() - 1)) for name, t in before.items()}


ADVANCED = traces._advanced
FAULTS = [
    (traces, "_advanced", decay_dropped), (traces, "_advanced", inputs_dropped), (traces, "_advanced", vectors_dropped),
    (traced, "restarted", lambda traces, resets: traces),
    (traced, "restarted", all_to_zero),
]  # fmt: skip


@pytest.mark.parametrize(("module", "function", "fault"), FAULTS)
@pytest.mark.parametrize("kind", ["FirstQuadrantBMRU, epsilon 0.5", "LRU"])
def test_a_planted_fault_is_seen(monkeypatch, kind, module, function, fault):
    """A trace that is not decayed, lacks a chunk, is not reset, or is reset to 0 for the initial state."""
    monkeypatch.setattr(module, function, fault)
    with pytest.raises(AssertionError):
        test_resets_begin_new_sequences(kind)


# ------------------------------------------------------------------------------------------------ saved and loaded


def test_saved_traces_continue_in_another_stream(tmp_path):
    module, x = drawn(mk.MRUNetwork, 4, 3, width=4, num_blocks=2, units=("schmitt", "lru")), draw(3, 24, 4)
    feed = mk.stream(module, gradient="traces")
    streamed(feed, x[:, :16], [5, 11])
    torch.save({"state": feed.state, "traces": feed.traces}, tmp_path / "saved")
    module.zero_grad()
    loss(feed(x[:, 16:])).backward()
    expected = gradients(module)
    saved = torch.load(tmp_path / "saved", weights_only=True)
    other = drawn(mk.MRUNetwork, 4, 3, width=4, num_blocks=2, units=("schmitt", "lru"))
    again = mk.stream(other, gradient="traces")
    again.state, again.traces = saved["state"], saved["traces"]
    loss(again(x[:, 16:])).backward()
    for name, grad in gradients(other).items():
        assert torch.equal(grad, expected[name]), name
    for name, trace in feed.traces.items():
        assert torch.equal(trace, again.traces[name]), name


def test_a_state_without_traces_is_a_constant():
    module, x = drawn(mk.LRU, 4, 6), draw(3, 24, 4)
    _, state = module(x[:, :8])
    for start, expected in ((state.detach(), None), (None, None)):
        module.zero_grad()
        loss(module(x[:, 8:], start)[0]).backward()
        expected = gradients(module)
        feed = mk.stream(module, gradient="traces")
        feed.state = start
        streamed(feed, x[:, 8:], [5, 11])
        close(gradients(module), expected)


def test_traces_that_do_not_fit_raise():
    x = draw(3, 8, 4)
    feed = mk.stream(drawn(mk.BMRU, 4, 6), gradient="traces")
    feed(x)
    good, state = feed.traces, feed.state
    for other, error, message in (
        ([good], TypeError, r"^traces: expected a dict"),
        ({}, ValueError, r"^traces: expected the names .* bias_ih_l0, initial_state_l0, weight_ih_l0"),
        (good | {"more": good["weight_ih_l0"]}, ValueError, r"^traces: .* differ in more"),
        (good | {"weight_ih_l0": 1.0}, TypeError, r"^traces\['weight_ih_l0'\]: expected a tensor"),
        (
            good | {"weight_ih_l0": good["bias_ih_l0"]},
            ValueError,
            r"^traces\['weight_ih_l0'\]: expected shape \[3, 12, 4\]",
        ),
        (good | {"bias_ih_l0": good["bias_ih_l0"].float()}, TypeError, r"^traces\['bias_ih_l0'\]: expected dtype"),
    ):
        with pytest.raises(error, match=message):
            feed.traces = other
        assert feed.traces is good
    for module in (mk.BMRU(4, 5), mk.LRU(4, 6), mk.BMRU(4, 6, 2), mk.MRUBlock(4)):
        with pytest.raises((TypeError, ValueError), match=r"^traces"):
            mk.stream(module.double(), gradient="traces").traces = good
    with pytest.raises(ValueError, match=r"^traces: expected None, got traces"):
        mk.stream(feed.module).traces = good
    feed.state = None
    with pytest.raises(ValueError, match=r"^traces: expected None without a state"):
        feed(x)
    feed.state = state
    for wrong in ({name: t[:2] for name, t in good.items()}, {name: t.to("meta") for name, t in good.items()}):
        feed.traces = wrong
        with pytest.raises(ValueError, match=r"^traces\['.*_l0'\]: expected (shape|the module's device)"):
            feed(x)


# ------------------------------------------------------------------------------------------------ training


def test_a_step_of_an_optimiser_leaves_the_trace_of_the_older_parameters():
    module, x = drawn(mk.CMRU, 4, 6), draw(3, 24, 4)
    feed = mk.stream(module, gradient="traces")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    older = drawn(mk.CMRU, 4, 6)
    loss(feed(x[:, :8])).backward()
    optimizer.step()
    module.zero_grad()
    loss(feed(x[:, 8:])).backward()
    got = gradients(module)
    _, state = older(x[:, :8])
    loss(module(x[:, 8:], state)[0]).backward()
    of_older, expected = gradients(older), gradients(module)
    close(got, {name: grad + of_older[name] for name, grad in expected.items()})
    assert of_older["weight_ih_l0"].norm() > 0


@pytest.mark.parametrize("how", ["autocast", "parameters"])
@pytest.mark.parametrize("cls", [mk.MinGRU, mk.AlphaCMRU, mk.LRU])
def test_half_precision_has_traces_of_its_states(cls, how):
    if cls is mk.LRU and how == "parameters":
        pytest.skip("an LRU has no half precision")
    dtype = torch.float32 if how == "autocast" else torch.bfloat16
    module, x = drawn(cls, 4, 6, dtype=dtype), torch.randint(-2, 3, (3, 24, 4)).to(dtype)
    with torch.no_grad():  # of integers, gates are the same in every dtype and every cut
        module.weight_ih_l0.copy_(torch.randint(-2, 3, module.weight_ih_l0.shape))
    exact = drawn(cls, 4, 6)
    exact.load_state_dict(module.double().state_dict() if how == "autocast" else module.state_dict())
    module.to(dtype)
    expected = whole(exact, x.double())
    feed = mk.stream(module, gradient="traces")
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        start = 0
        for chunk in x.split(CUTS["unequal"], 1):
            loss(feed(chunk).double(), start).backward()
            start += chunk.shape[1]
    states = {torch.complex64 if cls is mk.LRU else torch.float32}
    assert {t.dtype for t in feed.traces.values()} == states
    for name, grad in gradients(module).items():
        assert grad.dtype == dtype
        assert (grad.double() - expected[name]).norm() < 0.02 * expected[name].norm(), name


def test_several_losses_in_one_backward_pass():
    module, x = drawn(mk.MinLSTM, 4, 6), draw(3, 24, 4)
    expected = whole(module, x)
    feed = mk.stream(module, gradient="traces")
    sum(loss(feed(chunk), 8 * i) for i, chunk in enumerate(x.split(8, 1))).backward()
    close(gradients(module), expected)


def test_parametrized_weights():
    module, x = drawn(mk.BMRU, 4, 6, epsilon=0.5), draw(3, 24, 4)
    torch.nn.utils.parametrizations.weight_norm(module, "weight_ih_l0")
    expected = whole(module, x)
    streamed(mk.stream(module, gradient="traces"), x, CUTS["unequal"])
    close(gradients(module), expected)


def test_a_compiled_module_raises_and_a_compiled_training_step_runs():
    torch._dynamo.reset()
    block, x = drawn(mk.MRUBlock, 4), draw(3, 24, 4)
    with pytest.raises(ValueError, match=r"^module: expected an eager one"):
        mk.stream(torch.compile(block, backend="eager"), gradient="traces")
    feed = mk.stream(block, gradient="traces")

    @torch.compile(backend="eager")
    def step(chunk: Tensor) -> Tensor:
        return feed(2.0 * chunk).square().sum()

    step(x[:, :12]).backward()
    step(x[:, 12:]).backward()
    got = gradients(block)
    feed.reset()
    for chunk in x.split(12, 1):
        feed(2.0 * chunk).square().sum().backward()
    close(got, gradients(block))
    block.units[0].compile(backend="eager")
    with pytest.raises(ValueError, match=r"^module: expected an eager one"):
        mk.stream(block, gradient="traces")
    with pytest.raises(ValueError, match=r"^module: expected an eager one"):
        feed(x)


def test_distributed_data_parallel(group_of_one):
    module, x = drawn(mk.BMRU, 4, 6, 2, epsilon=0.5), draw(3, 24, 4)
    streamed(mk.stream(module, gradient="traces"), x, CUTS["equal"])
    expected = gradients(module)
    streamed(mk.stream(torch.nn.parallel.DistributedDataParallel(module), gradient="traces"), x, CUTS["equal"])
    close(gradients(module), expected)


def _train_in_two_processes(rank: int, results) -> None:
    module, x = drawn(mk.CMRU, 4, 6), draw(4, 24, 4)
    streamed(mk.stream(module, gradient="traces"), x, CUTS["unequal"])
    expected = gradients(module)
    parallel = torch.nn.parallel.DistributedDataParallel(module)
    streamed(mk.stream(parallel, gradient="traces"), x[2 * rank : 2 * rank + 2], CUTS["unequal"])
    close({name: 2 * grad for name, grad in gradients(module).items()}, expected)  # the mean over two processes
    results.put(rank)


@pytest.mark.check
def test_two_processes_train_as_one(tmp_path):
    results = torch.multiprocessing.get_context("spawn").Queue()
    processes.run(_train_in_two_processes, tmp_path / "rendezvous", results)
    assert {results.get(timeout=10), results.get(timeout=10)} == {0, 1}


# ------------------------------------------------------------------------------------------------ refused


def test_what_has_no_traces_raises():
    for other in (torch.nn.GRU(3, 4), "GRU", torch.nn.Linear(3, 4)):
        with pytest.raises(TypeError, match=r"^module: expected a recurrent module"):
            mk.stream(other, gradient="traces")
    with pytest.raises(ValueError, match=r"^module: expected one direction"):
        mk.stream(mk.BMRU(3, 4, bidirectional=True), gradient="traces")
    with pytest.raises(TypeError, match=r"^module: expected units of this package .* got a GRU"):
        mk.stream(mk.MRUNetwork(3, 4, width=4, num_blocks=1, units=("bmru", "gru")), gradient="traces")
    for gradient in ("trace", True, 1):
        with pytest.raises(ValueError, match=r'^gradient: expected None or "traces", got'):
            mk.stream(mk.BMRU(3, 4), gradient=gradient)
    feed = mk.stream(mk.BMRU(3, 4), gradient="traces")
    with pytest.raises(TypeError, match=r"^input: expected a tensor.*PackedSequence"):
        feed(torch.nn.utils.rnn.pack_sequence([torch.randn(5, 3)]))
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inference mode"):
        feed(torch.randn(2, 5, 3))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_raises(reentrant):
    class Checkpointed(mk.MRUBlock):
        def forward(self, *arguments):
            return torch.utils.checkpoint.checkpoint(super().forward, *arguments, use_reentrant=reentrant)

    feed = mk.stream(Checkpointed(4), gradient="traces")
    with pytest.raises(RuntimeError, match=r"^module: expected one .*activation checkpointing"):
        feed(torch.randn(2, 5, 4, requires_grad=True))


# ------------------------------------------------------------------------------------------------ memory

PROGRAM = """
import sys, torch
import mru_kernels as mk
torch.set_num_threads(1)
torch.manual_seed(0)
module = mk.MRUNetwork(4, 16, width=8, num_blocks=1, units=("bmru", "lru"))
optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
feed, chunk = mk.stream(module, gradient="traces"), torch.randn(1, 1000, 4)
for _ in range(int(sys.argv[1])):
    feed(chunk).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


@pytest.mark.check
def test_a_million_steps_need_the_memory_of_a_few():
    few, many = (processes.peak_memory(PROGRAM, chunks) for chunks in (20, 1000))
    assert many < few + 8 * 1024  # the inputs of all units are 61 MiB
