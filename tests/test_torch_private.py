"""Each private name of torch that the package uses exists and does what the package expects."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from mru_kernels import torch_private as private


@pytest.mark.parametrize("name", private.__all__)
def test_exists(name):
    assert getattr(private, name) is not None


def test_below_autograd_records_nothing():
    x = torch.ones(2, requires_grad=True)
    with private.BelowAutograd():
        assert not (x + 1).requires_grad


def test_tracing_is_detected():
    seen = []

    def f(x):
        seen.append(private.is_tracing())
        return x + 1

    torch.jit.trace(f, torch.ones(1), check_trace=False)
    assert seen == [True]
    assert not private.is_tracing()


def test_forward_mode_is_detected():
    assert not private.in_forward_mode()
    with forward_ad.dual_level():
        assert private.in_forward_mode()


def test_tangents_are_detected_and_removed():
    x = torch.ones(2)
    assert not private.may_have_tangents()
    assert not private.has_tangent(x)
    assert torch.func.grad(lambda x: x * private.may_have_tangents())(torch.tensor(1.0)) == 1

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x**3

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_forward(*inputs, None)

        @staticmethod
        def jvp(ctx, dx):
            with private.enable_forward_gradients(True):
                x, absent = private.primals(ctx)
                assert not private.has_tangent(x)
                assert absent is None
                return 3 * x**2 * dx

    def along_ones(f):
        return lambda x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]

    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        assert private.has_tangent(dual)
        assert not private.has_tangent(x)
        assert [private.has_tangent_below_python(t) for t in (dual, x, None)] == [True, False, False]
        assert torch.equal(forward_ad.unpack_dual(Cube.apply(dual)).tangent, 3 * x)
    assert torch.equal(along_ones(along_ones(Cube.apply))(x), 6 * x)


def test_wrapped_tensors_are_detected():
    def f(x):
        assert private.transforms_active()
        assert private.is_wrapped(x)
        assert private.is_batched(x)
        assert private.unwrapped_tensor(x).shape == (3, 2)
        return x

    torch.func.vmap(f)(torch.ones(3, 2))
    assert not private.transforms_active()
    assert not private.is_wrapped(torch.ones(1))


def test_legacy_batches_are_detected():
    seen = []

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(private.is_legacy_batched(grad))
            return private.add_batch_dim(private.remove_batch_dim(grad, 1, 3, 0), 0, 1)

    x = torch.ones(2, requires_grad=True)
    (grad,) = torch.autograd.grad(Recorded.apply(x), x, torch.ones(3, 2), is_grads_batched=True)
    assert seen == [True]
    assert grad.shape == (3, 2)


def test_modes_are_detected_and_left():
    assert private.modes_active() == 0
    assert private.dispatch_mode(private.FAKE_MODE) is None
    with torch._subclasses.fake_tensor.FakeTensorMode():
        assert private.modes_active() == 1
        assert private.dispatch_mode(private.FAKE_MODE) is not None
        fake = torch.ones(1)
        assert isinstance(fake, private.FakeTensor)
        assert private.is_fake(fake)
        with private.disable_modes():
            assert type(torch.ones(1)) is torch.Tensor


def test_functions_and_transforms_are_disabled():
    def f(x):
        with private.DisableFunctorch(), private.DisableTorchFunction():
            made = torch.ones(1)
        assert not private.is_wrapped(made)
        return x

    torch.func.vmap(f)(torch.ones(2))


def test_functions_are_enabled_again():
    class Noted(torch.overrides.TorchFunctionMode):
        seen: list = []

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.seen.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.ones(1)
    with private.DisableTorchFunction(), Noted() as noted:
        x.abs()
        with private.EnableTorchFunction():
            x.neg()
    assert noted.seen == [torch.Tensor.neg]


def test_leaves_of_nested_arguments():
    assert private.tree_leaves(((1, [2]), {"a": 3})) == [1, 2, 3]


def test_autocast_is_detected():
    assert not private.any_autocast()
    with torch.autocast("cpu"):
        assert private.any_autocast()


def test_kernels_are_found():
    assert private.has_kernel("aten::add.Tensor", "CPU")


def test_gradients_of_a_single_level():
    class Twice(private.SingleLevelFunction):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    def twice(x):
        with private.enable_single_level_autograd_function(), private.enable_forward_gradients(True):
            return Twice.apply(x)

    assert torch.func.grad(twice)(torch.tensor(1.0)) == 2
    with pytest.raises(RuntimeError, match="SingleLevelFunction"):
        torch.func.grad(Twice.apply)(torch.tensor(1.0))


def test_results_are_assumed_constant():
    def read() -> int:
        with open(__file__) as file:  # what the compiler cannot trace
            return len(file.read(2))

    constant = private.assume_constant_result(lambda: read())
    assert torch.compile(lambda x: x * constant(), backend="eager", fullgraph=True)(torch.ones(1)) == 2
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(lambda x: x * read(), backend="eager", fullgraph=True)(torch.ones(1))
