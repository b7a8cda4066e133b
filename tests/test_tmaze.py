"""The mazes of `examples.tmaze`, its advantages, and the example made small."""

from __future__ import annotations

import pytest
import torch

from examples import tmaze
from tests.test_examples import SMALL, page, percent


def test_a_maze_pays_for_the_side_of_its_signal():
    mazes = tmaze.Mazes(6, (3, 3), torch.Generator().manual_seed(0))
    side = mazes.look()[:, 1].long()
    assert mazes.look().tolist() == [[1 - s, s, 0, 0] for s in side.tolist()]
    turned = mazes.act(torch.full((6,), tmaze.LEFT))  # against a wall
    assert turned[0].tolist() == pytest.approx([-0.1] * 6)
    for _ in range(3):
        reward, ended = mazes.act(torch.full((6,), tmaze.AHEAD))
        assert not reward.any()
        assert not ended.any()
        assert not mazes.look()[:, :2].any()
    assert mazes.look()[:, 3].all()
    turns = torch.tensor([tmaze.LEFT, tmaze.RIGHT, tmaze.AHEAD] * 2)
    reward, ended = mazes.act(turns)
    right = (turns == tmaze.LEFT + side).float() * 2 - 1
    assert reward.tolist() == pytest.approx(torch.where(turns == tmaze.AHEAD, -0.1, right).tolist())
    assert ended.tolist() == (turns != tmaze.AHEAD).tolist()
    assert (mazes.look()[:, :2].sum(1) == ended.float()).all()  # a new signal where an episode ended


def test_advantages_end_with_their_episode():
    rewards, ended = torch.tensor([[0.0, 1.0, 0.0, -1.0]]), torch.tensor([[False, True, False, False]])
    none = torch.zeros(1, 4)
    rollout = tmaze.Rollout(none, none, none, rewards, ended, none, None, torch.tensor([2.0]))
    last = -1.0 + tmaze.DISCOUNT * 2.0
    faded = tmaze.DISCOUNT * tmaze.TRACE
    assert tmaze.advantages(rollout).tolist()[0] == pytest.approx([faded, 1.0, faded * last, last])


def test_tmaze(tmp_path):
    options = ["--steps", "2", "--corridors", "5", "--episodes", "4", "--out", str(tmp_path)]
    tmaze.main([*SMALL, *options])
    _, _, *rows = page(tmp_path, "tmaze")[: 2 + len(tmaze.UNITS)]
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in tmaze.UNITS]
    assert all(0 <= percent(row)[0] <= 100 for row in rows)
