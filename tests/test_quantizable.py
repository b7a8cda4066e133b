"""`quantizable`: units whose projections are modules, which the tools of quantisation replace."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import mru_kernels as mk
from mru_kernels.distributed import sequence_parallel
from tests.units import CLASSES, network, unit

UNITS = [*CLASSES, mk.MinGRU, mk.MinLSTM, mk.Aaren]
OPTIONS = [{}, {"bias": False}, {"bidirectional": True}, {"learn_initial_state": False}]


def trained(module, x):
    """Output, final state and gradients by name."""
    module.zero_grad()
    output, h_n = module(x)
    output.square().sum().backward()
    return output, h_n, {name: p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cls", UNITS)
def test_a_copy_computes_the_same_with_the_same_state_dict(cls, options):
    module = unit(cls, **options)
    result = mk.quantizable(module)
    x = torch.randn(2, 9, 4)
    for a, b in zip(trained(result, x)[:2], trained(module, x)[:2], strict=True):
        torch.testing.assert_close(a, b)
    if not module.bidirectional:
        for a, b in zip(result.step(x[:, 0]), module.step(x[:, 0]), strict=True):
            torch.testing.assert_close(a, b)
    linear = [name for name, m in result.named_modules() if type(m) is torch.nn.Linear]
    assert linear == [f"projection{suffix}" for _, suffix in module._scans()]
    assert not [name for name in dict(module.named_modules()) if name]  # the module itself is as it was

    saved, original = result.state_dict(), module.state_dict()
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], t) for name, t in original.items())
    others = mk.quantizable(unit(cls, **options)), unit(cls, **options)
    for other in others:
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
        other.load_state_dict(saved)
        assert torch.equal(other(x)[0], (result if other is others[0] else module)(x)[0])


def test_gradients_and_training():
    module, x = network(), torch.randn(2, 9, 4)
    result = mk.quantizable(module)
    _, _, expected = trained(module, x)
    _, _, found = trained(result, x)
    rename = {"projection_l0.weight": "weight_ih_l0", "projection_l0.bias": "bias_ih_l0"}
    for name, gradient in found.items():
        for new, old in rename.items():
            name = name.replace(new, old)
        torch.testing.assert_close(gradient, expected.pop(name))
    assert not expected


def test_copies_and_tools():
    module, x = mk.quantizable(network()), torch.randn(2, 9, 4)
    expected = module(x)[0]
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x)[0], expected)
        assert other.state_dict().keys() == network().state_dict().keys()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x)[0].dtype == torch.bfloat16
    assert mk.quantizable(unit(mk.BMRU)).double()(x.double())[0].dtype == torch.float64
    plain = mk.stream(unit(mk.MinGRU), gradient="traces")
    feed = mk.stream(mk.quantizable(unit(mk.MinGRU)), gradient="traces")
    for t in (slice(0, 4), slice(4, 9)):
        torch.testing.assert_close(feed(x[:, t]), plain(x[:, t]))
    for name, trace in plain.traces.items():
        torch.testing.assert_close(feed.traces[name], trace)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_dynamic_quantisation_replaces_the_projections():
    ao = pytest.importorskip("torch.ao.quantization")
    module = mk.MRUNetwork(4, 3, width=32, num_blocks=1, units=("min_gru", "lru")).eval()
    x = torch.randn(2, 9, 4)
    result = ao.quantize_dynamic(mk.quantizable(module), {torch.nn.Linear}, torch.qint8)
    kind = type(result.blocks[0].units[0].projection_l0)
    assert kind is torch.ao.nn.quantized.dynamic.Linear
    output, expected = result(x)[0], module(x)[0]
    assert not torch.equal(output, expected)
    torch.testing.assert_close(output, expected, atol=0.1, rtol=0.1)
    assert result.step(x[:, 0])[0].shape == (2, 3)
    other = ao.quantize_dynamic(mk.quantizable(copy.deepcopy(module)), {torch.nn.Linear}, torch.qint8)
    other.load_state_dict(result.state_dict())
    assert torch.equal(other(x)[0], output)
    with pytest.raises(TypeError, match="module: expected a unit with floating weights"):
        mk.stream(result.blocks[0].units[0], gradient="traces")(torch.randn(2, 9, 32))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_training_that_is_aware_of_quantisation():
    ao = pytest.importorskip("torch.ao.quantization")
    module = mk.quantizable(network(units="bmru")).train()
    module.qconfig = ao.get_default_qat_qconfig("fbgemm")
    prepared = ao.prepare_qat(module)
    x = torch.randn(2, 9, 4)
    prepared(x)[0].square().sum().backward()
    linear = prepared.blocks[0].units[0].projection_l0
    assert type(linear) is torch.ao.nn.qat.Linear
    assert linear.weight.grad.any()
    assert "blocks.0.units.0.weight_ih_l0" in prepared.state_dict()
    prepared.load_state_dict(prepared.state_dict())


def test_int8_weights_of_torchao():
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    module = mk.MRUNetwork(4, 3, width=32, num_blocks=1, units="min_gru").eval()
    result, x = mk.quantizable(module), torch.randn(2, 9, 4)
    quantize_(result, Int8WeightOnlyConfig())
    assert type(result.blocks[0].units[0].projection_l0.weight) is not torch.nn.Parameter
    output, expected = result(x)[0], module(x)[0]
    assert not torch.equal(output, expected)
    torch.testing.assert_close(output, expected, atol=0.1, rtol=0.1)
    assert result.state_dict().keys() == module.state_dict().keys()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: "unit", TypeError, "module: expected a torch.nn.Module, got str"),
        (lambda: torch.nn.Linear(2, 2), ValueError, "module: expected a module with units"),
        (lambda: mk.LRU(2, 2), ValueError, "module: expected a module with units"),
        (lambda: mk.quantizable(mk.BMRU(2, 2)), ValueError, "plain parameters, got one without projection_l0"),
        (
            lambda: torch.nn.utils.parametrizations.weight_norm(mk.BMRU(2, 2), "weight_ih_l0"),
            ValueError,
            "plain parameters, got one without weight_ih_l0",
        ),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        mk.quantizable(make())


def test_sequence_parallel_training_of_a_copy_is_refused(group_of_one):
    parallel = sequence_parallel(mk.quantizable(unit(mk.BMRU)))
    with pytest.raises(TypeError, match="module: expected a unit with its own parameters"):
        parallel(torch.randn(2, 9, 4))


def test_errors_of_a_copy_name_the_argument():
    result = mk.quantizable(unit(mk.BMRU))
    with pytest.raises(RuntimeError, match="reset_parameters: expected a unit with its own parameters"):
        result.reset_parameters()
    with pytest.raises(TypeError, match="input: expected the module's dtype"):
        result(torch.randn(2, 9, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="input: expected 4 features"):
        result(torch.randn(2, 9, 3))
