"""The world: what is drawn, where, in which colour, and what its captions say."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from components.pretrain import scenes
from components.pretrain.build import write_tokenizer
from components.pretrain.composition import CLOSE, NORMAL, RECOLOURS, SMALL, Scenes
from components.pretrain.subjects import SUBJECTS, TOO_FINE
from components.pretrain.world import World, never_together
from model.errors import InputError

PLACED = dict(turn=0.0, flip=False, shadow=0.0, other=-1, worn=-1, back_light=1.0)


def placed(world: World, subject: int, **fields: float) -> Scenes:
    """One composition with these values, the rest by lot."""
    drawn = world.sample(1, world.generator(1), subject=torch.tensor([subject]), alone=True)
    values = {**PLACED, **fields}
    return dataclasses.replace(
        drawn, **{k: torch.full_like(getattr(drawn, k), v) for k, v in values.items()}
    )


def test_looked_up_tokens_are_the_tokenizers(world: World, world_folder: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(world_folder / "tokenizer")
    gen = world.generator(7)
    pieces = world.captions(world.sample(600, gen), gen)
    texts = world.captioner.text(pieces)
    wanted = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(world.captioner.table(tokenizer)(pieces), wanted)
    for words in (" and ", "wearing a crown", "far away", "close up", "tiny ", "a 3d render of"):
        assert any(words in text for text in texts), words


def test_tokenizer_files_are_made_from_a_byte_pair_file(tmp_path: Path, world_folder: Path) -> None:
    shipped = json.loads((world_folder / "tokenizer" / "tokenizer.json").read_text())["model"]
    merges = [" ".join(m) for m in shipped["merges"]] + ["left over"]
    write_tokenizer(tmp_path, gzip.compress("\n".join(["#version", *merges]).encode()))
    made, given = (CLIPTokenizer.from_pretrained(p) for p in (tmp_path, world_folder / "tokenizer"))
    text = "A photo of <new1> 25% off, naïvely: an axolotl's"
    assert made(text).input_ids == given(text).input_ids
    assert made.get_vocab() == given.get_vocab() and made.model_max_length == 32
    with pytest.raises(ValueError, match="tokens, not 6144"):
        write_tokenizer(tmp_path, gzip.compress(b"#version\nonly one"))


def test_held_out_subjects_are_never_drawn(world: World, world_folder: Path) -> None:
    held = torch.tensor([bool(s["held_out"]) for s in world.sprites])
    drawn = world.sample(3000, world.generator(2))
    paired = drawn.other >= 0
    assert paired.any() and not held[drawn.subject].any()
    assert not held[drawn.other[paired]].any()
    # Every sprite that is not held out does come; "fox" only in its other style.
    free = {i for i, s in enumerate(world.sprites) if not s["held_out"] and s["kind"] != "worn"}
    assert set(drawn.subject.tolist()) == free
    only = World(world_folder, "cpu", held_out=True)
    assert held[only.sample(300, only.generator(2)).subject].all()


def test_what_is_kept_apart_never_meets(world_folder: Path) -> None:
    seen, unseen = (World(world_folder, "cpu", drawn=kind) for kind in ("seen", "unseen"))

    def met(world: World) -> set[tuple[str, str]]:
        drawn = world.sample(4000, world.generator(3))
        scenes_of = world.back_scene[drawn.back]
        assert torch.equal(scenes_of, drawn.back_scene)
        return {
            (world.names[n], world.scene_names[s])
            for n, s in zip(drawn.name.tolist(), drawn.back_scene.tolist(), strict=True)
        }

    together, apart = met(seen), met(unseen)
    assert ("fox", "wood") in apart and ("owl", "night") in apart
    assert not together & apart
    names = {name for name, _ in together}
    assert names == {name for name, _ in apart} and {"fox", "cat", "owl"} <= names
    for name in names:  # every scene is on one side or the other
        never = never_together(name, seen.scene_names)
        assert 3 <= sum(never) <= 6
        assert {s for n, s in apart if n == name} <= {
            s for s, kept in zip(seen.scene_names, never, strict=True) if kept
        }


def test_what_is_too_fine_is_not_learnt(
    world_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.pretrain.world.TOO_FINE", {"owl"})
    world = World(world_folder, "cpu", drawn="seen")
    drawn = world.sample(2000, world.generator(2))
    emoji = {world.sprites[i]["emoji"] for i in drawn.subject.tolist()}
    assert "owl" not in emoji and "fox" in emoji
    assert set(TOO_FINE) <= {e for kind in SUBJECTS.values() for es in kind.values() for e in es}


def test_position_and_size_are_where_the_picture_shows_them(world: World) -> None:
    # A filled square (its side is 124 of the sprite's 128 px) at x = 0.4, y = -0.3, size 0.5.
    _, cover = world.render(placed(world, 2, x=0.4, y=-0.3, size=0.5, colour=-1))
    mask, axis = cover[0, 0], (torch.arange(128) + 0.5) / 64 - 1
    assert (mask.sum(0) * axis).sum() / mask.sum() == pytest.approx(0.4, abs=0.01)
    assert (mask.sum(1) * axis).sum() / mask.sum() == pytest.approx(-0.3, abs=0.01)
    assert mask.mean() == pytest.approx((0.5 * 124 / 128) ** 2, rel=0.03)


def test_cover_is_the_subject_and_nothing_else(world: World) -> None:
    there = placed(world, 2, x=0.0, y=0.0, size=0.6)
    picture, cover = world.render(there)
    gone, nothing = world.render(dataclasses.replace(there, x=torch.tensor([9.0])))
    changed = (picture - gone).abs().amax(1, keepdim=True) > 1e-6
    assert nothing.sum() == 0 and cover.min() >= 0 and cover.max() <= 1
    assert not changed[cover == 0].any() and changed[cover > 0.5].all()
    shaded = world.render(dataclasses.replace(there, shadow=torch.tensor([0.4])))[0]
    darker = (shaded - picture).sum(1)[cover[:, 0] == 0]
    assert darker.min() < -0.1 and darker.max() <= 1e-6


def test_a_flipped_subject_is_the_mirror_image(world: World) -> None:
    corner = 1  # the triangle
    right = world.render(placed(world, corner, x=0.0, y=0.0, size=0.7))[1]
    left = world.render(placed(world, corner, x=0.0, y=0.0, size=0.7, flip=True))[1]
    assert torch.allclose(right.flip(-1), left, atol=1e-5) and not torch.equal(right, left)


@pytest.mark.parametrize("colour", list(RECOLOURS))
def test_recoloured_subjects_have_their_colour(world: World, colour: str) -> None:
    index = list(RECOLOURS).index(colour)
    there = placed(world, 12, x=0.0, y=0.0, size=0.7, colour=index)  # of middle lightness
    picture, cover = world.render(there)
    seen = ((picture[0] + 1) / 2)[:, cover[0, 0] > 0.99].mean(1)
    distance = {name: float((seen - torch.tensor(rgb)).norm()) for name, rgb in RECOLOURS.items()}
    assert min(distance, key=lambda name: distance[name]) == colour
    assert f" {colour} " in world.captioner.text(world.captions(there, world.generator(0)))[0]


def test_a_subject_given_keeps_its_own_colours(world: World) -> None:
    picture, cover = world.render(placed(world, 0, x=0.0, y=0.0, size=0.7))
    seen = ((picture[0] + 1) * 127.5)[:, cover[0, 0] > 0.99].mean(1)
    assert seen.tolist() == pytest.approx([230, 120, 30], abs=1.5)


def test_zoom_sets_the_size_and_subjects_stay_inside(world: World) -> None:
    drawn = world.sample(2000, world.generator(3))
    assert drawn.size[drawn.zoom == SMALL].max() < 0.4 < drawn.size[drawn.zoom == NORMAL].min()
    assert drawn.size[drawn.zoom == CLOSE].min() >= 0.95
    normal = drawn.zoom != CLOSE
    assert (drawn.x.abs() + drawn.size)[normal & (drawn.other < 0)].max() <= 1
    assert (drawn.y.abs() + drawn.size)[normal].max() <= 1
    assert (drawn.worn[drawn.worn >= 0] == len(world.sprites) - 1).all()
    assert world.wears[drawn.subject[drawn.worn >= 0]].all()


def test_a_hat_sits_on_top(world: World) -> None:
    bare = placed(world, 4, x=0.0, y=0.3, size=0.5)
    hatted = dataclasses.replace(bare, worn=torch.tensor([len(world.sprites) - 1]))
    changed = (world.render(hatted)[0] - world.render(bare)[0]).abs().amax(1)[0] > 0.02
    rows = changed.any(1).nonzero()[:, 0].float() / 64 - 1
    assert rows.mean() == pytest.approx(0.3 - 0.5, abs=0.15)


def test_the_scene_asked_for_is_behind_and_in_the_caption(world: World) -> None:
    gen = world.generator(4)
    drawn = world.sample(50, gen, scene="beach", alone=True, zoom=NORMAL)
    assert {world.scene_names[i] for i in drawn.back_scene.tolist()} == {"beach"}
    texts = world.captioner.text(world.captions(drawn, gen))
    named = sum(any(p in text for p in scenes.phrases("beach")) for text in texts)
    assert named >= 40  # some captions leave the scene out
    assert (drawn.other < 0).all() and (drawn.worn < 0).all() and (drawn.zoom == NORMAL).all()


@pytest.mark.parametrize("text", ['{"sprites": [', "{}", "[]"])
def test_a_broken_world_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "world.json").write_text(text)
    with pytest.raises(InputError, match="world.json is broken: build the world again"):
        World(tmp_path, "cpu")


def test_one_seed_is_one_world(world: World) -> None:
    one, again, other = (
        world.render(world.sample(4, world.generator(seed)))[0] for seed in (5, 5, 6)
    )
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert one.shape == (4, 3, 128, 128) and one.min() >= -1 and one.max() <= 1


def test_scenes_are_painted_the_same_by_one_seed() -> None:
    first, names = scenes.paint_all(9, per_scene=1, per_colour=1)
    again, _ = scenes.paint_all(9, per_scene=1, per_colour=1)
    assert np.array_equal(first, again) and first.shape[1:] == (160, 160, 3)
    assert len(names) == len(first) == len(scenes.PAINTERS) + 11
    assert all(scenes.phrases(name) for name in names)
    assert len({picture.tobytes() for picture in first}) == len(first)
