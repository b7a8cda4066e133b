"""The softmax recurrence: its definition, a loop over time, and the gradients by hand.

A step i has the weight e^(s_i + c_t - c_i) at step t, with c_t = l_1 + ... + l_t the sum of the decays. y_t is the mean
of the values so far with these weights. With a bonus u, step t is read before the past decays, and its own weight is
e^(s_t + u). The state `[B, D + 2 H]` is mean | Z | z: the mean and, in two parts, the log of the total weight.

Streams are `[B, T, H]` and `[B, T, D]`, decays `[H]` or `[B, T, H]`, the bonus `[H]`. All is float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .scan import over_sequences

INF = float("inf")


def empty(score: Tensor, value: Tensor) -> Tensor:
    """The state `[B, D + 2 H]` before any step."""
    batch, heads = score.shape[0], score.shape[-1]
    logs = torch.tensor([-INF, 0.0], dtype=score.dtype).repeat_interleave(heads)
    return torch.cat([score.new_zeros(batch, value.shape[-1]), logs.expand(batch, -1)], -1)


def definition(
    score: Tensor, value: Tensor, decay: Tensor | None, bonus: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Every weight of every step, in O(T^2); autograd differentiates it. Decays are finite.

    The state counts as a step before the first one, with the score Z + z and the mean as its value.
    """
    time, heads = score.shape[1:]
    mean, high, low = state.split([value.shape[-1], heads, heads], -1)
    s = torch.cat([(high + low).unsqueeze(1), score], 1)  # [B, 1 + T, H]
    v = torch.cat([mean.unsqueeze(1), value], 1).unflatten(-1, (heads, -1))
    decays = torch.zeros_like(score) if decay is None else decay.expand_as(score)
    c = torch.cat([torch.zeros_like(high).unsqueeze(1), decays.cumsum(1)], 1)
    read = c if bonus is None else torch.cat([c[:, :1], c[:, :-1]], 1)
    logs = s.unsqueeze(1) + (read.unsqueeze(2) - c.unsqueeze(1))  # [B, t, i, H]
    later = torch.ones(time + 1, time + 1, dtype=torch.bool).triu(1)
    logs = logs.masked_fill(later[..., None], -INF)
    if bonus is not None:
        own = torch.cat([s[:, :1], score + bonus], 1)
        logs = torch.where(torch.eye(time + 1, dtype=torch.bool)[..., None], own.unsqueeze(1), logs)
    y, _ = _mean(logs, v)
    last, z = _mean((s + (c[:, -1:] - c)).unsqueeze(1), v)
    return y[:, 1:].flatten(2), torch.cat([last.flatten(1), z[:, 0], torch.zeros_like(low)], -1)


def _mean(logs: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of `v [B, i, H, G]` with the weights e^logs `[B, t, i, H]`, and the log of their sum `[B, t, H]`."""
    most = logs.amax(2, keepdim=True).detach()
    weights = (logs - torch.where(most.isinf(), 0.0, most)).exp()
    total = weights.sum(2)
    some = torch.where(total == 0, 1.0, total)
    log = torch.where(total == 0, -INF, some.log() + most.squeeze(2))
    return torch.einsum("btih,bihg->bthg", weights, v) / some.unsqueeze(-1), log


def step(
    s: Tensor, v: Tensor, decay: Tensor, u: Tensor | None, mean: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y `[B, H, G]`, and the mean and the log weight after a step; scores and logs are `[B, H, 1]`."""
    after = torch.logaddexp(s, z + decay)
    mean_after = mixed(mean, z + decay, v, s)
    return mean_after if u is None else mixed(mean, z, v, s + u), mean_after, after


def mixed(a: Tensor, log_a: Tensor, b: Tensor, log_b: Tensor) -> Tensor:
    """The mean of a and b with the weights e^log_a and e^log_b; a if both are 0."""
    share = torch.where(log_b == -INF, 0.0, torch.sigmoid(log_b - log_a))
    return a + share * (b - a)


def loop(
    score: Tensor, value: Tensor, decay: Tensor | None, bonus: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The same as `definition`, one step at a time. Decays may be -inf."""
    heads = score.shape[-1]
    decays = torch.zeros_like(score) if decay is None else decay.expand_as(score)
    u = None if bonus is None else bonus.unsqueeze(-1)
    mean, high, low = state.split([value.shape[-1], heads, heads], -1)
    mean, z = mean.unflatten(-1, (heads, -1)), (high + low).unsqueeze(-1)
    outputs = [value[:, :0]]
    for t in range(score.shape[1]):
        v = value[:, t].unflatten(-1, (heads, -1))
        y, mean, z = step(score[:, t].unsqueeze(-1), v, decays[:, t].unsqueeze(-1), u, mean, z)
        outputs.append(y.flatten(1).unsqueeze(1))
    return torch.cat(outputs, 1), torch.cat([mean.flatten(1), z.squeeze(-1), torch.zeros_like(high)], -1)


def gradients(
    grad_y: Tensor,
    grad_final: Tensor,
    score: Tensor,
    value: Tensor,
    decay: Tensor | None,
    bonus: Tensor | None,
    state: Tensor,
) -> dict[str, Tensor]:
    """The gradients by hand, right to left. Those of `decay` and `bonus` are those of every step, `[B, T, H]`.

    With p the share of step t in the mean after it, and 1 - p that of the past::

        mean_t = mean_{t-1} + p (v_t - mean_{t-1}),    z_t = log(e^s_t + e^(z_{t-1} + l_t))

    so that with M = dL/dmean_t and Z = dL/dz_t, where <, > sums over the channels of a head::

        dL/ds_t = p Z + p (1 - p) <M, v_t - mean_{t-1}>,    dL/dv_t = p M
        dL/d(z_{t-1} + l_t) = (1 - p) Z - p (1 - p) <M, v_t - mean_{t-1}>,    dL/dmean_{t-1} = (1 - p) M
    """
    heads = score.shape[-1]
    decays = torch.zeros_like(score) if decay is None else decay.expand_as(score)
    mean, high, low = state.split([value.shape[-1], heads, heads], -1)
    means, zs = [mean.unflatten(-1, (heads, -1))], [(high + low).unsqueeze(-1)]
    steps = range(score.shape[1])
    s, v = score.unsqueeze(-1), value.unflatten(-1, (heads, -1))
    for t in steps:
        _, mean, z = step(s[:, t], v[:, t], decays[:, t].unsqueeze(-1), None, means[-1], zs[-1])
        means.append(mean)
        zs.append(z)
    g = grad_y.unflatten(-1, (heads, -1))
    of_mean, of_z, _ = grad_final.split([value.shape[-1], heads, heads], -1)
    of_mean, of_z = of_mean.unflatten(-1, (heads, -1)), of_z.unsqueeze(-1)
    found = {"score": torch.zeros_like(s), "value": torch.zeros_like(v), "decay": torch.zeros_like(s)}
    found["bonus"] = torch.zeros_like(s)
    for t in reversed(steps):
        if bonus is None:
            of_mean = of_mean + g[:, t]
        past = zs[t] + decays[:, t].unsqueeze(-1)
        p = _share(s[:, t], past)
        apart = p * (1 - p) * (of_mean * (v[:, t] - means[t])).sum(-1, keepdim=True)
        none = past == -INF  # nothing has been seen, or nothing is left of it
        found["score"][:, t] = torch.where(s[:, t] == -INF, 0.0, p * of_z + apart)
        found["value"][:, t] = p * of_mean
        found["decay"][:, t] = torch.where(none, 0.0, (1 - p) * of_z - apart)
        of_z, of_mean = torch.where(none, 0.0, (1 - p) * of_z - apart), torch.where(none, 0.0, (1 - p) * of_mean)
        if bonus is None:
            continue
        p = _share(s[:, t] + bonus.unsqueeze(-1), zs[t])
        apart = p * (1 - p) * (g[:, t] * (v[:, t] - means[t])).sum(-1, keepdim=True)
        apart = torch.where(s[:, t] == -INF, 0.0, apart)
        found["score"][:, t] += apart
        found["bonus"][:, t] = apart
        found["value"][:, t] += p * g[:, t]
        of_z = of_z - apart
        of_mean = of_mean + torch.where(zs[t] == -INF, 0.0, (1 - p) * g[:, t])
    found = {name: x.squeeze(-1) if name != "value" else x.flatten(2) for name, x in found.items()}
    return found | {"initial_state": torch.cat([of_mean.flatten(1), of_z.squeeze(-1), of_z.squeeze(-1)], -1)}


def _share(own: Tensor, past: Tensor) -> Tensor:
    return torch.where(own == -INF, 0.0, torch.sigmoid(own - past))


def scan(
    function,
    score: Tensor,
    value: Tensor,
    initial_state: Tensor | None = None,
    *,
    decay: Tensor | None = None,
    bonus: Tensor | None = None,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`definition` or `loop` in either direction, on packed sequences too: y and the final state."""
    if initial_state is None:
        sequences = score.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        initial_state = empty(score[:1].expand(sequences, -1, -1), value)
    streams = [score, value] if decay is None else [score, value, decay.expand_as(score)]

    def one(x, states):
        y, final = function(x[0], x[1], x[2] if len(x) > 2 else None, bonus, states[0])
        return [y], [final]

    (y,), (final,) = over_sequences(one, streams, [initial_state], reverse, cu_seqlens)
    return y, final
