"""What `define_cell`, its results and the surrogates refuse, before anything is compiled."""

from __future__ import annotations

import copy
import functools
import pickle

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import mru_kernels as mk
from mru_kernels.define import build
from mru_kernels.define.torch_language import evaluate
from mru_kernels.define.trace import Functions, trace

OUTSIDE = torch.ones(3)


@pytest.fixture(autouse=True)
def _nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(build, "_run", lambda command: pytest.fail("compiled"))


def affine(x, a):
    return mk.Affine(a, x)


def branches(x, a):
    if x.sum() > 0:
        return mk.Affine(a, x)
    return mk.Affine(1 - a, x)


def branches_on_a_value(x, a):
    return mk.Affine(a if a[0, 0] > 0 else x, x)


def in_place(x, a):
    y = x * 2
    y += a
    return mk.Affine(a, y)


def draws(x, a):
    return mk.Affine(a, x + torch.rand_like(x))


def captures(x, a):
    return mk.Affine(a * OUTSIDE, x)


def reshapes(x, a):
    return mk.Affine(a, x.transpose(0, 1))


def casts(x, a):
    return mk.Affine(a, x.float())


def chooses_an_inexact_number(x, a):
    return mk.Affine(a, torch.where(x > 0, 0.1, 0.2))


def lacks_an_operation(x, a):
    return mk.Affine(a, torch.special.bessel_j0(x))


def takes_an_angle(x, a):
    return mk.Affine(a, x * (a * 1j).angle())


def lacks_a_complex_operation(x, a):
    return mk.Affine(torch.tanh(1j * a), x)


def raises_to_a_power(x, a):
    return mk.Affine((1j * a) ** 0.5, x)


def drops_an_imaginary_part(x, a):
    return mk.Affine(a, x * (1j * a).to(torch.float64))


def multiplies_parts(x, a):
    parts = torch.view_as_real(1j * a)
    return mk.Affine(torch.view_as_complex(parts * parts), x)


def adds_to_both_parts(x, a):
    return mk.Affine(torch.view_as_complex(torch.view_as_real(1j * a) + 1), x)


def subtracts_from_both_parts(x, a):
    return mk.Affine(torch.view_as_complex(torch.view_as_real(1j * a) - 1), x)


WHAT_A_GATE_MUST_NOT_DO = [
    (branches, "sum"),
    (branches_on_a_value, "branch on values|pointwise"),
    (in_place, "no operation in place, got add_"),
    (draws, "a function of its arguments, got the random rand_like"),
    (captures, "a tensor of shape \\[3\\] from outside"),
    (reshapes, "transpose"),
    (casts, "the dtype of its arguments"),
    (lacks_an_operation, "bessel_j0"),
    (chooses_an_inexact_number, "the dtype of its arguments, got where to torch.float32"),
    (takes_an_angle, "pointwise operations on complex numbers that kernels have, got angle"),
    (lacks_a_complex_operation, "pointwise operations on complex numbers that kernels have, got tanh"),
    (raises_to_a_power, "pointwise operations on complex numbers that kernels have, got pow"),
    (drops_an_imaginary_part, "pointwise operations on complex numbers that kernels have, got _to_copy"),
    (adds_to_both_parts, "a sum of two results of view_as_real, got add of one and a number"),
    (subtracts_from_both_parts, "pointwise operations, got sub, whose result has another shape"),
    (multiplies_parts, "pointwise operations, got mul, whose result has another shape"),
]


@pytest.mark.filterwarnings("ignore:Casting complex values to real")
@pytest.mark.parametrize(("gate", "message"), WHAT_A_GATE_MUST_NOT_DO, ids=lambda v: getattr(v, "__name__", ""))
def test_the_line_of_a_gate_that_cannot_be_compiled_is_named(gate, message):
    with pytest.raises(ValueError, match=message) as raised:
        mk.define_cell("refused", gate)
    assert str(raised.value).startswith(f"{gate.__name__}: expected ")
    assert "test_define_errors.py:" in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": 3}, TypeError, "name: expected a str, got int"),
        ({"name": "Capital"}, ValueError, "name: expected a lower-case identifier"),
        ({"name": "lambda"}, ValueError, "name: expected a lower-case identifier"),
        ({"name": "double"}, ValueError, "name: expected a lower-case identifier"),
        ({"name": "bmru"}, ValueError, "name: expected a new name, got 'bmru'"),
        ({"gate": 3}, TypeError, "gate: expected a function, got int"),
        ({"gate": lambda: mk.Affine(1.0, 1.0)}, ValueError, "gate: expected 1 to 4 inputs, got 0"),
        ({"gate": lambda *x: mk.Affine(x[0], x[1])}, TypeError, "gate: expected named arguments only"),
        ({"gate": lambda state, a: mk.Affine(a, state)}, ValueError, "gate: expected other names .* got 'state'"),
        ({"gate": lambda a, b: (a, b)}, TypeError, "expected mk.Affine or mk.Write, got tuple"),
        ({"gate": lambda a, b: mk.Affine(a, "b")}, TypeError, "expected offset as a floating tensor, got str"),
        ({"gate": lambda a, b: mk.Affine(a > 0, b)}, TypeError, "expected factor as a floating tensor, got a mask"),
        ({"gate": lambda a, b: mk.Write(1.0, a * b)}, TypeError, "expected write as a floating tensor, got float"),
        ({"gate": lambda a, b: mk.Affine(a, a)}, ValueError, "b: expected an argument that a result depends on"),
        ({"output": 3}, TypeError, "output: expected a function, got int"),
        ({"output": lambda x: x}, ValueError, "output: expected an argument `state`"),
        ({"output": lambda state, x: x}, ValueError, "state: expected an output that depends on it"),
        ({"output": lambda state: state > 0}, TypeError, "expected the output as a floating tensor, got a mask"),
        ({"scalars": [1.0]}, TypeError, "scalars: expected a dict"),
        ({"scalars": {"x": float("nan")}}, ValueError, "scalars: expected finite numbers, got nan for 'x'"),
        ({"scalars": {"k": 1.0}}, ValueError, "k: expected an argument that a result depends on"),
        ({"gate": lambda x, a=1.0: mk.Affine(a, x)}, TypeError, "gate: expected arguments without defaults"),
        (
            {"gate": lambda x, a, b: mk.Write(x > a, b), "scalars": {"a": 1.0, "b": 1.0}},
            ValueError,
            "scalars: expected at most 1, as epsilon is one too, got 2",
        ),
        ({"scalars": {"x": 1.0, "a": 1.0, "k": 1.0}}, ValueError, "gate: expected 1 to 4 inputs, got 0"),
        ({"complex_inputs": "x"}, TypeError, "complex_inputs: expected a collection of names, got 'x'"),
        ({"complex_inputs": ["b"]}, ValueError, "complex_inputs: expected names of inputs, x, a, got 'b'"),
        ({"complex_inputs": ["a"]}, ValueError, "output: expected a function with a real result, .* 'x' is real"),
        ({"gate": lambda x, a: mk.Affine(1j, x * a)}, ValueError, "output: expected a function with a real result"),
        (
            {"complex_inputs": ["a"], "output": lambda state: 2 * state},
            TypeError,
            "expected a real output, as the stream 'x' is real, got a complex one",
        ),
        (
            {"complex_inputs": ["a"], "gate": lambda x, a: mk.Write(x > 0, a.real)},
            TypeError,
            "expected mk.Affine, as an input or a result is complex, got mk.Write",
        ),
        ({"gate": lambda x, a: mk.Write(x > 0, 1j * a)}, TypeError, "expected mk.Affine, as an input or a result"),
    ],
)
def test_definitions_are_checked(arguments, error, message):
    with pytest.raises(error, match=message):
        mk.define_cell(**{"name": "refused", "gate": affine} | arguments)


def test_a_choice_of_small_numbers_is_recorded():
    cell = mk.define_cell("chooses", lambda x, a: mk.Affine(a, torch.where(x > 0, 1.0, -0.5)))
    assert "? splat<V>(S(0x1.0000000000000p+0)) : splat<V>(S(-0x1.0000000000000p-1))" in cell.source


def test_pairs_of_parts_add_up():
    def gate(x, a):
        one, other = torch.view_as_real(a), torch.view_as_real(1j * a)
        return mk.Affine(torch.view_as_complex(one + other), x)

    program = trace(Functions(gate, None, ("x", "a"), (), frozenset("xa")))
    a = torch.tensor([1 + 2j, -3j, 0.5 + 0j])
    (factor,) = evaluate(program.graph, [program.write], {"x[1]": a}, a.real)
    assert torch.equal(factor, a * (1 + 1j))


@pytest.mark.parametrize("number", [lambda k: k, lambda k: 2.0, lambda k: torch.tensor(2.0)])
def test_a_number_is_not_added_to_a_pair_of_parts(number):
    def output(state, k):
        return (torch.view_as_complex(number(k) + torch.view_as_real(state)) * k).real

    with pytest.raises(ValueError, match="a sum of two results of view_as_real"):
        trace(Functions(affine, output, ("x", "a"), ("k",), frozenset("a")))


MODES = {
    "fake": FakeTensorMode,
    "default device": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_does_not_change_a_definition(mode):
    with MODES[mode]():
        cell = mk.define_cell("made_under_a_mode", lambda x, a: mk.Affine(a.sigmoid(), x.exp()))
    again = mk.define_cell("made_under_a_mode", lambda x, a: mk.Affine(a.sigmoid(), x.exp()))
    assert again is cell  # its source is the same
    x = torch.randn(2, 5, 3, requires_grad=True)
    cell(x, x, backend="torch")[0].sum().backward()


def test_a_definition_inside_a_transform_is_refused():
    for transform in (torch.func.grad, torch.vmap):
        with pytest.raises(RuntimeError, match=r"^define_cell: expected a definition outside transforms"):
            transform(lambda x: mk.define_cell("refused", affine)(x, x)[0].sum())(torch.randn(1, 2, 5, 3))


def test_the_range_of_a_scalar_is_named():
    cell = mk.define_cell("has_a_scalar", lambda x, a, k: mk.Affine(a * k, x), scalars={"k": 1.0})
    for number in (float("nan"), float("inf"), 10**400):
        with pytest.raises(ValueError, match=f"^k: expected a finite number, got {number}"):
            cell(torch.ones(1, 2, 3), torch.ones(3), k=number, backend="torch")


def test_a_callable_without_a_name_is_refused_by_its_type():
    with pytest.raises(ValueError, match=r"partial: expected pointwise operations that kernels have, got transpose$"):
        mk.define_cell("refused", functools.partial(reshapes))


def test_a_name_is_given_once():
    first = mk.define_cell("named_once", affine)
    assert mk.define_cell("named_once", affine) is first  # a notebook runs its cells again
    with pytest.raises(ValueError, match="name: expected a new name, got 'named_once'"):
        mk.define_cell("named_once", lambda x, a: mk.Affine(a, 2 * x))


def test_cells_with_one_source_that_differ_in_their_second_derivatives_are_two():
    mk.define_cell("chooses_by_sign", lambda x, a: mk.Affine(torch.where(a > 0, a, 0.5), x))
    with pytest.raises(ValueError, match="name: expected a new name, got 'chooses_by_sign'"):
        mk.define_cell("chooses_by_sign", lambda x, a: mk.Affine(torch.where(a.detach() > 0, a, 0.5), x))


def test_copies_are_the_cell_itself():
    cell = mk.define_cell("copied", affine)
    assert copy.deepcopy(cell) is pickle.loads(pickle.dumps(cell)) is copy.copy(cell) is cell
    with pytest.raises(RuntimeError, match="expected the cell 'missing' to be defined first"):
        pickle.loads(pickle.dumps(cell).replace(b"copied", b"missing").replace(b"\x8c\x06missing", b"\x8c\x07missing"))


def test_each_choice_of_inputs_per_channel_is_a_cell_of_its_own():
    cell = mk.define_cell("many_kinds", lambda x, a, b, a_b: mk.Affine(a * b, x + a_b))
    x, v = torch.ones(1, 2, 3), torch.ones(3)
    for inputs in ((x, v, v, x), (x, x, x, v), (x, x, x, x)):
        cell(*inputs, backend="torch")
    assert len({made.name for made in cell._cells.values()}) == 3


def test_calls_are_checked():
    cell = mk.define_cell("called_wrongly", lambda x, a, k: mk.Affine(a * k, x), scalars={"k": 1.0})
    x = torch.randn(2, 5, 3)
    for arguments, named, message in [
        ((x, x, x), {}, "called_wrongly: expected at most 2 positional arguments"),
        ((x,), {}, "called_wrongly: expected the argument 'a', got none"),
        ((x, x), {"a": x}, "'a', which is given twice"),
        ((x, x), {"epsilon": 0.5}, "'epsilon', which is unknown; it takes x, a, k"),
        ((x.numpy(), x), {}, "x: expected a tensor"),
        ((x, x), {"k": "1"}, "k: expected a float, got str"),
    ]:
        with pytest.raises(TypeError, match=message):
            cell(*arguments, backend="torch", **named)
    for arguments, message in [
        ((x[0], x), "x: expected 3 dimensions"),
        ((x, torch.ones(4)), r"a: expected shape \[3\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            cell(*arguments, backend="torch")
    with pytest.raises(TypeError, match="a: expected"):
        cell(x, x.double(), backend="torch")
    with pytest.raises(TypeError, match="x: expected a dtype of"):
        cell(x.to(torch.complex64), x.to(torch.complex64), backend="torch")


def test_calls_of_complex_cells_are_checked():
    streams = mk.define_cell(
        "called_with_complex_streams", lambda w, a, k: mk.Affine(a * k, w), complex_inputs=["w", "a"]
    )
    x, v = torch.randn(2, 5, 3), torch.ones(3)
    w = x.to(torch.complex64)
    for arguments, error, message in [
        ((x, v, v), TypeError, "^w: expected a dtype of complex64, complex128, got torch.float32"),
        ((w, v, v), TypeError, "^a: expected a dtype of complex64, got torch.float32"),
        ((w, w.to(torch.complex128), v), TypeError, "^a: expected w's dtype torch.complex64, got torch.complex128"),
        ((w, w, v + 0j), TypeError, "^k: expected a real dtype, got torch.complex64"),
        ((w, w, v.long()), TypeError, "^k: expected a dtype of complex64, got torch.int64"),
        ((w, w, x), ValueError, r"^k: expected 1 dimensions \[channels\], got shape \[2, 5, 3\]"),
    ]:
        with pytest.raises(error, match=message):
            streams(*arguments, backend="torch")
    channels = mk.define_cell(
        "called_with_complex_channels", affine, output=lambda state: state.real, complex_inputs=["a"]
    )
    for arguments, error, message in [
        ((w, v + 0j), TypeError, "^x: expected a dtype of float32, .*, got torch.complex64"),
        ((x, v), TypeError, "^a: expected a dtype of complex64, got torch.float32"),
        ((x, w), ValueError, r"^a: expected 1 dimensions \[channels\], got shape \[2, 5, 3\]"),
        ((x.double(), v + 0j), TypeError, "^a: expected a dtype of complex128, got torch.complex64"),
    ]:
        with pytest.raises(error, match=message):
            channels(*arguments, backend="torch")
    with pytest.raises(TypeError, match=r"^initial_state: expected a dtype of complex64, got torch.float32"):
        channels(x, v + 0j, initial_state=x[:, 0], backend="torch")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.ones(3),), TypeError, "x: expected a tensor, got ndarray"),
        ((torch.ones(3, dtype=torch.int64),), TypeError, "x: expected a floating dtype, got torch.int64"),
        ((torch.ones(3), "1"), TypeError, "scale: expected a float, got str"),
        ((torch.ones(3), 0.0), ValueError, "scale: expected a positive finite number, got 0.0"),
    ],
)
def test_surrogates_are_checked(arguments, error, message):
    for function in (mk.heaviside, mk.sign):
        with pytest.raises(error, match=message):
            function(*arguments)
    with pytest.raises(ValueError, match="surrogate: expected a function or one of arctangent"):
        mk.heaviside(torch.ones(3), surrogate="none")
    with pytest.raises(TypeError, match="surrogate: expected a name or a function, got int"):
        mk.sign(torch.ones(3), surrogate=3)
    with pytest.raises(ValueError, match="threshold: expected the dtype and shape of x"):
        mk.heaviside(torch.ones(3), threshold=torch.ones(4))
