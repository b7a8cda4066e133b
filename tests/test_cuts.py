"""A scan in segments equals a whole scan, also where composed states leave the range of their dtype."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from bench import errors, inputs, verify
from tests import calls

TIME = 200  # steps: three segments of 64 and a rest, or one segment of 128 and a rest
LEAD = 30  # steps of a packed sequence before the call
CHANNELS = 5
DTYPES = inputs.DTYPES | inputs.COMPLEX_DTYPES


class Draw:
    """Numbers whose products reach the ends of the range of the state dtype within a segment."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.state = dtype, errors.state_dtype(dtype)
        self.wide = dtype in (torch.float64, torch.complex128)
        self.generator = torch.Generator().manual_seed(0)
        self.grows = 2.0**16 if self.wide else 4.0  # overflows in 64 steps
        self.falls = 2.0**-20 if self.wide else 0.17  # underflows to 0 in 64 steps
        self.fades = 2.0**-16.3 if self.wide else 0.23  # becomes a subnormal number of few bits in 64 steps
        self.huge = 2.0**800 if self.wide else 2.0**110

    def stream(self, *parts: tuple[int, float]) -> Tensor:
        """A stream [1, T, D] of parts (steps, value). The last part fills the rest."""
        rows = torch.cat([torch.full((steps,), value, dtype=torch.float64) for steps, value in parts])
        rows = torch.cat([rows, rows[-1:].expand(TIME - len(rows))])
        return rows[None, :, None].expand(1, TIME, CHANNELS).to(self.dtype).contiguous()

    def normal(self) -> Tensor:
        return torch.randn(1, TIME, CHANNELS, generator=self.generator).to(self.dtype)

    def channel(self, value: float) -> Tensor:
        return torch.full((CHANNELS,), value, dtype=self.state)

    def initial(self, value: float) -> Tensor:
        return torch.full((1, CHANNELS), value, dtype=self.state)


def linear(decay: Tensor, update: Tensor, initial_state: Tensor | None = None) -> inputs.Call:
    tensors = {"update": update, "decay": decay}
    if initial_state is not None:
        tensors["initial_state"] = initial_state
    return inputs.call("linear_recurrence", tensors, {})


def bmru(threshold: Tensor, epsilon: float, candidate: Tensor, **tensors: Tensor) -> inputs.Call:
    return inputs.call("bmru", {"candidate": candidate, "threshold": threshold} | tensors, {"epsilon": epsilon})


def one_infinity(x: Tensor, at: int) -> Tensor:
    x = x.clone()
    x[:, at, 1] = math.inf
    return x


def early_gradient(call: inputs.Call, steps: int) -> inputs.Call:
    """The call with zero gradients of h from step `steps` on, and of the final state."""
    grad_h = call.grad_h.clone()
    grad_h[:, steps:] = 0
    return replace(call, grad_h=grad_h, grad_final=torch.zeros_like(call.grad_final))


def held_gradient(x: Draw, epsilon: float, threshold: Tensor, steps: int = 64) -> inputs.Call:
    """The sum of the gradients of h overflows, but not together with the gradient of the final state."""
    alpha = x.channel(torch.finfo(x.state).max / steps * 1.2)
    call = bmru(threshold, epsilon, x.stream((1, 1.0)), alpha=alpha, initial_state=x.initial(1.0))
    grad_h = torch.zeros_like(call.grad_h)
    grad_h[:, 64 : 64 + steps] = 1.0
    return replace(call, grad_h=grad_h, grad_final=torch.full_like(call.grad_final, -torch.finfo(x.state).max / 2))


#: Calls of one sequence of `TIME` steps, in scan order.
CASES = {
    "late update": lambda x: linear(x.stream((1, x.grows)), x.stream((TIME - 10, 0.0), (1, 1.0))),
    "late update, decay per channel": lambda x: linear(x.channel(x.grows), x.stream((TIME - 10, 0.0), (1, 1.0))),
    "last segment but one grows": lambda x: linear(
        x.stream((128, 1.0), (64, x.grows), (1, 1.0)), x.stream((TIME - 2, 0.0), (1, 1.0))
    ),
    "no gradient where it grows": lambda x: early_gradient(
        linear(x.stream((64, 1.0), (64, x.grows), (1, 1.0)), x.stream((1, 0.0))), 64
    ),
    "small state that grows": lambda x: linear(
        x.stream((70, x.grows), (1, 1 / x.grows)), x.stream((1, 0.0)), x.initial(1 / x.huge)
    ),
    "huge state that falls and grows": lambda x: linear(
        x.stream((TIME // 2, 1 / x.grows), (1, x.grows)), x.stream((1, 0.0)), x.initial(x.huge)
    ),
    "huge state that fades": lambda x: linear(
        x.stream((64, x.fades), (1, 1.0)), x.stream((1, 0.0)), x.initial(x.huge)
    ),
    "factor of few bits that grows": lambda x: linear(
        x.stream((65, 1.0), (64, x.fades), (1, x.grows)), x.stream((1, 0.0)), x.initial(x.huge)
    ),
    "overflow": lambda x: linear(x.stream((1, x.grows)), x.normal()),
    "infinite state": lambda x: linear(x.stream((1, x.falls)), x.normal(), x.initial(-math.inf)),
    "infinite update": lambda x: linear(x.stream((1, x.falls)), one_infinity(x.normal(), 40)),
    "zeros": lambda x: linear((x.normal().real > 0).to(x.dtype), x.normal(), x.initial(1.0)),
    "zeros after an infinity": lambda x: linear(
        x.stream((90, 1.0), (1, 0.0), (1, 0.5)), x.normal(), x.initial(math.inf)
    ),
    "infinite state of a leaky unit": lambda x: bmru(
        x.stream((1, 0.5)), x.falls, x.stream((1, 1.0)), initial_state=x.initial(math.inf)
    ),
    "infinite state with an amplitude": lambda x: bmru(
        x.channel(0.5), x.falls, x.normal(), amplitude=x.normal(), initial_state=x.initial(math.inf)
    ),
    "infinite state of a Schmitt trigger": lambda x: inputs.call(
        "schmitt", {"candidate": x.normal(), "low": x.channel(-0.5), "high": x.channel(0.5),
                    "initial_state": x.initial(math.inf)}, {"epsilon": x.falls},
    ),
    "gradient held": lambda x: held_gradient(x, 0.0, x.channel(2.0)),
    "gradient of what counts": lambda x: held_gradient(x, 1.0, x.stream((1, 0.5))),
}  # fmt: skip


def cases() -> list[tuple[str, str]]:
    linear_only = list(CASES).index("infinite state of a leaky unit")
    return [
        (name, dtype)
        for i, name in enumerate(CASES)
        for dtype in (DTYPES if i < linear_only else inputs.DTYPES)
    ]  # fmt: skip


def positive(call: inputs.Call) -> inputs.Call:
    """The call with positive gradients, so that no sum cancels."""
    grads = {"grad_h": call.grad_h.abs().to(call.grad_h.dtype), "grad_final": call.grad_final.abs()}
    return replace(call, **{name: grad.to(getattr(call, name).dtype) for name, grad in grads.items()})


def flipped(call: inputs.Call) -> inputs.Call:
    """The same call with reversed time, from the last step to the first."""
    tensors = {name: t.flip(1) if t.dim() == 3 else t for name, t in call.tensors.items()}
    return replace(call, tensors=tensors, grad_h=call.grad_h.flip(1), settings=call.settings | {"reverse": True})


def packed(call: inputs.Call) -> inputs.Call:
    """Four packed sequences: the first steps of the call, two empty sequences, and the call."""

    def longer(t: Tensor) -> Tensor:
        return torch.cat([t[:, :LEAD], t], 1) if t.dim() == 3 else t.expand(4, -1).contiguous() if t.dim() == 2 else t

    settings = call.settings | {"cu_seqlens": torch.tensor([0, LEAD, LEAD, LEAD, LEAD + TIME])}
    tensors = {name: longer(t) for name, t in call.tensors.items()}
    return replace(
        call, tensors=tensors, settings=settings, grad_h=longer(call.grad_h), grad_final=longer(call.grad_final)
    )


def assert_same(cut: dict[str, Tensor], whole: dict[str, Tensor]) -> None:
    """Elements are equal where they are NaN or infinite, and elsewhere agree up to rounding."""
    for name, expected in whole.items():
        got = cut[name]
        assert torch.equal(got.isnan(), expected.isnan()), name
        finite = expected.isfinite()
        assert errors.same_values(got[~finite], expected[~finite]), name
        got, expected = errors.wide(got[finite]), errors.wide(expected[finite])
        limits = torch.finfo(cut[name].dtype)
        allowed = 16 * errors.LIMITS[cut[name].dtype] * expected.abs() + limits.tiny
        assert ((got - expected).abs() <= allowed).all(), name


FORMS = ["forward", "reverse", "packed and reverse"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "dtype"), cases())
def test_every_cut_equals_the_whole(backend, device, name, dtype, form):
    call = CASES[name](Draw(DTYPES[dtype]))
    call = call if "gradient" in name else positive(call)
    call = packed(call) if "packed" in form else call
    call = flipped(call) if "reverse" in form else call
    op = calls.op_of(call.cell, backend)
    with calls.segments(backend, 0):
        whole = calls.run(call, op, device)
    for steps in (64, 128):
        with calls.segments(backend, steps):
            assert_same(calls.run(call, op, device), whole)


@pytest.mark.parametrize("name", ["late update, decay per channel", "gradient held"])
def test_no_state_saved_and_any_number_of_threads(backend, device, name):
    call = CASES[name](Draw(torch.float32))
    op = calls.op_of(call.cell, backend)
    with calls.segments(backend, 64):
        results = calls.run(call, op, device)
        assert_same(calls.run(call, partial(op, chunk_size=None), device), results)
        for count in (1, 3):
            with verify.threads(count):
                calls.assert_same_bits(calls.run(call, op, device), results)


@pytest.mark.parametrize("channels", [8, 3])
def test_where_the_backend_cuts_time(backend, device, largest, channels):
    """The backend cuts few sequences and does not cut many sequences."""
    if largest[0] < 200:
        pytest.skip("too long for an interpreted backend")
    decay = torch.full((1, 4096, channels), 4.0)
    update = torch.zeros_like(decay)
    update[:, -10:] = 1.0
    few, many = linear(decay, update), linear(decay.expand(16, -1, -1), update.expand(16, -1, -1))
    op = calls.op_of("linear_recurrence", backend)
    many = replace(many, grad_h=few.grad_h.expand_as(many.grad_h), grad_final=few.grad_final.expand(16, -1))
    whole = {name: t[:1] for name, t in calls.run(many, op, device).items()}
    assert whole["final_state"].isfinite().all()
    assert_same(calls.run(few, op, device), whole)


LEAPS = {
    "state": lambda x: early_gradient(
        linear(x.stream((40, 1.0), (8, 1e10), (1, 0.9)), x.stream((48, 0.0), (1, 1.0))), 40
    ),
    "gradient held": lambda x: held_gradient(x, 0.0, x.channel(2.0), steps=8),
    "gradient of what counts": lambda x: held_gradient(x, 1.0, x.stream((1, 0.5)), steps=8),
}


@pytest.mark.parametrize("steps", [0, 64])
@pytest.mark.parametrize("name", LEAPS)
def test_few_steps_that_leave_the_range(backend, device, name, steps):
    """A backend may compose the maps of a few steps even in a whole scan, so compare with the reference."""
    call = LEAPS[name](Draw(torch.float32))
    op = calls.op_of(call.cell, backend)
    with calls.segments(backend, steps):
        calls.assert_right(call, op, device)


# ------------------------------------------------------------------------------------------------ scanned once


def assert_cut(call: inputs.Call, backend: str, device: torch.device, steps: int, name: str) -> None:
    """Some bits of a result differ from the whole scan, so the call was not scanned again."""
    op = calls.op_of(call.cell, backend)
    with calls.segments(backend, 0):
        whole = calls.run(call, op, device)[name]
    with calls.segments(backend, steps):
        assert not torch.equal(calls.run(call, op, device)[name], whole)


def test_ordinary_numbers_are_not_scanned_again(backend, device):
    x = Draw(torch.float32)
    call = linear(x.stream((1, 0.98)), x.normal(), x.initial(1.0))
    for name in ("h", "update"):
        assert_cut(call, backend, device, 64, name)


def test_gradients_that_depend_on_the_state_are_not_scanned_again(backend, device):
    """The maps of the adjoint come from a backward pass of their own."""
    x = Draw(torch.float32)
    call = inputs.call("leaky_integrator", {"input": x.normal(), "decay": x.stream((1, 0.98))}, {})
    assert_cut(call, backend, device, 64, "input")


def test_states_that_are_small_by_chance_are_not_scanned_again(backend, device):
    """The state that leaves a segment is small because its terms cancel, so its relative rounding error is large."""
    x = Draw(torch.float32)
    call = linear(x.stream((1, 0.8)), x.normal())
    decay, update = call.tensors["decay"], call.tensors["update"]
    offset = torch.zeros(1, CHANNELS)
    for t in range(64, 127):
        offset = decay[:, t] * offset + update[:, t]
    update[:, 127] = -(decay[:, 127] * offset)
    assert_cut(call, backend, device, 64, "h")


def test_gradients_that_cancel_are_not_scanned_again(backend, device):
    x = Draw(torch.float32)
    candidate = x.stream((1, 1.0), (TIME - 2, 0.0), (1, 1.0))  # the first and the last step write
    call = bmru(x.channel(0.5), 0.0, candidate)
    grad_h = x.normal()
    grad_h[:, 128] = -grad_h[:, 129:-1].flip(1).cumsum(1)[:, -1]
    assert_cut(replace(call, grad_h=grad_h), backend, device, 128, "candidate")
