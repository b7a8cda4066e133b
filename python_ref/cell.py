"""What a cell declares, and what follows for every cell: the op, its gradients, and the sums that measure errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .draw import DTYPES, Draw
from .scan import boundaries_of, over_sequences, positions, reset_mask_and_state, scan

Term = Callable[[Any], Any]


def itself(x: Any) -> Any:
    """The addend as it is."""
    return x


class Steps(NamedTuple):
    """What a gradient is made of, for every step of one batch of sequences; each tensor is `[B, T, D]`.

    Attributes:
        gates: the results of `Cell.gates`.
        s_before: s_{t-1}.
        s: s_t.
        lambda_: dL/ds_t.
        grad_h: dL/dh_t.
        exact: s_{t-1} and s_t themselves, where `s_before` and `s` may be sums of terms: they decide.
    """

    gates: tuple[Tensor, ...]
    s_before: Tensor
    s: Tensor
    lambda_: Tensor
    grad_h: Tensor
    exact: tuple[Tensor, Tensor]


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dtype):
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def _rounded(dtype: torch.dtype) -> Term:
    """Rounds to `dtype`, without an effect on gradients."""
    return lambda x: _Rounded.apply(x, dtype)


def _identity(s: Tensor, **_: Any) -> Tensor:
    return s


def _one(s: Tensor, **_: Any) -> Tensor:
    return torch.ones_like(s)


def _state_dtype(stream: Tensor) -> torch.dtype:
    """The dtype of the states of real streams."""
    return torch.float64 if stream.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Cell:
    """A cell: `s_t = step(s_{t-1}, gates_t)`, `h_t = output(s_t)`.

    Its functions get every input and scalar as a keyword argument, and take those they need (`**_` takes the others).
    Time runs in scan order. An input is `[B, T, D]` or `[D]`, and None where it is optional and absent; for `output`,
    `slope`, `decay` and `gradients` within `adjoint` each input is `[B, T, D]`, and ones where it is absent.

    Attributes:
        name: of its op.
        inputs: names of the tensors that the op takes first, in its order. One of them is always a stream.
        optional: names of the tensors that may be absent.
        scalars: the defaults of its numbers, by name.
        gates: (**inputs) -> a tuple of `[B, T, D]` or `[D]`: what the steps need and no state decides.
        step: (s, *gates, rounded, **scalars) -> the next state, all `[B, D]`. `rounded` rounds to the state dtype.
        step_of_terms: (s, sums, gates, terms, **scalars) -> the sum of the absolute values of what the next state
            adds up, from s, the sums for s, the gates, and their absolute values. None: `step` gives it.
        output: (s `[B, T, D]`, **inputs) -> h `[B, T, D]`.
        slope: (s `[B, T, D]`, **inputs) -> dh_t/ds_t `[B, T, D]`.
        decay: (*gates, steps, term, **inputs) -> ds_t/ds_{t-1} `[B, T, D]`; of `steps`, lambda and G are not known.
        gradients: (steps, term, **inputs) -> by the name of each input, its gradient at every step, `[B, T, D]`. Each
            addend of a sum passes through `term`.
        affine: (**inputs) -> (a, w) with s_t = a_t s_{t-1} + w_t, for other packages' scans, with autograd's gradients;
            required tensors only. None: it has no such form.
        draw: (draw, options) -> the tensors that a case calls for, by name, a stream first; `initial_state` aside.
        factors: in what calls of the cell differ, beyond what all cells share, as name: values. The first value is the
            default. An input that may be `[D]` or a stream has the values "stream" and "channel", an optional one
            False and True, a scalar some of its values.
        dtypes: of its streams, by short names.
        complex_state: whether states are complex though streams are real. Then all tensors are computed as complex
            ones, and results for real tensors are real parts.
        settle: (call) -> the tensors of a drawn call that change so that no output hangs on rounding, by name. `call`
            has all its arguments by name. None: no output does.
        rounds: whether the state decides what a step does. Then every backend rounds each operation of a step alike,
            and the forward pass is the same everywhere.
        unit: name of the module of `mru_kernels` that is timed next to the op; None: there is none.
    """

    name: str
    inputs: tuple[str, ...]
    gates: Callable[..., tuple[Tensor, ...]]
    step: Callable[..., Tensor]
    decay: Callable[..., Tensor]
    gradients: Callable[..., dict[str, Tensor]]
    draw: Callable[[Draw, Mapping[str, Any]], dict[str, Tensor]]
    optional: tuple[str, ...] = ()
    scalars: dict[str, Any] = field(default_factory=dict)
    output: Callable[..., Tensor] = _identity
    slope: Callable[..., Tensor] = _one
    affine: Callable[..., tuple[Tensor, Tensor]] | None = None
    factors: dict[str, tuple] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=lambda: DTYPES)
    complex_state: bool = False
    settle: Callable[[Mapping[str, Any]], dict[str, Tensor]] | None = None
    step_of_terms: Callable[..., Tensor] | None = None
    rounds: bool = False
    unit: str | None = None

    def __call__(
        self,
        *tensors: Tensor,
        initial_state: Tensor | None = None,
        reverse: bool = False,
        cu_seqlens: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: Tensor | None = None,
        chunk_size: int = 64,
        return_boundaries: bool = False,
        dtype: torch.dtype = torch.float64,
        state: torch.dtype | None = None,
        **arguments: Any,
    ) -> tuple[Tensor, ...]:
        """Scan the cell over time, one step after the other. Nothing is validated.

        Args:
            tensors: the inputs in the op's order, then the initial state; all may be given by name.
            initial_state: s_0 `[B, D]`, `[N, D]` with `cu_seqlens`; zeros if None.
            reverse: from the last step to the first.
            cu_seqlens: `[N + 1]` offsets of sequences packed along T, with B = 1.
            resets: bool `[B, T]`, where the state becomes `reset_state` before the step.
            reset_state: `[B, D]`, `[N, D]` with `cu_seqlens`; zeros if None.
            chunk_size: steps between two boundaries.
            return_boundaries: whether to return the states after every `chunk_size` steps too.
            dtype: of the arithmetic and the results: float64 makes it the reference, float32 the plain loop that error
                limits refer to. Complex tensors are computed in its complex counterpart.
            state: the dtype that a cell rounds to which `rounds`; None: that of states for the streams given.
            arguments: the optional inputs and the scalars, by name.

        Returns:
            h `[B, T, D]`, the final state `[B, D]` or `[N, D]` and, if asked for, the boundaries. Gradients come in the
            arguments' own dtypes.
        """
        names = (*self.inputs, "initial_state")
        x, initial_state, shape = self._arguments(
            {"initial_state": initial_state, **arguments, **dict(zip(names, tensors, strict=False))}, cu_seqlens, dtype
        )
        tensors_, scalars = self._split(x)
        given = (*tensors, *(t for t in arguments.values() if isinstance(t, Tensor)))
        rounded = _rounded(state or _state_dtype(next(t for t in given if t.dim() == 3)))
        mask, reset_state = reset_mask_and_state(resets, reset_state, initial_state, shape)

        def one(streams: list[Tensor], states: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            *streams, mask = streams
            given = {**tensors_, **dict(zip(over_time, streams, strict=True)), **scalars}
            gates = [g.expand_as(streams[0]) for g in self.gates(**given)]

            after_reset = states[1].unsqueeze(1).expand_as(streams[0])

            def step(s: Tensor, reset: Tensor, after_reset: Tensor, *row: Tensor) -> Tensor:
                return self.step(torch.where(reset, after_reset, s), *row, rounded=rounded, **scalars)

            s, final_state = scan(step, [mask, after_reset, *gates], states[0])
            return [self.output(s, **given), s], [final_state]

        over_time = [name for name, t in tensors_.items() if t is not None and t.shape == shape]
        streams = [*(tensors_[name] for name in over_time), mask]
        (h, s), (final_state,) = over_sequences(one, streams, [initial_state, reset_state], reverse, cu_seqlens)
        return (h, final_state, *((boundaries_of(s, reverse, cu_seqlens, chunk_size),) if return_boundaries else ()))

    @torch.no_grad()
    def adjoint(
        self,
        *,
        grad_h: Tensor,
        grad_final: Tensor,
        initial_state: Tensor | None = None,
        reverse: bool = False,
        cu_seqlens: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: Tensor | None = None,
        chunk_size: int = 64,
        return_boundaries: bool = False,
        grad_boundaries: Tensor | None = None,
        term: Term = itself,
        **arguments: Any,
    ) -> dict[str, Tensor]:
        """Values and gradients without autograd, as derived by hand, in float64; or the terms that they add up.

        Each addend of a sum passes through `term`. Left as it is, the results are the cell's values and gradients. With
        `abs`, each is the sum of the absolute values of the terms that it adds up, the terms of its terms included; of
        an output that is not linear in the state to first order.

        Args:
            grad_h: G = dL/dh `[B, T, D]`.
            grad_final: F = dL/ds_T `[B, D]`, `[N, D]` with `cu_seqlens`.
            grad_boundaries: the gradient of the boundaries, if these are returned.
            initial_state, reverse, cu_seqlens, resets, reset_state, chunk_size, return_boundaries, arguments: those of
                the call.
            term: `itself` or `abs`.

        Returns:
            "h", "final_state", "boundaries" if these are returned, and under the name of each tensor given its
            gradient. Those of a channel with a NaN mean nothing.
        """
        given = {name: x for name, x in arguments.items() if isinstance(x, Tensor) and name not in self.scalars}
        x, s_0, shape = self._arguments({**arguments, "initial_state": initial_state}, cu_seqlens, torch.float64)
        tensors, scalars = self._split(x)
        mask, s_reset = reset_mask_and_state(resets, reset_state, s_0, shape)
        like = grad_h.to(s_0.dtype)
        streams = [torch.ones_like(like) if t is None else t.expand(shape) for t in tensors.values()]
        rounded = _rounded(_state_dtype(grad_h))
        at = positions(shape[1], reverse, cu_seqlens, chunk_size) if return_boundaries else []
        joins = torch.zeros_like(like)  # dL/ds from the boundaries
        for row, t in at if grad_boundaries is not None else []:
            joins[:, t] = grad_boundaries[:, row].to(s_0.dtype)

        def one(streams: list[Tensor], states: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            *over_time, mask, joins, G = streams  # noqa: N806 as in the equations
            given = dict(zip(tensors, over_time, strict=True))
            return self._adjoint(given, scalars, mask, joins, G, *states, term, rounded)

        states = [s_0, s_reset, grad_final.to(s_0.dtype)]
        results, states = over_sequences(one, [*streams, mask, joins, like], states, reverse, cu_seqlens)
        (h, s, *grads), (final_state, ds_0, d_reset) = results, states
        found = {"h": h, "final_state": final_state}
        if return_boundaries:
            found["boundaries"] = boundaries_of(s, reverse, cu_seqlens, chunk_size)
        for name, grad in zip(tensors, grads, strict=True):
            if name in given:
                grad = grad if given[name].is_complex() else grad.real
                found[name] = grad.sum((0, 1)) if given[name].dim() == 1 else grad
        given_states = {"initial_state": (initial_state, ds_0), "reset_state": (reset_state, d_reset)}
        return found | {name: grad for name, (state, grad) in given_states.items() if state is not None}

    def _adjoint(self, tensors, scalars, mask, joins, G, s_0, s_reset, F, term, rounded):  # noqa: N803 as in the equations
        """`adjoint` of one batch of sequences in scan order: ([h, s, a gradient an input], [s_T, ds_0, ds_reset])."""
        x = {**tensors, **scalars}
        steps, s_last, h, slope = self._scan(x, scalars, mask, G, s_0, s_reset, term, rounded)
        G, from_right, lambdas = term(G), term(F), []  # noqa: N806
        of_reset = torch.zeros_like(from_right)
        decay = self.decay(*steps.gates, steps=steps, term=term, **x)
        for a_t, g_t, joins_t, reset in zip(
            *(reversed(x.unbind(1)) for x in (decay, slope.conj() * G, term(joins), mask)), strict=True
        ):
            lambdas.append(g_t + joins_t + from_right)
            from_right = a_t.conj() * lambdas[-1]
            of_reset = of_reset + torch.where(reset, from_right, 0)
            from_right = torch.where(reset, 0, from_right)
        lambda_ = torch.stack(lambdas[::-1], 1) if lambdas else torch.empty_like(G)
        grads = self.gradients(steps._replace(lambda_=lambda_, grad_h=G), term, **x)
        return [h, steps.s, *(grads[name] for name in tensors)], [s_last, from_right, of_reset]

    @torch.no_grad()
    def tangent(
        self,
        *,
        tangents: dict[str, Tensor],
        initial_state: Tensor | None = None,
        reverse: bool = False,
        cu_seqlens: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: Tensor | None = None,
        chunk_size: int = 64,
        return_boundaries: bool = False,
        term: Term = itself,
        **arguments: Any,
    ) -> tuple[Tensor, ...]:
        """The tangents of the results of a call, without autograd, in float64; or the terms that they add up.

        A step's derivatives are those of `gradients`, which are linear in lambda and G.

        Args:
            tangents: of the tensors given, by name; zeros where absent.
            initial_state, reverse, cu_seqlens, resets, reset_state, chunk_size, return_boundaries, term, arguments: as
                for `adjoint`.
        """
        x, s_0, shape = self._arguments({**arguments, "initial_state": initial_state}, cu_seqlens, torch.float64)
        tensors, scalars = self._split(x)
        like = torch.ones(shape, dtype=s_0.dtype)
        streams = [like if t is None else t.expand(shape) for t in tensors.values()]
        changes = [like * tangents[name].to(s_0.dtype) if name in tangents else 0 * like for name in tensors]
        mask, s_reset = reset_mask_and_state(resets, reset_state, s_0, shape)
        rounded = _rounded(_state_dtype(next(t for t in arguments.values() if isinstance(t, Tensor) and t.dim() == 3)))
        of_states = [
            tangents.get(name, torch.zeros_like(s_0)).to(s_0.dtype) for name in ("initial_state", "reset_state")
        ]

        def one(streams: list[Tensor], states: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            *streams, mask = streams
            s_0, s_reset, ds_0, ds_reset = states
            values, dx = streams[: len(tensors)], [term(t) for t in streams[len(tensors) :]]
            x = {**dict(zip(tensors, values, strict=True)), **scalars}
            steps, _, _, slope = self._scan(x, scalars, mask, values[0], s_0, s_reset, term, rounded)
            ones, zeros = torch.ones_like(steps.s), torch.zeros_like(steps.s)
            of_state = self.gradients(steps._replace(lambda_=ones, grad_h=zeros), term, **x)
            of_output = self.gradients(steps._replace(lambda_=zeros, grad_h=ones), term, **x)
            source = sum(of_state[name].conj() * t for name, t in zip(tensors, dx, strict=True))
            decay = self.decay(*steps.gates, steps=steps, term=term, **x)
            after_reset = term(ds_reset)
            ds, d_last = scan(
                lambda ds, reset, a, b: a * torch.where(reset, after_reset, ds) + b, [mask, decay, source], term(ds_0)
            )
            dh = slope * ds + sum(of_output[n].conj() * t for n, t in zip(tensors, dx, strict=True))
            dh = dh.real if self.complex_state else dh
            return [dh, ds], [d_last]

        (dh, ds), (d_final,) = over_sequences(
            one, [*streams, *changes, mask], [s_0, s_reset, *of_states], reverse, cu_seqlens
        )
        return (dh, d_final, *((boundaries_of(ds, reverse, cu_seqlens, chunk_size),) if return_boundaries else ()))

    def _scan(self, x, scalars, mask, like, s_0, s_reset, term, rounded):
        """Of a batch of sequences in scan order, or their terms: steps without gradients, s_T, h, dh/ds."""
        batch = like.shape[0]
        exact = [g.expand_as(like) for g in self.gates(**x)]
        # The states, and below them in the same batch the sums of their terms.
        after_reset = torch.cat([s_reset, term(s_reset)])

        def step(both: Tensor, reset: Tensor, *row: Tensor) -> Tensor:
            both = torch.where(reset, after_reset, both)
            if term is itself or self.step_of_terms is None:
                return self.step(both, *row, rounded=rounded, **scalars)
            s, sums = both.tensor_split(2)
            gates, terms = zip(*(g.tensor_split(2) for g in row), strict=True)
            after = self.step(s, *gates, rounded=rounded, **scalars)
            return torch.cat([after, self.step_of_terms(s, sums, gates, terms, **scalars)])

        both, final = scan(
            step,
            [torch.cat([mask, mask]), *(torch.cat([g, term(g)]) for g in exact)],
            torch.cat([s_0, term(s_0)]),
        )

        def before(s: Tensor, first: Tensor, after_reset: Tensor) -> Tensor:
            found = torch.cat([first.unsqueeze(1), s], 1)[:, :-1] if s.shape[1] else s
            return torch.where(mask, after_reset.unsqueeze(1), found)

        value, s, s_last = both[:batch], term(both[batch:]), term(final[len(s_0) :])
        h, slope = self.output(value, **x), term(self.slope(value, **x))
        if term is not itself:
            h = term(h) + torch.where(slope == 0, 0, slope * (s - term(value)))  # an infinite state may have no slope
        states = before(s, term(s_0), term(s_reset)), s
        of_exact = before(value, s_0, s_reset), value
        return Steps(tuple(term(g) for g in exact), *states, s, s, of_exact), s_last, h, slope

    def _arguments(
        self, given: dict[str, Any], cu_seqlens: Tensor | None, dtype: torch.dtype
    ) -> tuple[dict[str, Any], Tensor, torch.Size]:
        """Inputs and scalars by name, the initial state, and the shape of a stream; all tensors in `dtype`."""
        stream = next(x for x in given.values() if isinstance(x, Tensor) and x.dim() == 3)
        dtype = dtype.to_complex() if stream.is_complex() or self.complex_state else dtype
        x: dict[str, Any] = {}
        for name in (*self.inputs, *self.optional):
            x[name] = None if given.get(name) is None else given[name].to(dtype)
        for name, default in self.scalars.items():
            x[name] = type(default)(given.get(name, default))
        unknown = given.keys() - x.keys() - {"initial_state"}
        if unknown:
            raise TypeError(f"{self.name}: expected some of {', '.join(x)}, got {', '.join(sorted(unknown))}")
        state = given.get("initial_state")
        if state is None:
            sequences = stream.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
            state = stream.new_zeros(sequences, stream.shape[2])
        return x, state.to(dtype), stream.shape

    def state_dtype(self, stream: torch.dtype) -> torch.dtype:
        """The dtype of states for streams of a dtype."""
        state = stream if stream == torch.float64 or stream.is_complex else torch.float32
        return state.to_complex() if self.complex_state else state

    def _split(self, x: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Tensors, absent ones included, and scalars."""
        tensors = {name: x[name] for name in (*self.inputs, *self.optional)}
        return tensors, {name: x[name] for name in self.scalars}
