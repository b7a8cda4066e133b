"""The linear units: dtypes, bad input, compile, vmap, copies and training."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from mru_kernels.nn import LRU, MinGRU, MinLSTM
from tests.linear_units import all_classes, close, gated, make, random, states


@gated
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.filterwarnings("ignore:hx. expected torch.float32:UserWarning")
def test_dtypes(cls, dtype):
    module = make(cls, 4, 6, 2).to(dtype)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(3, 10, 4).to(dtype)
    for hx in (None, torch.ones(2, 3, 6, dtype=dtype), torch.ones(2, 3, 6, dtype=state)):
        output, h_n = module(x, hx)
        assert output.dtype == dtype
        assert h_n.dtype == state
        (output.sum() + h_n.sum()).backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize(("dtype", "state"), [(torch.float32, torch.complex64), (torch.float64, torch.complex128)])
def test_dtypes_of_complex_states(dtype, state):
    module = LRU(4, 6, 2).to(dtype)
    x = torch.randn(3, 10, 4, dtype=dtype)
    output, h_n = module(x, torch.ones(2, 3, 6, dtype=state))
    assert (output.dtype, h_n.dtype) == (dtype, state)
    assert all(p.dtype == dtype for p in module.parameters())
    for wrong in (dtype, torch.complex64 if state == torch.complex128 else torch.complex128):
        with pytest.raises(TypeError, match=f"hx: expected dtype {state}, got {wrong}"):
            module(x, torch.ones(2, 3, 6, dtype=wrong))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_complex_states_reject_half_precision(dtype):
    with pytest.raises(TypeError, match=f"dtype: expected float32 or float64, got {dtype}"):
        LRU(4, 6, dtype=dtype)
    with pytest.raises(TypeError, match=f"dtype: expected float32 or float64, got {dtype}"):
        LRU(4, 6).to(dtype)(torch.ones(1, 2, 4, dtype=dtype))


@all_classes
def test_autocast(cls):
    module = make(cls, 4, 6, 2, dtype=torch.float32)
    x = torch.randn(2, 33, 4)
    exact, exact_h_n = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, h_n = module(x)
        again, _ = module(x, h_n)
        # The scan of an LRU needs a complex64 update, so its projection stays in float32.
        assert cls is not LRU or module._project(x, module._parameters_by_scan()[0]).dtype == torch.float32
    assert output.dtype == again.dtype == torch.bfloat16
    assert h_n.dtype == exact_h_n.dtype
    torch.testing.assert_close(output.float(), exact, rtol=0.1, atol=0.1)
    (again.float().sum() + h_n.abs().sum()).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize(
    ("cls", "options", "error", "match"),
    [
        (
            MinGRU,
            {"max_time_scale": 1.5},
            ValueError,
            r"max_time_scale: expected a finite .* \[2, inf\], got 1.5",
        ),
        (MinLSTM, {"max_time_scale": math.inf}, ValueError, "max_time_scale: expected a finite"),
        (MinGRU, {"max_time_scale": math.nan}, ValueError, "max_time_scale: expected a finite"),
        (MinGRU, {"max_time_scale": "9"}, TypeError, "max_time_scale: expected a float, got str"),
        (LRU, {"r_max": True}, TypeError, "r_max: expected a float, got bool"),
        (MinGRU, {"epsilon": 0.5}, TypeError, "epsilon"),
        (LRU, {"r_max": 1.1}, ValueError, r"r_max: expected a finite number in \[0, 1\], got 1.1"),
        (LRU, {"r_min": 0.9, "r_max": 0.5}, ValueError, r"r_min: expected a finite number in \[0, 0.5\], got 0.9"),
        (LRU, {"max_phase": -1.0}, ValueError, "max_phase: expected a finite"),
        (
            LRU,
            {"bias": False},
            TypeError,
            "LRU: unknown argument 'bias'; it takes input_size, hidden_size, num_layers, r_min",
        ),
        (LRU, {"num_layers": 0}, ValueError, "num_layers: expected a positive int, got 0"),
    ],
)
def test_bad_construction(cls, options, error, match):
    with pytest.raises(error, match=match):
        cls(4, 6, **options)


@pytest.mark.parametrize(
    ("x", "hx", "error", "match"),
    [
        (torch.ones(2, 3, 5), None, ValueError, r"input: expected 4 features, got shape \[2, 3, 5\]"),
        (torch.ones(2, 3, 4).double(), None, TypeError, "input: expected the module's dtype torch.float32"),
        (torch.ones(2, 3, 4), torch.ones(1, 2, 6).cfloat(), ValueError, r"hx: expected shape \[2, 2, 6\]"),
    ],
)
def test_bad_input(x, hx, error, match):
    with pytest.raises(error, match=match):
        LRU(4, 6, 2)(x, hx)


# ------------------------------------------------------------------------------------------------ tools of torch


@all_classes
def test_compile(cls):
    torch._dynamo.reset()
    module = make(cls, 4, 6)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for time in (17, 65):
        x, hx = random(2, time, 4), states(cls, 1, 2, 6)
        results = []
        for run in (compiled, module):
            module.zero_grad()
            output, h_n = run(x, hx)
            (output.square().sum() + h_n.abs().sum()).backward()
            results.append([output, h_n, *(p.grad for p in module.parameters())])
        for a, b in zip(*results, strict=True):
            close(a, b)


@all_classes
def test_vmap_over_an_ensemble(cls):
    modules = [make(cls, 4, 6, seed=i) for i in range(3)]
    parameters, buffers = torch.func.stack_module_state(modules)
    x = random(2, 33, 4)
    output, h_n = torch.vmap(lambda p, b: torch.func.functional_call(modules[0], (p, b), (x,)))(parameters, buffers)
    for i, module in enumerate(modules):
        close(output[i], module(x)[0])
        close(h_n[i], module(x)[1])


@all_classes
def test_copies_and_checkpoints(cls):
    module = make(cls, 4, 6, 2, bidirectional=True)
    x = random(2, 9, 4)
    expected = module(x)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    loaded = make(cls, 4, 6, 2, bidirectional=True, seed=1)
    assert not torch.equal(loaded(x)[0], expected[0])
    loaded.load_state_dict(torch.load(file, weights_only=True), strict=True)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert all(torch.equal(a, b) for a, b in zip(twin(x), expected, strict=True))


@all_classes
def test_learns_to_recall(cls):
    torch.manual_seed(0)
    options = {"r_min": 0.9} if cls is LRU else {"max_time_scale": 50.0}
    module, head = cls(1, 16, **options), torch.nn.Linear(16, 1)
    optimizer = torch.optim.Adam([*module.parameters(), *head.parameters()], lr=1e-2)
    for _ in range(150):
        x = torch.randint(0, 2, (32, 1, 1)) * 2.0 - 1.0
        stream = F.pad(x, (0, 0, 0, 19))  # one sign, then 19 zeros
        loss = F.mse_loss(head(module(stream)[0][:, -1]), x[:, 0])
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert loss < 0.05
