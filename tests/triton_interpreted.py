"""What only Triton's interpreter can show. Run by test_triton.py, where TRITON_INTERPRET=1 is set in time.

Addresses are recorded at every load and store: bytes are counted, and bounds are checked.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from bench import inputs
from mru_kernels.backends import CHUNK
from mru_kernels.backends import triton as backend
from mru_kernels.checks import state_dtype
from mru_kernels.ops import CELLS
from tests import calls

OPS = {cell.name: cell for cell in CELLS}


class Traffic:
    """Distinct addresses of 1 byte that each launch read and wrote: what has to come from memory and go there."""

    def __init__(self):
        self.launches: list[tuple[str, dict[str, set[int]]]] = []

    def bytes_in(self, how: str, *tensors: torch.Tensor) -> int:
        """Bytes of the tensors' memory that launches loaded or stored, a byte once a launch."""
        total = 0
        for _, touched in self.launches:
            addresses = np.fromiter(touched[how], np.uint64, len(touched[how]))
            for t in tensors:
                begin = np.uint64(t.untyped_storage().data_ptr())
                end = begin + np.uint64(t.untyped_storage().nbytes())
                total += int(((addresses >= begin) & (addresses < end)).sum())
        return total

    def all_bytes(self) -> int:
        return sum(len(addresses) for _, touched in self.launches for addresses in touched.values())


@contextmanager
def recorded():
    """Traffic of what is launched within."""
    traffic = Traffic()
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    before = builder.create_masked_load, builder.create_masked_store, executor.__call__

    def record(how, pointers, mask):
        element = pointers.get_element_ty().primitive_bitwidth // 8
        first = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))
        first = first[np.broadcast_to(mask.data, first.shape).astype(bool)]
        traffic.launches[-1][1][how].update((first[:, None] + np.arange(element, dtype=np.uint64)).ravel().tolist())

    def load(self, pointers, mask, *rest):
        record("load", pointers, mask)
        return before[0](self, pointers, mask, *rest)

    def store(self, pointers, value, mask, *rest):
        record("store", pointers, mask)
        return before[1](self, pointers, value, mask, *rest)

    def launch(self, *arguments, **keywords):
        traffic.launches.append((self.fn.__name__, defaultdict(set)))
        return before[2](self, *arguments, **keywords)

    builder.create_masked_load, builder.create_masked_store, executor.__call__ = load, store, launch
    try:
        yield traffic
    finally:
        builder.create_masked_load, builder.create_masked_store, executor.__call__ = before


def arguments_of(
    streams, segment, *, cu_seqlens=None, alpha=None, initial_state=None, channel=(), reverse=False, epsilon=0.5
):
    epsilon = torch.tensor(epsilon, dtype=torch.float64)
    return (streams, list(channel), alpha, initial_state, cu_seqlens, epsilon, 1.0, reverse, 0, CHUNK, segment)


def run(arguments, grad_h, grad_final, save=True, cell="bmru"):
    """Forward and backward on the Triton backend: results, gradients, and the traffic of each."""
    with torch.no_grad():
        with recorded() as forward:
            results = OPS[cell].forward["triton"](*arguments, save)
        with recorded() as backward:
            grads = OPS[cell].backward["triton"](grad_h, grad_final, *arguments, *results[2:])
    return results, grads, forward, backward


# Steps of a segment, 0 where sequences are scanned whole; cell, dtype and streams; whether steps fit events.
FORMS = [
    *((segment, "bmru", dtype, 2, True) for segment, dtype in ((0, "bfloat16"), (64, "float32"), (64, "bfloat16"))),
    *((segment, "bmru", "float32", 3, False) for segment in (0, 64)),
    (64, "linear_recurrence", "complex64", 2, False),
]


@pytest.mark.parametrize(("segment", "cell", "dtype", "gates", "fit"), FORMS)
def test_traffic_is_the_budget(segment, cell, dtype, gates, fit):
    """Streams in and out: the floor, plus one stream where time is cut (backward, as events replace the gates), plus
    half a byte a step and channel of events; and states: of boundaries, at most fourteen rows a segment and pass, and
    those of a chunk.
    """
    batch, time, channels = 1, 2 * 64 + 16, 40
    streams = [torch.randn(batch, time, channels).to(getattr(torch, dtype)) for _ in range(gates)]
    grad_h = torch.randn_like(streams[0])
    grad_final = torch.randn(batch, channels, dtype=state_dtype(grad_h.dtype))
    (h, final_state, _, events), grads, forward, backward = run(
        arguments_of(streams, segment), grad_h, grad_final, cell=cell
    )
    steps = batch * time * channels
    stream = steps * h.element_size()
    passes = 1 if not segment or fit else 2  # without events a cut makes every pass over the gates two

    assert forward.bytes_in("load", *streams) == passes * gates * stream
    assert forward.bytes_in("store", h) == stream
    assert backward.bytes_in("load", *streams) == passes * gates * stream
    assert backward.bytes_in("load", grad_h) == (2 if segment else 1) * stream
    assert backward.bytes_in("store", *grads) == gates * stream
    once = steps // 4 if segment and fit else 0
    assert forward.bytes_in("store", events) == forward.bytes_in("load", events) == once
    # Events are read by the adjoint's summary and, but for the last step of a chunk's last word, by the gradients.
    assert once <= backward.bytes_in("load", events) <= 2 * once

    row = channels * final_state.element_size()
    slots = batch * -(-time // segment) if segment else 0
    states = 14 * slots * row + 2 * batch * row + batch * 2 * row + 16 * batch
    floor = stream * (passes * gates + 1)
    assert 0 <= forward.all_bytes() - floor - 2 * once <= states
    floor = stream * (passes * gates + (2 if segment else 1) + gates)
    part = torch.float32 if cell != "bmru" else h.dtype
    tiles = CHUNK // backend.tile("backward", gates, bool(segment and fit), 0, part)
    states += 2 * tiles * (slots or batch) * row  # those before the tiles of a chunk, which are written and read again
    assert 0 <= backward.all_bytes() - floor - 2 * once <= states


@pytest.mark.parametrize("gates", [2, 3])
def test_the_adjoint_is_summarized_up_to_a_write_that_forgets(gates):
    """With epsilon 0, word by word until all channels of a program have written: one holds longer than the others."""
    segments, channels, last = (64, 64, 21), 40, 7
    time = sum(segments)
    for first_write, words in ((15, 1), (16, 2), (time, 4)):
        streams = [torch.ones(1, time, channels) for _ in range(gates)]
        holds = torch.tensor([step % 64 < first_write for step in range(time)])
        streams[1][0, holds, last] = 2
        grad_h, grad_final = torch.randn(1, time, channels), torch.randn(1, channels)
        _, grads, _, backward = run(arguments_of(streams, 64, epsilon=0.0), grad_h, grad_final)
        _, whole, _, _ = run(arguments_of(streams, 0, epsilon=0.0), grad_h, grad_final)
        steps = time + sum(min(16 * words, length) for length in segments)
        assert backward.bytes_in("load", grad_h) == steps * channels * grad_h.element_size()
        for a, b in zip(grads, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("segment", [0, 64])
@pytest.mark.parametrize(("reverse", "dtype"), [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)])
def test_offsets_are_not_trusted(monkeypatch, segment, reverse, dtype):
    """Where offsets are wrong, so are results; but no load or store leaves the tensors."""
    time, channels = 100, 8
    for offsets in ([5, -3, 1000, 2], [0, 90, 20, 100], [2**40, -(2**40)], [0]):
        cu_seqlens = torch.tensor(offsets)
        n = len(offsets) - 1
        streams = [torch.randn(1, time, channels).to(dtype) for _ in range(2)]
        alpha, initial_state = torch.ones(channels), torch.zeros(n, channels)
        grad_h, grad_final = torch.randn(1, time, channels).to(dtype), torch.randn(n, channels)
        arguments = arguments_of(
            streams, segment, cu_seqlens=cu_seqlens, alpha=alpha, initial_state=initial_state, reverse=reverse
        )
        made: list[torch.Tensor] = []
        with monkeypatch.context() as patched:
            for make in (torch.Tensor.new_empty, torch.Tensor.new_zeros):

                def keep(self, *sizes, made=made, make=make, **keywords):
                    made.append(make(self, *sizes, **keywords))
                    return made[-1]

                patched.setattr(torch.Tensor, make.__name__, keep)
            results, grads, *traffic = run(arguments, grad_h, grad_final)
        known = [*streams, alpha, initial_state, grad_h, grad_final, cu_seqlens, *results, *grads, *made]
        spans = {(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in known}
        for launches in traffic:
            for name, touched in launches.launches:
                addresses = np.array(sorted(set().union(*touched.values())), dtype=np.uint64)
                inside = np.zeros(len(addresses), dtype=bool)
                for begin, size in spans:
                    inside |= (addresses >= np.uint64(begin)) & (addresses < np.uint64(begin + size))
                assert inside.all(), (name, offsets)


@pytest.mark.parametrize("segment", [0, 64])
def test_offsets_beyond_32_bits(segment):
    """Views of little memory whose strides over batch and time take elements beyond 2^31, forwards and backwards."""
    channels, time = 4, 66
    far = 2**31 + 8
    memory = torch.empty(far + 2**24, dtype=torch.bfloat16)  # untouched but for what the views hold

    def view(offset: int, stride: int) -> torch.Tensor:
        t = memory.as_strided((2, time, channels), (far, stride, 1), offset)
        return t.copy_(torch.randn(2, time, channels))

    streams = [view(0, 1024), view(8, 1024)]
    grad_h, grad_final = view(16, 1024), torch.randn(2, channels)
    steps = memory.as_strided((1, 3, channels), (0, far // 2, 1), 24)
    for given, g, f, reverse in (
        (streams, grad_h, grad_final, True),
        ([steps.copy_(torch.randn(1, 3, channels))] * 2, steps, grad_final[:1], False),
    ):
        near = [t.clone(memory_format=torch.contiguous_format) for t in given]
        results, grads, *_ = run(arguments_of(given, segment, reverse=reverse), g, f)
        expected, expected_grads, *_ = run(arguments_of(near, segment, reverse=reverse), g.clone(), f)
        for a, b in zip([*results[:2], *grads], [*expected[:2], *expected_grads], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("cell", ["bmru", "linear_recurrence"])
def test_groups_of_segments(monkeypatch, cell):
    """Where segments are so many that groups of them are walked over first, results stay the same."""
    time, channels = 3 * 64 + 3, 4
    linear = cell == "linear_recurrence"
    dtype = torch.complex64 if linear else torch.float32
    streams = [torch.randn(1, time, channels, dtype=dtype) for _ in range(2)]
    if linear:
        streams[1] = torch.polar(torch.full((1, time, channels), 0.99), streams[1].angle())
    alpha = None if linear else torch.randn(channels)
    initial_state, grad_final = torch.randn(2, 1, channels, dtype=dtype)
    grad_h = torch.randn_like(streams[0])
    arguments = arguments_of(streams, 64, alpha=alpha, initial_state=initial_state)
    (h, final_state, *_), grads, *_ = run(arguments, grad_h, grad_final, cell=cell)
    monkeypatch.setattr(backend, "_WALK", 1)
    (grouped_h, grouped_final, *_), grouped_grads, forward, backward = run(arguments, grad_h, grad_final, cell=cell)
    for traffic in (forward, backward):
        assert "fold" in [name for name, _ in traffic.launches]
    for a, b in zip([h, final_state, *grads], [grouped_h, grouped_final, *grouped_grads], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# What few examples of test_op.py may miss. Rows of five complex64 channels are not aligned to 16 bytes.
LINEAR = [
    (0, "fp32", {"decay": "channel", "batch": 1, "reverse": True}),
    (64, "fp32", {"batch": "packed"}),
    (64, "bf16", {"decay": "channel", "batch": 1}),
    (0, "c64", {"decay": "channel", "batch": "packed", "reverse": True, "layout": "chunked"}),
    (64, "c64", {"batch": 1, "reverse": True, "layout": "time-major"}),
    (64, "c64", {"decay": "channel", "batch": 1, "channels": 4, "nonfinite": True}),
    (64, "c128", {"batch": "packed", "layout": "chunked"}),
]


@pytest.mark.parametrize(("segment", "dtype", "options"), LINEAR, ids=str)
def test_linear_recurrence_equals_the_reference(segment, dtype, options):
    options = {"time": 2 * 64 + 5, "channels": 5, "initial_state": "real"} | options
    cell = inputs.CELLS["linear_recurrence"]
    call = inputs.case("linear_recurrence", cell.dtypes[dtype], **options).build()
    with calls.segments("triton", segment):
        calls.assert_right(call, calls.op_of("linear_recurrence", "triton"), torch.device("cpu"))


def test_segments_are_a_function_of_sizes():
    cpu = torch.device("cpu")
    for sequences, time, channels in ((8, 4096, 2048), (32, 2048, 512), (1, 2**20, 64), (1, 2**31, 1), (3, 300, 5)):
        steps = backend.segment(sequences, sequences * time, channels, 4, cpu)
        assert steps % CHUNK == 0
        assert CHUNK <= steps < time
    for whole in ((1024, 2**22, 512), (1, 255, 64), (0, 0, 4), (4, 4096, 0), (1, 0, 1)):
        assert backend.segment(*whole, 4, cpu) == 0


@pytest.mark.parametrize("cell", ["bmru", "schmitt"])
@pytest.mark.parametrize("scale", [1e-44, 1e-40, 4e37, 1e38, 3e38, 1e40, 1e60])
def test_any_surrogate_scale(cell, scale):
    """Gradients are those of float64 rounded, also where 1 / scale or the scale is no normal number of float32."""
    time, channels = 6, 4
    names = ["candidate", "threshold", "amplitude"] if cell == "bmru" else ["candidate", "low", "high"]
    candidate = torch.tensor([2.0, -1.0, 0.0, 1.0, 0.5, 3.0])[None, :, None].expand(1, time, channels).contiguous()
    streams = (
        [candidate] if cell == "schmitt" else [candidate, candidate.roll(2, 2).abs(), torch.full_like(candidate, 3.0)]
    )
    if cell == "bmru":
        streams[1][..., ::2] = 1
    channel = [torch.tensor([0.5, 0.0, 1.0, -1.0]), torch.ones(channels)] if cell == "schmitt" else []
    grad_h = torch.tensor([0.0, 1.0, -2.0, 0.5])[None, None].expand(1, time, channels).contiguous()

    def grads(dtype):
        arguments = list(arguments_of([t.to(dtype) for t in streams], 0, channel=[t.to(dtype) for t in channel]))
        arguments[6] = scale
        return run(tuple(arguments), grad_h.to(dtype), torch.zeros(1, channels, dtype=dtype), cell=cell)[1]

    for name, got, wide in zip(names, grads(torch.float32), grads(torch.float64), strict=True):
        expected = wide.to(torch.float32)
        assert torch.equal(got.isinf(), expected.isinf()), name
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-37 if scale > 1 else 1e-44)


def test_many_equal_terms():
    """The gradient of alpha sums up the same over time, many times."""
    time = 1024
    streams = [torch.ones(1, time, 1) for _ in range(2)]
    grad_h, alpha = torch.full((1, time, 1), 0.1), torch.ones(1)
    *_, grad_alpha = run(arguments_of(streams, 0, alpha=alpha, epsilon=0.0), grad_h, torch.zeros(1, 1))[1]
    expected = time * grad_h[0, 0, 0].double()
    assert (grad_alpha.double() / expected - 1).abs() < 1e-6


WRONG_NUMBERS = {
    "epsilon": {5: torch.tensor(2.0, dtype=torch.float64)},
    "surrogate_scale": {6: -1.0},
    "packed": {8: 10**7},
    "chunk": {9: 2**60},
    "segment": {10: 65},
}


@pytest.mark.parametrize("name", WRONG_NUMBERS)
def test_wrong_numbers_are_refused(name):
    streams = [torch.randn(1, 70, 4) for _ in range(2)]
    arguments = arguments_of(streams, 64)
    results = OPS["bmru"].forward["triton"](*arguments, True)
    wrong = [WRONG_NUMBERS[name].get(i, value) for i, value in enumerate(arguments)]
    with pytest.raises(ValueError, match=name):
        OPS["bmru"].forward["triton"](*wrong, True)
    with pytest.raises(ValueError, match=name):
        OPS["bmru"].backward["triton"](streams[0], torch.zeros(1, 4), *wrong, *results[2:])


@pytest.mark.parametrize("segment", [0, 64])
def test_wrong_tensors_are_refused_in_the_backward_pass(segment):
    streams = [torch.randn(1, 70, 4) for _ in range(2)]
    arguments = arguments_of(streams, segment)
    given = {
        "grad_h": torch.zeros(1, 70, 4), "grad_final": torch.zeros(1, 4),
        "checkpoints": torch.zeros(1, 1, 4), "events": torch.zeros(1, 5 if segment else 0, 4, dtype=torch.int32),
    }  # fmt: skip

    def backward(streams=streams, **changed):
        grad_h, grad_final, *saved = (given | changed).values()
        return OPS["bmru"].backward["triton"](grad_h, grad_final, streams, *arguments[1:], *saved)

    backward()
    for name, t in given.items():
        for wrong in (t[:, :-1] if t.numel() else torch.zeros(1, 3, 4).int(), t[..., :-1], t.to(torch.int64), t[None]):
            with pytest.raises((TypeError, ValueError), match=name):
                backward(**{name: wrong})
    for wrong in ([streams[0], streams[1][:, :-1]], streams[:1], [], [t[0] for t in streams]):
        with pytest.raises((TypeError, ValueError), match="streams"):
            backward(wrong)
