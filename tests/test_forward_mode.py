"""Forward mode and second derivatives by torch.func and torch.autograd, also compiled."""

from __future__ import annotations

import gc
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import mru_kernels as mk
from mru_kernels import backends
from tests.drawn import assert_close, assert_equal, draw
from tests.test_derivatives import DOUBLE, hessian_products, recurrence


def functions(backend: str, device: torch.device):
    """A function of `[2, 6, 3]` for each cell, and the name of the cell."""
    low = draw(3, dtype=DOUBLE, device=device)
    yield "bmru", lambda x: mk.bmru(x, low, epsilon=0.5, alpha=low, backend=backend)[0]
    yield "schmitt", lambda x: mk.schmitt(x, low, low + 0.5, backend=backend)[0]
    yield "leaky_integrator", lambda x: mk.leaky_integrator(x, x.sigmoid(), backend=backend)[0]
    yield "linear_recurrence", lambda x: mk.linear_recurrence(x.sigmoid(), x, backend=backend)[0]


def directional(f, x: Tensor, v: Tensor) -> Tensor:
    """The derivative along v, from the Jacobian in reverse mode."""
    return torch.tensordot(jacrev(f)(x), v, v.dim())


def _with_tangent(f, x: Tensor, v: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent


def _jacobian(f, x: Tensor, v: Tensor) -> Tensor:
    j = torch.autograd.functional.jacobian(f, x, vectorize=True, strategy="forward-mode")
    return torch.tensordot(j, v, v.dim())


FORWARD_MODE = {
    "jvp": lambda f, x, v: jvp(f, (x,), (v,))[1],
    "dual": _with_tangent,
    "jacfwd": lambda f, x, v: torch.tensordot(jacfwd(f)(x), v, v.dim()),
    "jacobian": _jacobian,
    "linearize": lambda f, x, v: linearize(f, x)[1](v),
    "vmap": lambda f, x, v: vmap(lambda x, v: jvp(f, (x,), (v,))[1])(x[:, None], v[:, None]).squeeze(1),
    "vmap of tangents": lambda f, x, v: vmap(lambda v: jvp(f, (x,), (v,))[1])(torch.stack([v, v]))[1],
    "by the tangent": lambda f, x, v: jacrev(lambda v: jvp(f, (x,), (v,))[1].sum())(v) * v,
}


@pytest.mark.parametrize("way", FORWARD_MODE)
def test_forward_mode(backend, device, way):
    x, v = (draw(2, 6, 3, dtype=DOUBLE, seed=i, device=device) for i in range(2))
    for _, f in functions(backend, device):
        got, expected = FORWARD_MODE[way](f, x, v), directional(f, x, v)
        if way == "by the tangent":
            got, expected = got.sum(), expected.sum()
        assert_close([got], [expected])


def test_forward_mode_of_steps_and_modules(backend, device):
    x, state, low = draw(4, 3, device=device), draw(4, 3, seed=1, device=device), draw(3, device=device)
    with patch.object(backends, "_CHOSEN", backend):
        step = jvp(lambda x, s: mk.bmru_step(x, low, s, epsilon=0.5), (x, state), (state, x))
        scan = jvp(lambda x, s: mk.bmru(x[:, None], low, s, epsilon=0.5), (x, state), (state, x))
        assert_equal(*([h.flatten(1), final] for h, final in ((step[1]), (scan[1]))))
        for make in (mk.BMRU, mk.AlphaCMRU, mk.FirstQuadrantBMRU, mk.MinGRU, mk.LRU):
            module = make(3, 4, dtype=DOUBLE).to(device)
            x, v = (draw(2, 6, 3, dtype=DOUBLE, seed=i, device=device) for i in range(2))
            assert_close(
                [jvp(lambda x, m=module: m(x)[0], (x,), (v,))[1]], [directional(lambda x, m=module: m(x)[0], x, v)]
            )


def second_derivatives(f, x: Tensor, v: Tensor):
    """Ways to second derivatives, as functions."""

    def loss(x):
        return f(x).square().sum()

    yield lambda: jvp(grad(loss), (x,), (v,))
    yield lambda: hessian(loss)(x)
    yield lambda: grad(lambda x: jvp(loss, (x,), (v,))[1])(x)
    yield lambda: grad(lambda x: grad(loss)(x).sum())(x)
    yield lambda: jvp(lambda x: jvp(f, (x,), (v,))[1], (x,), (v,))
    yield lambda: grad(loss)(x.clone().requires_grad_()).sum().backward()
    yield lambda: torch.autograd.functional.hvp(loss, x, v)
    yield lambda: torch.autograd.functional.hessian(loss, x, vectorize=True)


def test_other_second_derivatives_are_refused_by_name(backend, device):
    x, v = (draw(2, 6, 3, dtype=DOUBLE, seed=i, device=device) for i in range(2))
    for cell, f in functions(backend, device):
        for way in second_derivatives(f, x, v):
            if cell == "linear_recurrence":
                way()
                continue
            with pytest.raises(NotImplementedError, match=f"mru::{cell}: there is no second derivative"):
                way()
        assert_close([jvp(f, (x,), (v,))[1]], [directional(f, x, v)])  # first derivatives still work


def test_hessians(backend, device):
    x = draw(1, 4, 2, dtype=DOUBLE, device=device)

    def loss(x, backend=backend):
        return mk.linear_recurrence(x.sigmoid(), x, x[:, 0], backend=backend)[0].pow(3).sum()

    expected = hessian(partial(loss, backend="torch"))(x)
    assert_close([hessian(loss)(x), jacrev(jacrev(loss))(x), jacfwd(jacfwd(loss))(x)], [expected] * 3)
    for vectorize in (False, True):
        assert_close([torch.autograd.functional.hessian(loss, x, vectorize=vectorize)], [expected])
    mapped = vmap(hessian(loss))(torch.stack([x, 2 * x]))
    assert_close(mapped, [expected, hessian(partial(loss, backend="torch"))(2 * x)])


COMPILED = {
    "jvp": lambda f, x, v: jvp(f, (x,), (v,))[1],
    "dual": _with_tangent,
    "jacfwd": lambda f, x, v: jacfwd(f)(x),
    "vmap": lambda f, x, v: vmap(lambda v: jvp(f, (x,), (v,))[1])(torch.stack([x, v])),
}


@pytest.mark.parametrize("way", COMPILED)
def test_compiled_forward_mode(backend, device, way):
    x, v = (draw(2, 6, 3, dtype=DOUBLE, seed=i, device=device) for i in range(2))
    fs = [f for _, f in functions(backend, device)]

    def every(x, v):
        return [COMPILED[way](f, x, v) for f in fs]

    compiled = torch.compile(every, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, v), every(x, v))


def test_compiled_second_derivatives(backend, device):
    x, v = (draw(2, 6, 3, dtype=DOUBLE, seed=i, device=device) for i in range(2))
    *refused, (_, f) = functions(backend, device)

    def loss(x):
        return f(x).pow(3).sum()

    def products(x, v):
        ways = hessian_products(loss, x, v)
        return [next(ways), next(ways), next(ways), hessian(loss)(x)]

    compiled = torch.compile(products, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, v), products(x, v))
    of_bmru = torch.compile(
        grad(lambda x: grad(lambda x: refused[0][1](x).square().sum())(x).sum()), backend="aot_eager"
    )
    with pytest.raises(Exception, match="mru::bmru: there is no second derivative"):
        of_bmru(x)


# ------------------------------------------------------------------------------------------------ what is kept


class Ops(TorchDispatchMode):
    """The names of the package's ops that run."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mru" and "segment" not in func._schema.name:
            self.names.append(func._schema.name.removeprefix("mru::"))
        return func(*args, **(kwargs or {}))


def test_a_first_derivative_runs_the_two_kernels_alone(backend, device):
    """A graph of the gradient changes no bit of it, and its scans run when a second derivative is taken."""
    op, leaves = recurrence(torch.float32, False, False, False, backend, device)
    grads = []
    for create_graph in (False, True):
        with Ops() as ran:
            h, _ = op(*leaves)
            grads.append(torch.autograd.grad(h.sum(), leaves, create_graph=create_graph))
        assert ran.names == ["linear_recurrence", "linear_recurrence_backward"]
    assert_equal([t.detach() for t in grads[1]], list(grads[0]))
    assert grads[1][0].requires_grad


def test_tangents_keep_no_tensor_alive(backend, device):
    """Without the garbage collector; the first calls make constants that stay."""
    x, v = (draw(2, 6, 3, dtype=DOUBLE, device=device) for _ in range(2))
    alive = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            for _, f in functions(backend, device):
                _with_tangent(f, x.clone().requires_grad_(), v)
            alive.append(sum(issubclass(type(t), Tensor) for t in gc.get_objects()))
    finally:
        gc.enable()
    assert alive[0] == alive[1]


def test_an_epsilon_with_a_tangent_is_refused(backend, device):
    x, epsilon = draw(2, 6, 3, device=device), torch.tensor(0.5)
    with pytest.raises(ValueError, match=r"epsilon: expected a schedule, not a trained .* has a tangent"):
        jvp(lambda e: mk.bmru(x, x, epsilon=e, backend=backend)[0], (epsilon,), (epsilon,))


def test_traces_and_parallel_scans_refuse_forward_mode(device, group_of_one):
    x = draw(1, 6, 3, device=device)
    feed = mk.stream(mk.BMRU(3, 4).to(device), gradient="traces")
    with pytest.raises(NotImplementedError, match="traces: there is no forward-mode derivative"):
        jvp(feed, (x,), (x,))
    scan = mk.distributed.sequence_parallel(mk.bmru)
    with pytest.raises(NotImplementedError, match="sequence_parallel: there is no forward-mode derivative"):
        jvp(lambda x: scan(x, x)[0], (x,), (x,))
