"""Cells that test_define_triton.py defines, under Triton's interpreter and for devices that are not there."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

import mru_kernels as mk
from mru_kernels import backends
from tests import sass, triton_offline, triton_variants


def min_gru(candidate, update):
    z = update.sigmoid()
    return mk.Affine(1 - z, z * torch.where(candidate >= 0, candidate + 0.5, candidate.sigmoid()))


def bistable(candidate, threshold):
    return mk.Write(mk.heaviside(candidate.abs(), threshold=threshold.abs()), mk.sign(candidate))


def leaky(input, decay, gain):
    return mk.Affine(decay.sigmoid(), gain * input)


def latch(set, reset, on):
    """A mask writes, one part of it by a scalar alone; and constants are no numbers of float32."""
    return mk.Write((set > 0.1) | (~(reset < 0.3) & (on > 0)), torch.where(set > reset, 0.7 * reset, -0.1))


def functions(input, x):
    smooth = x.sin() + x.cos() + x.tanh() + x.erf() + x.exp() + x.expm1() + (1e-3 * x).expm1()
    positive = x.abs() + 0.1
    of_positive = positive.log() + positive.log1p() + (1e-3 * positive).log1p() + positive.sqrt() + positive**-1.3
    extremes = torch.maximum(x, input) - torch.minimum(x, 0.2 * input) + x.clamp(-0.3, 0.4)
    return mk.Affine(x.sigmoid(), smooth + of_positive + extremes + math.pi * input)


def linear(update, decay):
    return mk.Affine(decay, update)


def lru(input, pole, angle):
    return mk.Affine(pole / (1 + pole.abs()) * torch.exp(1j * angle), input * pole.conj() - 0.1j)


def resonator(input, pole, gain):
    return mk.Affine(pole / (1 + pole.abs()), gain.tanh() * input)


CELLS = {
    "min_gru": mk.define_cell("of_triton_min_gru", min_gru),
    "bistable": mk.define_cell("of_triton_bistable", bistable),
    "scaled": mk.define_cell("of_triton_scaled", bistable, output=lambda state, alpha: alpha * state),
    "leaky": mk.define_cell(
        "of_triton_leaky", leaky, output=lambda state, gain: (gain * state).tanh(), scalars={"gain": 0.7}
    ),
    "latch": mk.define_cell(
        "of_triton_latch", latch, output=lambda state: (0.3 * state).sigmoid(), scalars={"on": 1.0}
    ),
    "functions": mk.define_cell("of_triton_functions", functions),
    "linear": mk.define_cell("of_triton_linear", linear, complex_inputs=("update", "decay")),
    "lru": mk.define_cell("of_triton_lru", lru, complex_inputs=("input", "pole")),
    "waves": mk.define_cell(
        "of_triton_waves", lru, output=lambda state, input: (state * input).imag, complex_inputs=("input", "pole")
    ),
    "resonator": mk.define_cell(
        "of_triton_resonator",
        resonator,
        output=lambda state, k: state.abs() * k + state.real,
        complex_inputs=("pole",),
        scalars={"k": 0.3},
    ),
}


def added(name: str, kinds: tuple[str, ...]) -> str:
    """The name of the cell for inputs of these kinds, which Triton then has."""
    assert backends.load_error("triton") is None
    CELLS[name]._add(kinds)
    CELLS[name]._load(kinds, "triton")
    return CELLS[name]._cells[kinds].name


def examine(variant: triton_variants.Variant) -> tuple[triton_offline.Report, int]:
    """What a binary holds, and how many instructions. The variant's cell is a name in CELLS, or one of the package."""
    if variant.cell in CELLS:
        inputs = CELLS[variant.cell].inputs
        t, v = torch.empty(1, 1, 1), torch.empty(1)
        kinds = tuple(map(CELLS[variant.cell]._kind, inputs, (t if n in variant.streams else v for n in inputs)))
        variant = replace(variant, cell=added(variant.cell, kinds))
    asm = triton_offline.compile_variant(variant).asm
    if "amdgcn" in asm:
        return triton_offline._amd(variant, asm["amdgcn"]), 0
    _, listing = triton_offline.disassemble(asm["cubin"])
    return triton_offline._nvidia(variant, asm["cubin"]), sum(run.total() for run in sass.runs(listing))
