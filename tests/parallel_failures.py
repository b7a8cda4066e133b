"""Jobs of processes: failures of one rank under sequence parallelism raise on every rank."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import mru_kernels as mk
from mru_kernels.distributed import sequence_parallel
from tests.parallel_modules import assert_close, halves, halves_of, make_module


def _raises(rank: int, failing: int, call: Callable[[], Any], error: type[Exception], message: str) -> None:
    """The failing rank raises its own error. The other ranks raise an error that quotes it."""
    if rank == failing:
        with pytest.raises(error, match=message):
            call()
    else:
        with pytest.raises(RuntimeError, match=f"rank {failing} of the group failed: {error.__name__}: .*{message}"):
            call()


def one_rank_fails_before_the_exchange(rank: int) -> None:
    """The last rank fails, every rank raises, and the next call of all ranks works."""
    last = dist.get_world_size() - 1
    fails = rank == last
    op, c, state = sequence_parallel(mk.bmru), torch.randn(2, 10, 3), torch.zeros(2, 3)
    module = mk.BMRU(3, 4, num_layers=2)
    parallel = sequence_parallel(module)
    for call, error, message in (
        (lambda: op(c, c, nonsense=1) if fails else op(c, c), TypeError, "nonsense"),
        (lambda: op(c) if fails else op(c, c), TypeError, "threshold"),
        (lambda: op(c, c, reverse=1 if fails else True), TypeError, "reverse: expected"),
        (lambda: op(c, c, epsilon=2.0 if fails else 1.0), ValueError, "epsilon: expected"),
        (lambda: op(c, c[..., : 2 if fails else 3]), ValueError, "threshold: expected"),
        (lambda: op(c, c, state[: 1 if fails else 2]), ValueError, "initial_state: expected"),
        (lambda: op(c, c, state.to(torch.int32 if fails else torch.float32)), TypeError, "initial_state: expected"),
        (lambda: parallel([1] if fails else c), TypeError, "input: expected a tensor"),
        (lambda: parallel(c[..., : 2 if fails else 3]), ValueError, "input: expected 3 features"),
        (lambda: parallel(c, torch.zeros(1 if fails else 2, 2, 4)), ValueError, "hx: expected shape"),
    ):
        _raises(rank, last, call, error, message)
        _in_line(rank, op)
    # The last rank fails between the scans of a module.
    if fails:
        module._output = lambda *_: (_ for _ in ()).throw(ValueError("no output"))
    _raises(rank, last, lambda: parallel(c), ValueError, "no output")
    _in_line(rank, op)
    # The last rank fails within a scan: only its own threshold has the wrong length.
    error, message = (ValueError, "threshold: expected") if fails else (RuntimeError, f"rank {last} of the group")
    with pytest.raises(error, match=message):
        op(c, c[:, : 9 if fails else 10])
    _in_line(rank, op)
    _initial_state_is_wrong_everywhere(op)
    _in_line(rank, op)


def _initial_state_is_wrong_everywhere(op: Callable[..., Any]) -> None:
    """A wrong initial state raises on every rank, also with an empty segment and where it would broadcast."""
    for wrong in (torch.zeros(1, 3), torch.zeros(2, 3, 1)):
        with pytest.raises(ValueError, match="initial_state: expected"):
            op(torch.randn(2, 0, 3), torch.randn(2, 0, 3), wrong)


def _in_line(rank: int, op: Callable[..., Any]) -> None:
    """All ranks make the same call: rank 0 writes a 1, and the other ranks hold it."""
    c = torch.full((1, 2, 1), 1.0 if rank == 0 else 0.0)
    h, _ = op(c, torch.full((1, 2, 1), 0.5))
    assert bool((h == 1.0).all())


def one_rank_makes_another_call(rank: int) -> None:
    """The error on every rank names both calls, and the next call of all ranks works."""
    other = rank == dist.get_world_size() - 1
    c, one = torch.randn(2, 10, 3), torch.ones(3)
    ops = {op: sequence_parallel(op) for op in (mk.bmru, mk.schmitt, mk.linear_recurrence)}
    modules = {
        name: sequence_parallel(mk.BMRU(3, 4, **settings))
        for name, settings in {"one": {}, "two": {"num_layers": 2}, "scaled": {"surrogate_scale": 2.0}}.items()
    }
    op = ops[mk.bmru]
    pairs = {
        ("bmru", "linear_recurrence"): (lambda: op(c, c), lambda: ops[mk.linear_recurrence](c, c)),
        ("bmru", "schmitt"): (lambda: op(c, c), lambda: ops[mk.schmitt](c, one, one)),
        ("epsilon 0.5", "epsilon 0.25"): (lambda: op(c, c, epsilon=0.5), lambda: op(c, c, epsilon=0.25)),
        ("reverse True", "reverse False"): (lambda: op(c, c, reverse=True), lambda: op(c, c, reverse=False)),
        ("float32", "float64"): (lambda: op(c, c), lambda: op(c.double(), c.double())),
        (r"float32\[2, T, 3\]", r"float32\[1, T, 3\]"): (lambda: op(c, c), lambda: op(c[:1], c[:1])),
        ("surrogate_scale 1.0", "surrogate_scale 2.0"): (
            lambda: op(c, c, surrogate_scale=1.0), lambda: op(c, c, surrogate_scale=2.0),
        ),
        ("checksum", "checksum"): (
            lambda: op(c[:1], c[:1], cu_seqlens=torch.tensor([0, 3, 10 * dist.get_world_size()])),
            lambda: op(c[:1], c[:1], cu_seqlens=torch.tensor([0, 4, 10 * dist.get_world_size()])),
        ),
        ("with gradients", "bmru"): (lambda: op(c.clone().requires_grad_(), c), lambda: op(c, c)),
        ("BMRU", "bmru"): (lambda: modules["one"](c), lambda: op(c, c)),
        (r"BMRU\(3, 4, epsilon", "num_layers=2"): (lambda: modules["one"](c), lambda: modules["two"](c)),
        (r"BMRU\(3, 4, epsilon", "surrogate_scale=2.0"): (lambda: modules["one"](c), lambda: modules["scaled"](c)),
    }  # fmt: skip
    for (first, second), calls in pairs.items():
        with pytest.raises(RuntimeError, match=f"the same call on every rank; rank 0 .*{first}.*; rank .*{second}"):
            calls[other]()
        _in_line(rank, op)
    _one_rank_skips_the_backward_pass(other)


def _one_rank_skips_the_backward_pass(skips: bool) -> None:
    op = sequence_parallel(mk.bmru, dist.new_group())  # the ranks of this group stay out of line
    c = torch.randn(2, 10, 3, requires_grad=True)
    h, _ = op(c, c)
    with pytest.raises(RuntimeError, match=r"rank 0 of the group has backward pass of call 1, .*; rank . has call 2"):
        (lambda: op(c, c) if skips else h.sum().backward())()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"has call 2, .*; rank . has call 3|has call 3, .*; rank . has call 4"):
            op(c, c)


def two_threads(rank: int) -> None:
    """A second thread raises while another is in a call, and does not disturb that call."""
    module = make_module("BMRU")
    parallel = sequence_parallel(module, dist.new_group())
    x, half = halves(rank)
    expected = halves_of(module(x), rank)
    refused: list[Exception] = []

    def other() -> None:
        try:
            parallel(half)
        except RuntimeError as error:
            refused.append(error)

    def run_another(*_: object) -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    hook = module.register_forward_pre_hook(run_another)
    assert_close(parallel(half), expected)
    hook.remove()
    assert [*module.state_dict()] == [*make_module("BMRU").state_dict()]
    assert "expected one thread at a time in a group" in str(refused.pop())
    if rank == 1:  # a call that one rank alone refuses leaves the ranks out of line
        hook = module.register_forward_pre_hook(run_another)
    parallel(half)
    hook.remove()
    with pytest.raises(RuntimeError, match=r"rank 0 of the group has call 4, .*; rank 1 has call 5"):
        parallel(half)


def bad_arguments(rank: int) -> None:
    with pytest.raises(TypeError, match=r"op_or_module: expected one of .*bmru.* got"):
        sequence_parallel(torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"mesh_or_group: expected .* got str"):
        sequence_parallel(mk.bmru, "gloo")
    with pytest.raises(TypeError, match="input: expected a tensor, got list"):
        sequence_parallel(mk.BMRU(3, 4))([1])
    c = torch.randn(1, 10, 3)
    with pytest.raises(ValueError, match="cu_seqlens: expected offsets that rise from 0 to the total length 20"):
        sequence_parallel(mk.bmru)(c, c, cu_seqlens=torch.tensor([0, 10]))
    with pytest.raises(ValueError, match="initial_state: expected"):
        sequence_parallel(mk.bmru)(c, c, torch.zeros(2, 3))
    loss = sequence_parallel(mk.bmru)(c.clone().requires_grad_(), c)[0].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward pass"):
        loss.backward()
