"""ZeRO stage 3 of the frozen networks: kept in parts, used as if they were whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from components.spec import resolve_spec
from components.train import shards
from components.train.job import BasePaths
from components.train.shards import networks, sharded
from components.train.worker import load_frozen
from model.acceleration import use_channels_last
from model.errors import InputError
from model.iteration import Frozen
from tests.integration.train.packs import tiny_spec
from tests.tiny import build_tiny_pair
from tests.unit.train.ranks import on_ranks


def passes(frozen: Frozen) -> tuple[torch.Tensor, ...]:
    """Pictures and features, and what flows back through every network to its input."""
    pair, gen = frozen.pair, torch.Generator().manual_seed(0)
    noise = torch.randn(2, *pair.latent_shape, generator=gen).requires_grad_()
    kv = torch.randn(2, 16, len(pair.student_kv), generator=gen).requires_grad_()
    z = pair.denoise(pair.student, noise, torch.tensor([10, 900]), kv)
    images = pair.decode(z)
    found = [backbone(images) for backbone in (*frozen.backbones, frozen.identity)]
    features = [each for f in found for each in (f.pooled, *f.layers)]
    loss = sum((f.square().mean() for f in features), images.square().mean())
    return images.detach(), *torch.autograd.grad(loss, (noise, kv))


def held(frozen: Frozen) -> int:
    return sum(p.numel() for network in networks(frozen) for p in network.parameters())


def strides(frozen: Frozen) -> list[tuple[int, ...]]:
    return [p.stride() for network in networks(frozen) for p in network.parameters()]


def compare(paths: Any, checkpointing: bool, channels_last: bool) -> dict[str, Any]:
    # Everything is a part, and nothing stays for a later use.
    shards.SMALL = shards.WHOLE_AT_ONCE = 0
    bases = BasePaths.from_spec(tiny_spec(paths))
    frozen = load_frozen(bases, torch.float32, torch.device("cpu"), 32, checkpointing)
    if channels_last:  # as on a GPU
        use_channels_last(frozen)
    laid_out = strides(frozen)
    before = [p.detach().clone() for network in networks(frozen) for p in network.parameters()]
    found: dict[str, Any] = {"whole": held(frozen), "expected": passes(frozen)}
    with sharded(frozen, 2):
        found["stage 2"] = held(frozen)
    with sharded(frozen, 3) as parts:
        found["idle"] = held(frozen)
        own = [p.ds_tensor for network in networks(frozen) for p in network.parameters()]
        found["own"] = sum(tensor.numel() for tensor in own)
        found["passes"] = passes(frozen)
        parts.tidy()
        found["left"] = held(frozen)
    after = [p for network in networks(frozen) for p in network.parameters()]
    found["same"] = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    found["laid out"] = strides(frozen) == laid_out
    with sharded(frozen, 3):
        found["again"] = passes(frozen)
    return found


@pytest.mark.parametrize(("checkpointing", "channels_last"), [(False, True), (True, False)])
def test_parts_are_used_as_the_whole_and_put_together_again(
    tmp_path: Path, checkpointing: bool, channels_last: bool
) -> None:
    paths = build_tiny_pair(tmp_path / "tiny")
    for found in on_ranks(2, compare, paths, checkpointing, channels_last):
        assert found["stage 2"] == found["whole"] > 600_000
        assert found["idle"] == 0
        assert found["left"] < 0.1 * found["whole"]
        assert found["own"] < 0.51 * found["whole"]
        assert found["same"] and found["laid out"]
        # Parts do not lie in memory as the whole did: sums are in another order.
        near = 1e-4 if channels_last else 1e-5
        for name in ("passes", "again"):
            for mine, theirs in zip(found[name], found["expected"], strict=True):
                assert (mine - theirs).abs().max() <= near * theirs.abs().max()


def test_parts_are_not_compiled() -> None:
    parts = ["train.zero_stage=3", "train.compile=true"]
    resolve_spec("pocket", None, [*parts, "train.workers=1"])
    with pytest.raises(InputError, match="compile needs whole networks"):
        resolve_spec("pocket", None, [*parts, "train.workers=2"])
