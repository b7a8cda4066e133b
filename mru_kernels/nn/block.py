"""A residual block: recurrent units, and what is around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy

from .. import checks
from .. import torch_private as private
from ..cells import spikes
from .arguments import (
    check_choice,
    check_input_dtype,
    check_resets,
    check_sizes,
    check_state,
    check_state_shapes,
    constructor,
)
from .base import UNITS, MRUBase
from .delays import DelayConv, convolved_in_episodes
from .memory_cache import MemoryCache
from .mesa import MesaNet
from .rwkv import RWKV4ChannelMix, RWKV4TimeMix
from .rwkv_network import RWKV4
from .wrappers import fx_node
from .write_or_hold import WriteOrHold

Units = str | Sequence[str] | Mapping[str, Mapping[str, Any]]
State = Sequence[Tensor]
WITHOUT_RESETS = (MesaNet, RWKV4, RWKV4ChannelMix, RWKV4TimeMix)  # modules that accept no resets within a call
SEVERAL_STATES = (MemoryCache, *WITHOUT_RESETS)  # modules that return a tuple of states and check it themselves


class WithUnits(torch.nn.Module):
    """Base class of block and network: epsilon of all units they contain."""

    def _write_or_hold(self) -> list[WriteOrHold]:
        return [m for m in self.modules() if isinstance(m, WriteOrHold)]

    @property
    def epsilon(self) -> float:
        """Epsilon of all bistable and cumulative units. It may be set at any time; see `EpsilonSchedule`.

        Reading it raises ValueError where the units differ. Without such units the attribute does not exist.
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


class MRUBlock(WithUnits):
    """A recurrent mixer and an MLP, each on a pre-normalised residual branch.

    For `x [B, T, width]`, with RMSNorm (arXiv 1910.07467), gates as in arXiv 2002.05202, and all units on one input::

        u = RMSNorm(x)                       v = SiLU(causal depthwise convolution of u), or u if conv_size is 0
        x = x + W_o (units(v) * sigmoid(W_g u))
        x = x + W_2 GLU(W_1 RMSNorm(x))

    Args:
        width: number of features of input and output.
        units: the recurrent units: a name, a sequence of names, or a mapping from names to further arguments of that
            unit, such as `{"bmru": {}, "min_gru": {"max_time_scale": 1000}}`. Each has one layer and one direction. The
            names are "bmru", "cmru", "alpha_cmru", "first_quadrant_bmru" or "schmitt", "min_gru", "min_lstm", "lru",
            "lif", "prf", "aaren", "mesa" for `MesaNet`, "rwkv4" for `RWKV4TimeMix`, and "gru" for `torch.nn.GRU`.
        hidden_size: number of channels of each unit; `width` if None, which "rwkv4" needs.
        combine: "sum" or "concatenate", how to combine the outputs of the units.
        conv_size: number of steps that the convolution reads, including the current step; 0 for no convolution.
        delay: arguments of a `DelayConv` that replaces the convolution, such as `{"taps": 128, "count": 8}`; None for
            none. With the unit "min_gru" the mixer is that of mGRADE (arXiv 2507.01829).
        mlp_size: number of channels inside the MLP; twice `width` if None.
        mlp: "glu", or "spiking" for the spiking block of PRF (arXiv 2410.03530): then the last line above is
            `x = x + W_2 (alpha H(RMSNorm(x) - 1))`, with the unit step H, whose derivative is replaced by
            1 / (1 + (pi v)^2), and alpha `[width]`, which is trained from 1 on. It takes no `mlp_size`.
        cache: arguments of a `MemoryCache` around every unit, such as `{"segment": 64}`; None for no cache.
        dropout: probability of dropout at the end of each branch.
        device, dtype: of the parameters; the units restrict the dtype.

    Call:
        `output, state = block(input, state=None, resets=None)`

        input, output: `[B, T, width]`, T >= 1.
        resets: bool `[B, T]` or None, true where a new episode begins: there the units start from their own initial
            states, and the convolution reads no earlier step. Not with a `cache`, "mesa", "rwkv4" or "gru".
        state: a tuple of tensors. With a convolution the first is its last `conv_size - 1` inputs
            `[B, width, conv_size - 1]`; with `delay` they are `[B, taps - 1, width]`. The others are the states of the
            units, `[B, hidden_size]` each, or those of an `Aaren`, `MemoryCache`, `MesaNet` or `RWKV4TimeMix`. A call
            with the returned state continues the sequences. None stands for zeros and the units' own initial states.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Example::

        >>> block = mk.MRUBlock(8, {"bmru": {}, "min_gru": {"max_time_scale": 100}}, conv_size=4)
        >>> output, state = block(torch.randn(2, 10, 8))
        >>> output.shape, [tuple(t.shape) for t in state]
        (torch.Size([2, 10, 8]), [(2, 8, 3), (2, 8), (2, 8)])
    """

    @constructor
    def __init__(
        self,
        width: int,
        units: Units = "bmru",
        *,
        hidden_size: int | None = None,
        combine: str = "sum",
        conv_size: int = 0,
        delay: Mapping[str, Any] | None = None,
        mlp_size: int | None = None,
        mlp: str = "glu",
        cache: Mapping[str, Any] | None = None,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(width=width)
        hidden_size = width if hidden_size is None else hidden_size
        if mlp == "spiking" and mlp_size is not None:
            raise ValueError(f'mlp_size: expected None with mlp="spiking", whose size is the width, got {mlp_size}')
        mlp_size = (width if mlp == "spiking" else 2 * width) if mlp_size is None else mlp_size
        check_sizes(hidden_size=hidden_size, mlp_size=mlp_size)
        check_choice("combine", combine, ("sum", "concatenate"))
        check_choice("mlp", mlp, ("glu", "spiking"))
        _check_parts(conv_size, delay, cache)
        named = _units(units)
        self.width = width
        self.hidden_size = hidden_size
        self.combine = combine
        self.conv_size = conv_size
        self.delay = delay
        self.mlp = mlp
        self.cache = cache
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        mixed = hidden_size * (len(named) if combine == "concatenate" else 1)
        self.norm = torch.nn.RMSNorm(width, **where)
        self.conv: Any = None
        if delay is not None:
            self.conv = DelayConv(width, **delay, **where)
        elif conv_size:
            self.conv = torch.nn.Conv1d(width, width, conv_size, groups=width, **where)
        made: list[Any] = [
            UNITS[name](width, hidden_size, batch_first=True, **options, **where) for name, options in named
        ]
        self.units = torch.nn.ModuleList(made if cache is None else (MemoryCache(unit, **cache) for unit in made))
        self.gate = torch.nn.Linear(width, mixed, bias=False, **where)
        self.out = torch.nn.Linear(mixed, width, bias=False, **where)
        self.mlp_norm = torch.nn.RMSNorm(width, **where)
        if mlp == "spiking":
            self.alpha = torch.nn.Parameter(torch.ones(width, **where))
        else:
            self.mlp_in = torch.nn.Linear(width, 2 * mlp_size, **where)
        self.mlp_out = torch.nn.Linear(mlp_size, width, **where)
        self.dropout = torch.nn.Dropout(dropout)
        per_unit = [unit.num_states if isinstance(unit, SEVERAL_STATES) else 1 for unit in self.units]
        self.num_states = sum(per_unit) + (self.conv is not None)

    def forward(
        self, input: Tensor, state: State | None = None, *, resets: Tensor | None = None, _one_step: bool = False,
        _parallel: Any = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
        """Run the block; the class describes the arguments, results and errors.

        With `_one_step`, input and output are `[B, width]` and resets `[B]`. This saves six views per unit, 1 us each.
        """
        if isinstance(input, Proxy):
            return fx_node(self, input, state, resets)
        check_shape(input, self.width, "width", 2 if _one_step else 3)
        self._check_resets(resets, input)
        check_input_dtype(input, dtype_of(self.norm))
        given = self._given(state, input)
        after: list[Tensor] = []
        u = v = self.norm(input)
        if self.conv is not None and v.dtype in checks.HALF_DTYPES:
            # `cat` does not mix the two half precisions, also not under autocast
            v = v.to(checks.autocast_dtype(v.device) or v.dtype)
        if self.conv is not None:
            past = given.pop(0)
            if _one_step:
                v, last = self._convolved(v.unsqueeze(1), past, _with_time(resets), None)
                v = v.squeeze(1)
            else:
                v, last = self._convolved(v, past, resets, _parallel)
            after.append(last)
        outputs = []
        for unit in self.units:
            count = unit.num_states if isinstance(unit, SEVERAL_STATES) else 1
            own, given = given[:count], given[count:]
            if not _one_step:
                output, states = self._through(unit, v, own, resets, _parallel)
            elif isinstance(unit, MRUBase):
                output, *states = unit.step_in_block(v, own[0], resets)
            else:
                output, states = self._through(unit, v.unsqueeze(1), own, _with_time(resets), None)
                output = output.squeeze(1)
            outputs.append(output)
            after += states
        mixed = torch.cat(outputs, -1) if self.combine == "concatenate" else sum(outputs[1:], start=outputs[0])
        # A gate that changes sign with the input, like SiLU, gives what was stored long ago gradients of either sign.
        x = input + self._dropped(self.out(mixed * self.gate(u).sigmoid()))
        return x + self._dropped(self.mlp_out(self._inside(self.mlp_norm(x)))), tuple(after)

    def _through(
        self, unit: Any, v: Tensor, own: list[Tensor | None], resets: Tensor | None, parallel: Any
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """The output of a unit for `v [B, T, width]`, and its states after it, from those before it."""
        options: dict[str, Any] = {} if parallel is None else {"_parallel": parallel}
        if isinstance(unit, SEVERAL_STATES):
            return unit(v, None if own[0] is None else own, **options)
        if resets is not None:
            options["resets"] = resets  # torch.nn.GRU has none
        output, h_n = unit(v, None if own[0] is None else own[0].unsqueeze(0), **options)
        return output, (h_n.squeeze(0),)

    def _dropped(self, x: Tensor) -> Tensor:
        """Dropout of x. In evaluation the module is not called, which saves 4 us."""
        dropout = self.dropout
        idle = type(dropout) is torch.nn.Dropout and not dropout.training and not private.has_hooks(dropout)
        return x if idle else dropout(x)

    def _inside(self, u: Tensor) -> Tensor:
        """What the last map of the MLP reads."""
        if self.mlp == "spiking":
            return self.alpha * spikes.emitted(u, torch.ones_like(u), True, "atan", 1.0)
        return F.glu(self.mlp_in(u))

    def _convolved(self, v: Tensor, past: Tensor | None, resets: Tensor | None, parallel: Any) -> tuple[Tensor, Tensor]:
        """SiLU of the convolution of `v [B, T, width]`, and its last inputs, which the next call reads."""
        if isinstance(self.conv, DelayConv):
            state = None if past is None else (past,)
            convolved, (last,) = self.conv(v, state, resets=resets, _parallel=parallel)
            return F.silu(convolved), last
        time_last = v.transpose(1, 2)
        if past is None:
            past = time_last.new_zeros((v.shape[0], self.width, self.conv_size - 1))
        elif past.dtype != v.dtype:
            raise TypeError(f"state: expected dtype {v.dtype} for tensor 0, got {past.dtype}")
        last = None
        if parallel is not None:
            past, last = (t.transpose(1, 2) for t in parallel.halo(v, past.transpose(1, 2), resets))
        padded = torch.cat([past, time_last], -1)
        if resets is None:
            convolved, own = self.conv(padded), padded[..., v.shape[1] :]
        else:
            convolved, own = convolved_in_episodes(padded, self.conv.weight[:, 0].to(padded.dtype), resets)
            if self.conv.bias is not None:
                convolved = convolved + self.conv.bias.to(padded.dtype).unsqueeze(-1)
        # A view would keep `padded` in memory. One layout for all T: torch.compile records one graph of a step.
        last = (own if last is None else last).clone(memory_format=torch.contiguous_format)
        return F.silu(convolved).transpose(1, 2), last

    def _check_resets(self, resets: Tensor | None, input: Tensor) -> None:
        check_resets(resets, input, "[batch, time]")
        for unit in self.units:
            if resets is not None and not isinstance(unit, MRUBase):
                raise ValueError(f"resets: expected None for a block with a {type(unit).__name__}, got a mask")

    def _given(self, state: State | None, input: Tensor) -> list[Tensor | None]:
        """The tensors of `state`, with shapes and devices checked; each unit checks the dtype of its own."""
        if state is None:
            return [None] * self.num_states
        check_state(state, self.num_states)
        batch, place = input.shape[0], 0
        if self.conv is not None:
            last = (self.conv.taps - 1, self.width) if self.delay is not None else (self.width, self.conv_size - 1)
            check_state_shapes(state[:1], [(batch, *last)], input.device)
            place = 1
        for unit in self.units:
            if isinstance(unit, SEVERAL_STATES):
                place += unit.num_states
            else:
                columns = unit._columns if isinstance(unit, MRUBase) else self.hidden_size
                check_state_shapes([state[place]], [(batch, columns)], input.device, first=place)
                place += 1
        return list(state)


def dtype_of(module: torch.nn.Module) -> torch.dtype:
    """The dtype of the parameters, without computing `module.weight`, which may be parametrized."""
    weight = module._parameters.get("weight")
    return (next(module.parameters()) if weight is None else weight).dtype  # `parameters` takes 4 us


def _with_time(resets: Tensor | None) -> Tensor | None:
    return None if resets is None else resets.unsqueeze(1)


def check_shape(input: Tensor, size: int, name: str, rank: int) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"input: expected a tensor, got {type(input).__name__}")
    checks.dense("input", input, "separate calls")
    if input.dim() != rank or input.shape[-1] != size or 0 in input.shape[1:]:
        expected = "[batch, time >= 1, " if rank == 3 else "[batch, "
        raise ValueError(f"input: expected shape {expected}{name}={size}], got {list(input.shape)}")


def _check_parts(conv_size: int, delay: Mapping[str, Any] | None, cache: Mapping[str, Any] | None) -> None:
    """Check the arguments of the parts that a block may have: a convolution or learned delays, and a cache."""
    check_sizes(0, conv_size=conv_size)
    for name, value in (("cache", cache), ("delay", delay)):
        if not (value is None or isinstance(value, Mapping)):
            raise TypeError(f"{name}: expected a mapping of arguments or None, got {type(value).__name__}")
    if conv_size and delay is not None:
        raise ValueError(f"delay: expected None with conv_size={conv_size}, got {dict(delay)}")


def _units(units: Units) -> list[tuple[str, Mapping[str, Any]]]:
    """Name and further arguments of each unit of a block."""
    if isinstance(units, str):
        units = (units,)
    if not isinstance(units, (Sequence, Mapping)):
        raise TypeError(f"units: expected a name, several, or a mapping from names, got {type(units).__name__}")
    if not units:
        raise ValueError("units: expected at least one, got none")
    for name in units:
        check_choice("units", name, tuple(sorted(UNITS)))
    named = list(units.items()) if isinstance(units, Mapping) else [(name, {}) for name in units]
    for name, options in named:
        if options.get("bidirectional") or options.get("num_layers", 1) != 1:
            raise ValueError(f"units: expected one layer and direction of {name!r}, got {dict(options)}")
    return named
