"""Traces: derivatives of states with respect to the parameters of their own layer, carried from chunk to chunk.

A layer computes gates `x W^T + b` and scans them. The step of a channel reads no other channel's state, so the state of
a channel depends on that channel's rows of W only. One trace of W's shape per sequence therefore contains the whole
derivative: real-time recurrent learning (arXiv 2305.15947), in chunks as in HYPR (arXiv 2506.14464). For a chunk of
the steps t0 < t <= t1 with the loss L::

    dL/dW  =  backward pass of the chunk  +  sum over sequences of dL/ds_t0 E_t0                 (Remember)
    E_t1   =  A E_t0 + sum over t of K_t x_t        A = ds_t1/ds_t0    K_t = ds_t1/dgates_t      (Recorder)

A and K are the gradients that a backward pass gives for a gradient of ones of s_t1. The bias is a weight of x = 1.
Per-channel inputs `[D]` of the recurrence have traces `[B, D]`. A learned initial state too: its trace begins as 1.
Traces of complex states are stored conjugated, as torch stores their gradients, so the formulas are the same.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import checks
from .. import torch_private as private

if TYPE_CHECKING:
    from .base import MRUBase

Traces = dict[str, Tensor]
"""Traces by name, such as "blocks.0.units.1.weight_ih_l0": `[B, *shape]` for a tensor of this shape."""


_NO_REPEAT = "traces do not work under activation checkpointing, which runs layers again"


class _Active(threading.local):
    recorder: Recorder | None = None


active = _Active()
"""`active.recorder` is the recorder of the call that runs in this thread, or None."""


class Recorder:
    """A context for one call of a module. It adds the traces to the gradients of the call, and advances them.

    Args:
        units: the recurrent units of the module by path.
        traces: the traces at the start of the chunk, or None.
        begins: whether the sequences begin with the chunk. If not, and without traces, the state is a constant.
    """

    def __init__(self, units: Mapping[str, MRUBase], traces: Traces | None, begins: bool) -> None:
        self._paths = {unit: path for path, unit in units.items()}
        self._before = traces
        self._begins = begins
        self._differentiated = torch.is_grad_enabled()
        self._after: Traces = {}
        self._scans = 0

    def __enter__(self) -> Recorder:
        self._outer, active.recorder = active.recorder, self
        return self

    def __exit__(self, *_: object) -> None:
        active.recorder = self._outer

    def result(self) -> Traces:
        """The traces at the end of the chunk."""
        expected = sum(unit.num_layers for unit in self._paths)
        if self._scans != expected:
            raise RuntimeError(
                f"module: expected one scan for each of {expected} layers, got {self._scans}; {_NO_REPEAT}"
            )
        return self._after

    def scan_of(self, unit: MRUBase, layer: int, x: Tensor, p: dict[str, Tensor]) -> Callable[..., Any]:
        """The recorded scan of a layer with the input x `[B, T, features]` and the parameters `p` by name."""
        return functools.partial(self._scan, unit, layer, x, p)

    def _scan(
        self, unit: MRUBase, layer: int, x: Tensor, p: dict[str, Tensor], gates: Tensor, state: Tensor | None, *,
        reverse: bool, cu_seqlens: Tensor | None, chunk_size: int | None, resets: Tensor | None = None,
        reset_state: Tensor | None = None, **vectors: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        self._scans += 1  # before the scan, because checkpointing may run it again within its gradient
        if torch.is_grad_enabled() != self._differentiated:
            raise RuntimeError(f"module: expected one grad mode for a whole call, got both; {_NO_REPEAT}")
        if any(private.has_tangent(t) for t in (gates, state, *vectors.values()) if t is not None):
            raise NotImplementedError("traces: there is no forward-mode derivative (jvp, jacfwd, hessian)")
        dtype, batch = unit._state_dtypes(gates.dtype)[-1], gates.shape[0]
        past = depends_on(unit, p, vectors)
        names = {name: full_name(self._paths[unit], name, layer) for name in past}
        state = gates.new_zeros((batch, unit.hidden_size), dtype=dtype) if state is None else state.to(dtype)
        before: Traces = {}
        if self._before is not None:
            before = {name: check(self._before, names[name], t, dtype, batch) for name, t in past.items()}
            state = Remember.apply(state, list(before.values()), *past.values())
        elif self._begins:
            before = {"initial_state": torch.ones_like(state)}
        inputs = (gates, state, reset_state, *vectors.values())
        differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
        with torch.enable_grad():
            gates, state = _with_gradient(gates), _with_gradient(state)
            rows = {name: _with_gradient(v.expand(batch, -1)) for name, v in vectors.items() if name in past}
            rest = {name: v for name, v in vectors.items() if name not in past}
            scan = functools.partial(unit._scan, reverse=reverse, cu_seqlens=cu_seqlens, chunk_size=chunk_size, **rest)
            per_sequence = dict(rows)
            if reset_state is not None:
                per_sequence["initial_state"] = _with_gradient(reset_state.expand(batch, -1))
            h, final = _scan_rows(scan, gates, state, rows, resets, per_sequence.get("initial_state"))
            of_gates, of_state, *of_rows = torch.autograd.grad(
                final, (gates, state, *per_sequence.values()), torch.ones_like(final), retain_graph=differentiated,
                materialize_grads=True,
            )  # fmt: skip
        after = _advanced(past, before, x, of_gates, of_state, dict(zip(per_sequence, of_rows, strict=True)))
        self._after |= {names[name]: trace for name, trace in after.items()}
        return (h, final) if differentiated else (h.detach(), final.detach())


class Remember(torch.autograd.Function):
    """The identity on a state `[B, D]`. Its backward pass gives each tensor of `past` the gradient dL/ds E."""

    @staticmethod
    def forward(ctx, state: Tensor, traces: list[Tensor], *past: Tensor) -> Tensor:
        ctx.save_for_backward(*traces)
        ctx.dtypes = [t.dtype for t in past]
        return state.view_as(state)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        grads: list[Tensor | None] = []
        with checks.without_autocast(grad.device):
            for trace, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[2:], strict=True):
                if not needed:
                    grads.append(None)
                    continue
                of_rows = _per_row(grad, trace).to(trace.dtype)
                if trace.dim() == 2 or trace.shape[0] == 1:  # for one sequence a matrix product is slower
                    total = (of_rows * trace).sum(0)
                else:
                    total = torch.bmm(of_rows.permute(1, 2, 0), trace.transpose(0, 1)).squeeze(1)
                grads.append(total.to(dtype))
        return grad, None, *grads


def depends_on(unit: MRUBase, p: dict[str, Tensor], vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that the state of one scan depends on, by name: parameters, or functions of them.

    For complex gates, the rows of weight and bias alternate between real and imaginary parts. They become complex rows.

    Args:
        p: the parameters of the scan by name.
        vectors: the per-channel inputs `[D]` of the scan by name.
    """
    weight, bias = unit._gate_weights(p)
    found = {"weight_ih": weight}
    if bias is not None:
        found["bias_ih"] = bias
    is_complex = unit._state_dtypes(weight.dtype)[-1].is_complex
    if is_complex:
        found = {name: _as_complex(t, 0) for name, t in found.items()}
    for name, vector in vectors.items():
        if name not in unit.output_only:
            if vector.is_complex() != is_complex:
                kind = "complex" if is_complex else "real"
                raise TypeError(f"{name}: expected a {kind} tensor, as the state is, got {vector.dtype}")
            found[name] = vector
    if unit.learn_initial_state:
        found["initial_state"] = unit._learned_state(p)
    return found


def full_name(path: str, name: str, layer: int) -> str:
    return f"{path}{'.' if path else ''}{name}_l{layer}"


def check(traces: Traces, name: str, of: Tensor, dtype: torch.dtype, batch: int | None = None) -> Tensor:
    """The checked trace `name` of the tensor `of`. Device and batch size are checked only if `batch` is given."""
    trace = traces[name]
    if not isinstance(trace, Tensor):
        raise TypeError(f"traces[{name!r}]: expected a tensor, got {type(trace).__name__}")
    expected = [batch if batch is not None else (trace.shape[0] if trace.dim() else 0), *of.shape]
    if list(trace.shape) != expected:
        raise ValueError(f"traces[{name!r}]: expected shape {expected} [batch, ...], got {list(trace.shape)}")
    if trace.dtype != dtype:
        raise TypeError(f"traces[{name!r}]: expected dtype {dtype}, got {trace.dtype}")
    if batch is not None and trace.device != of.device:
        raise ValueError(f"traces[{name!r}]: expected the module's device {of.device}, got {trace.device}")
    return trace


@torch.no_grad()
def check_all(traces: object, units: Mapping[str, MRUBase]) -> None:
    """Raise unless `traces` has the names, shapes and dtypes of the traces of `units`."""
    if not isinstance(traces, dict):
        raise TypeError(f"traces: expected a dict of tensors or None, got {type(traces).__name__}")
    expected: dict[str, tuple[Tensor, torch.dtype]] = {}
    for path, unit in units.items():
        for layer, p in enumerate(unit._parameters_by_scan()):
            dtype = unit._state_dtypes(unit._gate_weights(p)[0].dtype)[-1]
            past = depends_on(unit, p, unit._vectors(p))
            expected |= {full_name(path, name, layer): (t, dtype) for name, t in past.items()}
    if traces.keys() != expected.keys():
        wrong = ", ".join(sorted(map(str, traces.keys() ^ expected.keys())))
        raise ValueError(f"traces: expected the names of the module's traces, got others; they differ in {wrong}")
    for name, (of, dtype) in expected.items():
        check(traces, name, of, dtype)


def restarted(traces: Traces, resets: Tensor) -> Traces:
    """The traces after the sequences of `resets [B]` begin anew: 1 for a learned initial state, 0 for the rest."""
    masks = {t.dim(): resets.reshape(-1, *[1] * (t.dim() - 1)) for t in traces.values()}
    return {
        name: t.masked_fill(masks[t.dim()], 1.0 if name.rpartition(".")[2].startswith("initial_state_l") else 0.0)
        for name, t in traces.items()
    }


def _scan_rows(
    scan: Callable[..., tuple[Tensor, Tensor]], gates: Tensor, state: Tensor, rows: dict[str, Tensor],
    resets: Tensor | None, reset_state: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`scan` with per-channel inputs for each sequence, `rows [B, D]`, so that each sequence has its own gradient.

    `resets [B, T]` and `reset_state [B, D]` are None in a call without resets; only the latter in one to zeros.
    """
    if gates.shape[0] < 2 or not rows:
        options: dict[str, Any] = {name: t.sum(0) for name, t in rows.items()}  # one row or none
        return scan(gates, state, **options, **_options(resets, reset_state))
    if resets is not None:  # vmap takes one mask for all sequences
        results = [
            scan(
                gates[n : n + 1], state[n : n + 1], **{name: t[n] for name, t in rows.items()},
                **_options(resets[n : n + 1], None if reset_state is None else reset_state[n]),
            )
            for n in range(gates.shape[0])
        ]  # fmt: skip
        h, final = zip(*results, strict=True)
        return torch.cat(h), torch.cat(final)

    def one(gates: Tensor, state: Tensor, rows: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        h, final = scan(gates.unsqueeze(0), state.unsqueeze(0), **rows)
        return h.squeeze(0), final.squeeze(0)

    return torch.func.vmap(one)(gates, state, rows)


def _options(resets: Tensor | None, reset_state: Tensor | None) -> dict[str, Tensor | None]:
    return {} if resets is None else {"resets": resets, "reset_state": reset_state}


@torch.no_grad()
def _advanced(
    past: dict[str, Tensor], before: Traces, x: Tensor, of_gates: Tensor, of_state: Tensor, of_vectors: Traces
) -> Traces:
    """The traces after a chunk.

    Args:
        past: the tensors that the state depends on, by name.
        before: the traces before the chunk; absent ones are 0.
        x: the input of the layer, `[B, T, features]`.
        of_gates, of_state, of_vectors: gradients of the sum of the final states: K `[B, T, gates D]`, A `[B, D]`, and
            `[B, D]` for each per-channel input and, in a call with resets, the learned initial state.
    """
    dtype = of_state.dtype
    with checks.without_autocast(x.device):
        added = {"weight_ih": torch.bmm(of_gates.mT, x.to(of_gates.dtype)).to(dtype.to_real())}
        added["bias_ih"] = of_gates.sum(1, dtype=dtype.to_real())
        if dtype.is_complex:
            added = {name: _as_complex(t, 1) for name, t in added.items()}
        added |= {name: t.clone() for name, t in of_vectors.items()}  # autograd may return one tensor for two
        added.setdefault("initial_state", torch.zeros_like(of_state))
        after = {name: added[name] for name in past}
        for name in after.keys() & before.keys():
            after[name].addcmul_(_per_row(of_state, after[name]), before[name])
    return after


def _per_row(of_state: Tensor, trace: Tensor) -> Tensor:
    """`of_state [B, D]` repeated for each row of a trace `[B, k D, *]`: `[B, k D, 1, ...]`."""
    gates = trace.shape[1] // of_state.shape[1]
    rows = of_state if gates == 1 else of_state.repeat(1, gates)
    return rows.reshape(*rows.shape, *[1] * (trace.dim() - 2))


def _as_complex(t: Tensor, dim: int) -> Tensor:
    """Complex numbers from real and imaginary parts that alternate along `dim`."""
    return torch.view_as_complex(t.unflatten(dim, (-1, 2)).movedim(dim + 1, -1).contiguous())


def _with_gradient(t: Tensor) -> Tensor:
    return t if t.requires_grad else t.detach().requires_grad_()
