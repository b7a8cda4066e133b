"""`mk.MemoryCache`: arguments, inputs and states that do not fit raise."""

from __future__ import annotations

import pytest
import torch

import mru_kernels as mk
from tests.test_memory_cache import CHANNELS, FEATURES, SEGMENT, cached, random


@pytest.mark.parametrize(
    ("unit", "options", "error", "match"),
    [
        (mk.BMRU(2, 3, bidirectional=True), {}, ValueError, "^unit: expected one layer and one direction, got"),
        (mk.BMRU(2, 3, 2), {}, ValueError, "^unit: expected one layer and one direction, got num_layers=2"),
        (torch.nn.GRU(2, 3), {}, TypeError, "^unit: expected a recurrent module of this package, got GRU"),
        (mk.MRUBlock(3), {}, TypeError, "^unit: expected a recurrent module of this package, got MRUBlock"),
        ("bmru", {}, TypeError, "^unit: expected a recurrent module of this package, got str"),
        (mk.BMRU(2, 3), {"mode": "soup"}, ValueError, "^mode: expected one of 'gated', .*'average', got 'soup'"),
        (mk.BMRU(2, 3), {"segment": 0}, ValueError, "^segment: expected a positive int, got 0"),
        (mk.BMRU(2, 3), {"segment": 2.0}, TypeError, "^segment: expected an int, got float"),
        (mk.BMRU(2, 3), {"mode": "sparse"}, ValueError, '^top_k: expected an int with mode="sparse"'),
        (mk.BMRU(2, 3), {"top_k": 2}, ValueError, '^top_k: expected an int with mode="sparse", else None, got 2 with'),
        (mk.BMRU(2, 3), {"mode": "sparse", "top_k": 0}, ValueError, "^top_k: expected a positive int, got 0"),
        (mk.BMRU(2, 3), {"mode": "sparse", "top_k": "2"}, TypeError, "^top_k: expected an int, got str"),
        (mk.BMRU(2, 3), {"restart": 1}, TypeError, "^restart: expected a bool, got int"),
        (mk.BMRU(2, 3), {"segments": 8}, TypeError, "^MemoryCache: unknown argument 'segments'; did you mean"),
    ],
)
def test_bad_construction(unit, options, error, match):
    with pytest.raises(error, match=match):
        mk.MemoryCache(unit, **options)


def test_bad_blocks():
    with pytest.raises(TypeError, match=r"^unit: expected a recurrent module of this package, got GRU"):
        mk.MRUBlock(4, "gru", cache={})
    with pytest.raises(ValueError, match=r"^mode: expected one of"):
        mk.MRUNetwork(3, 2, width=4, num_blocks=1, cache={"mode": "soup"})
    with pytest.raises(TypeError, match=r"^cache: expected a mapping of arguments or None, got int"):
        mk.MRUBlock(4, cache=64)


def test_bad_calls():
    module = cached()
    x = random(2, 6, FEATURES)
    _, state = module(x)
    for bad, error, match in (
        (x[0], ValueError, r"input: expected 3 dimensions \[batch, time, features\], got shape"),
        ([1.0], TypeError, r"input: expected a tensor"),
        (x[..., :2], ValueError, r"input: expected 5 features"),
        (x.float(), TypeError, r"input: expected the module's dtype"),
        (torch.nn.utils.rnn.pack_sequence([x[0]]), TypeError, r"input: expected a tensor .*got PackedSequence"),
    ):
        with pytest.raises(error, match=match):
            module(bad)

    def replaced(index, value):
        return [value if i == index else t for i, t in enumerate(state)]

    for bad, error, match in (
        (state[:4], ValueError, r"state: expected 5 tensors"),
        (state[0], TypeError, r"state: expected a tuple of tensors"),
        (replaced(0, state[0][:1]), ValueError, r"state: expected shape \[2, 4\] for tensor 0"),
        (replaced(0, state[0].bfloat16()), TypeError, r"hx: expected dtype"),
        (replaced(1, state[1].double()), ValueError, r"state: expected one number of steps .*tensor 1"),
        (replaced(1, torch.tensor([6, 7])), ValueError, r"state: expected one number of steps .*got \[6, 7\]"),
        (replaced(1, torch.tensor([60, 60])), ValueError, r"state: expected shape \[2, 15, 4\] for tensor 3"),
        (replaced(2, state[2][:, :2]), ValueError, r"state: expected shape \[2, 5\] for tensor 2"),
        (replaced(3, state[3].float()), TypeError, r"state: expected caches .*dtype torch.float64, got torch.float32"),
        (replaced(3, state[3].to("meta")), ValueError, r"state: expected the input's device cpu for tensor 3"),
        (replaced(4, state[4][:, :0]), ValueError, r"state: expected shape \[2, 1, 5\] for tensor 4"),
    ):
        with pytest.raises(error, match=match):
            module(x, bad)
    with pytest.raises(ValueError, match=r"input: expected 2 dimensions \[batch, features\]"):
        module.step(x)


@pytest.mark.parametrize("inside", [False, True])
def test_streams_without_traces_and_resets(inside):
    cached = mk.MRUBlock(4, cache={"segment": 2}) if inside else mk.MemoryCache(mk.BMRU(4, 6), segment=2)
    with pytest.raises(TypeError, match=r"^module: expected no MemoryCache with gradient"):
        mk.stream(cached, gradient="traces")
    with pytest.raises(ValueError, match=r"^resets: expected None for a MemoryCache"):
        mk.stream(cached)(torch.randn(2, 3, 4), resets=torch.tensor([True, False]))


def test_a_number_of_steps_without_a_value_is_named():
    unit = mk.MemoryCache(mk.BMRU(FEATURES, CHANNELS), SEGMENT)
    x = torch.randn(2, 3, FEATURES)
    state = [t.to("meta") for t in unit(x)[1]]
    with pytest.raises(
        ValueError, match="state: expected a number of steps on the CPU for tensor 1, got a meta or fake tensor"
    ):
        unit(x, state)
