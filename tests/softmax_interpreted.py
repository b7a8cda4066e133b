"""The softmax recurrence in Triton under its interpreter, and faults planted into copies of its kernels.

Run by test_softmax_triton.py, where TRITON_INTERPRET=1 is set in time. A check must catch each fault.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mru_kernels.softmax import plain
from mru_kernels.softmax import triton as backend
from mru_kernels.softmax.layout import split_gates
from mru_kernels.softmax.state import split_state
from tests.softmax_calls import draw, error

CHUNK = 16
INF = torch.inf


def ops() -> ModuleType:
    return importlib.import_module(f"{backend.__name__}.ops")


def plant(monkeypatch, folder: Path, old: str, new: str) -> None:
    """Let calls take a copy of the kernels in which the text `old`, which occurs once, is `new`."""
    source, copy = Path(backend.__path__[0]), folder / "triton"
    found = [path.name for path in source.glob("*.py") for _ in range(path.read_text().count(old))]
    assert len(found) == 1, f"expected the text once, got it in {found}: {old}"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / found[0]).write_text((copy / found[0]).read_text().replace(old, new))
    for name in [name for name in sys.modules if name.startswith(f"{backend.__name__}.")]:
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(backend, name.rpartition(".")[2], raising=False)
    monkeypatch.setattr(backend, "__path__", [str(copy)])


def arguments(call, offsets=None, reverse=False, gates=False) -> list:
    """Those of the op up to `reverse`."""
    score, value, heads = call["score"], call["value"], 0
    if gates:
        score, value, heads = torch.cat([score, value], -1), None, score.shape[-1]
    rest = (call.get(name) for name in ("decay", "bonus", "initial_state"))
    return [score, value, heads, *rest, None if offsets is None else torch.tensor(offsets), reverse]


def between(call, begin: int, end: int) -> dict[str, torch.Tensor]:
    """The call of some of the steps."""
    return {name: t[:, begin:end] if t.dim() == 3 else t for name, t in call.items()}


def forward(call, segment=0, **options) -> list[torch.Tensor]:
    """Y and the final state."""
    return ops().forward(*arguments(call, **options), CHUNK, segment, False)


def equals_the_loop(segment=0, offsets=None, reverse=False, gates=False, limit=1e-11, **drawn) -> None:
    """Results and gradients equal those of the loop in torch and of autograd."""
    sequences = None if offsets is None else len(offsets) - 1
    call = draw(heads=2, sequences=sequences, batch=1, state=True, masked=0.2, scale=5.0, **drawn)
    args = arguments(call, offsets, reverse, gates)
    leaves = [t.clone().requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in args]
    y, final = plain.scan(*leaves, CHUNK)
    torch.manual_seed(1)
    grad_y, grad_final = torch.randn_like(y), torch.randn_like(final)
    high, low = split_state(grad_final, 2)[1:]
    high.masked_fill_(split_state(final, 2)[1].isinf(), 0.0)
    inputs = [t for t in leaves if isinstance(t, torch.Tensor) and t.requires_grad]
    finite = torch.where(final.isfinite(), final, 0.0)
    loss = (y * grad_y).sum() + (finite * grad_final).sum() - (split_state(final, 2)[2] * low).sum()
    wanted = torch.autograd.grad(loss, inputs)
    *results, borders = ops().forward(*args, CHUNK, segment, True)
    grads = ops().backward(grad_y, grad_final, *args, CHUNK, segment, borders)
    channels = y.shape[-1] + 2  # of states without z, which may differ by a rounding error
    for got, right in zip([results[0], results[1][:, :channels]], [y, final[:, :channels]], strict=True):
        assert error(got, right) < limit
    for i, (got, right) in enumerate(zip(grads, wanted, strict=True)):
        of_state = i == len(grads) - 1
        assert error(*(t[:, :channels] if of_state else t for t in (got, right))) < limit, i


def whole_sequences() -> None:
    equals_the_loop(time=37, decay="stream", bonus=True)


def whole_sequences_of_heads() -> None:
    equals_the_loop(time=37, group=3, decay="head", bonus=True, reverse=True)


def segments() -> None:
    equals_the_loop(time=70, decay="stream", bonus=True, segment=16, reverse=True)


def segments_of_heads() -> None:
    equals_the_loop(time=70, group=3, decay="head", segment=32)


def packed_sequences() -> None:
    equals_the_loop(time=70, group=3, decay="stream", offsets=[0, 5, 5, 52, 70], segment=16, reverse=True, gates=True)


def packed_sequences_read_after_the_update() -> None:
    equals_the_loop(time=70, decay="head", offsets=[0, 5, 5, 52, 70])


def groups_of_segments() -> None:
    """Results stay the same when there are many segments, so that groups of them are composed first."""
    launch = importlib.import_module(f"{backend.__name__}.launch")
    usual, launch._MOST_WALKED = launch._MOST_WALKED, 3
    try:
        equals_the_loop(time=150, decay="head", segment=16)
    finally:
        launch._MOST_WALKED = usual


def precision(segment=0) -> None:
    """Large scores under slow decays: with one float of log weight, or another order, digits are lost."""
    for bonus in (False, True):
        call = draw(
            batch=1, time=80, heads=8, decay="head", bonus=bonus, scale=0.3, shift=1e5, slowest=-1e-4, fastest=-1e-2,
            dtype=torch.float32,
        )  # fmt: skip
        y, _ = forward(call, segment)
        wide = [None if t is None or isinstance(t, (bool, int)) else t.double() for t in arguments(call)]
        right, _ = plain.scan(*wide[:2], 0, *wide[3:6], None, False, CHUNK)
        assert (y - right).abs().max() < 2e-6


def precision_of_segments() -> None:
    precision(16)


def masks_and_ends() -> None:
    """Where nothing but masks has come y is 0; after a decay of -inf it is the value; a far larger score stays."""
    for group in (1, 2):
        for segment in (0, 16):
            call = draw(time=40, group=group, batch=1, decay="stream", dtype=torch.float32)
            call["score"][:, :9], call["decay"][:, 20], call["score"][:, 30] = -INF, -INF, 150.0
            y, final = forward(call, segment)
            assert torch.equal(y[:, :9], torch.zeros_like(y[:, :9]))
            assert torch.equal(y[:, [9, 20]], call["value"][:, [9, 20]])
            assert torch.equal(y[:, 30:], call["value"][:, 30:31].expand(-1, 10, -1))
            assert split_state(final, 3)[1].isfinite().all()


def nan_stays() -> None:
    """In a head from a score on, and in a channel from a value on."""
    for segment in (0, 16):
        call = draw(time=40, group=2, batch=1, bonus=True, dtype=torch.float32)
        call["score"][0, 25, 1] = call["value"][0, 33, 0] = torch.nan
        y, final = forward(call, segment)
        bad = torch.zeros(40, 6, dtype=torch.bool)
        bad[25:, 2:4] = bad[33:, 0] = True
        assert torch.equal(y[0].isnan(), bad)
        assert torch.equal(final[0, :9].isnan(), torch.tensor([1, 0, 1, 1, 0, 0, 0, 1, 0], dtype=torch.bool))


def exact() -> None:
    """A split at a chunk, packing, and a flip of time change no bit; one step copies its value."""
    for group in (1, 3):
        call = draw(time=53, group=group, batch=1, decay="stream", bonus=True, masked=0.1, dtype=torch.float32)
        y, final = forward(call)
        assert torch.equal(y[:, 0], torch.where(call["score"][:, 0].isinf().repeat_interleave(group, 1), 0.0,
                                                call["value"][:, 0]))  # fmt: skip
        cut = partial(between, call)
        first, state = forward(cut(0, 32))
        rest, last = forward(cut(32, 53) | {"initial_state": state})
        assert torch.equal(torch.cat([first, rest], 1), y)
        assert torch.equal(last, final)
        offsets = [0, 7, 53]
        packed, finals = forward(call, offsets=offsets)
        for n, (begin, end) in enumerate(pairwise(offsets)):
            own, state = forward(cut(begin, end))
            assert torch.equal(own, packed[:, begin:end])
            assert torch.equal(state[0], finals[n])
        flipped, state = forward({k: t.flip(1) if t.dim() == 3 else t for k, t in call.items()}, reverse=True)
        assert torch.equal(flipped.flip(1), y)
        assert torch.equal(state, final)


CHECKS = [
    whole_sequences, whole_sequences_of_heads, segments, segments_of_heads, packed_sequences,
    packed_sequences_read_after_the_update, groups_of_segments, precision, precision_of_segments, masks_and_ends,
    nan_stays, exact,
]  # fmt: skip

#: The check that catches a fault, the text, and what stands there instead.
FAULTS = {
    "the difference of scores comes last": (
        precision, "return (s - tl.maximum(m, least, propagate_nan=tl.PropagateNan.ALL)) - c", "return s - (m + c)",
    ),
    "the bonus is added first": (
        precision, "distance(s, state.m, state.c) + bonus", "distance(s + bonus, state.m, state.c)",
    ),
    "one float of log weight": (precision, "tl.where(share.newer, 0.0, low)", "low * 0.0"),
    "maps in one float": (
        precision_of_segments,
        "Z, z = add(tl.where(newer, second.Z, d), tl.where(newer, second.z, low), logarithm_of_1_plus(e))",
        "Z, z = add(tl.where(newer, second.Z, d), 0.0 * low, logarithm_of_1_plus(e))",
    ),
    "1 / 0": (masks_and_ends, "return tl.where(x == 0, 0.0, result)", "return result"),
    "a mask on nothing is NaN": (
        masks_and_ends, "(s - tl.maximum(m, least, propagate_nan=tl.PropagateNan.ALL)) - c", "(s - m) - c",
    ),
    "a NaN that is lost": (
        nan_stays, "propagate_nan=tl.PropagateNan.ALL", "propagate_nan=tl.PropagateNan.NONE",
    ),
    "infinite decays": (
        masks_and_ends, "tl.where(tl.abs(total) == INFINITY, 0.0, t - (total - high))", "t - (total - high)",
    ),
    "sign of the gap": (whole_sequences, "e = exponential(-tl.abs(gap), form.nvidia)\n    smaller",
                        "e = exponential(-tl.maximum(gap, 0.0), form.nvidia)\n    smaller"),
    "bonus read with the decayed past": (
        whole_sequences, "distance(s, state.m, state.c) + bonus", "distance(s, after.m, after.c) + bonus",
    ),
    "border off by one": (
        packed_sequences_read_after_the_update, "tl.where(begin > 0, saved - i, at.index)",
        "tl.where(begin > 0, tl.maximum(saved - i - 1, 0), at.index)",
    ),
    "denominator not decayed": (whole_sequences, "    mu = mu * A\n", "    mu = mu\n"),
    "sums of the last step only": (whole_sequences_of_heads, "sums.decay + grad.decay", "grad.decay"),
    "sums of one chunk": (
        whole_sequences_of_heads, "put_sums(c, grad_bonus, summed - i", "put_sums(c, grad_bonus, summed",
    ),
    "sums over channels that are not there": (
        whole_sequences_of_heads, "g = tl.where(c.channels.mask, g, 0.0)", "g = g",
    ),
    "gradient of Z at every channel": (
        whole_sequences_of_heads, "c.channels.mask & (tl.arange(0, c.block.group)[None, :] == 0)", "c.channels.mask",
    ),
    "maps that do not decay": (segments, "put(c, maps, at.segment, mean, (total + rest,",
                                 "put(c, maps, at.segment, mean, (total * 0,"),
    "means that do not shift": (segments, "shift += change", "shift += 0.0 * change"),
    "a group too many": (
        groups_of_segments, "group_shifts, unit + 1, n + c.scan.groups", "group_shifts, unit, n + c.scan.groups",
    ),
}  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_faultless(check):
    check()


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_caught(monkeypatch, tmp_path, name):
    check, old, new = FAULTS[name]
    plant(monkeypatch, tmp_path, old, new)
    with pytest.raises(AssertionError):
        check()


def test_layouts_are_read_as_they_are():
    """Rows that start anywhere, any strides over batch and time, and half precision."""
    for group in (1, 3):
        call = draw(time=20, group=group, heads=3, decay="stream", dtype=torch.bfloat16)
        y, final = forward(call)
        wide = torch.full((20, 2, 9 + 3 * group), torch.nan, dtype=torch.bfloat16)
        gates = wide[..., 1 : 4 + 3 * group].transpose(0, 1)
        gates.copy_(torch.cat([call["score"], call["value"]], -1))
        score, value = split_gates(gates, 3)
        decay = wide[..., 4 + 3 * group : 7 + 3 * group].transpose(0, 1)
        decay.copy_(call["decay"])
        got = forward({"score": score, "value": value, "decay": decay})
        assert torch.equal(got[0], y)
        assert torch.equal(got[1], final)


def test_bad_input_is_named():
    call = draw(time=20)
    args = arguments(call)
    with pytest.raises(ValueError, match=r"^chunk: expected a multiple of 16"):
        ops().forward(*args, 24, 0, True)
    with pytest.raises(ValueError, match=r"^segment: expected"):
        ops().forward(*args, 16, -2, True)
    y, final, borders = ops().forward(*args, 16, 0, True)
    with pytest.raises(ValueError, match=r"^borders: expected"):
        ops().backward(y, final, *args, 16, 0, borders[:, :0])
    with pytest.raises(ValueError, match=r"^grad_y: expected"):
        ops().backward(y[:, 1:], final, *args, 16, 0, borders)
