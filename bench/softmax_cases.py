"""Seeded calls of the softmax recurrence, for `bench compare` and `make gpu-check`.

It is no cell of `bench.inputs`: scores and values differ in width, and a state has three parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from . import errors
from .inputs import DTYPES, Call
from .reference import python_ref

OP = "softmax_recurrence"
WKV, AAREN = FORMS = "wkv", "aaren"

_CUT, _PACKED_CUT = 300, 1500  # steps that the GPU backends cut: of two rows; in total, of packed sequences
#: Whether sequences are packed, whether the scan is reversed, and the steps.
_VARIANTS = (
    (False, False, 150), (True, True, 150), (False, True, _CUT),
    (True, False, _PACKED_CUT), (False, False, _CUT), (False, True, 150),
)  # fmt: skip
_OFFSETS = (0, 0, 37, 101, 101, 150)  # of 150 steps


def vectors(channels: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Decays and bonuses of RWKV-4, one per channel, in float64."""
    spaced = partial(torch.linspace, steps=channels, dtype=torch.float64, device=device)
    return {"decay": -spaced(-5.0, 3.0).exp(), "bonus": spaced(-1.0, 1.0)}


@dataclass(frozen=True)
class Case:
    """A call. "wkv" has a head for each channel, decays and a bonus; "aaren" has wider heads, and neither.

    Reversed scans start from a state, and a tenth of their steps is masked.
    """

    form: str
    dtype: torch.dtype
    packed: bool = False
    reverse: bool = False
    time: int = 150

    def build(self) -> Call:
        generator = torch.Generator().manual_seed(0)
        normal = partial(torch.randn, generator=generator, dtype=torch.float64)
        state = errors.state_dtype(self.dtype)
        heads, group = (40, 1) if self.form == WKV else (3, 24) if self.time < _CUT else (1, 200)
        batch, sequences, channels = 1 if self.packed else 2, len(_OFFSETS) - 1 if self.packed else 2, heads * group
        score = 3.0 * normal(batch, self.time, heads)
        if self.reverse:
            score[torch.rand(score.shape, generator=generator) < 0.1] = -torch.inf
        tensors = {"value": normal(batch, self.time, channels).to(self.dtype), "score": score.to(self.dtype)}
        if self.form == WKV:
            tensors |= {name: t.to(state) for name, t in vectors(channels).items()}
        if self.reverse:
            parts = normal(sequences, channels + heads), torch.zeros(sequences, heads)
            tensors["initial_state"] = torch.cat(parts, 1).to(state)
        settings: dict[str, object] = {"reverse": self.reverse}
        if self.packed:
            settings["cu_seqlens"] = torch.tensor(_OFFSETS) * self.time // _OFFSETS[-1]
        label = " ".join([self.form, *["packed"] * self.packed, *["reverse"] * self.reverse])
        grad_y, grad_final = normal(batch, self.time, channels), normal(sequences, channels + 2 * heads)
        return Call(OP, tensors, settings, grad_y.to(self.dtype), grad_final.to(state), label=label)


def covering_cases(dtype: torch.dtype) -> list[Case]:
    """Both forms: packed or not, in both directions, whole and cut."""
    return [Case(form, dtype, *variant) for form in FORMS for variant in _VARIANTS]


def brief_cases(dtype: torch.dtype) -> list[Case]:
    """A third of them. All dtypes together have every one."""
    return covering_cases(dtype)[list(DTYPES.values()).index(dtype) % 3 :: 3]


def reference(**arguments) -> tuple[Tensor, Tensor]:
    """The loop over time in the dtype of the arguments, which are those of the op."""
    return python_ref.softmax_recurrence.scan(python_ref.softmax_recurrence.loop, **arguments)


def split(state: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """The mean and the log weight of a state."""
    mean, high, low = state.split([state.shape[1] - 2 * heads, heads, heads], 1)
    return mean, high.double() + low
