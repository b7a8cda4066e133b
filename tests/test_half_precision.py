"""Modules and ops in bfloat16 and float16: autocast to the other dtype, and states in float32."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import mru_kernels as mk
from tests.units import HALF, HALF_STATES, network, unit


@pytest.mark.parametrize("cls", HALF)
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)], ids=str)
def test_a_half_precision_module_under_autocast_to_the_other_dtype(cls, dtypes):
    module = unit(cls, bidirectional=True, dtype=dtypes[0])
    x = torch.randn(2, 33, 4).to(dtypes[0])
    exact = copy.deepcopy(module).float()
    state = torch.ones(4, 2, 10 if cls is mk.Aaren else 6)
    for hx in (None, state, state.to(dtypes[1])) if cls in HALF_STATES else (None, state):
        with torch.autocast("cpu", dtype=dtypes[1]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the warning about hx in half precision
            got, expected = module(x, hx), exact(x.float(), hx)
        assert got[0].dtype == dtypes[1]
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        (got[0].float().sum() + got[1].sum()).backward()
    assert all(p.grad.dtype == dtypes[0] and p.grad.isfinite().all() for p in module.parameters())
    single = unit(cls, dtype=dtypes[0])
    with torch.autocast("cpu", dtype=dtypes[1]):
        assert torch.equal(single.step(x[:, 0])[1], single(x[:, :1])[1])


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)], ids=str)
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # RMSNorm warns
def test_a_half_precision_network_under_autocast_to_the_other_dtype(dtypes):
    module = network(units=("bmru", "schmitt", "min_gru"), dtype=dtypes[0])
    x = torch.randn(2, 33, 4).to(dtypes[0])
    with torch.autocast("cpu", dtype=dtypes[1]):
        output, state = module(x)
        again, _ = module(x, state)
        step, _ = module.step(x[:, 0], state)
    torch.testing.assert_close(output.float(), module(x)[0].float(), rtol=0.2, atol=0.2)
    torch.testing.assert_close(step, again[:, 0], rtol=0.05, atol=0.05)
    again.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)


def test_an_op_under_autocast_to_the_other_dtype_casts_states_and_channels():
    x, channel, state = torch.randn(2, 9, 3).bfloat16(), torch.rand(3).bfloat16(), torch.randn(2, 3).bfloat16()
    with torch.autocast("cpu", dtype=torch.float16):
        got = [*mk.bmru(x, channel, state, alpha=channel), *mk.schmitt(x, channel, channel, state, alpha=channel)]
        channel, state = channel.float(), state.float()
        exact = [*mk.bmru(x, channel, state, alpha=channel), *mk.schmitt(x, channel, channel, state, alpha=channel)]
    assert all(torch.equal(a, b) for a, b in zip(got, exact, strict=True))


@pytest.mark.parametrize("make", [lambda: unit(mk.BMRU), network])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.complex64])
def test_autocast_does_not_convert_every_dtype(make, dtype):
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(TypeError, match=rf"^input: expected the module's dtype torch.float32, got {dtype}"),
    ):
        make()(torch.ones(2, 3, 4, dtype=dtype))


def hx_warnings(call: Callable[[], Any]) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return sum(str(w.message).startswith("hx: expected torch.float32") for w in caught)


@pytest.mark.parametrize("cls", HALF_STATES)
@pytest.mark.parametrize("epsilon", [0.0, 0.5])
def test_an_accumulating_state_in_half_precision_warns(cls, epsilon):
    module, x = unit(cls, dtype=torch.bfloat16), torch.randn(2, 3, 4).bfloat16()
    accumulates = cls in (mk.MinGRU, mk.MinLSTM, mk.LIF) or epsilon > 0
    if hasattr(module, "epsilon"):
        module.epsilon = epsilon
    half = torch.ones(2, 2, 6, dtype=torch.bfloat16)
    assert hx_warnings(lambda: module(x, half)) == accumulates
    assert hx_warnings(lambda: module.step(x[:, 0], half)) == accumulates
    assert hx_warnings(lambda: module(x, half.float())) == hx_warnings(lambda: module(x)) == 0
    if accumulates:
        with pytest.warns(UserWarning, match=rf"got torch.bfloat16, which rounds away what {cls.__name__} accumulates"):
            module(x, half)


def test_a_state_in_half_precision_makes_no_graph_break():
    torch._dynamo.reset()
    module, x = unit(mk.CMRU, dtype=torch.bfloat16), torch.randn(2, 3, 4).bfloat16()
    half = torch.ones(2, 2, 6, dtype=torch.bfloat16)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert hx_warnings(lambda: compiled(x, half)) == 0
    torch.testing.assert_close(compiled(x, half), compiled(x, half.float()))


def counter(**options: Any) -> mk.CMRU:
    """A CMRU whose state counts the steps."""
    module = mk.CMRU(1, 1, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.weight_ih_l0[0] = 1.0
        module.alpha_l0.fill_(1.0)
    return module


@pytest.mark.parametrize("casts", [True, False])
def test_counting_in_half_precision_under_fsdp(casts, group_of_one):
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=casts)
    module = fully_shard(counter(), mesh=mesh, mp_policy=policy)
    x = torch.ones(1, 1, dtype=torch.float32 if casts else torch.bfloat16)
    state = torch.full((1, 1, 1), 250.0)

    def count() -> None:
        nonlocal state
        for _ in range(20):
            _, state = module.step(x, state)

    assert hx_warnings(count) == (20 if casts else 0)
    assert state.item() == (257.0 if casts else 270.0)
