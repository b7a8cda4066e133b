"""Complex cells of `define_cell` are equal to the linear recurrence and to their definitions, with every option.

LINEAR has complex streams. OSCILLATOR has real streams and complex inputs per channel. TURNED has complex streams and a
real output.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

import mru_kernels as mk
from bench import inputs
from mru_kernels.define.torch_language import evaluate
from mru_kernels.define.trace import Functions, trace
from tests import calls
from tests.test_define_derivatives import assert_second_derivatives_of_a_step

CPU = torch.device("cpu")
COMPLEX = [torch.complex64, torch.complex128]
C, R = torch.complex128, torch.float64


def linear(update: Tensor, decay: Tensor) -> mk.Affine:
    return mk.Affine(decay, update)


def oscillator(input: Tensor, pole: Tensor, gain: Tensor, phase: Tensor) -> mk.Affine:
    """It is not analytic in its complex inputs."""
    return mk.Affine(pole / (1 + pole.abs()), gain.conj() * torch.polar(input.exp(), phase))


def modulus(state: Tensor, input: Tensor) -> Tensor:
    return (state * state).real * 0.3 + state.abs() + input * state.imag


def turned(wave: Tensor, mode: Tensor, angle: Tensor) -> mk.Affine:
    return mk.Affine(torch.exp(1j * angle - angle.exp()) * mode.sgn(), wave * mode.conj() / (wave + 2 + 3j))


LINEAR = mk.define_cell("test_complex_linear", linear, complex_inputs=("update", "decay"))
OSCILLATOR = mk.define_cell("test_complex_oscillator", oscillator, output=modulus, complex_inputs=("pole", "gain"))
TURNED = mk.define_cell(
    "test_complex_turned", turned, output=lambda state, wave: (state * wave).real, complex_inputs=("wave", "mode")
)

#: Those of the quick suite, and those whose kernels only `make check` compiles.
CELLS = [OSCILLATOR, pytest.param(TURNED, marks=pytest.mark.check)]
WITH_LINEAR = [*CELLS, pytest.param(LINEAR, marks=pytest.mark.check)]


def drawn(cell: mk.DefinedCell, batch: int = 2, time: int = 100, channels: int = 5) -> tuple[list[Tensor], Tensor]:
    """Leaves for a call of a cell, and an initial state."""
    torch.manual_seed(3)
    stream, vector = (batch, time, channels), (channels,)
    sizes = {
        LINEAR: [(stream, C), (stream, C)],
        OSCILLATOR: [(stream, R), (vector, C), (vector, C), (stream, R)],
        TURNED: [(stream, C), (stream, C), (vector, R)],
    }[cell]
    state = torch.randn(batch, channels, dtype=C)
    x = [torch.randn(size, dtype=dtype) for size, dtype in sizes]
    if cell is LINEAR:
        x[1] *= 0.7  # states stay in range
    return [t.requires_grad_() for t in x], state.requires_grad_()


def results(cell: mk.DefinedCell, backend: str, leaves: list[Tensor], **options) -> list[Tensor]:
    """h, the final state, other results and the gradients of the leaves."""
    made = cell(*leaves[: len(cell.inputs)], backend=backend, **options)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(t.shape, dtype=t.dtype, generator=generator) for t in made]
    return [*made, *torch.autograd.grad(made, leaves, cotangents, materialize_grads=True)]


def assert_equal_to_the_loop(cell: mk.DefinedCell, leaves: list[Tensor], **options) -> None:
    ours, theirs = (results(cell, backend, leaves, **options) for backend in ("cpu", "torch"))
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.dtype == b.dtype, i
        error = ((a - b).abs().max() / b.abs().max()).item()
        assert error < 1e-12, (i, error)


# ---------------------------------------------------------------------------------------------- against the linear one


@pytest.mark.check
@pytest.mark.parametrize("dtype", COMPLEX, ids=str)
@pytest.mark.parametrize("segment", [0, 64])
@pytest.mark.parametrize(
    "options",
    [
        {"decay": "stream", "initial_state": "real", "layout": "time-major"},
        {"decay": "channel", "reverse": True},
        {"decay": "stream", "batch": "packed"},
        {"decay": "stream", "resets": "to a state", "boundaries": True},
    ],
    ids=str,
)
def test_a_defined_linear_recurrence_is_the_one_by_hand(dtype, segment, options):
    """Bit for bit, gradients too."""
    options = {"batch": 3, "time": 200, "channels": 11} | options
    call = inputs.case("linear_recurrence", dtype, seed=5, **options).build()
    with calls.segments("cpu", segment):
        ours, theirs = (calls.run(call, op, CPU) for op in (LINEAR, mk.linear_recurrence))
    calls.assert_same_bits(ours, theirs)
    calls.assert_right(call, LINEAR, CPU)


@pytest.mark.check
def test_a_step_of_the_linear_recurrence_is_the_one_by_hand():
    (update, decay), state = drawn(LINEAR, time=1)
    with torch.no_grad():
        ours = LINEAR.step(update[:, 0], decay[:, 0], state=state)
        theirs = mk.linear_recurrence_step(decay[:, 0], update[:, 0], state)
    assert all(map(torch.equal, ours, theirs))


# ---------------------------------------------------------------------------------------------- against definitions


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_kernels_are_within_the_limits_of_their_definition(cell):
    found = cell.compare()
    assert found.passes, str(found)
    dtypes = {str(row.dtype) for row in found.rows}
    assert ("torch.bfloat16" in dtypes) == (cell is OSCILLATOR)


@pytest.mark.parametrize("segment", [0, 64])
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_results_and_gradients_are_those_of_the_loop(cell, segment):
    leaves, state = drawn(cell)
    packed, _ = drawn(cell, batch=1)
    mask = torch.rand(2, 100, generator=torch.Generator().manual_seed(0)) < 0.1
    state_of_three = torch.randn(3, 5, dtype=C, requires_grad=True)
    with calls.segments("cpu", segment):
        assert_equal_to_the_loop(cell, [*leaves, state], initial_state=state, reverse=True)
        assert_equal_to_the_loop(cell, [*leaves, state], reset_state=state, resets=mask, return_boundaries=True)
        offsets = torch.tensor([0, 1, 60, 100])
        assert_equal_to_the_loop(cell, [*packed, state_of_three], initial_state=state_of_three, cu_seqlens=offsets)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_gradients_and_tangents_by_differences(cell, reverse):
    leaves, state = drawn(cell, time=6, channels=3)

    def scan(*arguments):
        return cell(*arguments[:-1], initial_state=arguments[-1], reverse=reverse)

    assert torch.autograd.gradcheck(scan, [*leaves, state], check_forward_ad=True)


@pytest.mark.parametrize("cell", WITH_LINEAR, ids=str)
def test_second_derivatives_by_differences(cell):
    leaves, state = drawn(cell, batch=1, time=3, channels=2)

    def scan(*arguments):
        return cell(*arguments[:-1], initial_state=arguments[-1], reverse=True)

    assert torch.autograd.gradgradcheck(scan, [*leaves, state])


POINTS = torch.tensor([0, 1, -2j, 1 + 1j, 3 - 3j, -2 + 0.5j, 0.25 + 4j, 1e-200 - 1e-200j], dtype=C)


@pytest.mark.parametrize(
    "function", [torch.abs, torch.sgn, lambda t: t.abs() * t, lambda t: t / (1 + t.abs()), lambda t: t.real.abs() + t]
)
def test_second_derivatives_of_moduli_are_those_of_torch(function):
    """At 0, on the axes and where both parts are of one size."""
    points = POINTS[1:-1] if function is torch.sgn else POINTS  # torch's own of sgn are NaN at the others
    assert_second_derivatives_of_a_step(lambda x, a: mk.Affine(a * x, function(x) * a), points, points.exp())


def test_third_derivatives_of_moduli_by_differences():
    x = POINTS[1:-1].clone().requires_grad_()
    program = trace(Functions(lambda x: mk.Affine(0.5, x.abs() + 0 * x), None, ("x",), (), frozenset("x")))

    def first(x: Tensor) -> Tensor:
        return evaluate(program.graph, program.grads, {"x[0]": x, "lambda_": torch.ones_like(x)}, x.real)[0]

    assert torch.autograd.gradgradcheck(first, x)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_steps_are_the_scan(cell):
    leaves, state = drawn(cell, time=4)
    x = [t.detach() for t in leaves]
    h, final = cell(*x, initial_state=state.detach())
    after, outputs = state.detach(), []
    for t in range(4):
        output, after = cell.step(*(v if v.dim() == 1 else v[:, t] for v in x), state=after)
        outputs.append(output)
    assert torch.equal(torch.stack(outputs, 1), h)
    assert torch.equal(after, final)
    slots = torch.zeros(4, 5, dtype=C)
    output, _ = cell.step(
        *(v if v.dim() == 1 else v[:, 0] for v in x), state=slots, state_indices=torch.tensor([3, -1])
    )
    assert torch.equal(output[0], cell(*x)[0][0, 0])
    assert slots[3].any()
    assert not output[1].any()
    assert not slots[:3].any()


def test_streams_that_kernels_do_not_take_are_refused():
    (update, decay), _ = drawn(LINEAR, time=7)
    for wrong in ((update.real, decay.real), (update.real, decay), (update, decay.real)):
        with pytest.raises(TypeError, match=r"^(update|decay): expected "):
            LINEAR(*wrong)
    (x, pole, gain, phase), _ = drawn(OSCILLATOR, time=7)
    for wrong in (
        (x + 0j, pole, gain, phase + 0j),
        (x, pole.real, gain, phase),
        (x.float(), pole, gain, phase.float()),
    ):
        with pytest.raises(TypeError, match=r"^(input|pole): expected "):
            OSCILLATOR(*wrong)


@pytest.mark.check
def test_dtypes_and_layouts_of_results():
    (wave, mode, angle), _ = drawn(TURNED, time=7)
    h, state = TURNED(wave.transpose(0, 1).contiguous().transpose(0, 1), mode, angle)
    assert (h.dtype, state.dtype, h.stride()) == (R, C, (5, 10, 1))
    assert TURNED(wave, mode, angle)[0].is_contiguous()
    assert torch.equal(TURNED(wave, mode, angle.float().double())[0], TURNED(wave, mode, angle.float())[0])
    (x, pole, gain, phase), _ = drawn(OSCILLATOR, time=7)
    h, state = OSCILLATOR(x.half(), pole.cfloat(), gain.cfloat(), phase.half())
    assert (h.dtype, state.dtype) == (torch.float16, torch.complex64)


@pytest.mark.check
def test_quotients_and_moduli_over_the_whole_range():
    """No square of a part leaves the range of complex64."""

    def gate(a: Tensor, b: Tensor) -> mk.Affine:
        return mk.Affine(0.0, a / b + b.abs())

    cell = mk.define_cell("test_complex_quotient", gate, complex_inputs=("a", "b"))
    torch.manual_seed(0)
    size = 10.0 ** torch.randint(-30, 31, (1, 1, 20_000))
    b = (torch.randn(1, 1, 20_000, dtype=torch.complex64) * size).requires_grad_()
    a = (torch.randn(1, 1, 20_000, dtype=torch.complex64) * size).requires_grad_()
    h, _ = cell(a, b)
    expected = (a.to(C) / b.to(C) + b.to(C).abs()).to(torch.complex64)
    torch.testing.assert_close(h, expected, rtol=1e-6, atol=1e-30)
    special = torch.tensor([complex("inf"), complex(0, float("-inf")), 0, complex("nan"), complex(3, -4)])
    ones = torch.ones_like(special)
    h, _ = cell((0 * ones).view(1, 1, -1) + 1, special.view(1, 1, -1))
    assert h[0, 0, 0].real == h[0, 0, 1].real == float("inf")
    assert h[0, 0, 2:4].isnan().all()
    assert h[0, 0, 4] == 5 + 1 / complex(3, -4)


# ---------------------------------------------------------------------------------------------- tools of torch


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_compile_makes_one_graph(cell):
    leaves, state = drawn(cell, time=30)

    def loss(*x):
        h, final = cell(*x, initial_state=state)
        return h.square().sum() + final.abs().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(*(torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_vmap_opcheck_and_export(cell):
    leaves, _ = drawn(cell, batch=3, time=20)
    x = [t.detach() for t in leaves]
    streams = [t.dim() == 3 for t in x]
    each = [t.unsqueeze(1) if is_stream else t for t, is_stream in zip(x, streams, strict=True)]
    ours = torch.vmap(lambda *t: cell(*t)[0], tuple(0 if is_stream else None for is_stream in streams))(*each)
    assert torch.equal(ours.squeeze(1), cell(*x)[0])

    class Module(torch.nn.Module):
        def forward(self, *arguments):
            return cell(*arguments)

    time = tuple({1: torch.export.Dim.AUTO} if is_stream else None for is_stream in streams)
    program = torch.export.export(Module(), tuple(x), dynamic_shapes=(time,))
    longer = [t.detach() for t in drawn(cell, batch=3, time=33)[0]]
    assert torch.equal(program.module()(*longer)[0], cell(*longer)[0])
    kinds = tuple(map(cell._kind, cell.inputs, x))
    op = [t.to(x[0].dtype) if x[0].is_complex() else t for t in x]
    arguments = (op, (1 << len(x)) - 1, 0, [], None, None, None, None, False, 64, -1, True)
    torch.library.opcheck(getattr(torch.ops.mru, cell._cells[kinds].name).cpu, arguments)


@pytest.mark.parametrize("cell", WITH_LINEAR, ids=str)
def test_sequence_parallel(cell, group_of_one):
    leaves, _ = drawn(cell, time=50)
    parallel = mk.distributed.sequence_parallel(cell)
    ours, theirs = (op(*leaves) for op in (parallel, cell))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    grads = (torch.autograd.grad(h.abs().sum(), leaves) for h in (ours[0], theirs[0]))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_leaves_complex_tensors():
    (x, pole, gain, phase), _ = drawn(OSCILLATOR, time=9)
    call = partial(OSCILLATOR, x.float(), pole.cfloat(), gain.cfloat(), phase.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h, state = call()
    assert (h.dtype, state.dtype) == (torch.bfloat16, torch.complex64)
    torch.testing.assert_close(h.float(), call()[0], rtol=0.05, atol=0.05)
