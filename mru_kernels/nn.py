"""Memory recurrent units and linear recurrent units as modules, with the interface of `torch.nn.GRU`.

Every layer and direction is one projection, which makes the gates `[B, T, k D]` side by side, and one scan
over them. `MRUBase` does all that units have in common; a unit states its gates, its vectors and its scan.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import PackedSequence

from . import backends, checks, ops
from .cells.bmru import bmru_packed
from .cells.linear_recurrence import linear_recurrence
from .cells.schmitt import schmitt
from .scalars import EPSILON, SURROGATE_SCALE

__all__ = ["BMRU", "CMRU", "LRU", "AlphaCMRU", "FirstQuadrantBMRU", "MRUBase", "MinGRU", "MinLSTM", "WriteOrHold"]


class MRUBase(torch.nn.Module):
    """Layers and directions of projection and scan, shared by all units; `BMRU` has arguments and results.

    A subclass states `gates` and `_scan`, and `vectors`, `initial_states` and `dtypes` where it differs in
    them. Parameters of layer k, with the suffix `_reverse` for its second direction, where D is `hidden_size`:

        weight_ih_l{k}      [gates * D, input_size or directions * D]
        bias_ih_l{k}        [gates * D], without the gates that `bias=False` leaves bare
        {vector}_l{k}       [D], one for each of `vectors`
        initial_state_l{k}  [D], unless `learn_initial_state` is false
    """

    gates: ClassVar[Mapping[str, float | None]]
    """Gates in the order of the projection, with the initial bias; None, at the front only, for a bias that
    is drawn as in `nn.Linear` and absent with `bias=False`.
    """

    vectors: ClassVar[Mapping[str, float]] = {}
    """Parameters `[D]` that `_scan` is given by name, with their initial value."""

    initial_states: ClassVar[tuple[float, float]] = (0.0, 0.0)
    """The two values from which a learned initial state is drawn."""

    dtypes: ClassVar[tuple[torch.dtype, ...]] = checks.STREAM_DTYPES
    """What the parameters may be in."""

    @checks.constructor
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
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)):
            raise TypeError(f"dropout: expected a float, got {type(dropout).__name__}")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout: expected a probability in [0, 1], got {dropout}")
        if dropout > 0.0 and num_layers == 1:
            warnings.warn(
                f"dropout acts between layers, so dropout={dropout} does nothing with num_layers=1",
                stacklevel=2,
            )
        self._check_dtype(dtype or torch.get_default_dtype())
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.learn_initial_state = learn_initial_state
        self.chunk_size = checks.chunk_size(chunk_size)
        self._bare_gates = 0 if bias else sum(value is None for value in self.gates.values())

        self._names = tuple(self._shapes(input_size))  # the same for every scan
        for layer, suffix in self._scans():
            width = input_size if layer == 0 else hidden_size * self.num_directions
            for name, shape in self._shapes(width).items():
                parameter = torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                self.register_parameter(name + suffix, parameter)
        self.reset_parameters()

    @property
    def num_directions(self) -> int:
        return 2 if self.bidirectional else 1

    def _scans(self) -> Iterator[tuple[int, str]]:
        """Layer and parameter suffix of every scan, in the order of `hx` and `h_n`."""
        for layer in range(self.num_layers):
            for direction in range(self.num_directions):
                yield layer, f"_l{layer}" + "_reverse" * direction

    def _shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """Parameters, by name, of a scan whose input has `width` features."""
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (len(self.gates) * self.hidden_size, width)}
        if self._bare_gates < len(self.gates):
            shapes["bias_ih"] = ((len(self.gates) - self._bare_gates) * self.hidden_size,)
        shapes |= dict.fromkeys(self.vectors, (self.hidden_size,))
        if self.learn_initial_state:
            shapes["initial_state"] = (self.hidden_size,)
        return shapes

    def _read(self) -> list[dict[str, Tensor]]:
        """The parameters of every scan by name. A call reads each once, since a parametrization computes it."""
        return [{name: getattr(self, name + suffix) for name in self._names} for _, suffix in self._scans()]

    def _biases(self, suffix: str) -> dict[str, Tensor]:
        """The bias `[D]` of each gate that has one, as views."""
        names = list(self.gates)[self._bare_gates :]
        return dict(zip(names, getattr(self, "bias_ih" + suffix).split(self.hidden_size), strict=True)) if names else {}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw projections as in `nn.Linear` and initial states from `initial_states`; set the rest to constants."""
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
            for name, value in self.vectors.items():
                getattr(self, name + suffix).fill_(value)
            if self.learn_initial_state:
                low, high = self.initial_states
                getattr(self, "initial_state" + suffix).bernoulli_(0.5).mul_(high - low).add_(low)

    def flatten_parameters(self) -> None:
        """Do nothing. Code for `nn.GRU` calls this; the parameters here need no rearranging."""

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

    def __prepare_scriptable__(self):
        """What `torch.jit.script` asks a module for."""
        raise RuntimeError(
            f"{type(self).__name__}: torch.jit.script cannot compile this module; use torch.jit.trace, torch.compile or"
            " torch.export"
        )

    def _scan(
        self,
        gates: Tensor,
        initial_state: Tensor | None,
        *,
        reverse: bool,
        cu_seqlens: Tensor | None,
        chunk_size: int | None,
        **vectors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The unit itself, from gates `[B, T, k D]` and initial state `[B, D]` to output and final state.

        These are `[B, T, D]` and `[B, D]`. With `cu_seqlens [N + 1]` B is 1 and states are `[N, D]`.
        """
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------ forward

    @overload
    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(self, input: PackedSequence, hx: Tensor | None = None) -> tuple[PackedSequence, Tensor]: ...
    def forward(self, input: Any, hx: Tensor | None = None, *, _parallel: Any = None) -> tuple[Any, Tensor]:
        """See `BMRU`."""
        if isinstance(input, Proxy):
            return fx_node(self, input, hx)
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        parameters = self._read()
        scan = self._scan
        if _parallel is not None:  # a call of `distributed.SequenceParallel`
            parameters = _parallel.parameters(parameters)
            scan = functools.partial(_parallel.scan, self._scan)
        order = "[batch, time, features]" if self.batch_first else "[time, batch, features]"
        self._check_shape(input, (2, 3), f"{order} or [time, features]")
        self._check_match(input, parameters[0]["weight_ih"])
        if input.dim() == 2:
            self._check_hx(hx, input, batch=())
            output, h_n = self._layers(input.unsqueeze(0), None if hx is None else hx.unsqueeze(1), 1, parameters, scan)
            return output.squeeze(0), h_n.squeeze(1)
        batch = input.shape[0 if self.batch_first else 1]
        self._check_hx(hx, input, batch=(batch,))
        return self._layers(input, hx, batch, parameters, scan, time_first=not self.batch_first)

    @torch.no_grad()
    def step(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One step of `forward`, for streaming inference; there is no gradient.

        Args:
            input: `[B, input_size]`.
            hx: as for `forward`: `[num_layers, B, D]`.

        Returns:
            The output `[B, D]` and the states after the step `[num_layers, B, D]`, equal to `forward` with T = 1.

        Raises:
            RuntimeError: the module is bidirectional.
            TypeError, ValueError: as `forward`.
        """
        if self.bidirectional:
            raise RuntimeError(
                "step: not supported by a bidirectional module, whose second direction starts at the last step"
            )
        self._check_shape(input, (2,), "[batch, features]")
        time = 1 if self.batch_first else 0
        output, h_n = self(input.unsqueeze(time), hx)
        return output.squeeze(time), h_n

    def _forward_packed(self, input: PackedSequence, hx: Tensor | None) -> tuple[PackedSequence, Tensor]:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        parameters = self._read()
        self._check_shape(data, (2,), "packed data [total, features]")
        self._check_match(data, parameters[0]["weight_ih"])
        order, cu_seqlens = _by_sequence(batch_sizes)
        order, cu_seqlens = order.to(data.device), cu_seqlens.to(data.device)
        sequences = cu_seqlens.shape[0] - 1
        self._check_hx(hx, data, batch=(sequences,))
        if hx is not None and sorted_indices is not None:
            hx = hx.index_select(1, sorted_indices)
        x = data.index_select(0, order).unsqueeze(0)
        output, h_n = self._layers(x, hx, sequences, parameters, self._scan, cu_seqlens=cu_seqlens)
        output = output.squeeze(0)
        output = torch.empty_like(output).index_copy_(0, order, output)
        if unsorted_indices is not None:
            h_n = h_n.index_select(1, unsorted_indices)
        return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), h_n

    def _layers(
        self,
        x: Tensor,
        hx: Tensor | None,
        sequences: int,
        parameters: list[dict[str, Tensor]],
        scan: Callable[..., tuple[Tensor, Tensor]],
        *,
        time_first: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """All scans over `x [B, T, features]`, or `[T, B, features]`: the last layer's output and `h_n`."""
        outputs: list[Tensor] = []
        finals: list[Tensor] = []
        for i, p in enumerate(parameters):
            reverse = self.bidirectional and i % 2 == 1
            if i > 0 and not reverse:
                x, outputs = _side_by_side(outputs), []
                if self.dropout > 0.0 and self.training:
                    x = F.dropout(x, self.dropout)
            gates = self._project(x, p)
            h, final = scan(
                gates.transpose(0, 1) if time_first else gates,
                self._initial_state(None if hx is None else hx[len(finals)], sequences, p),
                reverse=reverse,
                cu_seqlens=cu_seqlens,
                chunk_size=self.chunk_size,
                **{name: p[name] for name in self.vectors},
            )
            outputs.append(self._output(h.transpose(0, 1) if time_first else h, x, p))
            finals.append(final)
        return _side_by_side(outputs), finals[0].unsqueeze(0) if len(finals) == 1 else torch.stack(finals)

    def _project(self, x: Tensor, p: dict[str, Tensor]) -> Tensor:
        """All gates of one scan from one matrix product: `[*, gates * D]`."""
        bias = p.get("bias_ih")
        if bias is not None and self._bare_gates:
            bias = F.pad(bias, (self._bare_gates * self.hidden_size, 0))
        return F.linear(x, p["weight_ih"], bias)

    def _output(self, h: Tensor, x: Tensor, p: dict[str, Tensor]) -> Tensor:
        """What one scan hands on, `[*, D]`, made from its result `h` and its input `x`."""
        return h

    def _learned_state(self, p: dict[str, Tensor]) -> Tensor:
        return p["initial_state"]

    def _initial_state(self, given: Tensor | None, sequences: int, p: dict[str, Tensor]) -> Tensor | None:
        if not self.learn_initial_state:
            return given
        learned = self._learned_state(p)
        if given is None:
            return learned.expand(sequences, -1)
        if not torch.is_grad_enabled():
            return given
        # The gradient of `learned` is zero, not absent: DistributedDataParallel waits for every parameter's.
        return torch.where(given.new_ones((), dtype=torch.bool), given, learned)

    # ------------------------------------------------------------------------------------------------ checks

    def _check_dtype(self, dtype: torch.dtype) -> None:
        if dtype not in self.dtypes:
            *names, last = (str(d).removeprefix("torch.") for d in self.dtypes)
            raise TypeError(f"dtype: expected {', '.join(names)} or {last}, got {dtype}")

    def _check_shape(self, input: Tensor, ranks: tuple[int, ...], expected: str) -> None:
        if not isinstance(input, Tensor):
            kinds = "a tensor or a PackedSequence" if 3 in ranks else f"a tensor {expected}"
            raise TypeError(f"input: expected {kinds}, got {type(input).__name__}")
        checks.dense("input", input, "a PackedSequence")
        if input.dim() not in ranks:
            raise ValueError(f"input: expected {expected}, got shape {list(input.shape)}")
        if input.shape[-1] != self.input_size:
            raise ValueError(f"input: expected {self.input_size} features, got shape {list(input.shape)}")

    def _check_match(self, input: Tensor, weight: Tensor) -> None:
        self._check_dtype(weight.dtype)  # a move may have changed it
        if input.device != weight.device:
            raise ValueError(f"input: expected the module's device {weight.device}, got {input.device}")
        check_input_dtype(input, weight.dtype)

    def _check_hx(self, hx: Tensor | None, input: Tensor, batch: tuple[int, ...]) -> None:
        if hx is None:
            return
        if not isinstance(hx, Tensor):
            raise TypeError(f"hx: expected a tensor or None, got {type(hx).__name__}")
        checks.dense("hx", hx, "a PackedSequence")
        expected = (self.num_layers * self.num_directions, *batch, self.hidden_size)
        if hx.shape != expected:
            letters = f"[layers * directions, {'batch, ' * len(batch)}hidden_size]"
            raise ValueError(f"hx: expected shape {list(expected)} {letters}, got {list(hx.shape)}")
        if hx.device != input.device:
            raise ValueError(f"hx: expected the input's device {input.device}, got {hx.device}")
        stream = input.dtype
        if stream != torch.float64:
            stream = checks.autocast_dtype(input.device) or stream
        allowed = dict.fromkeys(self._state_dtypes(stream))
        if hx.dtype not in allowed:
            raise TypeError(f"hx: expected dtype {' or '.join(map(str, allowed))}, got {hx.dtype}")
        if hx.dtype in checks.HALF_DTYPES and not torch.compiler.is_compiling() and self._accumulates():
            warnings.warn(
                f"hx: expected {ops.state_dtype(stream)}, the dtype of h_n, got {hx.dtype}, which rounds away what"
                f" {type(self).__name__} accumulates; under FSDP2 use MixedPrecisionPolicy(cast_forward_inputs=False)",
                stacklevel=2,
            )

    def _accumulates(self) -> bool:
        """Whether small steps add up in the state, so that rounding it at every call changes the result."""
        return True

    def _state_dtypes(self, stream: torch.dtype) -> tuple[torch.dtype, ...]:
        return stream, ops.state_dtype(stream)


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The module inside any nesting of `torch.compile` and DistributedDataParallel; another module is itself.

    It is for checks only. Calls go to the wrapper, whose hooks synchronise gradients.
    """
    compiled = getattr(module, "_orig_mod", None)  # OptimizedModule's; its class is in dynamo, which is slow to import
    if isinstance(compiled, torch.nn.Module):
        return unwrapped(compiled)
    return unwrapped(module.module) if isinstance(module, DistributedDataParallel) else module


def fx_node(module: torch.nn.Module, input: Proxy, state: object) -> Any:
    """A call under `torch.fx.symbolic_trace` as one node, like the call of a module of torch.nn."""
    tracer: Any = input.tracer
    path = tracer.path_of_module(module)
    if not path:
        kind = type(module).__name__
        raise TypeError(f"input: expected a tensor, got a Proxy; for torch.fx {kind} is one node of a larger module")
    return tracer.create_proxy("call_module", path, (input, state), {})


def check_input_dtype(input: Tensor, dtype: torch.dtype) -> None:
    """Raise unless a module of `dtype` takes the input; autocast converts all floating dtypes but float64."""
    if input.dtype == dtype:
        return
    dtypes = {input.dtype, dtype}
    converts = dtypes <= set(checks.STREAM_DTYPES) and torch.float64 not in dtypes
    if not converts or checks.autocast_dtype(input.device) is None:
        raise TypeError(f"input: expected the module's dtype {dtype}, got {input.dtype}")


def check_sizes(least: int = 1, **sizes: int) -> None:
    """Raise for the first that is not an int of at least `least`, which is 1 or 0."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name}: expected an int, got {type(size).__name__}")
        if size < least:
            raise ValueError(f"{name}: expected a {'positive' if least else 'non-negative'} int, got {size}")


def _side_by_side(outputs: list[Tensor]) -> Tensor:
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def _by_sequence(batch_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The order that turns a PackedSequence's data, interleaved by time, into one sequence after another.

    Beside it the offsets `cu_seqlens [N + 1]` of the sequences in that order.
    """
    sequence = torch.arange(int(batch_sizes[0]), device=batch_sizes.device).unsqueeze(1)
    here = sequence < batch_sizes  # [N, T]: sequence n has a step t
    order = (batch_sizes.cumsum(0) - batch_sizes + sequence)[here]
    return order, F.pad(here.sum(1).cumsum(0), (1, 0))


class WriteOrHold(MRUBase):
    """A base of the units that write where a step function says so, keeping a share epsilon of the old state.

    `_epsilon` is a 0-dim float64 CPU tensor that no dtype or device move reaches, so that one compilation
    serves all its values and no launch waits for a device. It is extra state of the `state_dict`, no buffer:
    DistributedDataParallel broadcasts buffers, which NCCL refuses for the CPU's, and FSDP moves them. Every
    assignment makes a new tensor, because a backward pass needs the value of its forward pass.
    """

    @checks.constructor
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        epsilon: float = 0.0,
        surrogate_scale: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(input_size, hidden_size, num_layers, **options)
        self.epsilon = epsilon
        self.surrogate_scale = SURROGATE_SCALE.number(surrogate_scale)

    @property
    def epsilon(self) -> float:
        """Share of the old state that a write keeps, in [0, 1]; a schedule may set it at any time.

        A call uses the value of that time, and so does its backward pass. Activation checkpointing is the exception:
        it computes the forward pass again with the value at that time, so set epsilon after the backward pass.
        """
        return EPSILON.number(self._epsilon)

    @epsilon.setter
    def epsilon(self, value: float | Tensor) -> None:
        self._epsilon = EPSILON.own(value)

    def _accumulates(self) -> bool:
        return self.epsilon > 0.0

    def get_extra_state(self) -> Tensor:
        return self._epsilon  # itself: torch.distributed.checkpoint loads into the tensors of a `state_dict`

    def set_extra_state(self, state: float | Tensor) -> None:
        if isinstance(state, Tensor) and not checks.has_value(state):
            self._warn_of_no_value("a tensor without a value")
        else:
            self.epsilon = state.cpu() if isinstance(state, Tensor) else state

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, errors):
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, errors)
        key = prefix + "_extra_state"
        if key not in state_dict:
            if key in missing_keys:
                missing_keys.remove(key)
            self._warn_of_no_value(f"no {key!r}")

    def _warn_of_no_value(self, found: str) -> None:
        warnings.warn(f"epsilon: the state_dict has {found}; it stays {self.epsilon}", stacklevel=3)

    def extra_repr(self) -> str:
        scale = "" if self.surrogate_scale == 1.0 else f", surrogate_scale={self.surrogate_scale}"
        return f"{super().extra_repr()}, epsilon={self.epsilon}{scale}"


class BMRU(WriteOrHold):
    """Layers of bistable memory recurrent units (arXiv 2601.09495), used like `torch.nn.GRU`.

    Unlike in `nn.GRU`, `batch_first` is True by default: data `[T, B, features]` needs `batch_first=False`. Arguments
    after `num_layers` are given by name. `hx` and `h_n` are the raw states, not the output of the last step.

    For each step, with per-channel parameters and the unit step H(0) = 1::

        candidate_t = W_c x_t + b_c        threshold_t = W_b x_t + b_b
        z_t = H(|candidate_t| - |threshold_t|)
        s_t = z_t (sgn(candidate_t) + epsilon s_{t-1}) + (1 - z_t) s_{t-1}
        h_t = alpha s_t

    Args:
        input_size: features of the input.
        hidden_size: channels D of each layer and direction.
        num_layers: layers, each reading the output of the one before.
        epsilon: in [0, 1]. At 0 the last write is held until the next; at 1 writes accumulate. The attribute
            `epsilon` reads and sets it later on.
        bias: whether the candidate has a bias; the threshold always has one.
        batch_first: whether batches are `[B, T, *]` (the default, unlike in `nn.GRU`) or `[T, B, *]`.
        dropout: probability of dropout on the output of each layer but the last.
        bidirectional: scan each layer in both directions, the outputs side by side.
        learn_initial_state: train the state before the first step, one for each scan; zeros if false.
        chunk_size: steps between the states that are saved for the backward pass, or None: see `mru_kernels.bmru`.
        surrogate_scale: k > 0 of the surrogate derivatives of H, `k / (1 + (pi k x)^2)`, and sgn, twice that.
        device, dtype: of the parameters; float32, float64, bfloat16 or float16.

    Call:
        `output, h_n = module(input, hx=None)`

        input: `[B, T, input_size]`, or `[T, B, input_size]` without `batch_first`; `[T, input_size]`
            unbatched; or a `PackedSequence`. In the module's dtype, save under autocast.
        hx: states before the first step, `[num_layers * directions, B, D]`, or `[num_layers * directions, D]`
            unbatched, in the dtype of the streams or that of `h_n`. None takes the learned initial states. Eager calls
            warn where `hx` comes in half precision and the state accumulates (epsilon > 0, minGRU and minLSTM).
        output: h of the last layer, `[B, T, directions * D]`, arranged as the input is.
        h_n: final states, shaped as `hx`: the raw states s, without alpha, so that given as `hx` they
            continue the scan. float64 for float64 streams, else float32.

        `step(input, hx=None)` is one step of it, for streaming.

    A schedule of epsilon:
        `module.epsilon = value` acts from the next call on. Under activation checkpointing assign it after the backward
        pass: the forward pass is computed again with the value at that time, without an error.

        The `state_dict` has epsilon as extra state. Loading a `state_dict` without it leaves it unchanged, with a
        warning. It is neither a parameter nor a buffer, so tools that copy only these leave it unchanged too::

            averaged.module.epsilon = model.epsilon  # after AveragedModel.update_parameters(model)
            ddp.module.epsilon = value               # DistributedDataParallel: not `ddp.epsilon`
            base.epsilon = value                     # torch.func.stack_module_state: all members use that of
                                                     # `base`, the module that functional_call runs

    Several processes:
        FSDP2 in half precision casts `hx` by default, and a CMRU that counts one step at a time then stops at 257 in
        bfloat16. `fully_shard(module, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16,
        cast_forward_inputs=False))`, without `output_dtype`, keeps the states in float32; the caller casts the input.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """

    gates = {"candidate": None, "threshold": 1.0}
    vectors = {"alpha": 1.0}
    initial_states = (-1.0, 1.0)

    def _scan(self, gates, initial_state, **options):
        return bmru_packed(
            gates,
            initial_state,
            epsilon=self._epsilon,
            amplitude="amplitude" in self.gates,
            surrogate_scale=self.surrogate_scale,
            **options,
        )


class CMRU(BMRU):
    """Layers of cumulative memory recurrent units (arXiv 2605.11855): a `BMRU` with epsilon 1 by default."""

    @checks.constructor
    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, *, epsilon: float = 1.0, **options: Any
    ) -> None:
        super().__init__(input_size, hidden_size, num_layers, epsilon=epsilon, **options)


class AlphaCMRU(CMRU):
    """Layers of alpha-CMRU (arXiv 2605.11855): a `CMRU` that writes an amplitude made from the input.

    `amplitude_t = W_m x_t + b_m` scales what is written, in place of alpha, and levels are not quantised::

        s_t = z_t (amplitude_t sgn(candidate_t) + epsilon s_{t-1}) + (1 - z_t) s_{t-1}        h_t = s_t
    """

    gates = {"candidate": None, "threshold": 1.0, "amplitude": 1.0}
    vectors = {}


class FirstQuadrantBMRU(WriteOrHold):
    """Layers of first-quadrant bistable units, Schmitt triggers (arXiv 2605.15216), used like `torch.nn.GRU`.

    For each step, with per-channel parameters and the unit step H(0) = 1::

        candidate_t = relu(W x_t + b)      high = low + |width|
        L_t = H(candidate_t - low)         U_t = H(candidate_t - high)      hold_t = L_t (1 - U_t)
        s_t = hold_t s_{t-1} + (1 - hold_t) (U_t + epsilon s_{t-1})
        h_t = alpha s_t

    Initially weights are non-negative, b is about 0.5, low about 0.15 and width about 0.35, each times a draw from
    0.8 to 1.2, and learned initial states are 0 or 1. Arguments, call and errors are those of `BMRU`.
    """

    gates = {"candidate": None}
    vectors = {"low": 0.15, "width": 0.35, "alpha": 1.0}
    initial_states = (0.0, 1.0)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters as said above."""
        super().reset_parameters()
        for _, suffix in self._scans():
            getattr(self, "weight_ih" + suffix).abs_()
            around = {name: self.vectors[name] for name in ("low", "width")} | ({"bias_ih": 0.5} if self.bias else {})
            for name, value in around.items():
                getattr(self, name + suffix).uniform_(0.8 * value, 1.2 * value)

    def _scan(self, gates, initial_state, **options):
        low, width = options.pop("low"), options.pop("width")
        return schmitt(
            F.relu(gates),
            low,
            low + width.abs(),
            initial_state,
            epsilon=self._epsilon,
            surrogate_scale=self.surrogate_scale,
            **options,
        )


class MinGRU(MRUBase):
    """Layers of minimal gated recurrent units (arXiv 2410.01201), used like `torch.nn.GRU`.

    For each step, with g(x) = x + 1/2 for x >= 0, else sigmoid(x), which is positive::

        candidate_t = W_c x_t + b_c        update_t = W_z x_t + b_z
        z_t = sigmoid(update_t)
        h_t = (1 - z_t) h_{t-1} + z_t g(candidate_t)

    Arguments, call and errors are those of `BMRU`, without `epsilon` and `surrogate_scale`. `bias=False` drops b_c
    only. A learned initial state starts at zero, as unlearned ones do. In half precision a decay 1 - z_t nearer to 1
    than 2^-9 (bfloat16) or 2^-12 (float16) rounds to 1.

    Args:
        max_time_scale: in steps, at least 2. Without an input, a state fades with the time scale 1 / z_t, which the
            initial b_z draws uniformly from [2, max_time_scale] (chrono initialisation, arXiv 1804.11188). At 2 all b_z
            are 0 and half the state is gone after one step; for a long memory give the length of what is to be
            remembered.
    """

    gates = {"candidate": None, "update": 0.0}

    @checks.constructor
    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, *, max_time_scale: float = 2.0, **options: Any
    ) -> None:
        self.max_time_scale = _number("max_time_scale", max_time_scale, 2.0, math.inf)
        super().__init__(input_size, hidden_size, num_layers, **options)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw projections as in `nn.Linear`, gate biases from the time scales; set initial states to zero."""
        super().reset_parameters()
        for _, suffix in self._scans():
            biases = self._biases(suffix)
            odds = torch.empty_like(biases["update"]).uniform_(1.0, self.max_time_scale - 1.0)  # of keeping
            biases["update"].copy_(-odds.log())
            if "forget" in biases:
                biases["forget"].copy_(odds.log())

    def _log_odds(self, *gates: Tensor) -> Tensor:
        """Of keeping the state: the decay is their sigmoid."""
        (update,) = gates
        return -update

    def _scan(self, gates, initial_state, **options):
        candidate, *others = gates.chunk(len(self.gates), -1)
        keep = self._log_odds(*others)
        value = torch.where(candidate >= 0, candidate + 0.5, candidate.sigmoid())
        return linear_recurrence(keep.sigmoid(), keep.neg().sigmoid() * value, initial_state, **options)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, max_time_scale={self.max_time_scale:g}"


class MinLSTM(MinGRU):
    """Layers of minimal LSTM units with normalised gates (arXiv 2410.01201), used like `torch.nn.GRU`.

    For each step, with g as in `MinGRU`::

        candidate_t = W_c x_t + b_c        update_t = W_i x_t + b_i        forget_t = W_f x_t + b_f
        i_t = sigmoid(update_t)            f_t = sigmoid(forget_t)
        h_t = f_t / (f_t + i_t) h_{t-1} + i_t / (f_t + i_t) g(candidate_t)

    The share of the old state is evaluated as `sigmoid(log f_t - log i_t)`, which no gate near 0 upsets. All else is as
    in `MinGRU`; initially b_f = -b_i, which gives the time scales said there.
    """

    gates = {"candidate": None, "update": 0.0, "forget": 0.0}

    def _log_odds(self, *gates: Tensor) -> Tensor:
        update, forget = gates
        return F.logsigmoid(forget) - F.logsigmoid(update)


class LRU(MRUBase):
    """Layers of linear recurrent units (arXiv 2303.06349) with D complex states, used like `torch.nn.GRU`.

    For each step, with complex matrices B and C and per-channel nu, theta and gamma::

        a = exp(-exp(nu) + i exp(theta))
        s_t = a s_{t-1} + exp(gamma) B x_t
        y_t = Re(C s_t) + D x_t

    D is a vector where the layer's input has `hidden_size` features, else a matrix. There are no biases and no
    activations, so that a stack of layers is linear; `MRUNetwork` puts gates between them.

    Parameters are real, so that optimisers and moves see nothing unusual. Those of layer k, with the suffix `_reverse`
    for its second direction:

        weight_ih_l{k}      [2 D, input_size or directions * D], B: the real and imaginary part of a row in turn
        weight_ho_l{k}      [D, 2 D], C: the real and negative imaginary part of a column in turn
        skip_l{k}           D: [D], or [D, input_size or directions * D]
        nu_log_l{k}, theta_log_l{k}, gamma_log_l{k}     [D]: nu, theta, gamma
        initial_state_l{k}  [D, 2], real and imaginary part, unless `learn_initial_state` is false

    Initially a is uniform in the ring r_min <= |a| <= r_max with a phase in [0, max_phase], gamma is
    log sqrt(1 - |a|^2), B, C and D are normal with variances (of each part, for the complex ones) 1 / (2 inputs),
    1 / D and 1 (matrix: 1 / inputs), and learned initial states are zero.

    Args:
        r_min, r_max: 0 <= r_min <= r_max <= 1. A state fades with the time scale 1 / (1 - |a|) steps: for a long memory
            bring r_min near to 1.
        max_phase: in radians. A small one keeps from states that turn too fast on long sequences.

    The other arguments, call and errors are those of `BMRU`, without `bias`, `epsilon` and `surrogate_scale`. The
    output is real, `hx` and `h_n` are complex64, or complex128 for float64. Half precision is a TypeError: the states
    have no such dtype, so an FSDP2 policy must not have a half-precision `param_dtype` for it; shard it with a policy
    of its own. Under autocast only the matrix products are in half precision.
    """

    gates = {"real": None, "imaginary": None}
    vectors = {"nu_log": 0.0, "theta_log": 0.0}
    dtypes = (torch.float32, torch.float64)

    @checks.constructor
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
        **options: Any,
    ) -> None:
        if "bias" in options:
            raise TypeError("bias: the unit has none")
        self.r_max = _number("r_max", r_max, 0.0, 1.0)
        self.r_min = _number("r_min", r_min, 0.0, self.r_max)
        self.max_phase = _number("max_phase", max_phase, 0.0, math.inf)
        super().__init__(input_size, hidden_size, num_layers, bias=False, **options)

    def _shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        channels = self.hidden_size
        shapes = super()._shapes(width) | {
            "gamma_log": (channels,),
            "weight_ho": (channels, 2 * channels),
            "skip": (channels,) if width == channels else (channels, width),
        }
        if self.learn_initial_state:
            shapes["initial_state"] = (channels, 2)
        return shapes

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters as said above."""
        super().reset_parameters()
        for _, suffix in self._scans():
            p = {name: getattr(self, name + suffix) for name in self._names}
            inputs = p["weight_ih"].shape[1]
            tiny, almost_one = torch.finfo(p["nu_log"].dtype).tiny, 1.0 - torch.finfo(p["nu_log"].dtype).eps
            square = p["nu_log"].uniform_(self.r_min**2, self.r_max**2).clamp_(tiny, almost_one)  # of the modulus
            square.log_().mul_(-0.5).log_()
            p["theta_log"].uniform_(0.0, self.max_phase).clamp_(min=tiny).log_()
            p["gamma_log"].copy_(torch.expm1(-2.0 * p["nu_log"].exp()).neg_().log_().mul_(0.5))
            p["weight_ih"].normal_(std=(2 * inputs) ** -0.5)
            p["weight_ho"].normal_(std=self.hidden_size**-0.5)
            p["skip"].normal_(std=1.0 if p["skip"].dim() == 1 else inputs**-0.5)

    def _project(self, x: Tensor, p: dict[str, Tensor]) -> Tensor:
        gamma, weight = p["gamma_log"].exp(), p["weight_ih"]
        return F.linear(x, gamma.repeat_interleave(2).unsqueeze(1) * weight).to(weight.dtype)  # autocast halves it

    def _scan(self, gates, initial_state, **options):
        decay = torch.polar(options.pop("nu_log").exp().neg().exp(), options.pop("theta_log").exp())
        update = torch.view_as_complex(gates.unflatten(-1, (self.hidden_size, 2)))
        return linear_recurrence(decay, update, initial_state, **options)

    def _output(self, h: Tensor, x: Tensor, p: dict[str, Tensor]) -> Tensor:
        y = F.linear(torch.view_as_real(h).flatten(-2), p["weight_ho"])
        skip = p["skip"]
        return y + (skip * x if skip.dim() == 1 else F.linear(x, skip)).to(y.dtype)  # autocast leaves products alone

    def _learned_state(self, p: dict[str, Tensor]) -> Tensor:
        return torch.view_as_complex(p["initial_state"])

    def _state_dtypes(self, stream: torch.dtype) -> tuple[torch.dtype, ...]:
        return (torch.complex128 if stream == torch.float64 else torch.complex64,)

    def extra_repr(self) -> str:
        options = super().extra_repr().replace(", bias=False", "")
        return f"{options}, r_min={self.r_min:g}, r_max={self.r_max:g}, max_phase={self.max_phase:g}"


def _number(name: str, value: float, least: float, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
    if not least <= value <= most or math.isinf(value):
        raise ValueError(f"{name}: expected a finite number in [{least:g}, {most:g}], got {value}")
    return float(value)
