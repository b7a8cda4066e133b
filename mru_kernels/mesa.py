"""MesaNet's layer: each step solves a regularised least-squares problem over the past (arXiv 2506.05233).

It consists of torch's own matrix products. Time is cut into chunks of C steps. The states at the borders of chunks
are computed first, and then all steps solve their systems at once. The backward pass is written by hand: it solves
one more system per step with the same solver, and keeps nothing of the iterations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import checks, mesa_fla
from . import torch_private as private
from .mesa_checks import check_backend, check_numbers, check_state, check_tensors
from .scalars import has_value

State = tuple[Tensor, Tensor]


def mesa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    regularizer: Tensor,
    initial_state: State | None = None,
    *,
    steps: int = 30,
    tolerance: float = 0.0,
    solver: str = "cg",
    chunk_size: int = 64,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, State, Tensor]:
    """MesaNet's layer (arXiv 2506.05233), for all heads.

    For each sequence and head, with L = diag(regularizer)::

        kk_t = exp(decay_t) kk_{t-1} + beta_t k_t k_t'      [K, K]
        kv_t = exp(decay_t) kv_{t-1} + beta_t k_t v_t'      [K, V]
        x_t = (kk_t + L)^-1 q_t
        o_t = kv_t' x_t

    Gradients pass through every tensor argument and through both returned states. They are those of the solved
    system: with few `steps` their error is like that of the output. There are no second derivatives.

    Args:
        q, k: queries and keys `[B, T, H, K]`, bfloat16, float16, float32 or float64.
        v: values `[B, T, H, V]`.
        decay: logarithm of the forget gate `[B, T, H]`, finite and at most 0. Above 0 the systems may lose
            definiteness. The values are not read.
        beta: input gate `[B, T, H]`, at least 0. 0 skips the step. The values are not read.
        regularizer: `[H, K]`, positive. It has the dtype of the streams or the state dtype.
        initial_state: the states kk `[B, H, K, K]`, symmetric and positive semidefinite, and kv `[B, H, K, V]`; None
            for zeros. With `cu_seqlens` the first size is the number of sequences.
        steps: most iterations of conjugate gradients.
        tolerance: a step's iteration ends when its residual is at most `tolerance` times the length of q_t. 0 is the
            rounding of the state dtype.
        solver: "cg" for conjugate gradients from 0 without a preconditioner, or "direct" for a Cholesky decomposition
            per step, for K up to 256.
        chunk_size: number of steps C of a chunk. A larger one takes more operations and fewer states.
        cu_seqlens: offsets `[N + 1]` of packed sequences in streams with B = 1, int32 or int64. They are padded to
            the longest. On a GPU the call waits for their values.
        backend: None or "torch" for torch's matrix products, or "fla" for the kernels of fla-core on a GPU. "fla"
            takes bfloat16 and float16 streams, equal key and value sizes up to 128, solver="cg", tolerance=0 and
            chunk_size=64. Its gradients are its own. Its first call for a device, dtype and key size is compared with
            "torch". It has not yet been run on a GPU.

    Returns:
        The output `[B, T, H, V]` in the dtype of v, the final states in the state dtype, float64 for float64 streams
        and float32 otherwise, and the iterations that every step took, int64 `[B, T, H]`, 0 with "direct". "fla" always
        takes all `steps`.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        NotImplementedError: a forward-mode derivative is taken.
        RuntimeError: "fla" is not installed, does not take such a call, or computes something else.

    Example::

        >>> q, k, v = torch.randn(3, 2, 100, 4, 16).unbind(0)
        >>> k = torch.nn.functional.normalize(k, dim=-1)
        >>> decay, beta = -torch.rand(2, 100, 4) / 100, torch.rand(2, 100, 4)
        >>> output, state, taken = mk.mesa(q, k, v, decay, beta, torch.ones(4, 16))
        >>> output.shape, state[0].shape, taken.shape
        (torch.Size([2, 100, 4, 16]), torch.Size([2, 4, 16, 16]), torch.Size([2, 100, 4]))
    """
    check_numbers(steps, tolerance, solver, chunk_size)
    check_backend(backend)
    sequences = check_tensors(q, k, v, decay, beta, regularizer, solver, cu_seqlens)
    dtype = checks.state_dtype(q.dtype)
    if initial_state is None:
        key, value = q.shape[3], v.shape[3]
        initial_state = (
            q.new_zeros(sequences, q.shape[2], key, key, dtype=dtype),
            q.new_zeros(sequences, q.shape[2], key, value, dtype=dtype),
        )
    else:
        check_state("initial_state", initial_state, q, v, sequences)
    kk, kv = (s.to(dtype) for s in initial_state)
    if any(map(private.has_tangent, (q, k, v, decay, beta, regularizer, kk, kv))):
        raise NotImplementedError("mesa: there is no forward-mode derivative (jvp, jacfwd, hessian)")
    if cu_seqlens is not None:
        checks.offsets(cu_seqlens, q.shape[1])
    if backend == "fla":
        mesa_fla.check(q, v, tolerance, solver, chunk_size, cu_seqlens)
    if 0 in (*q.shape, *v.shape, sequences):
        return v.new_zeros(v.shape), (kk.clone(), kv.clone()), q.new_zeros(q.shape[:3], dtype=torch.int64)
    if backend == "fla":
        output, kk, kv = mesa_fla.run(mesa, (q, k, v, decay, beta, regularizer, kk, kv), steps, cu_seqlens)
        return output, (kk, kv), torch.full(q.shape[:3], steps, device=q.device)
    streams: tuple[Tensor, ...] = (q, k, v, decay, beta)
    place = None
    if cu_seqlens is not None:
        place, time = _places(cu_seqlens, q.shape[1])
        streams = tuple(_spread(s, place, sequences, time) for s in streams)
    options = _Options(int(steps), float(tolerance), solver, int(chunk_size))
    output, kk, kv, taken, _ = _Mesa.apply(*(s.to(dtype) for s in (*streams, regularizer)), kk, kv, options)
    if place is not None:
        output, taken = (t.flatten(0, 1)[place].unsqueeze(0) for t in (output, taken))
    return output.to(v.dtype), (kk, kv), taken


def mesa_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    regularizer: Tensor,
    state: State | None = None,
    *,
    steps: int = 30,
    tolerance: float = 0.0,
    solver: str = "cg",
) -> tuple[Tensor, State, Tensor]:
    """One step of `mesa`.

    Args:
        q, k: `[B, H, K]`.
        v: `[B, H, V]`.
        decay, beta: `[B, H]`.
        regularizer, steps, tolerance, solver: as for `mesa`.
        state: the states before the step, as `initial_state` of `mesa`.

    Returns:
        The output `[B, H, V]`, the states after the step and the iterations taken `[B, H]`. Gradients as for `mesa`.

    Raises:
        TypeError, ValueError: as `mesa`.

    Example::

        >>> q, k, v = torch.randn(3, 2, 4, 16).unbind(0)
        >>> gates = torch.rand(2, 4)
        >>> output, state, taken = mk.mesa_step(q, k, v, -gates, gates, torch.ones(4, 16))
        >>> output.shape
        torch.Size([2, 4, 16])
    """
    check_numbers(steps, tolerance, solver, chunk_size=1)
    check_tensors(q, k, v, decay, beta, regularizer, solver, step=True)
    if state is not None:
        check_state("state", state, q, v, len(q))
    q, k, v, decay, beta = (s.unsqueeze(1) for s in (q, k, v, decay, beta))
    options: dict[str, Any] = {"steps": steps, "tolerance": tolerance, "solver": solver}
    output, state, taken = mesa(q, k, v, decay, beta, regularizer, state, chunk_size=1, **options)
    return output.squeeze(1), state, taken.squeeze(1)


# ---------------------------------------------------------------------------------------------------- chunks


class _Options(NamedTuple):
    steps: int
    tolerance: float
    solver: str
    chunk_size: int


class _Chunks:
    """Streams in chunks, `[B, H, N, C, ...]`, with the decays between the steps of a chunk.

    b is the sum of decays from the start of a chunk up to and with a step. Steps that fill up the last chunk have
    k = 0, beta = 0 and decay = 0, so they change no state.
    """

    def __init__(self, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, regularizer: Tensor, size: int) -> None:
        self.time = k.shape[1]
        self.size = min(size, self.time)
        self.k, self.v, self.beta = self.cut(k), self.cut(v), self.cut(beta)
        self.regularizer = regularizer[:, None, None]  # [H, 1, 1, K]
        b = self.cut(decay).cumsum(-1)
        later = b.new_ones(self.size, self.size, dtype=torch.bool).triu(1)
        self.between = (b.unsqueeze(-1) - b.unsqueeze(-2)).masked_fill(later, -torch.inf).exp()  # e^{b_t - b_i}
        self.weights = self.between * self.beta.unsqueeze(-2)  # M
        self.enter = b.exp().unsqueeze(-1)  # [B, H, N, C, 1]: the share of the entering state that step t reads
        self.through = b[..., -1:, None].exp()  # [B, H, N, 1, 1]
        self.leave = (b[..., -1:] - b).exp().unsqueeze(-1)
        self.write = self.beta.unsqueeze(-1) * self.leave

    def cut(self, stream: Tensor) -> Tensor:
        """`[B, T, H, ...]` as `[B, H, N, C, ...]`."""
        missing = -self.time % self.size
        if missing:
            stream = torch.cat([stream, stream.new_zeros(stream.shape[0], missing, *stream.shape[2:])], 1)
        return stream.unflatten(1, (-1, self.size)).movedim(3, 1).contiguous()

    def join(self, stream: Tensor) -> Tensor:
        """`[B, H, N, C, ...]` as `[B, T, H, ...]`."""
        return stream.movedim(1, 3).flatten(1, 2)[:, : self.time].contiguous()

    def borders(self, kk: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        """The states `[B, H, N + 1, ...]` before every chunk and after the last."""
        written = self.write * self.k
        add_kk, add_kv = written.mT @ self.k, written.mT @ self.v
        kks, kvs = [kk], [kv]
        for n in range(self.k.shape[2]):
            kks.append(self.through[:, :, n] * kks[-1] + add_kk[:, :, n])
            kvs.append(self.through[:, :, n] * kvs[-1] + add_kv[:, :, n])
        return torch.stack(kks, 2), torch.stack(kvs, 2)

    def read(self, x: Tensor, before: Tensor, values: Tensor) -> Tensor:
        """state_t' x_t of every step, for the state that sums `k values'`."""
        return self.enter * (x @ before) + ((x @ self.k.mT) * self.weights) @ values

    def solve(self, q: Tensor, kk: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
        """(kk_t + L)^-1 q_t of every step, and the iterations taken `[B, H, N, C]`."""
        if options.solver == "direct":
            return self._direct(q, kk), q.new_zeros(q.shape[:-1], dtype=torch.int64)
        # Squares of small gradients would underflow, so every right side is scaled.
        scale = q.abs().amax(-1, keepdim=True)
        scale = torch.where(scale == 0, 1.0, scale)
        # Three dimensions spare each product the work of `matmul` on its shapes.
        residual, before, k, weights, enter = (
            s.flatten(0, 2) for s in (q / scale, kk, self.k, self.weights, self.enter)
        )
        regularizer = self.regularizer.expand(*q.shape[:3], 1, -1).flatten(0, 2)
        x, direction = torch.zeros_like(residual), residual
        square = residual.square().sum(-1, keepdim=True)
        # Below the rounding of the dtype, p'Ap would underflow before the residual does.
        enough = max(options.tolerance, torch.finfo(q.dtype).eps) ** 2 * square
        taken = torch.zeros_like(square, dtype=torch.int64)
        # On a GPU the host would wait for the device.
        may_end = options.tolerance > 0 or q.device.type == "cpu"
        may_end = may_end and not torch.compiler.is_compiling() and has_value(q)
        for _ in range(options.steps):
            done = square <= enough
            if may_end and bool(done.all()):
                break
            taken = taken + ~done
            image = torch.addcmul(regularizer * direction, enter, torch.bmm(direction, before))
            image = torch.baddbmm(image, torch.bmm(direction, k.mT) * weights, k)
            length = torch.where(done, 0.0, square / (direction * image).sum(-1, keepdim=True))
            x = torch.addcmul(x, length, direction)
            residual = torch.addcmul(residual, length, image, value=-1)
            new = residual.square().sum(-1, keepdim=True)
            direction = torch.addcmul(residual, torch.where(done, 0.0, new / square), direction)
            square = new
        return scale * x.view_as(q), taken.squeeze(-1).view(q.shape[:-1])

    def _direct(self, q: Tensor, kk: Tensor) -> Tensor:
        """Cholesky decompositions, for one chunk at a time, `[B, H, C, K, K]`."""
        solved = []
        for n in range(self.k.shape[2]):
            k, weights = self.k[:, :, n], self.weights[:, :, n]
            system = self.enter[:, :, n].unsqueeze(-1) * kk[:, :, n].unsqueeze(2)
            system = system + torch.einsum("bhti,bhik,bhil->bhtkl", weights, k, k)
            system = system + torch.diag_embed(self.regularizer.squeeze(2)).unsqueeze(0)
            factor, failed = torch.linalg.cholesky_ex(system)
            x = torch.cholesky_solve(q[:, :, n].unsqueeze(-1), factor).squeeze(-1)
            solved.append(torch.where(failed.unsqueeze(-1) == 0, x, torch.nan))
        return torch.stack(solved, 2)


class _Mesa(torch.autograd.Function):
    """All tensors have the state dtype."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q, k, v, decay, beta, regularizer, kk, kv, options):
        with checks.without_autocast(q.device):
            chunks = _Chunks(k, v, decay, beta, regularizer, options.chunk_size)
            kks, kvs = chunks.borders(kk, kv)
            x, taken = chunks.solve(chunks.cut(q), kks[:, :, :-1], options)
            output = chunks.read(x, kvs[:, :, :-1], chunks.v)
            return chunks.join(output), kks[:, :, -1].clone(), kvs[:, :, -1].clone(), chunks.join(taken), x

    @staticmethod
    def setup_context(ctx, inputs, output):
        *_, taken, x = output
        ctx.options = inputs[-1]
        ctx.mark_non_differentiable(taken, x)
        ctx.save_for_backward(*inputs[1:-1], x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, grad_kk, grad_kv, *_):
        with checks.without_autocast(grad_output.device):
            return (*_gradients(ctx.saved_tensors, ctx.options, grad_output, grad_kk, grad_kv), None)


def _gradients(
    saved: tuple[Tensor, ...], options: _Options, grad_output: Tensor, grad_kk: Tensor, grad_kv: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, decay, beta, regularizer, kk and kv.

    For step t let e be the gradient of its output, and f = (kk_t + L)^-1 (kv_t e). Then f is the gradient of q_t, kk_t
    gets -f x' and kv_t gets x e'. What a chunk passes to the chunk before it is a sum of the same form.
    """
    k, v, decay, beta, regularizer, kk, kv, x = saved
    chunks = _Chunks(k, v, decay, beta, regularizer, options.chunk_size)
    kks, kvs = chunks.borders(kk, kv)
    before_kk, before_kv = kks[:, :, :-1], kvs[:, :, :-1]
    e = chunks.cut(grad_output)
    ev, entered_x = e @ chunks.v.mT, e @ before_kv.mT
    grad_x = chunks.enter * entered_x + (ev * chunks.weights) @ chunks.k
    f, _ = chunks.solve(grad_x, before_kk, options)

    add_kk, add_kv = -(chunks.enter * f).mT @ x, (chunks.enter * x).mT @ e
    after_kk, after_kv = [grad_kk], [grad_kv]
    for n in reversed(range(x.shape[2])):
        after_kk.append(chunks.through[:, :, n] * after_kk[-1] + add_kk[:, :, n])
        after_kv.append(chunks.through[:, :, n] * after_kv[-1] + add_kv[:, :, n])
    grad_kk, grad_kv = after_kk.pop(), after_kv.pop()
    h, g = torch.stack(after_kk[::-1], 2), torch.stack(after_kv[::-1], 2)  # gradients of the states after each chunk

    ck, cv = chunks.k, chunks.v
    xk, fk = x @ ck.mT, f @ ck.mT
    read = (xk * chunks.weights).mT
    later_v, later_k = cv @ g.mT + ck @ h, ck @ h.mT
    grad_v = chunks.write * (ck @ g) + read @ e
    grad_k = chunks.write * (later_v + later_k)
    grad_k = grad_k + ((ev - fk) * chunks.weights).mT @ x - read @ f

    pair = chunks.between * xk * (ev - fk)
    later = chunks.leave.squeeze(-1) * (ck * later_v).sum(-1)
    grad_beta = pair.sum(-2) + later
    weighted = pair * chunks.beta.unsqueeze(-2)
    entered = (x * entered_x).sum(-1) - (f * (x @ before_kk)).sum(-1)
    grad_b = weighted.sum(-1) - weighted.sum(-2) - chunks.beta * later + chunks.enter.squeeze(-1) * entered
    left = (h * kks[:, :, 1:]).sum((-2, -1)) + (g * kvs[:, :, 1:]).sum((-2, -1))
    grad_b = torch.cat([grad_b[..., :-1], grad_b[..., -1:] + left.unsqueeze(-1)], -1)
    grad_decay = grad_b.flip(-1).cumsum(-1).flip(-1)

    joined = (chunks.join(s) for s in (f, grad_k, grad_v, grad_decay, grad_beta))
    return (*joined, -(x * f).sum((0, 2, 3)), grad_kk, grad_kv)


# ---------------------------------------------------------------------------------------------------- packing


def _places(cu_seqlens: Tensor, total: int) -> tuple[Tensor, int]:
    """The place `[total]` of every packed step among `N x longest` padded ones, and the longest length."""
    starts = cu_seqlens.to(torch.int64)
    lengths = starts.diff()
    time = int(lengths.max()) if lengths.numel() else 0
    steps = torch.arange(total, device=starts.device)
    sequence = torch.searchsorted(starts[1:], steps, right=True)
    return sequence * time + steps - starts[sequence], time


def _spread(stream: Tensor, place: Tensor, sequences: int, time: int) -> Tensor:
    """Packed steps `[1, total, ...]` as `[N, longest, ...]`, with zeros behind shorter sequences."""
    padded = stream.new_zeros(sequences * time, *stream.shape[2:])
    with checks.without_autocast(stream.device):  # it refuses the half precision that is not its own
        padded = padded.index_copy(0, place, stream.squeeze(0))
    return padded.unflatten(0, (sequences, time))
