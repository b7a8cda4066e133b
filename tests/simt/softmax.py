"""The CUDA kernels of the softmax recurrence under host execution, and checks of them; a check that fails raises.

`python -m simt.softmax float32` runs the checks of a dtype on the module that MRU_SIMT_MODULE names.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from torch import Tensor

from bench import errors
from mru_kernels.softmax import plain
from simt.softmax_module import control


@dataclass
class Call:
    """The arguments of the ops, and gradients of their results."""

    score: Tensor
    value: Tensor
    decay: Tensor | None = None
    bonus: Tensor | None = None
    initial_state: Tensor | None = None
    cu_seqlens: Tensor | None = None
    reverse: bool = False
    chunk: int = 16
    segment: int = 0
    grad_y: Tensor | None = None
    grad_final: Tensor | None = None

    def arguments(self) -> tuple:
        return (self.score, self.value, 0, self.decay, self.bonus, self.initial_state, self.cu_seqlens, self.reverse,
                self.chunk, self.segment)  # fmt: skip

    def given(self) -> dict[str, Tensor]:
        """The tensors that have gradients."""
        names = ("score", "value", "decay", "bonus", "initial_state")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def forward(self) -> list[Tensor]:
        control()
        return torch.ops.mru.softmax_recurrence.simt(*self.arguments(), True)

    def backward(self, borders: Tensor) -> dict[str, Tensor]:
        gradients = self.grad_y, self.grad_final
        grads = torch.ops.mru.softmax_recurrence_backward.simt(*gradients, *self.arguments(), borders)
        return dict(zip(self.given(), grads, strict=True))

    def results(self) -> dict[str, Tensor]:
        """y, the final state and the gradients by their names."""
        y, final, borders = self.forward()
        return {"y": y, "final": final} | self.backward(borders)


def draw(dtype: torch.dtype, heads: int, group: int, *, batch: int = 2, time: int = 75, decay: str | None = None,
         bonus: bool = False, state: bool = False, scale: float = 2.0, shift: float = 0.0, masked: float = 0.0,
         slow: float = 1.0, offsets: list[int] | None = None, **options) -> Call:  # fmt: skip
    """A call. decay: None, "head" or "stream", at most -`slow`; scores are `shift + scale N(0, 1)`, or -inf."""
    wide, channels = errors.state_dtype(dtype), heads * group
    score = shift + scale * torch.randn(batch, time, heads)
    score[torch.rand(score.shape) < masked] = -torch.inf
    call = Call(score.to(dtype), torch.randn(batch, time, channels).to(dtype), **options)
    if decay is not None:
        shape = (heads,) if decay == "head" else score.shape
        call.decay = (-slow * torch.rand(shape)).to(wide if decay == "head" else dtype)
    if bonus:
        call.bonus = torch.randn(heads).to(wide)
    sequences = batch
    if offsets is not None:
        call.cu_seqlens, sequences = torch.tensor(offsets), len(offsets) - 1
    if state:
        parts = torch.randn(sequences, channels), shift + scale * torch.randn(sequences, heads)
        call.initial_state = torch.cat([*parts, torch.zeros(sequences, heads)], 1).to(wide)
    call.grad_y = torch.randn(call.value.shape).to(dtype)
    call.grad_final = torch.randn(sequences, channels + 2 * heads).to(wide)
    return call


def expected(call: Call) -> dict[str, Tensor]:
    """The results in float64, by the loop in plain torch."""
    wide = {name: t.double().requires_grad_() for name, t in call.given().items()}
    streams = (wide.get(name) for name in ("decay", "bonus", "initial_state"))
    y, final = plain.scan(wide["score"], wide["value"], 0, *streams, call.cu_seqlens, call.reverse, call.chunk)
    heads = call.score.shape[2]
    of_final = torch.where(final.isfinite(), call.grad_final, 0).double()
    of_final[:, final.shape[1] - heads :] = 0
    grads = torch.autograd.grad([y, final], list(wide.values()), [call.grad_y.double(), of_final])
    results = {"y": y, "final": final} | dict(zip(wide, grads, strict=True))
    if "initial_state" in results:  # the gradient of z is that of Z
        results["initial_state"][:, -heads:] = results["initial_state"][:, -2 * heads : -heads]
    return {name: t.detach() for name, t in results.items()}


def require(condition: object, what: object) -> None:
    if not condition:
        raise AssertionError(what)


def compare(call: Call, where: object, loosen: float = 1.0) -> None:
    """The results against those in float64: the mean, Z + z, y and the gradients."""
    heads, state_limit = call.score.shape[2], errors.LIMITS[errors.state_dtype(call.score.dtype)]
    right, got = expected(call), call.results()
    for results in (right, got):
        final = results["final"].double()
        results["Z"] = final[:, -2 * heads : -heads] + final[:, -heads:]
        results["final"] = results["final"][:, : -2 * heads]
    for name, wanted in right.items():
        result = got[name]
        error = errors.relative_error(result, wanted, wanted.abs())
        limit = loosen * (state_limit if name == "Z" else errors.LIMITS[result.dtype])
        if wanted.dim() == 1:  # the terms of gradients [H] cancel
            limit *= 8
        require(error <= limit, f"{name}: {error:.2e}, {where}")


# ------------------------------------------------------------------------------------------ checks

#: (heads, channels of a head): words or single channels; heads of a thread, of a part of a warp, and of several parts.
SIZES = ((6, 1), (5, 1), (3, 8), (7, 3), (2, 64), (1, 200), (2, 33))
#: Decay, bonus, initial state, reverse, segment.
FORMS = (
    (None, False, False, False, 0),
    ("head", True, True, False, 0),
    ("stream", True, True, True, 0),
    ("stream", False, True, False, 16),
    ("head", True, False, True, 32),
    (None, False, True, True, 48),
)


def check_numbers(dtype: torch.dtype) -> None:
    """Every form and layout of threads against float64, in several orders."""
    for i, ((heads, group), (decay, bonus, state, reverse, segment)) in enumerate(product(SIZES, FORMS)):
        control().configure(seed=i, resident=(1, 24, 200)[i % 3])
        masked = 0.2 if i % 2 else 0.0
        options = {"decay": decay, "bonus": bonus, "state": state, "reverse": reverse, "segment": segment}
        compare(draw(dtype, heads, group, masked=masked, **options), (heads, group, options))


#: Packed sequences of 90 steps: empty ones on both ends and between others; those of 32 and 49 steps are cut.
#: They do not begin at multiples of a segment in the row, in either direction.
OFFSETS = [0, 0, 9, 9, 41, 90, 90]


def draw_packed(dtype: torch.dtype, group: int, **options) -> Call:
    return draw(dtype, 2, group, batch=1, time=OFFSETS[-1], offsets=OFFSETS, state=True, **options)


def check_packed(dtype: torch.dtype) -> None:
    for i, (group, reverse, segment) in enumerate(product((1, 3, 200), (False, True), (0, 16, 32))):
        control().configure(seed=i, resident=(1, 24, 200)[i % 3])
        options = {"bonus": i % 4 > 0, "reverse": reverse, "segment": segment}
        call = draw_packed(dtype, group, decay=("head", "stream")[i % 2], **options)
        compare(call, (group, options))
        *_, borders = call.forward()
        require(not borders.isnan().any(), "borders that no chunk has are not cleared")


def check_packed_as_separate(dtype: torch.dtype) -> None:
    """A packed sequence has the bits of a call of its own with the same segments. A NaN stays in its sequence."""
    for group, reverse, segment in product((1, 3, 200), (False, True), (0, 16)):
        call = draw_packed(dtype, group, decay="stream", bonus=True, reverse=reverse, segment=segment)
        call.score[0, 20, 1] = torch.nan
        together = call.results()
        for n, (begin, end) in enumerate(pairwise(OFFSETS)):
            own = {name: getattr(call, name)[:, begin:end] for name in ("score", "value", "decay", "grad_y")}
            own |= {name: getattr(call, name)[n : n + 1] for name in ("initial_state", "grad_final")}
            for name, t in Call(**{**vars(call), **own, "cu_seqlens": None}).results().items():
                if name == "bonus":
                    continue  # its gradient is the sum over all sequences
                right = together[name][:, begin:end] if t.dim() == 3 else together[name][n : n + 1]
                require(torch.equal(t.nan_to_num(7), right.nan_to_num(7)), f"{name} of {n}, {group=} {segment=}")


def check_large(dtype: torch.dtype) -> None:
    """Large scores, whose Z alone has no room for the steps; long pasts of equal weights; decays that end the past."""
    for segment, group in product((0, 32), (1, 3)):
        options = {"state": True, "segment": segment, "time": 150}
        high = {"shift": 1000.0, "scale": 1e-3, "slow": 1e-3}
        compare(draw(dtype, 3, group, decay="head", **high, **options), (segment, group), 4)
        compare(draw(dtype, 3, group, decay="head", scale=300.0, **options), (segment, group), 8)
        compare(draw(dtype, 3, group, decay="stream", slow=80.0, bonus=True, **options), (segment, group), 8)


def check_many_segments(dtype: torch.dtype) -> None:
    """More segments than a warp of `carry` takes at once."""
    time = 16 * 70 + 5
    for group, offsets in product((1, 3), (None, [0, 16 * 33 + 2, 16 * 34, time])):
        options = {"batch": 1 if offsets else 2, "time": time, "offsets": offsets}
        call = draw(dtype, 2, group, decay="stream", slow=0.1, state=True, segment=16, **options)
        compare(call, (group, offsets), 4)


def check_exact(dtype: torch.dtype) -> None:
    """What has to be right bit for bit."""
    for group, bonus in product((1, 3, 64), (False, True)):
        call = draw(dtype, 2, group, time=1, decay="head", bonus=bonus, scale=100.0)
        require(torch.equal(call.forward()[0], call.value), "the first value is copied")
        call = draw(dtype, 2, group, decay="stream", state=True)
        ends = torch.rand(call.decay.shape) < 0.2
        call.decay[ends] = -torch.inf
        at = ends.repeat_interleave(group, -1)
        require(torch.equal(call.forward()[0][at], call.value[at]), "a decay of -inf ends the past")
        call = draw(dtype, 2, group, decay=None, bonus=False)
        call.score[:, 40] += 1000.0
        held = call.value[:, 40:41].expand(-1, 35, -1)
        require(torch.equal(call.forward()[0][:, 40:], held), "a large score holds its value")
        call = draw(dtype, 2, group, bonus=bonus, decay="head", masked=2.0)
        y, final, _ = call.forward()
        grads = call.results()
        require(not y.any() and (final[:, -4:-2] == -torch.inf).all(), "nothing but masks is zero")
        require(not any(grads[name].any() for name in call.given()), "and has no gradients")
        _check_split(dtype, group, bonus)


def _check_split(dtype: torch.dtype, group: int, bonus: bool) -> None:
    """Handed on at a border, packed or from the other end: the same bits."""
    options = {"bonus": bonus, "decay": "stream", "state": True, "batch": 1}
    call = draw(dtype, 2, group, masked=0.1, **options)
    y, final, _ = call.forward()
    streams = {"score": call.score, "value": call.value, "decay": call.decay}
    parts, state = [], call.initial_state
    for a, b in pairwise((0, 32, 75)):
        part = Call(**{name: t[:, a:b] for name, t in streams.items()}, bonus=call.bonus, initial_state=state)
        out, state, _ = part.forward()
        parts.append(out)
    require(torch.equal(torch.cat(parts, 1), y) and torch.equal(state, final), f"split, {group=} {bonus=}")
    flipped = {name: t.flip(1) for name, t in streams.items()}
    there, last, _ = Call(**flipped, bonus=call.bonus, initial_state=call.initial_state, reverse=True).forward()
    require(torch.equal(there.flip(1), y) and torch.equal(last, final), f"reverse, {group=} {bonus=}")
    twice = {name: torch.cat([t, t], 1) for name, t in streams.items()}
    offsets = torch.tensor([0, 75, 150])
    packed = Call(**twice, bonus=call.bonus, initial_state=call.initial_state.expand(2, -1), cu_seqlens=offsets)
    there, last, _ = packed.forward()
    require(torch.equal(there[:, 75:], y) and torch.equal(last[1:], final), f"packed, {group=} {bonus=}")


def check_shifted(dtype: torch.dtype) -> None:
    """Integers: adding one to all scores changes no bit inside a chunk."""
    for group in (1, 3):
        call = draw(dtype, 2, group, time=16, decay="head", bonus=True)
        call.score = torch.randint(-9, 9, call.score.shape).to(dtype)
        call.decay, call.bonus = -torch.tensor([1, 2]).to(call.decay), torch.tensor([2, -3]).to(call.bonus)
        y, *_ = call.forward()
        call.score = call.score + 64
        require(torch.equal(call.forward()[0], y), f"scores that are shifted, {group=}")


def check_nan(dtype: torch.dtype) -> None:
    """NaN in a score stays in its head, NaN in a value in its channel, from there on."""
    for group, bonus, segment in product((1, 3, 64), (False, True), (0, 16)):
        call = draw(dtype, 3, group, decay="head", bonus=bonus, segment=segment, masked=0.3)
        clean, *_ = call.forward()
        call.score[0, 40, 1] = torch.nan
        call.value[1, 20, 2 * group] = torch.nan
        y, last, _ = call.forward()
        wrong = torch.zeros_like(y, dtype=torch.bool)
        wrong[0, 40:, group : 2 * group] = wrong[1, 20:, 2 * group] = True
        require(y[wrong].isnan().all() and torch.equal(y[~wrong], clean[~wrong]), f"{group=} {bonus=} {segment=}")
        require(last[0, -6:-3].isnan().tolist() == [False, True, False], "Z of a head with NaN")


def check_order(dtype: torch.dtype) -> None:
    """Results depend on sizes only, not on the order of threads and blocks."""
    calls = [draw(dtype, heads, group, decay="stream", bonus=True, state=True, segment=segment)
             for heads, group, segment in ((6, 1, 16), (2, 200, 32), (5, 3, 0))]  # fmt: skip
    for call in (*calls, draw_packed(dtype, 200, decay="head", bonus=True, segment=16)):
        control().configure(seed=1, resident=24)
        first = call.results()
        control().configure(seed=7, resident=1)
        for name, t in call.results().items():
            require(torch.equal(t, first[name]), name)


def _time_major(t: Tensor) -> Tensor:
    return t.transpose(0, 1).contiguous().transpose(0, 1)


def check_layouts(dtype: torch.dtype) -> None:
    """Gates side by side, time-major streams and rows that are not aligned give the same bits."""
    for heads, group in ((8, 1), (2, 8)):
        call = draw(dtype, heads, group, decay="stream", bonus=True)
        first, names = call.results(), ("score", "value", "decay", "grad_y")

        def moved(t: Tensor, offset: int, padding: int) -> Tensor:
            wide = t.new_empty((*t.shape[:-1], offset + t.shape[-1] + padding))
            return wide[..., offset : offset + t.shape[-1]].copy_(t)

        # pointers that are not aligned, rows that are not, and time-major streams
        changes = (lambda t: moved(t, 1, 15), lambda t: moved(t, 0, 1), _time_major)
        for change in changes:
            other = Call(**{**vars(call), **{name: change(getattr(call, name)) for name in names}})
            for name, t in other.results().items():
                error = errors.relative_error(t, first[name].double(), first[name].double().abs())
                require(error <= errors.LIMITS[t.dtype], f"{name} of {heads} heads of {group}")
        gates = torch.cat([call.score, call.value], -1)
        packed = (gates, None, heads, *call.arguments()[3:])
        y, _, borders = torch.ops.mru.softmax_recurrence.simt(*packed, True)
        of_gates, *_ = torch.ops.mru.softmax_recurrence_backward.simt(call.grad_y, call.grad_final, *packed, borders)
        both = torch.cat([first["score"], first["value"]], -1).double()
        for name, t, right in (("y", y, first["y"].double()), ("gates", of_gates, both)):
            require(errors.relative_error(t, right, right.abs()) <= errors.LIMITS[dtype], name)


def check_offsets_are_clamped(dtype: torch.dtype) -> None:
    """The kernels cannot check the values of cu_seqlens, but wrong ones must not lead out of bounds."""
    wrong = ([0, 2**40, 50], [-7, 60, 9999], [49, 20, 3], [50, 50, 0], [49, 50], [30, 40, 20, 45], [0])
    for offsets, group, segment, reverse in product(wrong, (1, 3), (0, 16), (False, True)):
        options = {"decay": "stream", "bonus": True, "state": True, "segment": segment, "reverse": reverse}
        call = draw(dtype, 2, group, batch=1, time=50, offsets=offsets, **options)
        call.cu_seqlens = torch.tensor([*offsets, 50])[:-1]  # 50: what a read past the end gets
        outside = torch.ones(50, dtype=torch.bool)
        for begin, end in pairwise(offsets):
            outside[max(begin, 0) : max(end, 0)] = False
        require(call.results()["y"][:, outside].isnan().all(), f"steps of no sequence, {offsets=} {segment=}")


def check_empty(dtype: torch.dtype) -> None:
    """No steps: the final state is the initial one, or empty."""
    for group, state in product((1, 3), (False, True)):
        call = draw(dtype, 2, group, time=0, state=state, decay="head", bonus=True)
        _, final, _ = call.forward()
        right = call.initial_state
        if right is None:
            right = torch.zeros_like(final)
            right[:, -4:-2] = -torch.inf
        require(torch.equal(final, right), "the final state of no steps")
        got = call.results()
        require(not got["decay"].any() and not got["bonus"].any(), "gradients [H] of no steps")


def check_traffic(dtype: torch.dtype) -> None:
    """Bytes of streams as in the specification: each stream once, where time is cut twice; results once.

    Each thread of a head reads the head's score. A warp does so in one access, but here every thread counts.
    """
    e, wide = dtype.itemsize, errors.state_dtype(dtype).itemsize
    sizes, decays, packed = ((8, 1), (4, 32), (1, 256)), (None, "head", "stream"), (None, [0, 41, 41, 128])
    for (heads, group), decay, segment, offsets in product(sizes, decays, (0, 16), packed):
        batch, time, sequences = (1, 128, len(offsets) - 1) if offsets else (2, 64, 2)
        options = {"decay": decay, "bonus": True, "segment": segment, "offsets": offsets}
        call = draw(dtype, heads, group, time=time, batch=batch, **options)
        n, passes, columns = batch * time * heads * group, 2 if segment else 1, heads * (group + 2)
        width = 1 if group == 1 else 2 if dtype == torch.float64 else 4
        threads, narrow = group // width, 2 if decay == "stream" else 1
        once = n * e + narrow * batch * time * heads * threads * e
        control().reset_traffic()
        _, _, borders = call.forward()
        moved = control().traffic()
        where = f"{heads} heads of {group}, {options} {moved}"
        require(moved["stream"] == [passes * once, n * e], f"forward: {where}, not {passes * once}")
        segments = batch * time // segment + (sequences if offsets else 0) if segment else 0
        states = (sequences + batch * ((time - 1) // call.chunk) + 2 * segments) * columns + segments * heads
        require(moved["state"][1] <= states * wide, f"states of forward: {where}, not {states * wide}")
        control().reset_traffic()
        call.backward(borders)
        moved = control().traffic()
        where = f"{heads} heads of {group}, {options} {moved}"
        right = [passes * (once + n * e), n * e + narrow * batch * time * heads * e]
        require(moved["stream"] == right, f"backward: {where}, not {right}")


#: The slower ones come last, because a planted fault ends at the first check that fails.
CHECKS = (check_exact, check_nan, check_shifted, check_empty, check_layouts, check_offsets_are_clamped, check_order,
          check_packed_as_separate, check_traffic, check_large, check_many_segments, check_numbers,
          check_packed)  # fmt: skip


def failure(element: str) -> str:
    """The first check of a dtype that fails, and why; empty if all pass."""
    torch.manual_seed(0)
    for check in CHECKS:
        try:
            check(getattr(torch, element))
        except (AssertionError, RuntimeError) as error:
            return f"{check.__name__}: {error}"
    return ""


if __name__ == "__main__":
    sys.exit(failure(sys.argv[1]) or print("all checks pass"))
