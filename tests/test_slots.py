"""Steps on states in slots: against steps on separate states, and what is refused."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import mru_kernels as mk
from bench import inputs
from mru_kernels import backends, ops
from tests import raw
from tests.calls import CELLS, assert_same_bits, cases, step_settings
from tests.drawn import assert_close


def of_step(call: inputs.Call) -> dict[str, Any]:
    """The arguments of a step for the first step of a call, without the state."""
    rows = {name: t[:, 0] if t.dim() == 3 else t for name, t in call.tensors.items() if name != "initial_state"}
    return rows | step_settings(call)


def assert_slots_equal_separate_states(call: inputs.Call, indices: list[int], count: int, dtype: torch.dtype) -> None:
    """A step in slots against a step of each sequence on its own state. Other slots stay as they are."""
    step, arguments, first = getattr(mk, f"{call.cell}_step"), of_step(call), call.stream[:, 0]
    state = inputs.CELLS[call.cell].state_dtype(first.dtype)
    before = torch.randn(count, first.shape[1], dtype=torch.complex128 if state.is_complex else torch.float64).to(state)
    slots, expected = before.clone().to(first.device), before.clone().to(first.device)
    expected_h = torch.zeros_like(first)
    for b, slot in enumerate(indices):
        if slot < 0:
            continue
        row = {name: x[b : b + 1] if getattr(x, "ndim", 0) == 2 else x for name, x in arguments.items()}
        h, after = step(**row, state=expected[slot : slot + 1])
        expected_h[b], expected[slot] = h[0], after[0]
    h, same = step(**arguments, state=slots, state_indices=torch.tensor(indices, dtype=dtype, device=first.device))
    assert same is slots
    assert h.dtype == first.dtype
    one, other = ({"h": h.cpu(), "slots": s.cpu()} for h, s in ((h, slots), (expected_h, expected)))
    assert_same_bits(one, other)


@given(st.data())
def test_steps_in_slots_equal_steps_on_separate_states(backend, device, data):
    batch = data.draw(st.integers(1, 4))
    call = (
        data.draw(cases((1, 40), time=1, batch=batch, reverse=False, resets="none", boundaries=False, nonfinite=False))
        .build()
        .to(device)
    )
    count = batch + data.draw(st.integers(0, 3))
    indices = data.draw(st.permutations(range(count)))[:batch]
    indices = [-1 if data.draw(st.integers(0, 3)) == 0 else slot for slot in indices]
    with patch.object(backends, "_CHOSEN", backend):
        assert_slots_equal_separate_states(call, indices, count, data.draw(st.sampled_from([torch.int32, torch.int64])))


@pytest.mark.parametrize("cell", CELLS)
def test_slots_on_several_threads(device, cell):
    call = inputs.case(cell, torch.float32, time=1, batch=40, channels=1100).build().to(device)
    indices = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:40]
    indices[::7] = -1
    assert_slots_equal_separate_states(call, indices.tolist(), 60, torch.int64)


@pytest.mark.parametrize(("batch", "count", "channels"), [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_no_sequence_no_slot_no_channel(backend, device, monkeypatch, batch, count, channels):
    monkeypatch.setattr(backends, "_CHOSEN", backend)
    x, slots = torch.randn(batch, channels, device=device), torch.randn(count, channels, device=device)
    before, indices = slots.clone(), torch.full((batch,), -1, device=device)
    h, same = mk.bmru_step(x, x, slots, state_indices=indices)
    assert torch.equal(h, torch.zeros_like(x))
    assert torch.equal(same, before)


@pytest.mark.parametrize("indices", [[4, 1, 4], [0, 5, 1], [-2, 0, 1]], ids=str)
def test_slots_that_are_wrong(backend, device, monkeypatch, indices):
    """On the CPU they are refused before a slot changes. Elsewhere those out of range are skipped."""
    monkeypatch.setattr(backends, "_CHOSEN", backend)
    x, slots = torch.randn(3, 7, device=device), torch.randn(5, 7, device=device)
    before, indices = slots.clone(), torch.tensor(indices, device=device)
    if device.type == "cpu" and backend != "simt":
        with pytest.raises(ValueError, match=r"^state_indices: expected (-1 or a slot below 5|every slot once), got"):
            mk.bmru_step(x, x, slots, state_indices=indices)
        assert torch.equal(slots, before)
        return
    h, _ = mk.bmru_step(x, x, slots, state_indices=indices)
    exists = (indices >= 0) & (indices < 5)
    assert torch.equal(h == 0, ~exists.unsqueeze(1).expand(3, 7))
    changed = (slots != before).any(1)
    assert set(changed.nonzero().flatten().tolist()) <= set(indices[exists].tolist())


def arguments() -> dict[str, Any]:
    return {"state": torch.zeros(5, 7), "state_indices": torch.tensor([3, 1]), "epsilon": 0.5}


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("state_indices", [3, 1], TypeError, "expected a tensor"),
        ("state_indices", torch.tensor([3.0, 1.0]), TypeError, "expected dtype int32 or int64, got torch.float32"),
        ("state_indices", torch.tensor([True, False]), TypeError, "expected dtype int32 or int64, got torch.bool"),
        ("state_indices", torch.tensor([[3, 1]]), ValueError, "expected 1 dimensions"),
        ("state_indices", torch.tensor([3]), ValueError, r"expected shape \[2\], got \[1\]"),
        ("state_indices", torch.tensor([3, 1], device="meta"), ValueError, "expected the input's device cpu"),
        ("state", None, TypeError, "expected a tensor"),
        ("state", torch.zeros(7), ValueError, "expected 2 dimensions"),
        ("state", torch.zeros(5, 8), ValueError, r"expected shape \[slots, 7\], got \[5, 8\]"),
        ("state", torch.zeros(5, 7).double(), TypeError, "expected the state dtype torch.float32, got torch.float64"),
        ("state", torch.zeros(5, 7).bfloat16(), TypeError, "expected the state dtype torch.float32"),
        ("state", torch.zeros(7, 5).t(), ValueError, "expected a contiguous tensor"),
        ("candidate", torch.zeros(2, 1, 7), ValueError, "expected 2 dimensions"),
        ("threshold", torch.zeros(3, 7), ValueError, "expected shape"),
        ("epsilon", 2.0, ValueError, "expected a value in"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("chosen", ["cpu", "torch"])
def test_the_argument_is_named(monkeypatch, chosen, name, value, error, message):
    monkeypatch.setattr(backends, "_CHOSEN", chosen)
    good = {"candidate": torch.ones(2, 7), "threshold": torch.ones(2, 7)} | arguments()
    with pytest.raises(error, match=f"^{name}: {message}"):
        mk.bmru_step(**good | {name: value})
    assert (good["state"] == 0).all()


def test_slots_have_no_gradient_and_no_transform():
    x = torch.ones(2, 7)
    for name in ("candidate", "state"):
        given = {"candidate": x, "threshold": x} | arguments()
        given[name] = given[name].clone().requires_grad_()
        with pytest.raises(RuntimeError, match=f"^bmru_step: {name} requires grad"):
            mk.bmru_step(**given)

    def step(candidate):
        return mk.bmru_step(candidate, x, **arguments())[0]

    with pytest.raises(RuntimeError, match=r"^state_indices: expected None under"):
        torch.func.vmap(step)(x.expand(3, 2, 7))
    with pytest.raises(RuntimeError, match=r"^state_indices: expected None under"):
        torch.jit.trace(step, (x,))
    op, call = ops.CELLS["bmru"].step_slots["cpu"], inputs.case("bmru", torch.float32, time=1, batch=2, channels=7)
    named = raw.step(call.build()) | {"state_indices": torch.tensor([0, 1])}
    named["inputs"][0].requires_grad_()
    with pytest.raises(NotImplementedError, match="bmru_step_slots: there is no derivative"):
        op(*named.values())


def test_autograd_notices_that_slots_have_changed():
    x, weight, slots = torch.ones(2, 7), torch.ones(5, 7, requires_grad=True), torch.zeros(5, 7)
    for run in (mk.bmru_step, lambda *x, **options: ops.CELLS["bmru"].step_slots["cpu"](*row(*x, **options))):
        product = (weight * slots).sum()
        run(x, x, slots, state_indices=torch.tensor([0, 1]))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


def row(candidate, threshold, state, state_indices):
    """The arguments of the raw op."""
    epsilon = torch.zeros((), dtype=torch.float64)
    given = ops.CELLS["bmru"].mask("candidate", "threshold", "epsilon")
    return [candidate, threshold, epsilon], given, 0, [1.0], state, state_indices


def test_slots_under_autocast(backend, device, monkeypatch):
    monkeypatch.setattr(backends, "_CHOSEN", backend)
    x, slots = torch.randn(2, 7, device=device), torch.zeros(5, 7, device=device)
    indices = torch.tensor([4, 0], device=device)
    with torch.autocast(device.type, torch.bfloat16):
        h, _ = mk.bmru_step(x, x.bfloat16(), slots, state_indices=indices)
    other = torch.zeros_like(slots)
    expected, _ = mk.bmru_step(x.bfloat16(), x.bfloat16(), other, state_indices=indices)
    assert h.dtype == torch.bfloat16
    assert_same_bits({"h": h.cpu(), "slots": slots.cpu()}, {"h": expected.cpu(), "slots": other.cpu()})


@pytest.mark.parametrize("cell", CELLS)
def test_opcheck_of_a_step_in_slots(backend, device, cell):
    options = {name: values[-1] for name, values in inputs.CELLS[cell].factors.items()}
    call = inputs.case(cell, torch.float32, time=1, batch=4, channels=9, **options).build().to(device)
    named = raw.step(call)
    named["state"] = torch.randn(6, 9, dtype=inputs.CELLS[cell].state_dtype(torch.float32), device=device)
    named["state_indices"] = torch.tensor([3, -1, 0, 5], device=device)
    torch.library.opcheck(ops.CELLS[cell].step_slots[backend], tuple(named.values()))


@pytest.mark.parametrize("chosen", ["cpu", "torch"])
def test_a_compiled_step_updates_the_slots_of_a_layer(monkeypatch, chosen):
    """Also where the slots are part of a larger tensor; one graph serves all indices."""
    monkeypatch.setattr(backends, "_CHOSEN", chosen)
    x, slots = torch.randn(3, 7), torch.randn(2, 5, 7)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def step(x, slots, indices):
        return mk.bmru_step(x, x, slots[1], epsilon=0.5, state_indices=indices)[0]

    for indices in ([4, -1, 2], [0, 1, 2], [-1, -1, -1]):
        ours, theirs, indices = slots.clone(), slots.clone(), torch.tensor(indices)
        h, expected = step(x, ours, indices), mk.bmru_step(x, x, theirs[1], epsilon=0.5, state_indices=indices)[0]
        assert_same_bits({"h": h, "slots": ours}, {"h": expected, "slots": theirs})
    assert counter.frame_count == 1


def test_an_exported_step_updates_the_slots():
    class Step(torch.nn.Module):
        def forward(self, x, slots, indices):
            return mk.bmru_step(x, x, slots, state_indices=indices)[0]

    x, slots, indices = torch.randn(2, 7), torch.randn(5, 7), torch.tensor([4, -1])
    program = torch.export.export(Step(), (x, slots.clone(), indices)).run_decompositions()
    ours, theirs = slots.clone(), slots.clone()
    h, expected = program.module()(x, ours, indices), Step()(x, theirs, indices)
    assert_same_bits({"h": h, "slots": ours}, {"h": expected, "slots": theirs})


def test_shapes_without_values():
    """On meta tensors, and on fake ones, whose indices have no values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for mode, device in ((FakeTensorMode(), "cpu"), (torch.device("meta"), "meta")):
        with mode:
            x, slots = torch.ones(2, 7, dtype=torch.bfloat16, device=device), torch.zeros(5, 7, device=device)
            indices = torch.zeros(2, dtype=torch.int32, device=device)
            h, same = mk.schmitt_step(x, x[0], x[0], slots, state_indices=indices)
            assert (h.shape, h.dtype) == ((2, 7), torch.bfloat16)
            assert same is slots
            with pytest.raises(ValueError, match=r"^state_indices: expected shape"):
                mk.schmitt_step(x, x[0], x[0], slots, state_indices=indices[:1])


# ------------------------------------------------------------------------------------------------ modules


class OnlyScans(mk.nn.MRUBase):
    """A unit that defines no step of its own."""

    gates = {"update": None}
    per_channel = {"decay": 0.9}

    def _scan(self, gates, initial_state, *, decay, **options):
        return mk.linear_recurrence(decay, gates, initial_state, **options)


BISTABLE = [mk.BMRU, mk.CMRU, mk.AlphaCMRU, mk.FirstQuadrantBMRU]
UNITS = [*BISTABLE, mk.MinGRU, mk.MinLSTM, mk.LIF, mk.Aaren, mk.LRU, OnlyScans]


def network() -> mk.MRUNetwork:
    return mk.MRUNetwork(4, 3, width=8, num_blocks=2, units=("bmru", "lru", "gru"), conv_size=4)


def assert_slots_of_a_module(module: torch.nn.Module, slots: list[torch.Tensor], dim: int, wrap) -> None:
    """Slots 4 and 1 make a step as separate states do; the others stay. `slots` are along dimension `dim`."""
    x, before = torch.randn(3, 4), [t.clone() for t in slots]
    output, _ = module.step(x, wrap(slots), state_indices=torch.tensor([4, -1, 1]))
    picked = [t.index_select(dim, torch.tensor([4, 1])) for t in before]
    expected, after = module.step(x[[0, 2]], wrap(picked))
    assert_close(output[[0, 2]], expected)
    for new, old, other in zip(slots, before, [after] if dim else after, strict=True):
        assert_close(new.index_select(dim, torch.tensor([4, 1])), other)
        rest = torch.tensor([0, 2, 3])
        assert torch.equal(new.index_select(dim, rest), old.index_select(dim, rest))


@pytest.mark.parametrize("cls", UNITS)
def test_slots_of_a_unit(cls):
    unit = cls(4, 6, 2)
    _, h_n = unit(torch.randn(5, 7, 4))
    slots = h_n.detach()
    assert_slots_of_a_module(unit, [slots], 1, lambda states: states[0])
    output, same = unit.step(torch.randn(1, 4), slots, state_indices=torch.tensor([2]))
    assert same is slots
    assert not output.requires_grad


def test_slots_of_a_network():
    module = network()
    _, state = module(torch.randn(5, 7, 4))
    assert_slots_of_a_module(module, [t.detach() for t in state], 0, tuple)


def test_a_unit_with_another_scan_steps_by_that_scan():
    class Negative(mk.BMRU):
        def _scan(self, gates, initial_state, **options):
            h, final = super()._scan(gates, initial_state, **options)
            return -h, final

    unit, x = Negative(4, 6), torch.randn(2, 4)
    assert_close(unit.step(x)[0], unit(x.unsqueeze(1))[0].squeeze(1).detach())


def test_a_step_runs_the_hooks_of_a_call():
    unit, x, seen = mk.BMRU(4, 6), torch.randn(2, 4), []
    expected, _ = unit.step(x)
    handles = [
        unit.register_forward_pre_hook(lambda module, inputs: seen.append("before")),
        unit.register_forward_hook(lambda module, inputs, output: seen.append("after")),
    ]
    assert torch.equal(unit.step(x)[0], expected)
    assert seen == ["before", "after"]
    for handle in handles:
        handle.remove()


UNIT_SLOTS = torch.zeros(2, 5, 6)


@pytest.mark.parametrize(
    ("hx", "indices", "error", "message"),
    [
        (None, [0, 1], TypeError, "hx: expected a tensor, as state_indices are given, got NoneType"),
        (UNIT_SLOTS[:1], [0, 1], ValueError, r"hx: expected shape .* \[2, slots, 6\], got \[1, 5, 6\]"),
        (UNIT_SLOTS.double(), [0, 1], TypeError, "hx: expected dtype torch.float32, got torch.float64"),
        (UNIT_SLOTS.bfloat16(), [0, 1], TypeError, "hx: expected dtype torch.float32, got torch.bfloat16"),
        (torch.zeros(5, 2, 6).transpose(0, 1), [0, 1], ValueError, "hx: expected a contiguous tensor"),
        (UNIT_SLOTS, [0, 0], ValueError, "state_indices: expected every slot once, got 0 again at index 1"),
        (UNIT_SLOTS, [0, 5], ValueError, "state_indices: expected -1 or a slot below 5, got 5 at index 1"),
        (UNIT_SLOTS, [0], ValueError, r"state_indices: expected shape \[2\], got \[1\]"),
        (UNIT_SLOTS, [0.0, 1.0], TypeError, "state_indices: expected dtype int32 or int64"),
    ],
)
def test_a_unit_names_the_argument(hx, indices, error, message):
    with pytest.raises(error, match=f"^{message}"):
        mk.BMRU(4, 6, 2).step(torch.randn(2, 4), hx, state_indices=torch.tensor(indices))
    assert (UNIT_SLOTS == 0).all()


def test_a_network_names_the_argument():
    module, x, indices = network(), torch.randn(2, 4), torch.tensor([0, 1])
    _, state = module(torch.randn(5, 7, 4))
    state = tuple(t.detach() for t in state)
    with pytest.raises(TypeError, match=r"^state: expected a tuple of tensors"):
        module.step(x, state_indices=indices)
    with pytest.raises(ValueError, match=r"^state: expected \[5, ...\] for tensor 1"):
        module.step(x, (state[0], state[1][:4], *state[2:]), state_indices=indices)
    with pytest.raises(TypeError, match=r"^hx: expected dtype torch.float32, got torch.float64"):
        module.step(x, tuple(t.double() if i == 1 else t for i, t in enumerate(state)), state_indices=indices)
    with pytest.raises(ValueError, match=r"^state_indices: expected every slot once"):
        module.step(x, state, state_indices=torch.tensor([1, 1]))
    cached = mk.MRUNetwork(4, 3, width=8, num_blocks=1, units="bmru", cache={"segment": 4})
    with pytest.raises(RuntimeError, match=r"^state_indices: expected None with a MemoryCache"):
        cached.step(x, cached(torch.randn(5, 7, 4))[1], state_indices=indices)


@torch._dynamo.config.patch(error_on_recompile=True)
def test_a_compiled_step_of_a_network_is_one_graph():
    module = mk.MRUNetwork(4, 3, width=8, num_blocks=1, units=("bmru", "lru"), conv_size=4)
    _, state = module(torch.randn(2, 7, 4))
    torch._dynamo.reset()
    step = torch.compile(module.step, fullgraph=True, backend="aot_eager")
    ours = theirs = tuple(t.detach() for t in state)
    for x in torch.randn(4, 2, 4):
        output, ours = step(x, ours)
        expected, theirs = module.step(x, theirs)
        assert_close([output, *ours], [expected, *theirs])
    torch._dynamo.reset()
    ours, theirs = (tuple(t.new_zeros(6, *t.shape[1:]) for t in state) for _ in range(2))
    for i, x in enumerate(torch.randn(3, 2, 4)):
        indices = torch.tensor([i, 5 - i])
        output, _ = step(x, ours, state_indices=indices)
        expected, _ = module.step(x, theirs, state_indices=indices)
        assert_close([output, *ours], [expected, *theirs])
