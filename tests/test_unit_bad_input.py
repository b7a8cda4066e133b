"""Bad arguments and inputs of a unit raise an error that names the argument."""

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import mru_kernels as mk
from tests.units import all_classes, make


def test_bad_steps():
    with pytest.raises(RuntimeError, match="step: not supported by a bidirectional module, whose second"):
        make(mk.BMRU, 4, 6, bidirectional=True).step(torch.ones(2, 4))
    module = make(mk.BMRU, 4, 6)
    with pytest.raises(ValueError, match=r"input: expected \[batch, features\], got shape \[2, 1, 4\]"):
        module.step(torch.ones(2, 1, 4))
    with pytest.raises(TypeError, match=r"input: expected a tensor \[batch, features\], got PackedSequence"):
        module.step(pack_sequence([torch.ones(3, 4)]))
    with pytest.raises(ValueError, match=r"hx: expected shape \[1, 2, 6\]"):
        module.step(torch.ones(2, 4), torch.ones(2, 6))


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        ((0, 4), {}, ValueError, "input_size: expected a positive int, got 0"),
        ((4, -1), {}, ValueError, "hidden_size: expected a positive int, got -1"),
        ((4, 4, 0), {}, ValueError, "num_layers: expected a positive int, got 0"),
        ((4, 4.0), {}, TypeError, "hidden_size: expected an int, got float"),
        ((4, 4), {"dropout": 1.5}, ValueError, "dropout: expected a probability"),
        ((4, 4), {"dropout": "x"}, TypeError, "dropout: expected a float, got str"),
        ((4, 4), {"dropout": True}, TypeError, "dropout: expected a float, got bool"),
        ((4, True), {}, TypeError, "hidden_size: expected an int, got bool"),
        ((4, 4), {"chunk_size": 17}, ValueError, "chunk_size: expected a positive multiple of 16"),
        ((4, 4), {"surrogate_scale": True}, TypeError, "surrogate_scale: expected a float, got bool"),
        ((4, 4), {"surrogate_scale": 0.0}, ValueError, "surrogate_scale: expected a positive"),
        ((4, 4), {"dtype": torch.int32}, TypeError, "dtype: expected float32"),
        ((4, 4), {"batchfirst": True}, TypeError, "batchfirst"),
    ],
)
@all_classes
def test_bad_construction(cls, arguments, options, error, match):
    with pytest.raises(error, match=match):
        cls(*arguments, **options)


@pytest.mark.parametrize(
    ("x", "hx", "error", "match"),
    [
        ([1.0], None, TypeError, "input: expected a tensor or a PackedSequence, got list"),
        (torch.ones(4), None, ValueError, r"input: expected \[batch, time, features\] or .*got shape \[4\]"),
        (torch.ones(1, 2, 3, 4), None, ValueError, "input: expected"),
        (torch.ones(2, 3, 5), None, ValueError, r"input: expected 4 features, got shape \[2, 3, 5\]"),
        (torch.ones(2, 3, 4).double(), None, TypeError, "input: expected the module's dtype torch.float32"),
        (torch.ones(2, 3, 4).long(), None, TypeError, "input: expected the module's dtype torch.float32"),
        (
            torch.ones(2, 3, 4, device="meta"),
            None,
            ValueError,
            "input: expected the module's device cpu, got meta",
        ),
        (torch.ones(2, 3, 4), torch.ones(2, 6), ValueError, r"hx: expected shape \[2, 2, 6\]"),
        (
            torch.ones(2, 3, 4),
            torch.ones(2, 3, 6),
            ValueError,
            r"hx: expected shape \[2, 2, 6\].*got \[2, 3, 6\]",
        ),
        (torch.ones(3, 4), torch.ones(2, 1, 6), ValueError, r"hx: expected shape \[2, 6\]"),
        (torch.ones(2, 3, 4), 0.0, TypeError, "hx: expected a tensor or None, got float"),
        (torch.ones(2, 3, 4), torch.ones(2, 2, 6).double(), TypeError, "hx: expected dtype torch.float32"),
        (torch.ones(2, 3, 4), torch.ones(2, 2, 6).half(), TypeError, "hx: expected dtype torch.float32"),
        (
            torch.ones(2, 3, 4),
            torch.ones(2, 2, 6, device="meta"),
            ValueError,
            "hx: expected the input's device",
        ),
        (pack_sequence([torch.ones(3, 5)]), None, ValueError, "input: expected 4 features"),
        (pack_sequence([torch.ones(3)]), None, ValueError, "input: expected packed data"),
        (
            pack_sequence([torch.ones(3, 4)]),
            torch.ones(2, 2, 6),
            ValueError,
            r"hx: expected shape \[2, 1, 6\]",
        ),
    ],
)
def test_bad_input(x, hx, error, match):
    with pytest.raises(error, match=match):
        make(mk.BMRU, 4, 6, 2)(x, hx)
