"""minGRU and minLSTM: what tests of every cell do not show."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

import mru_kernels as mk
import python_ref
from bench import inputs
from mru_kernels.cells import min_gates
from mru_kernels.cells.min_gru import min_gru_packed, min_gru_packed_step
from mru_kernels.cells.min_lstm import min_lstm_packed, min_lstm_packed_step
from tests import calls
from tests.drawn import assert_equal, draw, results_and_grads

PACKED = {"min_gru": (min_gru_packed, min_gru_packed_step), "min_lstm": (min_lstm_packed, min_lstm_packed_step)}
CELLS = list(PACKED)
COUNT = {"min_gru": 2, "min_lstm": 3}


def min_gru(candidate: Tensor, update: Tensor) -> mk.Affine:
    z = update.sigmoid()
    return mk.Affine(1 - z, z * torch.where(candidate >= 0, candidate + 0.5, candidate.sigmoid()))


def min_lstm(candidate: Tensor, update: Tensor, forget: Tensor) -> mk.Affine:
    i, f = update.sigmoid(), forget.sigmoid()
    return mk.Affine(f / (f + i), i / (f + i) * torch.where(candidate >= 0, candidate + 0.5, candidate.sigmoid()))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_defined_cell_of_the_same_gates_agrees(cell, dtype):
    """Of gates that do not saturate, to a few units in the last place."""
    defined = mk.define_cell(f"test_gates_of_{cell}", globals()[cell])
    streams = [draw(2, 150, 19, dtype=dtype, seed=i) for i in range(COUNT[cell])]
    ours, theirs = (results_and_grads(op, *streams) for op in (getattr(mk, cell), defined))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=16 * torch.finfo(dtype).eps * float(other.abs().max()))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", list(inputs.DTYPES.values()), ids=str)
def test_packed_gates_equal_streams(backend, device, cell, dtype):
    """And the gradient of the gates is one tensor. A step equals a scan of one."""
    count, (packed, step) = COUNT[cell], PACKED[cell]
    gates, state = (draw(*s, dtype=dtype, device=device) for s in ((2, 70, 5 * count), (2, 5)))
    op = calls.op_of(cell, backend)
    one = results_and_grads(lambda g, s: packed(g, s, backend=backend), gates, state)
    other = results_and_grads(lambda g, s: op(*g.chunk(count, -1), s), gates, state)
    assert_equal(one, other)
    state = state.to(one[1].dtype)
    h, after = step(gates[:, 0], state)
    assert_equal([h, after], list(getattr(mk, f"{cell}_step")(*gates[:, 0].chunk(count, -1), state)))
    assert_equal([h.unsqueeze(1), after], list(packed(gates[:, :1], state)))


def special(count: int, dtype: torch.dtype) -> list[Tensor]:
    """Every combination of special values of the streams, `[1, 1, D]`."""
    values = [float("-inf"), -1e4, -30.0, -0.0, 0.0, 1.5, 30.0, 1e4, float("inf"), float("nan")]
    return [torch.tensor(v, dtype=dtype).view(1, 1, -1) for v in zip(*product(values, repeat=count), strict=True)]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_infinite_inputs_and_nan(backend, device, cell, dtype):
    """A state is what the gates in torch give before `linear_recurrence`, NaN and infinities included."""
    streams = special(COUNT[cell], dtype)
    wide = [t.to(torch.float64 if dtype == torch.float64 else torch.float32) for t in streams]
    decay, update = getattr(min_gates, cell)(wide, [])
    state = torch.full_like(wide[0][0], 2.0)
    composed = mk.linear_recurrence(decay, update, state)
    got = getattr(mk, cell)(*(t.to(device) for t in streams), state.to(device), backend=backend)
    for one, other in zip(got, composed, strict=True):
        # Triton's interpreter truncates to bfloat16.
        last_place = {"rtol": torch.finfo(one.dtype).eps, "atol": 1e-5} if one.dtype == torch.bfloat16 else {}
        rounded = other.to(one.dtype).to(other.dtype)
        torch.testing.assert_close(one.cpu().to(other.dtype), rounded, equal_nan=True, **last_place)
    reference = getattr(python_ref, cell)(*streams, state)
    for one, other in zip(composed, reference, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_states_of_infinite_gates():
    """The cases whose values follow from the formulas: z is 0 or 1, and of two infinite gates none decides."""
    inf, one = torch.tensor(torch.inf), torch.tensor(1.0)
    step, state = mk.min_lstm_step, torch.tensor([[2.0]])

    def lstm(update: Tensor, forget: Tensor) -> float:
        return step(one.view(1, 1), update.view(1, 1), forget.view(1, 1), state)[0].item()

    assert [mk.min_gru_step(one.view(1, 1), u.view(1, 1), state)[0].item() for u in (-inf, inf)] == [2.0, 1.5]
    assert [lstm(inf, inf), lstm(inf, -inf), lstm(-inf, inf), lstm(-inf, one), lstm(one, -inf)] == [
        1.75, 1.5, 2.0, 2.0, 1.5,
    ]  # fmt: skip
    assert torch.tensor(lstm(-inf, -inf)).isnan()


@pytest.mark.parametrize("cell", CELLS)
def test_gates_that_underflow_keep_their_shares(backend, device, cell):
    """Gradients of gates far below 0 are not rounded to 0, and decays near 1 are not rounded to 1."""
    far = torch.full((1, 64, 3), -60.0, device=device)
    if cell == "min_lstm":  # both gates are 1e-26 in size; their shares are 2 and 1 of 3
        h, _ = mk.min_lstm(
            far + 60, far, far + torch.tensor(2.0).log(), torch.ones(1, 3, device=device), backend=backend
        )
        torch.testing.assert_close(h[0, 0], torch.full_like(h[0, 0], 2 / 3 + 0.5 / 3), rtol=1e-5, atol=0)
        return
    update = far.requires_grad_()
    h, _ = mk.min_gru(torch.zeros_like(far), update, torch.ones(1, 3, device=device), backend=backend)
    (got,) = torch.autograd.grad(h.sum(), update)
    assert (got < 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_decays_near_1_in_half_precision(backend, device, cell, dtype):
    """A decay of 1 - 1.2e-4, which both dtypes would round to 1, still decays in 1000 steps."""
    zeros = torch.zeros(1, 1000, 2, dtype=dtype, device=device)
    gates = [zeros - 9] if cell == "min_gru" else [zeros - 9, zeros + 9]
    _, state = getattr(mk, cell)(zeros - 100, *gates, torch.ones(1, 2, device=device), backend=backend)
    z = torch.tensor(-9.0, dtype=torch.float64).sigmoid()
    decay = (1 - z if cell == "min_gru" else (1 - z) / ((1 - z) + z)).item()
    torch.testing.assert_close(state.cpu(), torch.full((1, 2), decay**1000), rtol=1e-4, atol=0)
