"""Residual networks of recurrent units: bistable ones for memory that lasts beside linear ones for transients.

`MRUBlock` is a recurrent mixer and an MLP, each on a pre-normed residual branch; `MRUNetwork` puts an input map, blocks
and a head together. Both run over whole sequences, chunk by chunk from state to state, and step by step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy

from . import checks
from .nn import (
    BMRU,
    CMRU,
    LRU,
    AlphaCMRU,
    FirstQuadrantBMRU,
    MinGRU,
    MinLSTM,
    WriteOrHold,
    check_input_dtype,
    check_sizes,
    fx_node,
)

__all__ = ["UNITS", "MRUBlock", "MRUNetwork"]

Units = str | Sequence[str] | Mapping[str, Mapping[str, Any]]
State = Sequence[Tensor]

UNITS: dict[str, type[torch.nn.Module]] = {
    "bmru": BMRU,
    "cmru": CMRU,
    "alpha_cmru": AlphaCMRU,
    "first_quadrant_bmru": FirstQuadrantBMRU,
    "schmitt": FirstQuadrantBMRU,
    "min_gru": MinGRU,
    "min_lstm": MinLSTM,
    "lru": LRU,
    "gru": torch.nn.GRU,
}
"""Units by name; each is made as `unit(input_size, hidden_size, batch_first=True, **options)`.

"gru", torch's own, is there to compare with: `torch.compile(fullgraph=True)` refuses it.
"""


class _Recurrent(torch.nn.Module):
    """What block and network share: epsilon, and steps made of `forward`."""

    def _write_or_hold(self) -> list[WriteOrHold]:
        return [m for m in self.modules() if isinstance(m, WriteOrHold)]

    @property
    def epsilon(self) -> float:
        """Epsilon of all bistable and cumulative units, which a schedule may set at any time.

        Reading it where units differ is a ValueError; without such units there is no such attribute.
        """
        values = {unit.epsilon for unit in self._write_or_hold()}
        if not values:
            raise AttributeError("epsilon: no unit has one")
        if len(values) > 1:
            raise ValueError(f"epsilon: the units differ: {sorted(values)}")
        return values.pop()

    @epsilon.setter
    def epsilon(self, value: float | Tensor) -> None:
        units = self._write_or_hold()
        if not units:
            raise AttributeError("epsilon: no unit has one")
        for unit in units:
            unit.epsilon = value


class MRUBlock(_Recurrent):
    """A recurrent mixer and an MLP, each on a pre-normed residual branch.

    For `x [B, T, width]`, with RMSNorm (arXiv 1910.07467), gates as in arXiv 2002.05202, and units in parallel::

        u = RMSNorm(x)                       v = SiLU(causal depthwise convolution of u); v = u without one
        x = x + W_o (units(v) * SiLU(W_g u))
        x = x + W_2 GLU(W_1 RMSNorm(x))

    Args:
        width: features of input and output.
        units: what remembers: a name from `UNITS`, several names, or a mapping from names to further arguments of
            that unit, as `{"bmru": {}, "min_gru": {"max_time_scale": 1000}}`; one layer and direction each.
        hidden_size: channels of each unit; None: `width`.
        combine: "sum" of the units' outputs, or "concatenate".
        conv_size: steps that the convolution sees, this one included; 0: no convolution.
        mlp_size: channels inside the MLP; None: twice `width`.
        dropout: probability of dropout at the end of each branch.
        device, dtype: of the parameters; what the units allow.

    Call:
        `output, state = block(input, state=None)`

        input, output: `[B, T, width]`, T >= 1.
        state: the last `conv_size - 1` inputs of the convolution `[B, width, conv_size - 1]`, if there is one, then
            the state `[B, hidden_size]` of each unit, as a tuple; given, it is what the sequence goes on from.
            None: zeros for the convolution, each unit's own initial state.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """

    @checks.constructor
    def __init__(
        self,
        width: int,
        units: Units = "bmru",
        *,
        hidden_size: int | None = None,
        combine: str = "sum",
        conv_size: int = 0,
        mlp_size: int | None = None,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(width=width)
        hidden_size = width if hidden_size is None else hidden_size
        mlp_size = 2 * width if mlp_size is None else mlp_size
        check_sizes(hidden_size=hidden_size, mlp_size=mlp_size)
        check_sizes(0, conv_size=conv_size)
        _one_of("combine", combine, ("sum", "concatenate"))
        named = _units(units)
        self.width = width
        self.hidden_size = hidden_size
        self.combine = combine
        self.conv_size = conv_size
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        mixed = hidden_size * (len(named) if combine == "concatenate" else 1)
        self.norm = torch.nn.RMSNorm(width, **where)
        self.conv = torch.nn.Conv1d(width, width, conv_size, groups=width, **where) if conv_size else None
        self.units = torch.nn.ModuleList(
            UNITS[name](width, hidden_size, batch_first=True, **options, **where) for name, options in named
        )
        self.gate = torch.nn.Linear(width, mixed, bias=False, **where)
        self.out = torch.nn.Linear(mixed, width, bias=False, **where)
        self.mlp_norm = torch.nn.RMSNorm(width, **where)
        self.mlp_in = torch.nn.Linear(width, 2 * mlp_size, **where)
        self.mlp_out = torch.nn.Linear(mlp_size, width, **where)
        self.dropout = torch.nn.Dropout(dropout)
        self.num_states = len(self.units) + (conv_size > 0)

    def forward(self, input: Tensor, state: State | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See the class."""
        if isinstance(input, Proxy):
            return fx_node(self, input, state)
        _check_shape(input, self.width, "width", 3)
        check_input_dtype(input, _dtype(self.norm))
        given = self._given(state, input)
        after: list[Tensor] = []
        u = v = self.norm(input)
        if self.conv is not None:
            if v.dtype in checks.HALF_DTYPES:  # under autocast `cat` refuses the other half precision
                v = v.to(checks.autocast_dtype(v.device) or v.dtype)
            time_last = v.transpose(1, 2)
            past = given.pop(0)
            if past is None:
                past = time_last.new_zeros((input.shape[0], self.width, self.conv_size - 1))
            elif past.dtype != v.dtype:
                raise TypeError(f"state: expected dtype {v.dtype} for tensor 0, got {past.dtype}")
            seen = torch.cat([past, time_last], -1)
            after.append(seen[..., input.shape[1] :].clone())  # a view would keep all of the call alive
            v = F.silu(self.conv(seen)).transpose(1, 2)
        outputs = []
        for unit, before in zip(self.units, given, strict=True):
            output, h_n = unit(v, None if before is None else before.unsqueeze(0))
            outputs.append(output)
            after.append(h_n.squeeze(0))
        mixed = torch.cat(outputs, -1) if self.combine == "concatenate" else sum(outputs[1:], start=outputs[0])
        x = input + self.dropout(self.out(mixed * F.silu(self.gate(u))))
        return x + self.dropout(self.mlp_out(F.glu(self.mlp_in(self.mlp_norm(x))))), tuple(after)

    def _given(self, state: State | None, input: Tensor) -> list[Tensor | None]:
        """The parts of `state`, checked; units check the dtypes of theirs."""
        if state is None:
            return [None] * self.num_states
        _check_state(state, self.num_states)
        batch = input.shape[0]
        shapes: list[tuple[int, ...]] = [(batch, self.width, self.conv_size - 1)] if self.conv is not None else []
        shapes += [(batch, self.hidden_size)] * len(self.units)
        for i, (tensor, shape) in enumerate(zip(state, shapes, strict=True)):
            if tensor.shape != shape:
                raise ValueError(f"state: expected shape {list(shape)} for tensor {i}, got {list(tensor.shape)}")
            if tensor.device != input.device:
                raise ValueError(
                    f"state: expected the input's device {input.device} for tensor {i}, got {tensor.device}"
                )
        return list(state)


class MRUNetwork(_Recurrent):
    """An input map, residual blocks of recurrent units, and a head.

    Args:
        input_size: features of the input; with `tokens`, how many tokens there are.
        output_size: features of the output.
        width: features of the residual stream.
        num_blocks: how many `MRUBlock`s.
        units, hidden_size, combine, conv_size, mlp_size, dropout: of every block, see `MRUBlock`.
        tokens: whether the input is token numbers, which are embedded, or features, which go through a linear map.
        pool: None for an output at every step; "last" for one after the last step, "mean" for one of the mean over
            the steps of a call.
        device, dtype: of the parameters; what the units allow.

    Call:
        `output, state = network(input, state=None)`

        input: `[B, T, input_size]`, or int64 `[B, T]` with `tokens`; T >= 1.
        output: `[B, T, output_size]`, or `[B, output_size]` with `pool`.
        state: the blocks' states one after another, a tuple of tensors with the batch first; given, it is what the
            sequences go on from. Detach its tensors to cut the gradient.

        `output, state = network.step(input, state=None)` is one step of it.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """

    @checks.constructor
    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        width: int,
        num_blocks: int,
        units: Units = "bmru",
        hidden_size: int | None = None,
        combine: str = "sum",
        conv_size: int = 0,
        mlp_size: int | None = None,
        dropout: float = 0.0,
        tokens: bool = False,
        pool: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(input_size=input_size, output_size=output_size, width=width, num_blocks=num_blocks)
        _one_of("pool", pool, (None, "last", "mean"))
        self.input_size = input_size
        self.tokens = tokens
        self.pool = pool
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.input_map: torch.nn.Module = (torch.nn.Embedding if tokens else torch.nn.Linear)(
            input_size, width, **where
        )
        blocks = [
            MRUBlock(
                width, units, hidden_size=hidden_size, combine=combine, conv_size=conv_size, mlp_size=mlp_size,
                dropout=dropout, **where,
            )
            for _ in range(num_blocks)
        ]  # fmt: skip
        self.blocks = torch.nn.ModuleList(blocks)
        self._num_states = [block.num_states for block in blocks]
        self.norm = torch.nn.RMSNorm(width, **where)
        self.head = torch.nn.Linear(width, output_size, **where)

    def forward(self, input: Tensor, state: State | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See the class."""
        if isinstance(input, Proxy):
            return fx_node(self, input, state)
        self._check_shape(input, 2)
        dtype = _dtype(self.norm)
        if not self.tokens:
            check_input_dtype(input, dtype)
        if state is not None:
            _check_state(state, sum(self._num_states))
        x = self.input_map(input).to(dtype)  # the residual stream is not autocast's to halve
        after: tuple[Tensor, ...] = ()
        for block, count in zip(self.blocks, self._num_states, strict=True):
            first = len(after)
            x, states = block(x, None if state is None else state[first : first + count])
            after += states
        if self.pool == "last":
            x = x[:, -1]
        x = self.norm(x)
        if self.pool == "mean":
            x = x.mean(1)
        return self.head(x), after

    @torch.no_grad()
    def step(self, input: Tensor, state: State | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One step of `forward`, for streaming inference; there is no gradient.

        Args:
            input: `[B, input_size]`, or int64 `[B]` with `tokens`.
            state: as for `forward`.

        Returns:
            The output `[B, output_size]` and the state after the step.

        Raises:
            RuntimeError: `pool` is "mean".
            TypeError, ValueError: as `forward`.
        """
        if self.pool == "mean":
            raise RuntimeError('step: the mean over all steps, pool="mean", is not known after one')
        self._check_shape(input, 1)
        output, after = self(input.unsqueeze(1), state)
        return (output if self.pool else output.squeeze(1)), after

    def _check_shape(self, input: Tensor, ranks: int) -> None:
        if not self.tokens:
            _check_shape(input, self.input_size, "input_size", ranks + 1)
        elif not isinstance(input, Tensor) or input.dtype != torch.int64:
            came = f"a {input.dtype} tensor" if isinstance(input, Tensor) else type(input).__name__
            raise TypeError(f"input: expected token numbers, an int64 tensor, got {came}")
        elif input.dim() != ranks or 0 in input.shape[1:]:
            expected = "[batch, time >= 1]" if ranks == 2 else "[batch]"
            raise ValueError(f"input: expected shape {expected}, got {list(input.shape)}")


def _dtype(module: torch.nn.Module) -> torch.dtype:
    """The dtype of the parameters. `module.weight` would compute it where it is parametrized."""
    return next(module.parameters()).dtype


def _check_shape(input: Tensor, size: int, name: str, rank: int) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"input: expected a tensor, got {type(input).__name__}")
    checks.dense("input", input, "separate calls")
    if input.dim() != rank or input.shape[-1] != size or 0 in input.shape[1:]:
        expected = "[batch, time >= 1, " if rank == 3 else "[batch, "
        raise ValueError(f"input: expected shape {expected}{name}={size}], got {list(input.shape)}")


def _check_state(state: State, count: int) -> None:
    if not isinstance(state, (tuple, list)) or not all(isinstance(t, Tensor) for t in state):
        raise TypeError(f"state: expected a tuple of tensors, as a call returns it, got {type(state).__name__}")
    if len(state) != count:
        raise ValueError(f"state: expected {count} tensors, as a call returns them, got {len(state)}")


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")


def _units(units: Units) -> list[tuple[str, Mapping[str, Any]]]:
    """Names and arguments of the units of a block."""
    if isinstance(units, str):
        units = (units,)
    if not isinstance(units, (Sequence, Mapping)):
        raise TypeError(f"units: expected a name, several, or a mapping from names, got {type(units).__name__}")
    if not units:
        raise ValueError("units: expected at least one, got none")
    for name in units:
        _one_of("units", name, tuple(UNITS))
    named = list(units.items()) if isinstance(units, Mapping) else [(name, {}) for name in units]
    for name, options in named:
        if options.get("bidirectional") or options.get("num_layers", 1) != 1:
            raise ValueError(f"units: expected one layer and direction of {name!r}, got {dict(options)}")
    return named
