"""What training tells while it goes on, and who listens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from components.train.members import Member
from components.train.names import LOSS
from model.echo import EchoRound

if TYPE_CHECKING:
    from components.train.loop import Segment


@dataclass(frozen=True)
class Block:
    """What happened in some iterations of a segment.

    Attributes:
        first: the first of its iterations.
        names: of the values.
        values: [T, K, N] on the CPU, averaged over the ranks; T iterations, K names, N members.
        seconds: that it took.

    """

    first: int
    names: tuple[str, ...]
    values: torch.Tensor
    seconds: float


class Watcher:
    """What the loop tells while it trains; this one listens to nothing.

    Every method is called on every rank at the same time.
    """

    def block(self, members: list[Member], block: Block) -> None:
        """Some iterations are done."""

    def echo(self, member: Member, iteration: int, drawn: EchoRound) -> None:
        """A member's echo round was drawn."""

    def pictures(self, members: list[Member], iteration: int, segment: Segment) -> None:
        """It is time for sample pictures."""

    def failed(self, member: Member) -> None:
        """A member left the pack; its `error` says why."""

    def wants_checkpoint(self) -> bool:
        """Tell whether a checkpoint is due; rank 0's answer counts."""
        return False

    def checkpoint(self) -> None:
        """Keep the members' states, which are up to date now."""


def block_losses(block: Block, n: int) -> dict[str, float]:
    """Give the means of member n's losses over a block, by name."""
    means = zip(block.names, block.values[:, :, n].mean(0).tolist(), strict=True)
    return {name.removeprefix(LOSS): mean for name, mean in means if name.startswith(LOSS)}


def mark_broken(members: list[Member], block: Block) -> list[Member]:
    """Find and mark the members that had a value that is not finite."""
    broken = []
    for n, member in enumerate(members):
        wrong = (~block.values[:, :, n].isfinite()).nonzero()
        if member.error is None and len(wrong):
            t, k = wrong[0].tolist()
            kept = member.state.iteration if member.state else 0
            member.error = (
                f"{block.names[k]} was not finite at iteration {block.first + t}: lower the "
                f"learning rates or the loss weights (its state of iteration {kept} is kept)"
            )
            broken.append(member)
    return broken
