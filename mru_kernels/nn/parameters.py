"""The parameters of a unit: their names, shapes and initial values, for every layer and direction."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import backends, checks
from .arguments import check_dropout, check_sizes, constructor


class UnitParameters(torch.nn.Module):
    """The parameters of `MRUBase`, which describes them. A call reads them through `_parameters_by_scan`."""

    gates: ClassVar[Mapping[str, float | None]]
    """The gates in the order of the projection, with the initial value of their bias.

    None stands for a bias that is drawn as in `nn.Linear` and is absent with `bias=False`. Such gates come first.
    """

    per_channel: ClassVar[Mapping[str, float]] = {}
    """The parameters `[D]` that `_scan` gets by name, with their initial value."""

    output_only: ClassVar[tuple[str, ...]] = ()
    """The names in `per_channel` that change the output and not the state."""

    has_traces: ClassVar[bool] = True
    """Whether `stream(gradient="traces")` takes the unit.

    Its states are `[B, hidden_size]`, and its gates and inputs per channel are complex if the state is.
    """

    initial_state_values: ClassVar[tuple[float, float]] = (0.0, 0.0)
    """The two values from which a learned initial state is drawn."""

    state_columns: ClassVar[str] = "hidden_size"
    """What the columns of a state are, for messages."""

    dtypes: ClassVar[tuple[torch.dtype, ...]] = checks.STREAM_DTYPES
    """The dtypes that the parameters may have."""

    @constructor
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        bias: bool = True,
        batch_first: bool = True,
        dropout: float = 0.0,
        bidirectional: bool = False,
        learn_initial_state: bool = True,
        chunk_size: int | None = backends.CHUNK,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(input_size=input_size, hidden_size=hidden_size, num_layers=num_layers)
        self._check_dtype(dtype or torch.get_default_dtype())
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = check_dropout(dropout, num_layers)
        self.bidirectional = bidirectional
        self.learn_initial_state = learn_initial_state
        self.chunk_size = checks.chunk_size(chunk_size)
        self._names = tuple(self._shapes(input_size))  # the same for every scan
        self._names_by_scan = [[(name, name + suffix) for name in self._names] for _, suffix in self._scans()]
        for layer, suffix in self._scans():
            width = input_size if layer == 0 else hidden_size * self.num_directions
            for name, shape in self._shapes(width).items():
                parameter = torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                self.register_parameter(name + suffix, parameter)
        self.reset_parameters()

    @property
    def num_directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def _gates_without_bias(self) -> int:
        return 0 if self.bias else sum(value is None for value in self.gates.values())

    @property
    def _rows(self) -> dict[str, int]:
        """The rows of each gate in the projection, in its order."""
        return dict.fromkeys(self.gates, self.hidden_size)

    @property
    def _columns(self) -> int:
        """Number of columns of a state."""
        return self.hidden_size

    def _scans(self) -> Iterator[tuple[int, str]]:
        """Layer and parameter suffix of every scan, in the order of `hx` and `h_n`."""
        for layer in range(self.num_layers):
            for direction in range(self.num_directions):
                yield layer, f"_l{layer}" + "_reverse" * direction

    def _shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters, by name, of a scan whose input has `width` features."""
        rows = list(self._rows.values())
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (sum(rows), width)}
        if self._gates_without_bias < len(self.gates):
            shapes["bias_ih"] = (sum(rows[self._gates_without_bias :]),)
        shapes |= dict.fromkeys(self.per_channel, (self.hidden_size,))
        if self.learn_initial_state:
            shapes["initial_state"] = (self.hidden_size,)
        return shapes

    def _parameters_by_scan(self) -> list[dict[str, Any]]:
        """The parameters of every scan by name. A call reads each once, since a parametrization computes it.

        `quantizable` replaces weight and bias by a module, "projection".
        """
        own = self._parameters  # `getattr` of a module is slow; it finds what a parametrization computes
        return [
            {name: own[full] if full in own else getattr(self, full) for name, full in names}
            for names in self._names_by_scan
        ]

    def _biases(self, suffix: str) -> dict[str, Tensor]:
        """The bias of each gate that has one, `[D]` for most gates, as views."""
        rows = dict(list(self._rows.items())[self._gates_without_bias :])
        parts = getattr(self, "bias_ih" + suffix).split(list(rows.values())) if rows else ()
        return dict(zip(rows, parts, strict=True))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw projections as in `nn.Linear` and initial states from two values; set all other parameters to constants.

        A gate's bias is constant where `gates` gives its value, else drawn as in `nn.Linear`.
        """
        if "projection" in dict(self._names_by_scan[0]):
            raise RuntimeError("reset_parameters: expected a unit with its own parameters, got one of `quantizable`")
        for _, suffix in self._scans():
            weight: Tensor = getattr(self, "weight_ih" + suffix)
            bound = 1.0 / math.sqrt(weight.shape[1])
            weight.uniform_(-bound, bound)
            for gate, bias in self._biases(suffix).items():
                value = self.gates[gate]
                if value is None:
                    bias.uniform_(-bound, bound)
                else:
                    bias.fill_(value)
            for name, value in self.per_channel.items():
                getattr(self, name + suffix).fill_(value)
            if self.learn_initial_state:
                low, high = self.initial_state_values
                getattr(self, "initial_state" + suffix).bernoulli_(0.5).mul_(high - low).add_(low)

    def extra_repr(self) -> str:
        parts = [f"{self.input_size}, {self.hidden_size}"]
        defaults = {
            "num_layers": 1, "bias": True, "batch_first": True, "dropout": 0.0, "bidirectional": False,
            "learn_initial_state": True, "chunk_size": backends.CHUNK,
        }  # fmt: skip
        for name, default in defaults.items():
            if getattr(self, name) != default:
                parts.append(f"{name}={getattr(self, name)}")
        return ", ".join(parts)

    def _check_dtype(self, dtype: torch.dtype) -> None:
        if dtype not in self.dtypes:
            *names, last = (str(d).removeprefix("torch.") for d in self.dtypes)
            raise TypeError(f"dtype: expected {', '.join(names)} or {last}, got {dtype}")
