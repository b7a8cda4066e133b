"""What only Triton's interpreter can show. Run by test_triton.py, where TRITON_INTERPRET=1 is set in time.

Addresses are recorded at every load and store: bytes are counted, and bounds are checked.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pytest
import torch

from bench import inputs
from mru_kernels.backends import CHUNK
from mru_kernels.backends import triton as backend
from mru_kernels.backends.triton import launch, tuning
from mru_kernels.backends.triton.cell import find
from mru_kernels.ops import ALL_WANTED, CELLS, as_maps
from tests import calls
from tests.triton_calls import arguments_of, recorded, run


def adjoint_sees_state(cell: str) -> bool:
    return find(cell).real.adjoint_sees_state.value


def streams_of(cell: str) -> list[str]:
    """The inputs that may be streams and are not optional."""
    return [i.name for i in CELLS[cell].inputs if i.kind != "channel" and not i.optional]


def vectors_of(cell: str, channels: int, names: Collection[str] = ()) -> dict[str, torch.Tensor]:
    """The inputs `[D]` of a cell, those that are not optional or in `names`."""
    spec = CELLS[cell]
    given = [i for i in spec.inputs if i.name not in names and not i.optional]
    # A complex decay stays below 1, so that no composed state leaves its range.
    return {i.name: 0.3 * torch.randn(channels, dtype=torch.complex64) if i.complex else torch.randn(channels)
            for i in given}  # fmt: skip


COMPOSING = [name for name, cell in CELLS.items() if cell.composes]

# Steps of a segment, 0 where sequences are scanned whole; cell, dtype, and the inputs that come as streams.
FORMS = [
    *((segment, cell, "float32", streams_of(cell)) for cell in CELLS for segment in (0, 64 * CELLS[cell].composes)),
    *((segment, "bmru", "bfloat16", streams_of("bmru")) for segment in (0, 64)),
    *((segment, "bmru", "float32", ["candidate", "threshold", "amplitude"]) for segment in (0, 64)),
    (64, "linear_recurrence", "complex64", ["update", "decay"]),
]


@pytest.mark.parametrize(("segment", "cell", "dtype", "names"), FORMS)
def test_traffic_is_the_budget(segment, cell, dtype, names):
    """Streams in and out: the floor, plus one stream if time is split (backward, as codes replace the gates), plus half
    a byte a step and channel of codes; and states: of checkpoints, at most fourteen rows a segment and pass, and those
    of a chunk.
    """
    batch, time, channels = 1, 2 * 64 + 16, 40
    spec, gates = CELLS[cell], len(names)
    tensors = {name: torch.randn(batch, time, channels).to(getattr(torch, dtype)) for name in names}
    streams = list(tensors.values())
    tensors |= vectors_of(cell, channels, names)
    per_channel = len(tensors) - gates
    grad_h = torch.randn_like(streams[0])
    grad_final = torch.randn(batch, channels, dtype=spec.state_dtype(grad_h.dtype))
    arguments = arguments_of(tensors, segment, cell=cell)
    (h, final_state, _, codes), grads, forward, backward = run(arguments, grad_h, grad_final, cell=cell)
    fit = spec.has_codes(arguments[1])
    steps = batch * time * channels
    stream = steps * h.element_size()
    passes = 1 if not segment or fit else 2  # without codes a split makes every pass over the gates two
    runs = 1 + (bool(segment) and adjoint_sees_state(cell))  # of `backward`

    assert forward.bytes_in("load", *streams) == passes * gates * stream
    assert forward.bytes_in("store", h) == stream
    assert backward.bytes_in("load", *streams) == (passes + runs - 1) * gates * stream
    assert backward.bytes_in("load", grad_h) == (2 if segment else 1) * stream
    assert backward.bytes_in("store", *grads[:gates]) == runs * gates * stream
    once = steps // 4 if segment and fit else 0
    assert forward.bytes_in("store", codes) == forward.bytes_in("load", codes) == once
    # The adjoint's summary reads the codes and, but for the last step of a chunk's last word, so do the gradients.
    assert once <= backward.bytes_in("load", codes) <= 2 * once

    row = channels * final_state.element_size()
    segments = batch * -(-time // segment) if segment else 0
    states = (14 + per_channel) * segments * row + (2 + 4 * per_channel) * batch * row + batch * 2 * row + 16 * batch
    floor = stream * (passes * gates + 1)
    assert 0 <= forward.all_bytes() - floor - 2 * once <= states
    floor = stream * ((passes + runs - 1) * gates + (2 if segment else 1) + runs * gates)
    part = torch.float32 if h.is_complex() else h.dtype
    reads = tuning.Reads(part, gates, per_channel, bool(segment and fit), gated=find(cell).real.gated.value)
    tiles = CHUNK // tuning.tile("backward", reads)
    # The states before the tiles of a chunk, which are written and read again; and sums over chunks.
    states += runs * (2 * tiles * (segments or batch) + 4 * per_channel * -(-time // CHUNK)) * row
    assert 0 <= backward.all_bytes() - floor - 2 * once <= states


@pytest.mark.parametrize("segment", [0, 64])
@pytest.mark.parametrize("cell", CELLS)
def test_a_program_reads_the_mask_of_resets_once(cell, segment):
    """A byte a step, in each launch over the steps. Boundaries cost their rows, and a reset state one row a chunk."""
    time, channels = 2 * 64 + 21, 5
    tensors = {name: torch.randn(1, time, channels) for name in streams_of(cell)}
    tensors |= vectors_of(cell, channels, tensors)
    state = CELLS[cell].state_dtype(torch.float32)
    resets, grad_checkpoints = torch.rand(1, time) < 0.1, torch.randn(2, channels, dtype=state)
    reset_state = grad_final = torch.randn(1, channels, dtype=state)
    arguments = arguments_of(tensors, segment, cell=cell, resets=resets, reset_state=reset_state)
    _, _, *traffic = run(
        arguments, torch.randn(1, time, channels), grad_final, cell=cell, grad_checkpoints=grad_checkpoints
    )
    segment *= CELLS[cell].composes
    of_adjoint = ["summarize", "backward"] if adjoint_sees_state(cell) else ["summarize_adjoint"]
    for launches, cut in zip(traffic, (["summarize"], of_adjoint), strict=True):
        reading = [name for (name, _), count in zip(launches.launches, launches.mask_bytes, strict=True) if count]
        assert reading == [*(cut if segment else []), "forward" if launches is traffic[0] else "backward"]
        assert set(launches.mask_bytes) <= {0, time}
    read = traffic[1].bytes_in("load", grad_checkpoints)
    assert read == grad_checkpoints.nbytes * (2 if segment else 1)


@pytest.mark.parametrize("gates", [2, 3])
def test_the_adjoint_is_summarized_up_to_a_write_that_resets(gates):
    """With epsilon 0, word by word until all channels of a program have written: one holds longer than the others."""
    segments, channels, last = (64, 64, 21), 40, 7
    time = sum(segments)
    for first_write, words in ((15, 1), (16, 2), (time, 4)):
        names = ["candidate", "threshold", "amplitude"][:gates]
        streams = {name: torch.ones(1, time, channels) for name in names}
        holds = torch.tensor([step % 64 < first_write for step in range(time)])
        streams["threshold"][0, holds, last] = 2
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
        tensors = {name: torch.randn(1, time, channels).to(dtype) for name in ("candidate", "threshold")}
        tensors["alpha"], initial_state = torch.ones(channels), torch.zeros(n, channels)
        grad_h, grad_final = torch.randn(1, time, channels).to(dtype), torch.randn(n, channels)
        arguments = arguments_of(tensors, segment, cu_seqlens=cu_seqlens, initial_state=initial_state, reverse=reverse)
        made: list[torch.Tensor] = []
        with monkeypatch.context() as patched:
            for make in (torch.Tensor.new_empty, torch.Tensor.new_zeros):

                def keep(self, *sizes, made=made, make=make, **keywords):
                    made.append(make(self, *sizes, **keywords))
                    return made[-1]

                patched.setattr(torch.Tensor, make.__name__, keep)
            results, grads, *traffic = run(arguments, grad_h, grad_final)
        known = [*tensors.values(), initial_state, grad_h, grad_final, cu_seqlens, *results, *grads, *made]
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
        names = ("candidate", "threshold")
        given, near = dict(zip(names, given, strict=True)), dict(zip(names, near, strict=True))
        results, grads, *_ = run(arguments_of(given, segment, reverse=reverse), g, f)
        expected, expected_grads, *_ = run(arguments_of(near, segment, reverse=reverse), g.clone(), f)
        for a, b in zip([*results[:2], *grads], [*expected[:2], *expected_grads], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("cell", COMPOSING)
def test_groups_of_segments(monkeypatch, cell):
    """Results and the map stay the same when there are many segments, so that groups of them are composed first."""
    dtype = list(inputs.CELLS[cell].dtypes.values())[-1]
    call = inputs.case(cell, dtype, batch=1, time=3 * 64 + 3, channels=4, initial_state="real").build()
    op = calls.op_of(cell, "triton")

    def all_results():
        with calls.segments("triton", 64), recorded() as traffic:
            results = calls.run(call, op, torch.device("cpu"))
            with torch.no_grad(), as_maps():
                maps = op(**{name: t for name, t in call.tensors.items() if name != "initial_state"}, **call.settings)
        return results | dict(zip(("factor", "offset"), maps, strict=True)), [name for name, _ in traffic.launches]

    expected, launched = all_results()
    monkeypatch.setattr(launch, "MOST_WALKED", 1)
    got, launched_in_groups = all_results()
    assert launched.count("fold") == 1
    assert launched_in_groups.count("fold") == 4  # forward, backward, and twice for the map
    for name, t in expected.items():
        torch.testing.assert_close(got[name], t, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("segment", [0, 64])
@pytest.mark.parametrize("batch", [2, "packed"])
@pytest.mark.parametrize("cell", COMPOSING)
def test_maps(cell, batch, segment):
    """The map of each sequence takes the state before it to the state after it."""
    dtype = list(inputs.CELLS[cell].dtypes.values())[-1]
    call = inputs.case(cell, dtype, batch=batch, time=150, channels=5, initial_state="real", reverse=True).build()
    op, start = calls.op_of(cell, "triton"), call.tensors.pop("initial_state")
    with calls.segments("triton", segment), torch.no_grad():
        _, expected = op(**call.tensors, **call.settings, initial_state=start)
        with as_maps():
            factor, offset = op(**call.tensors, **call.settings)
    torch.testing.assert_close(factor * start + offset, expected, rtol=1e-4, atol=1e-4)


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
    if cell == "bmru":
        tensors = [candidate, candidate.roll(2, 2).abs(), torch.full_like(candidate, 3.0)]
        tensors[1][..., ::2] = 1
    else:
        tensors = [candidate, torch.tensor([0.5, 0.0, 1.0, -1.0]), torch.ones(channels)]
    grad_h = torch.tensor([0.0, 1.0, -2.0, 0.5])[None, None].expand(1, time, channels).contiguous()

    def grads(dtype):
        named = dict(zip(names, (t.to(dtype) for t in tensors), strict=True))
        arguments = arguments_of(named, 0, cell=cell, surrogate_scale=scale)
        return run(arguments, grad_h.to(dtype), torch.zeros(1, channels, dtype=dtype), cell=cell)[1]

    for name, got, wide in zip(names, grads(torch.float32), grads(torch.float64), strict=True):
        expected = wide.to(torch.float32)
        assert torch.equal(got.isinf(), expected.isinf()), name
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-37 if scale > 1 else 1e-44)


def test_many_equal_terms():
    """The gradient of alpha sums up the same over time, many times."""
    time = 1024
    tensors = {name: torch.ones(1, time, 1) for name in ("candidate", "threshold")} | {"alpha": torch.ones(1)}
    grad_h = torch.full((1, time, 1), 0.1)
    *_, grad_alpha = run(arguments_of(tensors, 0, epsilon=0.0), grad_h, torch.zeros(1, 1))[1]
    expected = time * grad_h[0, 0, 0].double()
    assert (grad_alpha.double() / expected - 1).abs() < 1e-6


@pytest.mark.parametrize("segment", [0, 64])
@pytest.mark.parametrize("epsilon", [0.0, 0.5])
def test_absent_inputs_are_not_read(segment, epsilon):
    """No variant is compiled for alpha, so a flag must keep kernels from its address, which is 0 here."""
    streams = {name: torch.randn(1, 100, 4) for name in ("candidate", "threshold")}
    *_, forward, backward = run(
        arguments_of(streams, segment, epsilon=epsilon), torch.randn(1, 100, 4), torch.ones(1, 4)
    )
    for launches in (forward, backward):
        assert launches.launches
        assert all(min(addresses) > 2**12 for _, touched in launches.launches for addresses in touched.values())


WRONG_NUMBERS = {
    "epsilon": lambda inputs, *rest: ([*inputs[:-1], torch.tensor(2.0, dtype=torch.float64)], *rest),
    "surrogate_scale": lambda *arguments: (*arguments[:3], [-1.0], *arguments[4:]),
    "numbers": lambda *arguments: (*arguments[:3], [], *arguments[4:]),
    "given": lambda inputs, given, *rest: (inputs, given & ~2, *rest),
    "packed": lambda inputs, given, packed, *rest: (inputs, given, 2, *rest),
    "chunk": lambda *arguments: (*arguments[:-2], 2**60, arguments[-1]),
    "segment": lambda *arguments: (*arguments[:-1], -2),
}


@pytest.mark.parametrize("name", WRONG_NUMBERS)
def test_wrong_numbers_are_refused(name):
    streams = {name: torch.randn(1, 70, 4) for name in ("candidate", "threshold")}
    arguments = arguments_of(streams, 64)
    results = CELLS["bmru"].forward["triton"](*arguments, True)
    wrong = WRONG_NUMBERS[name](*arguments)
    with pytest.raises(ValueError, match=name):
        CELLS["bmru"].forward["triton"](*wrong, True)
    with pytest.raises(ValueError, match=name):
        CELLS["bmru"].backward["triton"](
            streams["candidate"], torch.zeros(1, 4), None, *wrong, *results[2:], ALL_WANTED
        )


@pytest.mark.parametrize("segment", [0, 64])
def test_wrong_tensors_are_refused_in_the_backward_pass(segment):
    streams = [torch.randn(1, 70, 4) for _ in range(2)]
    inputs_, *arguments = arguments_of(dict(zip(("candidate", "threshold"), streams, strict=True)), segment)
    tensors = {
        "grad_h": torch.zeros(1, 70, 4), "grad_final": torch.zeros(1, 4), "grad_checkpoints": torch.zeros(1, 4),
        "checkpoints": torch.zeros(1, 4), "codes": torch.zeros(5 if segment else 0, 4, dtype=torch.int32),
    }  # fmt: skip

    def backward(streams=streams, **changed):
        *grads, checkpoints, codes = (tensors | changed).values()
        saved = (checkpoints, codes)
        return CELLS["bmru"].backward["triton"](*grads, [*streams, *inputs_[2:]], *arguments, *saved, ALL_WANTED)

    backward()
    for name, t in tensors.items():
        for wrong in (t[:-1] if t.numel() else torch.zeros(3, 4).int(), t[..., :-1], t.to(torch.int64), t[None]):
            with pytest.raises((TypeError, ValueError), match=name):
                backward(**{name: wrong})
    for wrong in ([streams[0], streams[1][:, :-1]], streams[:1], [], [t[0] for t in streams]):
        with pytest.raises((TypeError, ValueError), match="inputs"):
            backward(wrong)
