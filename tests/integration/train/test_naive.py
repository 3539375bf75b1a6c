"""The plain loop and the engine are the same method: the same losses, the same movement."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from components.train.loop import Block, Watcher, block_losses
from components.train.members import Member
from components.train.naive import NaiveLoop
from model.errors import InputError
from tests.integration.train.packs import checked_concepts, loaded, states, tiny_spec, trained
from tests.tiny import want_less_noise
from tests.unit.train.ranks import on_ranks

ITERATIONS = 2
# One pass over all items, and nothing but two iterations of the main stage.
SETS = ("train.iterations=2", "echo.rounds=0", "train.items_at_once=null", "tracking.log_every=1")
VARIANTS = {
    "lpips": (),
    "swd": ("loss.perceptual=swd", "loss.perc_weight=1"),
    "scaled": ("train.scale_lr=true", "loss.rec_weight=2", "loss.adv_weight=1"),
    "no adversary": ("loss.adv_weight=0",),
    "cooling": ("train.cooldown=1",),
    "calm": ("loss.guidance_rescale=0.5",),
    "led in part": ("method.follow=0.8",),
    "less noise": (),  # and a student that asks for it
}


class Losses(Watcher):
    """Keeps every iteration's losses, by concept."""

    def __init__(self) -> None:
        self.found: dict[str, list[dict[str, float]]] = {}

    def block(self, members: list[Member], block: Block) -> None:
        for n, member in enumerate(members):
            self.found.setdefault(member.concept.id, []).append(block_losses(block, n))


def less_noise(student: Path, place: Path) -> str:
    """Copies a student that wants half the noise; gives the setting that takes it."""
    shutil.copytree(student, place)
    want_less_noise(place, 0.5)
    return f"base.student={place}"


def both_loops(paths: Any, folder: Path, place: Path) -> dict[str, Any]:
    """Losses and weights of each variant: the engine on both concepts at once, ours one by one."""
    concepts = checked_concepts(folder)
    results: dict[str, Any] = {}
    for variant, sets in VARIANTS.items():
        if variant == "less noise":
            sets = (less_noise(paths.student, place / "student"),)
        spec = tiny_spec(paths, *SETS, *sets)
        watcher = Losses()
        ended = states(trained(spec, concepts, watcher=watcher))
        frozen, members = loaded(spec, concepts)
        for member in members:
            naive = NaiveLoop(spec, frozen, member.data, member.concept.initializer)
            start = naive.weights()
            losses = [naive.iterate(i) for i in range(ITERATIONS)]
            results[f"{variant}.{member.concept.id}"] = {
                "losses": [{k: float(v) for k, v in each.items()} for each in losses],
                "expected": watcher.found[member.concept.id],
                "start": start,
                "weights": naive.weights(),
                "groups": ended[member.concept.id].groups,
            }
    return results


@pytest.fixture(scope="module")
def results(
    tiny_paths: Any, concepts_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("student")
    return on_ranks(1, both_loops, tiny_paths, concepts_folder, place)[0]


def test_less_noise_is_other_losses(results: dict[str, Any]):
    losses = {v: results[f"{v}.dog"]["losses"][0]["mse"] for v in ("lpips", "less noise")}
    assert losses["less noise"] != pytest.approx(losses["lpips"], rel=1e-3)


@pytest.mark.parametrize("concept", ["dog", "robot"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_are_those_of_the_engine(results: dict[str, Any], variant: str, concept: str):
    result = results[f"{variant}.{concept}"]
    assert len(result["expected"]) == ITERATIONS
    names = {"rec", "mse", "id", "perc"} | (set() if variant == "no adversary" else {"adv", "disc"})
    for mine, theirs in zip(result["losses"], result["expected"], strict=True):
        assert set(mine) == set(theirs) == names
        for name, value in theirs.items():
            assert mine[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("concept", ["dog", "robot"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters_move_the_same(results: dict[str, Any], variant: str, concept: str):
    result = results[f"{variant}.{concept}"]
    for name, start in result["start"].items():
        group, part = name.split(".")
        mine, theirs = result["weights"][name] - start, result["groups"][group][part] - start
        assert theirs.abs().max() > 0, name
        assert (mine - theirs).norm() <= 1e-2 * theirs.norm(), name


def test_what_the_plain_loop_leaves_out_is_refused(tiny_paths: Any, concepts_folder: Path):
    with pytest.raises(InputError, match="masked_id"):
        NaiveLoop(tiny_spec(tiny_paths, "loss.masked_id=true"), None, None, "dog")  # type: ignore[arg-type]
