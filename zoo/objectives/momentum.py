"""Methods with a second network that is never trained but follows the first."""

from __future__ import annotations

from typing import TypeVar

from lightly.models.utils import update_momentum
from lightly.utils.scheduler import cosine_schedule
from torch import nn

from zoo.objectives.base import Objective
from zoo.recipe import Recipe

M = TypeVar("M", bound=nn.Module)


class MomentumObjective(Objective):
    """An objective whose `follow`ers are moving averages, ever slower ones, of what they follow."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self._followed: list[tuple[nn.Module, nn.Module]] = []  # in a list, which is not part of the state

    def follow(self, leader: nn.Module, follower: M) -> M:
        """`follower`, of the same make as `leader`, with its weights and from now on led by it."""
        follower.load_state_dict(leader.state_dict())
        follower.requires_grad_(False)
        self._followed.append((leader, follower))
        return follower

    def after_step(self, step: int, steps: int) -> None:
        """The followers move by 1 - momentum; momentum rises to 1 by half a cosine."""
        momentum = cosine_schedule(step, steps, self.recipe.momentum, 1.0)
        for leader, follower in self._followed:
            update_momentum(leader, follower, momentum)
