"""The public functions: a softmax over the past, as a recurrence."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends, checks
from .. import torch_private as private
from .layout import check
from .run import run


def softmax_recurrence(
    score: Tensor,
    value: Tensor,
    initial_state: Tensor | None = None,
    *,
    decay: Tensor | None = None,
    bonus: Tensor | None = None,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = backends.CHUNK,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The weighted mean of the values so far: attention of one query over the past, with a state of constant size.

    Each step has the weight e^score, and `decay` is the log of what multiplies all older weights. For each head, with
    c_t = decay_1 + ... + decay_t::

        y_t = sum_{i<=t} e^(score_i + c_t - c_i) value_i / sum_{i<=t} e^(score_i + c_t - c_i)

    With a bonus, y_t gives step t its own weight and reads the past before it decays (RWKV-4)::

        y_t = (sum_{i<t} e^(score_i + c_{t-1} - c_i) value_i + e^(score_t + bonus) value_t) / (the same without values)

    Only differences of scores count, and no exponential overflows. The log of the total weight is kept in two floats,
    so that scores may be large and sequences long. A score of -inf masks a step. Before the first step that is not
    masked, y is 0. A decay of -inf drops all earlier steps. From its step on, a NaN score makes y of its head NaN,
    and a NaN value y of its channel.

    Args:
        score: `[B, T, H]`; float32, float64, bfloat16 or float16. Strides over B and T may be any.
        value: `[B, T, D]` in the score's dtype, where H divides D. Channel c belongs to head `c // (D // H)`.
        initial_state: `[B, D + 2 H]` (`[N, D + 2 H]` with `cu_seqlens`), a final state of an earlier call, in the
            score's or the state dtype; None for an empty one. It is the mean `[D]`, and the log of each head's total
            weight as Z + z, both `[H]`. One step of score Z and value `mean` leaves the same state, up to z.
        decay: `[H]` or `[B, T, H]`, at most 0; None for 0. `[B, T, H]` has the score's dtype; `[H]` may also be
            float32.
        bonus: `[H]`, in the score's dtype or float32.
        reverse: scan from the last step to the first.
        cu_seqlens: int32 or int64 `[N + 1]`, offsets of N sequences packed along T of streams with B = 1.
        chunk_size: steps between two states that are saved for the backward pass, a multiple of 16. With None the
            forward pass saves no state, and the backward pass scans again. Results depend on it by rounding. With 64,
            the default, the "cpu" backend takes 32 if the state of a sequence has 4 KiB or more, and 16 from 12 KiB on.
        backend: None chooses; a name (see `available_backends`) runs or raises.

    Returns:
        y `[B, T, D]` in the score's dtype, and the final state `[B, D + 2 H]` (`[N, D + 2 H]`) in the state dtype:
        float64 for float64, else float32. Gradients pass through both and reach every tensor argument. z is the
        rounding error of Z: the gradient of a final z has no effect, and that of an initial z equals the gradient of Z.
        There is no second derivative, except with backend="torch". Under autocast floating streams are cast to the
        autocast dtype.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        RuntimeError: the backend cannot run this call.

    Example::

        >>> score, value = torch.randn(8, 100, 4), torch.randn(8, 100, 64)
        >>> y, state = mk.softmax_recurrence(score, value)
        >>> y.shape, state.shape
        (torch.Size([8, 100, 64]), torch.Size([8, 72]))
    """
    options = (reverse, cu_seqlens, chunk_size, backend)
    return _call("score", score, value, 0, decay, bonus, initial_state, *options)


def softmax_recurrence_step(
    score: Tensor, value: Tensor, state: Tensor | None, *, decay: Tensor | None = None, bonus: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One step of `softmax_recurrence`, for streaming inference.

    Args:
        score: `[B, H]`.
        value: `[B, D]`.
        state: `[B, D + 2 H]`, the state before the step; None for an empty one.
        decay: `[H]`, `[B, H]` or None.
        bonus: `[H]` or None.

    Returns:
        y `[B, D]` and the state after the step `[B, D + 2 H]`, equal to `softmax_recurrence` with T = 1.

    Raises:
        TypeError, ValueError, RuntimeError: as `softmax_recurrence`.

    Example::

        >>> y, state = mk.softmax_recurrence_step(torch.randn(8, 4), torch.randn(8, 64), None)
        >>> y.shape, state.shape
        (torch.Size([8, 64]), torch.Size([8, 72]))
    """
    return _step("score", score, value, state, decay, bonus)


def wkv(
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    bonus: Tensor,
    initial_state: Tensor | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = backends.CHUNK,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """RWKV-4's time mixing (arXiv 2305.13048): `softmax_recurrence` with a score for each channel, so H = D.

    Args:
        key: `[B, T, D]`, the scores.
        value: `[B, T, D]`.
        decay: `[D]` or `[B, T, D]`, at most 0: RWKV-4 has -exp(time_decay).
        bonus: `[D]`: RWKV-4 calls it time_first.
        initial_state: `[B, 3 D]`: the mean, Z and z, as for `softmax_recurrence`.
        reverse, cu_seqlens, chunk_size, backend: as for `softmax_recurrence`.

    Returns:
        y `[B, T, D]` in the key's dtype and the final state `[B, 3 D]`, as `softmax_recurrence`.

    Raises:
        TypeError, ValueError, RuntimeError: as `softmax_recurrence`.

    Example::

        >>> key, value, time_decay, time_first = *torch.randn(2, 8, 100, 64), torch.randn(64), torch.randn(64)
        >>> y, state = mk.wkv(key, value, -time_decay.exp(), time_first)
        >>> y.shape, state.shape
        (torch.Size([8, 100, 64]), torch.Size([8, 192]))
    """
    _check_wkv(key, value, decay, bonus)
    options = (reverse, cu_seqlens, chunk_size, backend)
    return _call("key", key, value, 0, decay, bonus, initial_state, *options)


def wkv_step(key: Tensor, value: Tensor, decay: Tensor, bonus: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """One step of `wkv`, for streaming inference.

    Args:
        key, value: `[B, D]`.
        decay: `[D]` or `[B, D]`.
        bonus: `[D]`.
        state: `[B, 3 D]`, the state before the step; None for an empty one.

    Returns:
        y `[B, D]` and the state after the step `[B, 3 D]`, equal to `wkv` with T = 1.

    Raises:
        TypeError, ValueError, RuntimeError: as `softmax_recurrence`.

    Example::

        >>> y, state = mk.wkv_step(*torch.randn(2, 8, 64), -torch.rand(64), torch.randn(64), None)
        >>> y.shape, state.shape
        (torch.Size([8, 64]), torch.Size([8, 192]))
    """
    _check_wkv(key, value, decay, bonus)
    return _step("key", key, value, state, decay, bonus)


def scan_gates(
    gates: Tensor,
    heads: int,
    initial_state: Tensor | None = None,
    *,
    decay: Tensor | None = None,
    bonus: Tensor | None = None,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = backends.CHUNK,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`softmax_recurrence` of scores and values that lie side by side in `gates [B, T, H + D]`, with one gradient."""
    return _call("gates", gates, None, heads, decay, bonus, initial_state, reverse, cu_seqlens, chunk_size, backend)


def _step(name: str, score, value, state, decay, bonus) -> tuple[Tensor, Tensor]:
    for argument, t in ((name, score), ("value", value)):
        checks.tensor(argument, t, 2, "[batch, heads]" if argument == name else "[batch, channels]")
    if isinstance(decay, Tensor) and decay.dim() == 2:
        decay = decay.unsqueeze(1)
    try:
        y, after = _call(name, score.unsqueeze(1), value.unsqueeze(1), 0, decay, bonus, state, False, None, None, None)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("initial_state:", "state:")) from None
    return y.squeeze(1), after


def _check_wkv(key, value, decay, bonus) -> None:
    for name, t in (("key", key), ("value", value), ("decay", decay), ("bonus", bonus)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
    if value.shape != key.shape:
        raise ValueError(f"value: expected key's shape {list(key.shape)}, got {list(value.shape)}")


def _call(
    name, score, value, heads, decay, bonus, initial_state, reverse, cu_seqlens, chunk_size, backend
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Check the arguments and run them. `name` is the caller's name of `score`."""
    if not isinstance(score, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(score).__name__}")
    if private.any_autocast():
        score, value, decay, bonus, initial_state = _autocast(score, value, decay, bonus, initial_state)
    if value is None and name != "gates":
        raise TypeError("value: expected a tensor [batch, time, channels], got NoneType")
    check(score, value, heads, decay, bonus, initial_state, cu_seqlens, name)
    if cu_seqlens is not None:
        checks.offsets(cu_seqlens, score.shape[1])
    checks.flag("reverse", reverse)
    arguments = (score, value, heads, decay, bonus, initial_state, cu_seqlens, reverse)
    return run(arguments, checks.chunk_size(chunk_size), backend)


def _autocast(score: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """Streams in the autocast dtype of the device; other half-precision tensors in float32. float64 stays."""
    dtype = checks.autocast_dtype(score.device)

    def cast(t):
        if dtype is None or not isinstance(t, Tensor) or not t.is_floating_point() or t.dtype == torch.float64:
            return t
        if t.dim() == 3:
            return t.to(dtype)
        return t.float() if t.dtype in checks.HALF_DTYPES else t

    return [cast(t) for t in (score, *others)]
