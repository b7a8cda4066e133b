"""Train agents in short T-mazes, many episodes in one rollout, and test them in corridors up to 100 times longer.

At the first step a signal says left or right. A corridor follows, in which all steps look alike. At its end the agent
turns: the right turn pays 1, the wrong one -1, and both end the episode. Every other action than "ahead" in the
corridor, and "ahead" at the end, costs 0.1 and does not move the agent. So the agent must remember one bit for as long
as the corridor is. The T-maze goes back to Bakker (2002); arXiv 2605.12206 argues that multistable units generalise
best over its length.

Many mazes run side by side. When an episode ends, the next one begins at the next step, so a rollout `[B, T]` contains
many episodes; `resets` marks their first steps. The agent is an advantage actor-critic.

Run from the repository's root: `python -m examples.tmaze`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mru_kernels as mk
from examples import common

AHEAD, LEFT, RIGHT = range(3)
FEATURES = 4  # signal left, signal right, corridor, end of the corridor
CORRIDORS = (2, 10)  # shortest and longest in training
MAZES, STEPS = 64, 32  # of a rollout
WIDTH = 16
LEARNING_RATE = 1e-2
DISCOUNT, TRACE = 0.97, 0.9  # of rewards; of generalised advantage estimation (arXiv 1506.02438)
ENTROPY = 0.02
#: The initial time scales of minGRU reach the longest training episode.
UNITS: dict[str, Any] = {
    "BMRU": "bmru",
    "minGRU": {"min_gru": {"max_time_scale": float(CORRIDORS[1])}},
    "BMRU + minGRU": {"bmru": {}, "min_gru": {"max_time_scale": float(CORRIDORS[1])}},
    "nn.GRU": "gru",
}


class Mazes:
    """T-mazes side by side, each with its corridor, its signal and the agent's place."""

    def __init__(self, count: int, corridors: tuple[int, int], generator: torch.Generator) -> None:
        self.corridors, self.generator = corridors, generator
        self.length, self.right = torch.zeros(2, count, dtype=torch.int64)
        self.place = torch.zeros(count, dtype=torch.int64)
        self._begin(torch.ones(count, dtype=torch.bool))

    def _begin(self, where: Tensor) -> None:
        shortest, longest = self.corridors
        count = len(where)
        length = torch.randint(shortest, longest + 1, (count,), generator=self.generator)
        right = torch.randint(2, (count,), generator=self.generator)
        self.length = torch.where(where, length, self.length)
        self.right = torch.where(where, right, self.right)
        self.place = torch.where(where, 0, self.place)

    def look(self) -> Tensor:
        """What the agents see, `[B, FEATURES]`."""
        at_start, at_end = self.place == 0, self.place == self.length
        columns = (at_start & (self.right == 0), at_start & (self.right == 1), ~at_start & ~at_end, at_end)
        return torch.stack(columns, 1).float()

    def act(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards `[B]`, and which episodes ended `[B]`: in their mazes the next episode begins."""
        at_end, ahead = self.place == self.length, action == AHEAD
        turned = at_end & ~ahead
        correct = action == LEFT + self.right
        reward = torch.where(turned, torch.where(correct, 1.0, -1.0), torch.where(ahead ^ at_end, 0.0, -0.1))
        self.place = self.place + (ahead & ~at_end)
        self._begin(turned)
        return reward, turned


class Agent(nn.Module):
    """A network of one block whose outputs are the logits of the actions and the value."""

    def __init__(self, units: Any) -> None:
        super().__init__()
        self.network = mk.MRUNetwork(FEATURES, 4, width=WIDTH, num_blocks=1, units=units)
        self.has_resets = units != "gru"

    def forward(self, x: Tensor, state: Any, resets: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Logits `[B, T, 3]`, values `[B, T]` and the state after `x [B, T, FEATURES]`.

        torch.nn.GRU has no resets: it goes step by step, with a state that is set to zero.
        """
        if self.has_resets:
            output, state = self.network(x, state, resets=resets)
        else:
            outputs = []
            for x_t, begins in zip(x.split(1, 1), resets.split(1, 1), strict=True):
                state = None if state is None else tuple(t.masked_fill(begins, 0.0) for t in state)
                output, state = self.network(x_t, state)
                outputs.append(output)
            output = torch.cat(outputs, 1)
        return output[..., :3], output[..., 3], state


class Rollout(NamedTuple):
    """Steps `[B, T]` of many episodes, and the state before the first and the value after the last."""

    x: Tensor
    resets: Tensor
    actions: Tensor
    rewards: Tensor
    ended: Tensor
    values: Tensor
    state: Any
    next_value: Tensor


@torch.no_grad()
def play(agent: Agent, mazes: Mazes, state: Any, begins: Tensor) -> tuple[Rollout, Any, Tensor]:
    """A rollout, the state after it, and which episodes begin then."""
    rows: list[tuple[Tensor, ...]] = []
    before = state
    for _ in range(STEPS):
        x = mazes.look()
        logits, value, state = agent(x.unsqueeze(1), state, begins.unsqueeze(1))
        action = torch.multinomial(logits[:, 0].softmax(-1), 1, generator=mazes.generator).squeeze(1)
        reward, ended = mazes.act(action)
        rows.append((x, begins, action, reward, ended, value[:, 0]))
        begins = ended
    _, value, _ = agent(mazes.look().unsqueeze(1), state, begins.unsqueeze(1))
    columns = (torch.stack(column, 1) for column in zip(*rows, strict=True))
    return Rollout(*columns, before, value[:, 0]), state, begins


def advantages(r: Rollout) -> Tensor:
    """Generalised advantage estimates `[B, T]`; none passes from an episode to the one before."""
    found, after, value = [], torch.zeros_like(r.next_value), r.next_value
    for t in reversed(range(r.rewards.shape[1])):
        goes_on = (~r.ended[:, t]).float()
        error = r.rewards[:, t] + DISCOUNT * goes_on * value - r.values[:, t]
        after = error + DISCOUNT * TRACE * goes_on * after
        value = r.values[:, t]
        found.append(after)
    return torch.stack(found[::-1], 1)


def loss_of(agent: Agent, r: Rollout) -> Tensor:
    """The loss of a rollout, in one pass over all of its episodes."""
    gain = advantages(r)
    logits, values, _ = agent(r.x, r.state, r.resets)
    log_policy = logits.log_softmax(-1)
    chosen = log_policy.gather(-1, r.actions.unsqueeze(-1)).squeeze(-1)
    of_policy = -(chosen * (gain - gain.mean()) / (gain.std() + 1e-6)).mean()
    entropy = -(log_policy.exp() * log_policy).sum(-1).mean()
    return of_policy + 0.5 * F.mse_loss(values, gain + r.values) - ENTROPY * entropy


@torch.no_grad()
def test(agent: Agent, corridor: int, count: int, seed: int) -> float:
    """Share of episodes that end with the right turn, by the most likely actions, with 20 steps to spare."""
    mazes = Mazes(count, (corridor, corridor), torch.Generator().manual_seed(1000 + seed))
    state, begins = None, torch.ones(count, dtype=torch.bool)
    won, open_ = torch.zeros(count, dtype=torch.bool), torch.ones(count, dtype=torch.bool)
    for _ in range(corridor + 20):
        logits, _, state = agent(mazes.look().unsqueeze(1), state, begins.unsqueeze(1))
        reward, begins = mazes.act(logits[:, 0].argmax(-1))
        won |= open_ & begins & (reward > 0)
        open_ &= ~begins
    return won.float().mean().item()


def run(name: str, seed: int, arguments: argparse.Namespace) -> dict[int, float]:
    torch.manual_seed(seed)
    agent = Agent(UNITS[name])
    mazes = Mazes(MAZES, CORRIDORS, torch.Generator().manual_seed(seed))
    state, begins = None, torch.ones(MAZES, dtype=torch.bool)

    def loss() -> Tensor:
        nonlocal state, begins
        rollout, state, begins = play(agent, mazes, state, begins)
        return loss_of(agent, rollout)

    common.train(agent, loss, steps=arguments.steps, learning_rate=LEARNING_RATE)
    return {n: test(agent, n, arguments.episodes, seed) for n in arguments.corridors}


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__, steps=300)
    parser.add_argument("--units", nargs="+", choices=UNITS, default=list(UNITS))
    parser.add_argument("--corridors", nargs="+", type=int, default=[10, 100, 1000], metavar="N", help="in tests")
    parser.add_argument("--episodes", type=int, default=200, help="number of test episodes for each corridor")
    arguments = parser.parse_args(argv)
    results = common.run_all(run, arguments.units, arguments)
    rows = [
        [name, *(common.spread([r[n] for r in runs]) for n in arguments.corridors)] for name, runs in results.items()
    ]
    text = common.table(["unit", *(f"corridor of {n:,}" for n in arguments.corridors)], rows)
    text += (
        f"\n\nPercent of right turns, {arguments.episodes} episodes x {arguments.seeds} seeds, trained in corridors of"
        f" {CORRIDORS[0]} to {CORRIDORS[1]} for {arguments.steps} rollouts of {MAZES} x {STEPS} steps."
    )

    def draw(axes: Any) -> None:
        for name, runs in results.items():
            means = [100 * statistics.mean(r[n] for r in runs) for n in arguments.corridors]
            axes.plot(arguments.corridors, means, marker="o", markersize=4, label=name)
        axes.axhline(50, color="grey", linewidth=0.8, linestyle=":")
        axes.set(xscale="log", ylim=(0, 105), xlabel="steps of the corridor", ylabel="percent of right turns")
        axes.legend(fontsize=8)

    common.finish("tmaze", text, draw, arguments.out)


if __name__ == "__main__":
    main()
