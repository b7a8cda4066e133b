"""What all modules share: parametrizations, default devices, layouts, signatures and code for nn.GRU."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import mru_kernels as mk
from tests.units import MIXED, UNITS, all_units, network, unit


def packed() -> PackedSequence:
    return pack_sequence([torch.randn(n, 4) for n in (2, 5, 3)], enforce_sorted=False)


def tensors(result: Any) -> list[Tensor]:
    """All tensors of a possibly nested result."""
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result if part is not None for t in tensors(part)]


#: Ways to call a unit: options of the unit, an input, and the call. The state `hx` is for a batch of 2, or None.
UNIT_CALLS: dict[str, tuple[dict[str, Any], Callable[[], Any], Callable]] = {
    "batch": ({"bidirectional": True}, lambda: torch.randn(2, 5, 4), lambda m, x, hx: m(x, hx)),
    "time first": ({"batch_first": False}, lambda: torch.randn(5, 2, 4), lambda m, x, hx: m(x, hx)),
    "one": ({"bidirectional": True}, lambda: torch.randn(5, 4), lambda m, x, hx: m(x, hx if hx is None else hx[:, 0])),
    "packed": ({"bidirectional": True}, packed, lambda m, x, hx: m(x, hx if hx is None else hx[:, [0, 1, 0]])),
    "step": ({}, lambda: torch.randn(2, 4), lambda m, x, hx: m.step(x, hx)),
}
#: Ways to call a block or a network: a constructor, an input, and the call.
NETWORK_CALLS: dict[str, tuple[Callable[[], torch.nn.Module], Callable[[], Any], Callable]] = {
    "block": (lambda: mk.MRUBlock(4, MIXED, conv_size=3), lambda: torch.randn(2, 5, 4), lambda m, x, s: m(x, s)),
    "network": (network, lambda: torch.randn(2, 5, 4), lambda m, x, s: m(x, s)),
    "tokens": (lambda: network(tokens=True), lambda: torch.randint(0, 4, (2, 5)), lambda m, x, s: m(x, s)),
    "step": (network, lambda: torch.randn(2, 4), lambda m, x, s: m.step(x, s)),
}
unit_calls = pytest.mark.parametrize(("options", "draw", "call"), UNIT_CALLS.values(), ids=UNIT_CALLS)
network_calls = pytest.mark.parametrize(("make", "draw", "call"), NETWORK_CALLS.values(), ids=NETWORK_CALLS)
given_or_not = pytest.mark.parametrize("given", [False, True], ids=["", "state"])


def state_of(module: torch.nn.Module) -> Tensor:
    """A state of the unit for a batch of 2."""
    x = torch.randn(2, 1, 4)
    return module(x if module.batch_first else x.transpose(0, 1))[1].detach()


# ------------------------------------------------------------------------------------------------ parametrizations


class Counted(torch.nn.Module):
    """A parametrization that counts how often it is computed."""

    def __init__(self, name: str, counts: Counter) -> None:
        super().__init__()
        self.name, self.counts = name, counts

    def forward(self, original: Tensor) -> Tensor:
        self.counts[self.name] += 1
        return original * 1.0


def computations(module: torch.nn.Module, call: Callable[[], Any]) -> tuple[Counter, Counter]:
    """How often the call computes each parameter of the module, and the expected counts, all 1."""
    counts: Counter = Counter()
    names = [name for name, _ in module.named_parameters()]
    for name in names:
        owner, _, own = name.rpartition(".")
        register_parametrization(module.get_submodule(owner), own, Counted(name, counts))
    counts.clear()  # registration computes the parametrization once
    call()
    return counts, Counter(names)


@all_units
@unit_calls
@given_or_not
def test_a_call_of_a_unit_computes_each_parameter_once(cls, options, draw, call, given):
    module, x = unit(cls, **options), draw()
    hx = state_of(module) if given else None
    counts, once = computations(module, lambda: call(module, x, hx))
    assert counts == once


@network_calls
@given_or_not
def test_a_call_of_a_block_or_network_computes_each_parameter_once(make, draw, call, given):
    module, x = make(), draw()
    state = call(module, x, None)[1] if given else None
    counts, once = computations(module, lambda: call(module, x, state))
    assert counts == once


@all_units
@pytest.mark.parametrize("register", [parametrizations.weight_norm, torch.nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weight_norm(cls, register):
    module, x = unit(cls), torch.randn(2, 5, 4)
    expected = module(x)
    register(module, "weight_ih_l0")
    for got in (module(x), module(x)):
        torch.testing.assert_close(got, expected)
    got[0].sum().backward()
    assert all(p.grad is not None for p in module.parameters())


# ------------------------------------------------------------------------------------------------ devices and dtypes


def trained(module: torch.nn.Module, call: Callable[[], Any]) -> list[Tensor]:
    """Results of a call, and the gradients of all parameters that get one."""
    module.zero_grad()
    results = tensors(call())
    if results[0].requires_grad:
        sum(t.abs().sum() for t in results if t.requires_grad).backward()
    return [*results, *(p.grad.clone() for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize("cls", [*UNITS, mk.MRUBlock, mk.MRUNetwork])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parameters_have_the_device_and_dtype_of_the_constructor(cls, dtype):
    where: dict[str, Any] = {"device": "meta", "dtype": dtype}
    if cls in UNITS:
        module = cls(4, 6, 2, bidirectional=True, **where)
    elif cls is mk.MRUBlock:
        module = cls(4, MIXED, conv_size=3, **where)
    else:
        module = network(tokens=True, **where)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", dtype)}


def assert_a_default_device_changes_nothing(run: Callable[[], list[Tensor]]) -> None:
    expected = run()
    with torch.device("meta"):
        got = run()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@all_units
@unit_calls
@given_or_not
def test_a_default_device_does_not_change_a_unit(cls, options, draw, call, given):
    module, x = unit(cls, **options), draw()
    hx = state_of(module) if given else None
    assert_a_default_device_changes_nothing(lambda: trained(module, lambda: call(module, x, hx)))


@network_calls
@given_or_not
def test_a_default_device_does_not_change_a_network(make, draw, call, given):
    module, x = make(), draw()
    state = tuple(s.detach() for s in call(module, x, None)[1]) if given else None
    assert_a_default_device_changes_nothing(lambda: trained(module, lambda: call(module, x, state)))


# ------------------------------------------------------------------------------------------------ other layouts

OTHER = {
    "nested": lambda: torch.nested.nested_tensor([torch.ones(3, 4), torch.ones(5, 4)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(3, 4), torch.ones(5, 4)], layout=torch.jagged),
    "sparse_coo": lambda: torch.ones(2, 5, 4).to_sparse(),
    "sparse_csr": lambda: torch.ones(2, 5, 4).to_sparse_csr(),
}
other_layouts = pytest.mark.parametrize("kind", OTHER)
ignore_prototypes = pytest.mark.filterwarnings("ignore:.*prototype.*:UserWarning", "ignore:.*beta state.*:UserWarning")


def refusal(name: str, kind: str) -> str:
    return f"^{name}: expected a dense tensor, got {'a nested one' if kind in ('nested', 'jagged') else '.*' + kind}"


@all_units
@other_layouts
@ignore_prototypes
def test_a_unit_refuses_other_layouts(cls, kind):
    module, other = unit(cls), OTHER[kind]()
    with pytest.raises(TypeError, match=refusal("input", kind)):
        module(other)
    with pytest.raises(TypeError, match=refusal("input", kind)):
        module.step(other)
    with pytest.raises(TypeError, match=refusal("hx", kind)):
        module(torch.ones(2, 5, 4), other)


@other_layouts
@ignore_prototypes
def test_a_network_refuses_other_layouts(kind):
    module, block, other = network(), mk.MRUBlock(4), OTHER[kind]()
    for call in (module, module.step, block):
        with pytest.raises(TypeError, match=refusal("input", kind)):
            call(other)


@other_layouts
@ignore_prototypes
def test_an_op_refuses_other_layouts(kind, backend, device):
    x, channel, state = (torch.ones(shape, device=device) for shape in ((2, 5, 4), (4,), (2, 4)))
    other = OTHER[kind]().to(device)
    for op, arguments in (
        (mk.bmru, {"candidate": x, "threshold": x, "initial_state": state, "alpha": channel, "amplitude": x}),
        (mk.schmitt, {"candidate": x, "low": channel, "high": channel, "initial_state": state}),
        (mk.linear_recurrence, {"update": x, "decay": x, "initial_state": state}),
    ):
        for name in arguments:
            with pytest.raises(TypeError, match=refusal(name, kind)):
                op(**arguments | {name: other}, backend=backend)
    one = x[:, 0].contiguous()
    for name in ("candidate", "threshold", "state"):
        with pytest.raises(TypeError, match=refusal(name, kind)):
            mk.bmru_step(**{"candidate": one, "threshold": one, "state": state} | {name: other})


# ------------------------------------------------------------------------------------------------ code for nn.GRU


class Model(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([inner])

    def forward(self, x: Tensor, state: Any = None) -> Any:
        output, state = self.layers[0](x * 2, state)
        return output + 1, state


@pytest.mark.parametrize("make", [*(lambda cls=cls: unit(cls) for cls in UNITS), network, lambda: mk.MRUBlock(4)])
def test_fx_traces_a_model_with_a_module_as_one_node(make):
    model, x = Model(make()), torch.randn(2, 5, 4)
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["layers.0"]
    state = model(x)[1]
    for given in (None, state):
        got, expected = traced(x, given), model(x, given)
        assert all(torch.equal(a, b) for a, b in zip(tensors(got), tensors(expected), strict=True))


@pytest.mark.parametrize("make", [lambda: unit(mk.BMRU), network, lambda: mk.MRUBlock(4)])
def test_fx_does_not_trace_a_module_itself(make):
    with pytest.raises(
        TypeError, match=r"^input: expected a tensor, got a Proxy; for torch.fx (BMRU|MRU.*) is one node"
    ):
        torch.fx.symbolic_trace(make())


@all_units
def test_flatten_parameters_does_nothing(cls):
    module, x = unit(cls), torch.randn(2, 5, 4)
    expected = module(x)[0]
    assert module.flatten_parameters() is None
    assert torch.equal(module(x)[0], expected)


#: Constructor arguments of every unit. `OWN` adds those of some units.
COMMON = {
    "input_size", "hidden_size", "num_layers", "batch_first", "dropout", "bidirectional", "learn_initial_state",
    "chunk_size", "device", "dtype",
}  # fmt: skip
WRITE_OR_HOLD = {"bias", "epsilon", "surrogate_scale"}
OWN = {
    mk.BMRU: WRITE_OR_HOLD,
    mk.CMRU: WRITE_OR_HOLD,
    mk.AlphaCMRU: WRITE_OR_HOLD,
    mk.FirstQuadrantBMRU: WRITE_OR_HOLD,
    mk.MinGRU: {"bias", "max_time_scale"},
    mk.MinLSTM: {"bias", "max_time_scale"},
    mk.LIF: {
        "bias",
        "beta",
        "threshold",
        "reset",
        "tie",
        "surrogate",
        "surrogate_scale",
        "detach_reset",
    },
    mk.Aaren: {"bias", "num_heads"},
    mk.LRU: {"r_min", "r_max", "max_phase"},
}


@all_units
def test_the_signature_of_a_unit_spells_all_arguments_out(cls):
    parameters = inspect.signature(cls).parameters
    assert set(parameters) == COMMON | OWN[cls]
    assert parameters["batch_first"].default is True
    if "epsilon" in parameters:
        assert parameters["epsilon"].default == cls(1, 1).epsilon


@pytest.mark.parametrize("cls", [mk.MRUBlock, mk.MRUNetwork, mk.EpsilonSchedule, mk.nn.MRUBase, mk.nn.WriteOrHold])
def test_the_signature_of_a_class_spells_all_arguments_out(cls):
    kinds = {p.kind for p in inspect.signature(cls).parameters.values()}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}


class Derived(mk.CMRU):
    """A user's subclass."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)


@pytest.mark.parametrize("cls", [*UNITS, Derived])
def test_a_constructor_names_its_class_and_the_nearest_argument(cls):
    name = cls.__name__
    with pytest.raises(TypeError, match=rf"^{name}: unknown argument 'bidirectionl'; did you mean 'bidirectional'\?$"):
        cls(4, 6, bidirectionl=True)
    with pytest.raises(
        TypeError, match=rf"^{name}: unknown argument 'q'; it takes input_size, hidden_size, num_lay.*dty"
    ):
        cls(4, 6, q=True)
    with pytest.raises(
        TypeError,
        match=rf"^{name}: expected at most 3 positional arguments \(input_size, hidden_size, num_layers\), got 4; give"
        " by name: .*batch_first, dropout",
    ):
        cls(4, 6, 1, True)
    with pytest.raises(TypeError, match=rf"^{name}: missing a required argument: 'hidden_size'"):
        cls(4)


def test_a_constructor_names_the_arguments_of_its_own_class():
    with pytest.raises(TypeError, match=r"^BMRU: unknown argument 'epsilonn'; did you mean 'epsilon'"):
        mk.BMRU(4, 6, epsilonn=0.5)
    with pytest.raises(TypeError, match=r"^MinGRU: unknown argument 'epsilon'; it takes.*max_time_scale"):
        mk.MinGRU(4, 6, epsilon=0.5)
    with pytest.raises(TypeError, match=r"^MRUBlock: unknown argument 'convsize'; did you mean 'conv_size'"):
        mk.MRUBlock(4, convsize=3)
    with pytest.raises(TypeError, match=r"^MRUNetwork: expected at most 2 positional arguments"):
        mk.MRUNetwork(4, 3, 8)
    with pytest.raises(TypeError, match=r"^LRU: unknown argument 'rmin'; did you mean 'r_min'"):
        mk.MRUBlock(4, {"lru": {"rmin": 0.5}})


def test_a_block_checks_the_state_of_its_convolution():
    block, x = mk.MRUBlock(4, conv_size=3), torch.randn(2, 5, 4)
    convolved, *rest = block(x)[1]
    with pytest.raises(TypeError, match=r"^state: expected dtype torch.float32 for tensor 0, got torch.float64"):
        block(x, (convolved.double(), *rest))
    for i in range(2):
        moved = [s.to("meta") if j == i else s for j, s in enumerate((convolved, *rest))]
        with pytest.raises(ValueError, match=rf"^state: expected the input's device cpu for tensor {i}, got meta"):
            block(x, moved)
