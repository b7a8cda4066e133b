"""What layers of delays, MesaNets, caches and blocks of time share with the units, and what the tools need for it."""

from __future__ import annotations

import ast
import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

import mru_kernels as mk
from tests.layers import IN_BLOCKS, LAYERS, all_layers, layer
from tests.test_modules import OTHER, computations, ignore_prototypes, other_layouts, refusal

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
HALVES = [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)]


def trained(module: torch.nn.Module, x: Tensor) -> list[Tensor]:
    """Results of two calls, the second from the state of the first, and the gradients of the parameters."""
    module.zero_grad()
    output, state = module(x)
    again = module(x[:, :3], state)
    (output.float().square().sum() + again[0].float().square().sum()).backward()
    return [*tree_leaves((output, state, again)), *(p.grad for p in module.parameters() if p.grad is not None)]


def assert_same(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ------------------------------------------------------------------------------------------------ inputs

VIEWS = {
    "windows": (lambda s: s.unfold(1, 4, 1), (2, 14)),
    "expanded on B": (lambda s: s.expand(2, 11, 4), (1, 11, 4)),
    "expanded on T": (lambda s: s.expand(2, 11, 4), (2, 1, 4)),
    "expanded on D": (lambda s: s.expand(2, 11, 4), (2, 11, 1)),
    "transposed": (lambda s: s.transpose(1, 2), (2, 4, 11)),
    "time first": (lambda s: s.transpose(0, 1), (11, 2, 4)),
    "not aligned": (lambda s: s[1:].view(2, 11, 4), (89,)),
    "overlapping": (lambda s: s.as_strided((2, 11, 4), (3, 1, 2)), (40,)),
    "negated": (torch._neg_view, (2, 11, 4)),
}


@all_layers
@pytest.mark.parametrize("view", VIEWS)
def test_strides_change_nothing(name, view):
    """Up to rounding: torch's own operations choose their kernels by strides."""
    make, shape = VIEWS[view]
    module, source = layer(name), torch.randn(shape)
    results = []
    for dense in (False, True):
        leaf = source.clone().requires_grad_()
        x = make(leaf).clone(memory_format=torch.contiguous_format) if dense else make(leaf)
        output = module(x)[0]
        results.append([output, *torch.autograd.grad(output.square().sum(), leaf)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@all_layers
@other_layouts
@ignore_prototypes
def test_other_layouts_are_refused(name, kind):
    with pytest.raises(TypeError, match=refusal("input", kind)):
        layer(name)(OTHER[kind]())


# ------------------------------------------------------------------------------------------------ devices and modes


@all_layers
def test_a_default_device_changes_nothing(name):
    module, x = layer(name), torch.randn(2, 11, 4)
    expected = [t.clone() for t in trained(module, x)]
    with torch.device("meta"):
        got = trained(module, x)
    assert_same(got, expected)


@all_layers
def test_on_meta(name):
    x, module = torch.randn(2, 11, 4), layer(name, device="meta")
    expected = layer(name)(x)
    for got, like in zip(tree_leaves(module(x.to("meta"))), tree_leaves(expected), strict=True):
        assert (got.shape, got.dtype) == (like.shape, like.dtype)
    module(x.to("meta"))[0].sum().backward()
    module.load_state_dict(layer(name).state_dict(), assign=True)
    assert_same(tree_leaves(module(x)), tree_leaves(expected))


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "quantizable"])  # torch copies no fake module
def test_fake(name):
    with FakeTensorMode():
        module = layer(name)
        output, _ = module(torch.randn(2, 11, 4))
        output.sum().backward()
    assert output.shape == layer(name)(torch.randn(2, 11, 4))[0].shape


def test_a_cache_names_a_state_without_values():
    for mode in (torch.device("meta"), FakeTensorMode()):
        with mode:
            x = torch.randn(2, 11, 4)
            module = mk.MemoryCache(mk.BMRU(4, 6), segment=4)
            state = (torch.zeros(2, 6), torch.zeros(2, dtype=torch.int64), *[torch.zeros(2, 4)] * 3)
            with pytest.raises(ValueError, match=r"^state: expected a number of steps on the CPU for tensor 1, got a"):
                module(x, state)


@all_layers
def test_inference_mode_leaves_nothing_behind(name):
    module, x = layer(name), torch.randn(2, 11, 4)
    expected = [t.detach().clone() for t in trained(module, x)]
    with torch.inference_mode():
        module(x, module(x)[1])
    assert_same(trained(module, x), expected)


@all_layers
@pytest.mark.parametrize("dtypes", HALVES)
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
def test_half_precision_under_autocast_to_the_other_dtype(name, dtypes):
    module, x = layer(name, dtype=dtypes[0]), torch.randn(2, 11, 4)
    with torch.autocast("cpu", dtype=dtypes[1]):
        got = trained(module, x.to(dtypes[0]))
        if hasattr(module, "step"):
            module.step(x[:, 0].to(dtypes[0]))
    assert all(t.isfinite().all() for t in got if t.is_floating_point())


@pytest.mark.parametrize("dtypes", HALVES)
def test_packed_calls_under_autocast_to_the_other_dtype(dtypes):
    x, offsets, ones = torch.randn(1, 11, 4).to(dtypes[0]), torch.tensor([0, 5, 11]), torch.ones(4, 2)
    heads, gates = x.unflatten(-1, (2, 2)), torch.zeros(1, 11, 2)
    for dtype in (None, dtypes[1]):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            y, past = mk.delay_conv(x, ones, ones, 1.0, 4, cu_seqlens=offsets)
            output, state, _ = mk.mesa(heads, heads, heads, gates, gates, torch.ones(2, 2), cu_seqlens=offsets)
        assert (y.dtype, past.dtype, output.dtype) == (dtype or x.dtype, x.dtype, x.dtype)
        assert past.shape == (2, 3, 4)
        assert state[0].shape == (2, 2, 2, 2)


def test_tools_under_a_default_device(tmp_path):
    unit, x, block = mk.BMRU(4, 6), torch.randn(2, 11, 4), mk.MRUNetwork(4, 3, width=4, num_blocks=1)

    def results() -> list[object]:
        mk.export.c(unit, tmp_path / "unit.c")
        mk.export.c(block, tmp_path / "network.c")
        torch.manual_seed(0)
        with mk.mismatch(unit, 0.1, noise=0.1):
            noisy = unit(x)[0].sum().item()
        rates = mk.write_rates(unit, x)
        texts = [(tmp_path / name).read_text() for name in ("unit.c", "network.c")]
        table = mk.robustness(unit, lambda u: u(x)[0].mean(), trials=2)
        return [noisy, str(rates), *texts, str(table), mk.quantized(unit, 3)(x)[0].sum().item()]

    expected = results()
    with torch.device("meta"):
        assert results() == expected


def test_every_new_tensor_names_its_device():
    """Else it is made on the default device, where nothing else of a call may be."""
    creations = {"arange", "as_tensor", "empty", "eye", "full", "Generator", "linspace", "logspace", "ones", "rand",
                 "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros"}  # fmt: skip
    found = []
    for path in sorted((ROOT / "mru_kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{name}" for name in creations}:
                named = node.args if node.func.attr == "Generator" else [k for k in node.keywords if k.arg == "device"]
                forwarded = [k for k in node.keywords if k.arg is None]
                if not named and not forwarded:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not found


# ------------------------------------------------------------------------------------------------ tools of torch


@all_layers
def test_copies(name):
    module, x = layer(name), torch.randn(2, 11, 4)
    expected = tree_leaves(module(x))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_same(tree_leaves(twin(x)), expected)


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in IN_BLOCKS])  # each block reads them
def test_a_call_computes_each_parameter_once(name):
    module, x = layer(name), torch.randn(2, 11, 4)
    counts, once = computations(module, lambda: module(x))
    assert counts == once


@all_layers
def test_fx_traces_a_layer_as_one_node(name):
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer(name)

        def forward(self, x):
            return self.layer(x)[0] * 2

    model, x = Model(), torch.randn(2, 11, 4)
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["layer"]
    assert torch.equal(traced(x), model(x))


@all_layers
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*deprecated:DeprecationWarning")
def test_jit_trace(name):
    module, x = layer(name), torch.randn(2, 11, 4)
    if name in IN_BLOCKS:
        with pytest.raises(RuntimeError, match=r"^blocked: torch.jit.trace cannot record"):
            torch.jit.trace(module, (x,))
        return
    traced = torch.jit.trace(module, (x,))
    torch.testing.assert_close(traced(x)[0], module(x)[0])


def test_vmap_over_the_gradients_of_a_mesa_net():
    module, x = layer("mesa"), torch.randn(3, 11, 4)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(module, parameters, (x,))[0].square().sum()

    each = torch.vmap(torch.func.grad(lambda p, row: loss(p, row[None])), in_dims=(None, 0))(parameters, x)
    assert module.taken is None
    for name, expected in torch.func.grad(loss)(parameters, x).items():
        torch.testing.assert_close(each[name].sum(0), expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(NotImplementedError, match=r"^mesa: there is no forward-mode derivative"):
        torch.func.jvp(lambda x: module(x)[0], (x,), (x,))


# ------------------------------------------------------------------------------------------------ hostile numbers

HUGE = 10**400  # is no float
NUMBERS = [
    ("taps", lambda n: mk.DelayConv(4, n)),
    ("taps", lambda n: mk.delay_conv(torch.ones(1, 2, 4), torch.ones(4, 1), torch.ones(4, 1), 1.0, n)),
    ("segment", lambda n: mk.MemoryCache(mk.BMRU(4, 6), n)),
    ("steps", lambda n: mk.blocked(mk.BMRU(4, 6), n)),
    ("steps", lambda n: mk.MesaNet(4, 6, steps=n)),
    ("chunk_size", lambda n: mk.MesaNet(4, 6, chunk_size=n)),
    ("chunk_size", lambda n: mk.mesa(*[torch.ones(1, 2, 1, 4)] * 3, *[torch.ones(1, 2, 1)] * 2, torch.ones(1, 4),
                                     chunk_size=n)),
    ("hidden_size", lambda n: mk.BMRU(4, n)),
    ("width", lambda n: mk.MRUNetwork(4, 3, width=n, num_blocks=1)),
    ("decay_steps", lambda n: mk.EpsilonSchedule(mk.BMRU(4, 6), n)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "call"), NUMBERS)
@pytest.mark.parametrize("number", [2**31, 2**63, HUGE], ids=["2^31", "2^63", "huge"])
def test_a_size_beyond_the_largest_is_named(name, call, number):
    with pytest.raises(ValueError, match=f"^{name}: expected at most 2147483647, got {number}"):
        call(number)


FLOATS = [
    ("sigma", lambda n: mk.DelayConv(4, 6, sigma=n)),
    ("sigma", lambda n: mk.delay_conv(torch.ones(1, 2, 4), torch.ones(4, 1), torch.ones(4, 1), n, 4)),
    ("reach", lambda n: mk.delay_conv(torch.ones(1, 2, 4), torch.ones(4, 1), torch.ones(4, 1), 1.0, 4, reach=n)),
    ("max_time_scale", lambda n: mk.MinGRU(4, 6, max_time_scale=n)),
    ("mismatch", lambda n: mk.mismatch(mk.BMRU(4, 6), n)),
    ("noise", lambda n: mk.mismatch(mk.BMRU(4, 6), 0.1, noise=n)),
    ("scale", lambda n: mk.heaviside(torch.ones(1), n)),
    ("tolerance", lambda n: mk.MesaNet(4, 6, tolerance=n)),
    ("scalars", lambda n: mk.define_cell("never_made", lambda x, a: mk.Affine(a, x), scalars={"a": n})),
]


@pytest.mark.parametrize(("name", "call"), FLOATS)
@pytest.mark.parametrize("number", [HUGE, float("nan")], ids=["huge", "nan"])
def test_a_number_that_is_no_finite_float_is_named(name, call, number):
    with pytest.raises(ValueError, match=f"^{name}: expected "):
        call(number)


def test_other_hostile_numbers_are_named():
    cache, x = mk.MemoryCache(mk.BMRU(4, 6), 4, mode="average"), torch.ones(2, 3, 4)
    with pytest.raises(ValueError, match=r"^state: expected one number of steps for all sequences"):
        cache(x, (torch.zeros(2, 6), torch.full((2,), 2**63 - 1), torch.zeros(2, 6)))
    with pytest.raises(ValueError, match=r"^sigma: expected a finite number of at least 1e-30, got 1e-300"):
        mk.DelayConv(4, 6, sigma=1e-300)
    assert mk.DelayConv(4, 6, sigma=1e-30)(x)[0].isfinite().all()
    for seed in (2**64, -(2**63) - 1):
        with pytest.raises(ValueError, match=r"^seed: expected an int that torch.manual_seed takes"):
            mk.robustness(mk.BMRU(4, 6), lambda unit: 1.0, seed=seed)
    with pytest.raises(TypeError, match=r"^EpsilonSchedule: unknown argument 'hold_step'; did you mean 'hold_steps'"):
        mk.EpsilonSchedule(mk.BMRU(4, 6), 4, hold_step=2)
