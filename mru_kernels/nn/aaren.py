"""Aaren: attention by a learned query over the past, as a recurrent unit (arXiv 2405.13956)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import backends, ops
from ..softmax import empty_state, scan_gates
from ..softmax.layout import split_gates
from .arguments import check_sizes, constructor
from .base import MRUBase


class Aaren(MRUBase, names=("aaren",)):
    """Layers of attention by a learned query over the past (Aaren, arXiv 2405.13956), used like `torch.nn.GRU`.

    Per head, with D / num_heads values and `mru_kernels.softmax_recurrence`::

        score_t = <w, x_t>
        value_t = W_v x_t + b_v
        y_t = sum_{i<=t} exp(score_i) value_i / sum_{i<=t} exp(score_i)

    In the paper a score is the product of a learned query q and a key W_k x_t. It is linear in x_t, so one vector w per
    head gives the same function; `from_attention` computes it. A constant added to all scores changes nothing, so they
    have no bias. The weights never decay: the share of a step falls with the number of steps.

    Parameters of layer k, with the suffix `_reverse` for its second direction, where H is `num_heads`:

        weight_ih_l{k}      [H + D, input_size or directions * D], rows of w, then W_v
        bias_ih_l{k}        [D], b_v, unless `bias` is False
        initial_state_l{k}  [D], the initial mean, if `learn_initial_state` is True

    Initially w is normal with variance 1 / features, so that scores of normalised inputs have variance 1. W_v and b_v
    are drawn as in `nn.Linear`. A learned initial state is a first token of score 0 and initially of value 0.

    `hx` and `h_n` are `[layers * directions, B, D + 2 H]`, float32 or float64: the weighted mean of the values, and the
    log of the total weight of each head as a sum of two numbers. An empty state is 0, -inf, 0. A NaN in a state lasts
    to the end of its sequence. Resets of `mru_kernels.stream` before a step or chunk remove it; a reset within a call
    does not.

    Arguments, calls and errors are those of `BMRU`, without `epsilon`, `surrogate_scale` and `return_boundaries`.
    There are no traces. The output map and the MLP of the paper's block are those of `MRUBlock`.

    Args:
        num_heads: number of heads H, which divides D; None for the greatest common divisor of D and 8.

    Example::

        >>> unit = mk.Aaren(3, 8, num_heads=2)
        >>> output, h_n = unit(torch.randn(4, 10, 3))
        >>> output.shape, h_n.shape
        (torch.Size([4, 10, 8]), torch.Size([1, 4, 12]))
    """

    gates = {"score": None, "value": None}
    has_traces = False
    state_columns = "hidden_size + 2 num_heads"

    @constructor
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        num_heads: int | None = None,
        bias: bool = True,
        batch_first: bool = True,
        dropout: float = 0.0,
        bidirectional: bool = False,
        learn_initial_state: bool = False,
        chunk_size: int | None = backends.CHUNK,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sizes(hidden_size=hidden_size)
        self.num_heads = math.gcd(hidden_size, 8) if num_heads is None else num_heads
        check_sizes(num_heads=self.num_heads)
        if hidden_size % self.num_heads:
            raise ValueError(f"num_heads: expected a divisor of hidden_size={hidden_size}, got {num_heads}")
        super().__init__(
            input_size, hidden_size, num_layers, bias=bias, batch_first=batch_first, dropout=dropout,
            bidirectional=bidirectional, learn_initial_state=learn_initial_state, chunk_size=chunk_size, device=device,
            dtype=dtype,
        )  # fmt: skip

    @classmethod
    def from_attention(
        cls,
        query: Tensor,
        query_weight: Tensor,
        key_weight: Tensor,
        value_weight: Tensor,
        *,
        num_heads: int,
        query_bias: Tensor | None = None,
        value_bias: Tensor | None = None,
        **options: Any,
    ) -> Aaren:
        """One layer that computes the attention of a learned query, per head softmax(<q, k_i> / sqrt(K)) over the past.

        With q = query_weight query + query_bias, k_i = key_weight x_i, v_i = value_weight x_i + value_bias, and heads
        of K = D / num_heads numbers as in `nn.MultiheadAttention`. A bias of the keys changes nothing. The output map
        of the attention stays a module of its own.

        Args:
            query: the learned token `[E]`.
            query_weight: `[D, E]`.
            key_weight, value_weight: `[D, features]`.
            num_heads: number of heads, which divides D.
            query_bias, value_bias: `[D]` or None.
            options: further arguments of `Aaren` for one layer and direction, such as `chunk_size`.

        Raises:
            TypeError, ValueError: a tensor does not fit; the message names it.

        Example::

            >>> attention = torch.nn.MultiheadAttention(8, 2, bias=False)
            >>> unit = mk.Aaren.from_attention(torch.randn(8), *attention.in_proj_weight.chunk(3), num_heads=2)
            >>> unit
            Aaren(8, 8, bias=False, num_heads=2)
        """
        named = {"query": query, "query_weight": query_weight, "key_weight": key_weight, "value_weight": value_weight}
        for name, t in named.items():
            rank = 1 if name == "query" else 2
            if not isinstance(t, Tensor) or not t.is_floating_point():
                came = t.dtype if isinstance(t, Tensor) else type(t).__name__
                raise TypeError(f"{name}: expected a floating-point tensor, got {came}")
            if t.dim() != rank:
                raise ValueError(f"{name}: expected {rank} dimensions, got shape {list(t.shape)}")
        channels, features = value_weight.shape
        fits = {
            "query_weight": (query_weight, (channels, len(query))),
            "key_weight": (key_weight, (channels, features)),
            "query_bias": (query_bias, (channels,)),
            "value_bias": (value_bias, (channels,)),
        }
        for name, (given, shape) in fits.items():
            if given is not None and given.shape != shape:
                raise ValueError(f"{name}: expected shape {list(shape)}, got {list(given.shape)}")
        where: dict[str, Any] = {"device": value_weight.device, "dtype": value_weight.dtype}
        unit = cls(features, channels, num_heads=num_heads, bias=value_bias is not None, **where | options)
        with torch.no_grad():
            q = query_weight.double() @ query.double()
            if query_bias is not None:
                q = q + query_bias.double()
            q, k = (t.double().unflatten(0, (num_heads, -1)) for t in (q, key_weight))
            score = torch.einsum("hk,hkf->hf", q, k) / math.sqrt(channels // num_heads)
            unit.get_parameter("weight_ih_l0").copy_(torch.cat([score, value_weight.double()]))
            if value_bias is not None:
                unit.get_parameter("bias_ih_l0").copy_(value_bias)
        return unit

    @property
    def _rows(self) -> dict[str, int]:
        return {"score": self.num_heads, "value": self.hidden_size}

    @property
    def _columns(self) -> int:
        return self.hidden_size + 2 * self.num_heads

    @property
    def _gates_without_bias(self) -> int:
        return 1 if self.bias else 2

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters as the class describes."""
        super().reset_parameters()
        for _, suffix in self._scans():
            score = getattr(self, "weight_ih" + suffix)[: self.num_heads]
            score.normal_(std=score.shape[1] ** -0.5)

    def _learned_state(self, p: dict[str, Tensor]) -> Tensor:
        mean = p["initial_state"].to(ops.state_dtype(p["initial_state"].dtype))
        return torch.cat([mean, mean.new_zeros(2 * self.num_heads)])

    def _start(self, p: dict[str, Tensor]) -> Tensor | None:
        if self.learn_initial_state:
            return self._learned_state(p)
        return empty_state(self._gate_weights(p)[0], 1, self.hidden_size, self.num_heads)[0]

    def _state_dtypes(self, stream: torch.dtype) -> tuple[torch.dtype, ...]:
        return (ops.state_dtype(stream),)  # half precision has too few digits for a log of weights

    def _scan(self, gates, initial_state, *, resets=None, reset_state=None, return_boundaries=False, **options):
        if return_boundaries:
            raise ValueError("return_boundaries: expected False for an Aaren, got True")
        decay = None
        if resets is not None:
            new = resets.unsqueeze(-1)
            decay = gates.new_zeros(()).expand(*resets.shape, self.num_heads).masked_fill(new, -torch.inf)
            if reset_state is not None:
                gates = torch.where(new, self._with_first_token(gates, reset_state[: self.hidden_size]), gates)
        return scan_gates(gates, self.num_heads, initial_state, decay=decay, **options)

    def _with_first_token(self, gates: Tensor, mean: Tensor) -> Tensor:
        """The gates of one step that has the weight of each step and of a first token, whose score is 0."""
        score, value = split_gates(gates, self.num_heads)
        heads = (self.num_heads, -1)
        value, mean = value.unflatten(-1, heads), mean.to(value.dtype).unflatten(0, heads)
        both = torch.lerp(mean.expand_as(value), value, score.sigmoid().unsqueeze(-1))
        return torch.cat([torch.logaddexp(score, score.new_zeros(())), both.flatten(-2)], -1)

    def extra_repr(self) -> str:
        options = super().extra_repr().replace(", learn_initial_state=False", "")  # the default of this class
        options += ", learn_initial_state=True" * self.learn_initial_state
        return f"{options}, num_heads={self.num_heads}"
