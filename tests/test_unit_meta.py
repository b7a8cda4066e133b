"""The units on the meta device and with fake tensors."""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pack_padded_sequence

import mru_kernels as mk
from mru_kernels import backends
from tests.units import CLASSES, all_units, make


def run_all(module, like):
    """Shapes of all results and gradients of a module, for inputs with the dtype and device of `like`."""
    x, hx = like.new_ones(2, 9, 4, requires_grad=True), module(like.new_ones(2, 9, 4))[1]
    output, h_n = module(x, hx.detach())
    (output.sum() + h_n.abs().sum()).backward()
    stepped = module.step(x[:, 0], hx)
    return [t.shape for t in (output, h_n, x.grad, *stepped, *(p.grad for p in module.parameters()))]


@all_units
def test_on_meta(cls):
    expected = run_all(make(cls, 4, 6, 2), torch.ones(()))
    module = cls(4, 6, 2, device="meta")
    assert run_all(module, torch.empty((), device="meta")) == expected
    with torch.autocast("cpu"), torch.device("meta"):
        module = cls(4, 6, 2)
        assert all(p.is_meta for p in module.parameters())
        assert run_all(module, torch.ones(())) == expected
    for lengths in ([5, 3, 2], [2, 5, 3]):
        packed = pack_padded_sequence(torch.ones(3, 5, 4), torch.tensor(lengths), True, enforce_sorted=False)
        output, h_n = module(packed.to("meta"))
        columns = 10 if cls is mk.Aaren else 6
        assert (output.data.shape, h_n.shape, h_n.is_meta) == ((10, 6), (2, 3, columns), True)
    with pytest.raises(ValueError, match="input: expected the module's device meta, got cpu"):
        module(torch.ones(2, 9, 4))


@all_units
def test_fake(cls):
    expected = run_all(make(cls, 4, 6, 2), torch.ones(()))
    with FakeTensorMode():
        assert run_all(cls(4, 6, 2), torch.ones(())) == expected
    assert run_all(cls(4, 6, 2), torch.ones(())) == expected


@all_units
def test_load_from_meta_and_to_meta(cls):
    module, x = make(cls, 4, 6, 2), torch.randn(2, 9, 4)
    options = {"epsilon": 0.3} if cls in CLASSES else {}
    if options:
        module.epsilon = 0.3
    empty = cls(4, 6, 2, device="meta", **options).to_empty(device="cpu")
    empty.reset_parameters()
    empty.load_state_dict(module.state_dict())
    assigned = cls(4, 6, 2, device="meta")
    assigned.load_state_dict(module.state_dict(), assign=True)
    for twin in (empty, assigned):
        assert all(map(torch.equal, twin(x), module(x)))
        assert not options or twin.epsilon == 0.3
    assigned.load_state_dict(cls(4, 6, 2, device="meta", **options).state_dict(), assign=True)
    assert assigned.weight_ih_l0.is_meta
    shapes = {name: t.to("meta") for name, t in module.state_dict().items()}
    with pytest.warns(UserWarning, match="without a value; it stays 0.3") if options else warnings.catch_warnings():
        module.load_state_dict(shapes, assign=True)
    assert module(x.to("meta"))[0].is_meta
    assert not options or module.epsilon == 0.3


def test_training_without_the_extension(monkeypatch):
    """On meta the gradient needs no kernels, which alone know how time is cut."""
    monkeypatch.setattr(backends, "load_error", lambda name: "not built")
    monkeypatch.setattr(backends.TABLE["cpu"].module, "segment", None)
    unit = mk.BMRU(3, 4, device="meta")
    unit(torch.empty(2, 5, 3, device="meta"))[0].sum().backward()
    assert unit.weight_ih_l0.grad.is_meta
