"""An iteration's networks and losses never wait for the device that they run on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.base_pair import load_base_pair
from model.batch import Batch, ConceptData
from model.discriminators import load_backbone
from model.iteration import Frozen
from tests.tiny import TinyPaths
from tests.unit.model.packs import Trained, backward, draw, trained

META = torch.device("meta")


class _Copies(TorchDispatchMode):
    """Notes the operators that read from the CPU and write to the device, or look at a value."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        devices = {a.device.type for a in _tensors((args, kwargs)) if a.dim()}
        if "cpu" in devices and any(o.device == META for o in _tensors(out)):
            self.found.append(str(func))
        return out


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    for leaf in torch.utils._pytree.tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            yield leaf


@pytest.fixture(scope="module")
def there(tiny: TinyPaths) -> Frozen:
    """The frozen networks on a device that refuses to tell a value."""
    pair = load_base_pair(tiny.teacher, tiny.student, name="tiny", device="meta")
    backbones = [load_backbone(folder, device="meta") for folder in (tiny.clip, tiny.dino)]
    return Frozen.build(pair, backbones)


def moved(own: Trained, batch: Batch) -> tuple[Trained, Batch]:
    """Put what is trained and a batch there; `concept` stays on the CPU."""
    trained_there = Trained(*(group.to(META) for group in own.groups.values()))
    return trained_there, replace(
        batch,
        **{
            name: getattr(batch, name).to(META)
            for name in ("images", "masks", "prompts", "noise", "t", "t_align", "directions")
        },
    )


def test_an_iteration_copies_nothing_to_the_device_and_asks_for_no_value(
    frozen: Frozen, there: Frozen, concepts: tuple[ConceptData, ...]
) -> None:
    own, batch = moved(trained(frozen, concepts), draw(frozen.pair, concepts))
    backward(there, own, batch)  # constants go there once
    with _Copies() as copies:
        backward(there, own, batch)
    assert copies.found == []
    with _Copies() as copies:  # what it would find
        own.teacher.rows[torch.tensor([1]).to(META)]
    assert copies.found
