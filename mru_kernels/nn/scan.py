"""What one scan of a unit is made of: its projection, its inputs per channel, its states, and their checks."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks, ops
from .arguments import check_input_dtype
from .noise import ThresholdNoise
from .parameters import UnitParameters


class UnitScan(UnitParameters):
    """The parts of a scan that whole sequences and single steps share. `MRUBase` describes what a unit overrides."""

    _noise: ThresholdNoise | None = None  # set within `mru_kernels.mismatch`

    def _scan(
        self,
        gates: Tensor,
        initial_state: Tensor | None,
        *,
        reverse: bool,
        cu_seqlens: Tensor | None,
        chunk_size: int | None,
        **per_channel: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Scan gates `[B, T, k D]` from the initial state `[B, D]`: the output `[B, T, D]` and final state `[B, D]`.

        With `cu_seqlens [N + 1]`, B is 1 and states are `[N, D]`. A call with resets has two more options, `resets
        [B, T]` and `reset_state`, `[D]` or None.
        """
        raise NotImplementedError

    def _project(self, x: Tensor, p: dict[str, Tensor]) -> Tensor:
        """All gates of one scan, `[*, gates * D]`, from one matrix product."""
        module: Any = p.get("projection")
        if module is None:
            gates = F.linear(x, *self._gate_weights(p))
        else:
            gates = module(x) if "bias_ih" not in p else module(x) + self._bias(p)
        return gates if self._noise is None else self._noise.added(self, gates)

    def _gate_weights(self, p: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The weight `[gates * D, features]` and bias `[gates * D]` of the map from a scan's input to its gates."""
        module: Any = p.get("projection")
        if module is None:
            return p["weight_ih"], self._bias(p)
        if not isinstance(module.weight, Tensor):
            raise TypeError(f"module: expected a unit with floating weights, got {type(module).__name__}")
        return module.weight, module.bias if "bias_ih" not in p else self._bias(p)

    def _bias(self, p: dict[str, Tensor]) -> Tensor | None:
        bias = p.get("bias_ih")
        if bias is not None and self._gates_without_bias:
            bias = F.pad(bias, (sum(list(self._rows.values())[: self._gates_without_bias]), 0))
        return bias

    def _vectors(self, p: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors `[D]` that `_scan` gets by name. Complex states need complex ones."""
        return {name: p[name] for name in self.per_channel}

    def _output(self, h: Tensor, x: Tensor, p: dict[str, Tensor]) -> Tensor:
        """The output `[*, D]` of one layer and direction, from the result `h` of its scan and its input `x`."""
        return h

    def _learned_state(self, p: dict[str, Tensor]) -> Tensor:
        return p["initial_state"]

    def _start(self, p: dict[str, Tensor]) -> Tensor | None:
        """The state `[columns]` of a new sequence; None for zeros."""
        return self._learned_state(p) if self.learn_initial_state else None

    def _resets(self, resets: Tensor | None, reverse: bool, p: dict[str, Tensor]) -> dict[str, Tensor | None]:
        """The options of `_scan` for resets `[B, T]` before the steps where episodes begin; none without resets."""
        if resets is None:
            return {}
        if reverse:  # the state passes from the first step of an episode to the last one of the episode before
            resets = torch.cat([resets[:, 1:], resets.new_zeros(resets.shape[0], 1)], 1)
        return {"resets": resets, "reset_state": self._learned_state(p) if self.learn_initial_state else None}

    def _initial_state(self, given: Tensor | None, sequences: int, p: dict[str, Tensor]) -> Tensor | None:
        if not self.learn_initial_state or (given is not None and not torch.is_grad_enabled()):
            return given
        learned = self._learned_state(p)
        if given is None:
            return learned.expand(sequences, -1)
        # DistributedDataParallel waits for a gradient of every parameter, so that of `learned` is zero, not absent.
        return torch.where(given.new_ones((), dtype=torch.bool), given, learned)

    # ------------------------------------------------------------------------------------------------ checks

    def _check_shape(self, input: Tensor, ranks: tuple[int, ...], expected: str) -> None:
        if not isinstance(input, Tensor):
            kinds = "a tensor or a PackedSequence" if 3 in ranks else f"a tensor {expected}"
            raise TypeError(f"input: expected {kinds}, got {type(input).__name__}")
        checks.dense("input", input, "a PackedSequence")
        if input.dim() not in ranks:
            raise ValueError(f"input: expected {expected}, got shape {list(input.shape)}")
        if input.shape[-1] != self.input_size:
            raise ValueError(f"input: expected {self.input_size} features, got shape {list(input.shape)}")

    def _check_match(self, input: Tensor, p: dict[str, Tensor]) -> None:
        module: Any = p.get("projection")
        # A parametrization computes the weight of a module at every reading, and the product reads it.
        weight = next((t for t in p.values() if isinstance(t, Tensor)), None)
        if weight is None:
            weight = module.weight
        if not isinstance(weight, Tensor):
            return  # a quantised module, which checks its input
        self._check_dtype(weight.dtype)  # `Module.to` may have changed it
        if input.device != weight.device:
            raise ValueError(f"input: expected the module's device {weight.device}, got {input.device}")
        check_input_dtype(input, weight.dtype)

    def _check_hx(self, hx: Tensor | None, input: Tensor, batch: tuple[int, ...]) -> None:
        if hx is None:
            return
        if not isinstance(hx, Tensor):
            raise TypeError(f"hx: expected a tensor or None, got {type(hx).__name__}")
        checks.dense("hx", hx, "a PackedSequence")
        expected = (self.num_layers * self.num_directions, *batch, self._columns)
        if hx.shape != expected:
            letters = f"[layers * directions, {'batch, ' * len(batch)}{self.state_columns}]"
            raise ValueError(f"hx: expected shape {list(expected)} {letters}, got {list(hx.shape)}")
        if hx.device != input.device:
            raise ValueError(f"hx: expected the input's device {input.device}, got {hx.device}")
        stream = self._gates_dtype(input)
        allowed = self._state_dtypes(stream)
        if hx.dtype not in allowed:
            raise TypeError(f"hx: expected dtype {' or '.join(map(str, dict.fromkeys(allowed)))}, got {hx.dtype}")
        if hx.dtype in checks.HALF_DTYPES and not torch.compiler.is_compiling() and self._accumulates():
            warnings.warn(
                f"hx: expected {ops.state_dtype(stream)}, the dtype of h_n, got {hx.dtype}, which rounds away what"
                f" {type(self).__name__} accumulates; under FSDP2 use MixedPrecisionPolicy(cast_forward_inputs=False)",
                stacklevel=2,
            )

    def _gates_dtype(self, input: Tensor) -> torch.dtype:
        """The dtype of the gates: that of autocast or of the input, which stays if it is float64."""
        autocast = None if input.dtype == torch.float64 else checks.autocast_dtype(input.device)
        return autocast or input.dtype

    def _accumulates(self) -> bool:
        """Whether small steps add up in the state, so that rounding the state at every call changes the result."""
        return True

    def _state_dtypes(self, stream: torch.dtype) -> tuple[torch.dtype, ...]:
        """The dtypes that `hx` may have where the gates have dtype `stream`."""
        return stream, ops.state_dtype(stream)
