"""Stages: state on disk, exact resumption, and a few steps of everything from the command line."""

from __future__ import annotations

import filecmp
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTokenizer
from typer.testing import CliRunner

from components.pretrain.__main__ import app
from components.pretrain.latents import Noising
from components.pretrain.networks import alphas_cumprod
from components.pretrain.pair import shipped_pair
from components.pretrain.recipe import STAGES, Recipe, adjusted, finished, load_network
from components.pretrain.training import Clock, OutOfTime, Stage, Trainee, cosine
from components.pretrain.vision import sinkhorn, train_clip
from components.pretrain.world import World
from model.errors import InputError
from tests.unit.pretrain.conftest import POCKET


class Allowance(Clock):
    """A clock that allows a number of looks instead of seconds."""

    def left(self) -> float:
        self.seconds -= 1
        return self.seconds


def state_of(trainee: Trainee) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainee.state().items()}


def test_a_stopped_stage_ends_like_an_undisturbed_one(
    tmp_path: Path, world: World, world_folder: Path
) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(world_folder / "tokenizer")

    def train(folder: str, looks: int) -> Trainee:
        stage = Stage("clip", tmp_path / folder, 4, Allowance(looks))
        return train_clip(stage, world, tokenizer, torch.float32, 2)

    undisturbed = state_of(train("once", 100))
    for done in (1, 2):
        with pytest.raises(OutOfTime, match=f"clip: {done} of 4 steps"):
            train("twice", 1)
    assert json.loads((tmp_path / "twice" / "clip.json").read_text())["step"] == 2
    resumed = state_of(train("twice", 100))
    assert resumed.keys() == undisturbed.keys()
    assert all(torch.equal(resumed[k], undisturbed[k]) for k in resumed)
    moved = [k for k in resumed if k.startswith("exp_avg.") and resumed[k].abs().sum() > 0]
    assert len(moved) > 100


def two_trainees() -> dict[str, Trainee]:
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    return {
        "early": Trainee(nn.Linear(3, 2), cpu, torch.float32, weight_decay=0.1),
        "late": Trainee(nn.Linear(3, 2), cpu, torch.float32, ema=0.5),
    }


def two_stages(folder: Path, looks: int) -> dict[str, Trainee]:
    """The second trainee begins at step 3, as the student's companions do."""
    trainees, stage = two_trainees(), Stage("two", folder, 6, Allowance(looks))
    gen = torch.Generator()
    stage.resume(trainees)

    def step(i: int) -> dict[str, Tensor]:
        for name, trainee in trainees.items():
            trainee.lr.fill_(0.1)
            if name == "early" or i >= 3:
                x = torch.randn(4, 3, generator=gen)
                trainee.step((trainee.net(x) - 1).square().mean())
        return {}

    stage.run(trainees, step, gen)
    return trainees


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_trainee_that_has_not_begun_is_resumed_too(tmp_path: Path, stop: int) -> None:
    undisturbed = two_stages(tmp_path / "once", 100)
    with pytest.raises(OutOfTime):
        two_stages(tmp_path / "twice", stop)
    resumed = two_stages(tmp_path / "twice", 100)
    for name, trainee in undisturbed.items():
        wanted, got = trainee.state(), resumed[name].state()
        assert wanted.keys() == got.keys() and all(torch.equal(wanted[k], got[k]) for k in got)


def test_a_killed_stage_goes_on_from_its_last_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.pretrain.training.SAVE_SECONDS", -1.0)  # before every step
    trainees, stage = two_trainees(), Stage("two", tmp_path, 6, Clock(1e9))

    def killed(i: int) -> dict[str, Tensor]:
        if i == 4:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        stage.run(trainees, killed, torch.Generator())
    assert Stage("two", tmp_path, 6, Clock(1e9)).step == 4
    assert not list(tmp_path.glob("*.part"))


def test_an_average_follows_its_weights() -> None:
    trainee = two_trainees()["late"]
    before = [w.clone() for w in trainee.masters]
    trainee.lr.fill_(0.1)
    trainee.step(trainee.net(torch.ones(1, 3)).sum())
    for old, new, average in zip(before, trainee.masters, trainee.average, strict=True):
        assert torch.allclose(average, (old + new) / 2) and not torch.equal(old, new)
    assert torch.equal(trainee.averaged().weight, trainee.average[0])


def test_learning_rate_warms_up_and_falls() -> None:
    rates = [cosine(i, 1000, 2.0, warm=100, floor=0.1) for i in range(1001)]
    assert rates[0] == pytest.approx(0.02, rel=0.01) and max(rates) <= 2
    assert rates[1000] == pytest.approx(0.2)
    assert rates[100:] == sorted(rates[100:], reverse=True)


def test_noising_is_undone_by_its_own_prediction() -> None:
    noising, gen = Noising(alphas_cumprod("cpu")), torch.Generator().manual_seed(0)
    z0, noise = (torch.randn(3, 8, 4, 4, generator=gen) for _ in range(2))
    t = torch.tensor([5, 500, 999])
    z_t, v = noising.add(z0, noise, t), noising.v(z0, noise, t)
    assert torch.allclose(noising.z0(v, z_t, t), z0, atol=1e-5)
    assert torch.allclose(noising.noise(v, z_t, t), noise, atol=1e-5)


def test_assignments_use_prototypes_alike() -> None:
    scores = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) * 0.1
    scores[:, 3] += 1  # everything looks like prototype 3
    q = sinkhorn(scores, 0.05, rounds=20)
    assert torch.allclose(q.sum(1), torch.ones(64)) and q.argmax(1).bincount().max() < 20
    assert torch.allclose(q.sum(0), torch.full((8,), 8.0), atol=0.8)


@pytest.fixture(scope="module")
def trained(world_folder: Path) -> Iterator[Path]:
    """The folder of a dry training: a few steps of every stage, from the command line."""
    work = world_folder.parent
    answer = CliRunner().invoke(app, ["train", "--dry", "--work", str(work), "--device", "cpu"])
    assert answer.exit_code == 0, answer.output
    (work / "state-dry").rename(work / "state")
    yield work
    (work / "state").rename(work / "state-dry")


def test_every_stage_trains(trained: Path) -> None:
    state = trained / "state"
    for name in STAGES:
        values = load_file(finished(state, name)).values()
        assert all(bool(torch.isfinite(value).all()) for value in values)
        log = json.loads((state / f"{name}.json").read_text())["log"]
        assert log and all(value == value for line in log for value in line.values())
    teacher, student = (load_network(state, name) for name in ("teacher", "student"))
    pairs = zip(teacher.parameters(), student.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


def test_latents_have_unit_variance(trained: Path, world_folder: Path) -> None:
    # The four pictures that were measured when the statistics were folded in.
    world = World(world_folder, "cpu")
    scenes = world.sample(4, world.generator(44))
    with torch.no_grad():
        z = load_network(trained / "state", "vae").encode(world.render(scenes)[0]).latent_dist.mean
    assert torch.allclose(z.mean((0, 2, 3)), torch.zeros(8), atol=1e-3)
    assert torch.allclose(z.std((0, 2, 3)), torch.ones(8), atol=1e-3)


def test_what_is_exported_has_the_shipped_form(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "pocket"
    answer = CliRunner().invoke(app, ["export", "--work", str(trained), "--out", str(out)])
    assert answer.exit_code == 0, answer.output

    def files(root: Path) -> set[str]:
        return {
            str(path.relative_to(root))
            for part in ("weights", "layout", "concepts")
            for path in (root / part).rglob("*")
            if path.is_file()
        }

    assert files(out) == files(POCKET)
    for name in STAGES:
        made, shipped = (
            load_file(root / "weights" / f"{name}.safetensors") for root in (out, POCKET)
        )
        assert {k: (v.shape, v.dtype) for k, v in made.items()} == {
            k: (v.shape, v.dtype) for k, v in shipped.items()
        }
    layout = [name for name in files(POCKET) if name.startswith("layout") and "dino" not in name]
    _, differ, errors = filecmp.cmpfiles(out, POCKET, layout, shallow=False)
    assert not errors and all(json.loads((out / name).read_text()) for name in differ)


def test_the_trained_pair_is_measured(trained: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", "--pair", "trained", "--work", str(trained), "--device", "cpu"]
    grid = tmp_path / "unseen.png"
    answer = CliRunner().invoke(app, [*arguments, "--count", "2", "--unseen", str(grid)])
    assert answer.exit_code == 0, answer.output
    figures = json.loads(answer.stdout)
    assert figures["parameters_teacher"] == figures["parameters_student"] > 9e6
    assert {"text_truth", "text_teacher", "text_student", "text_shuffled"} <= set(figures)
    assert 0 <= figures["names_held_out_top1"] <= figures["names_held_out_top5"] <= 1
    assert 3 < figures["vae_psnr"] < 40
    with Image.open(grid) as picture:
        assert picture.size == (1280, 512)
    assert len(grid.with_suffix(".txt").read_text().splitlines()) == 40


def test_the_card_says_what_the_shipped_pair_has() -> None:
    answer = CliRunner().invoke(app, ["evaluate", "--count", "0", "--device", "cpu"])
    assert answer.exit_code == 0, answer.output
    card = (POCKET / "README.md").read_text()
    for name, count in json.loads(answer.stdout).items():
        row = next(line for line in card.splitlines() if f"`{name[11:]}.safetensors`" in line)
        assert f"{count:,}" in row
        size = (POCKET / "weights" / f"{name[11:]}.safetensors").stat().st_size
        assert f"{size / 1e6:.1f} MB" in row


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--stages", "nonsense"], "No stage is called 'nonsense'"),
        (["train", "--stages", "teacher", "--dry"], "train the stage 'vae' first"),
        (["evaluate", "--pair", "best"], "neither 'trained' nor 'shipped'"),
        (["export"], "train the stage 'clip' first"),
    ],
)
def test_wrong_calls_are_told_what_to_do(
    tmp_path: Path, world_folder: Path, arguments: list[str], words: str
) -> None:
    (tmp_path / "world").symlink_to(world_folder)
    options = ["--work", str(tmp_path), *(["--count", "0"] if "evaluate" in arguments else [])]
    out = ["--out", str(tmp_path / "out")] if "export" in arguments else []
    answer = CliRunner().invoke(app, [*arguments, *options, *out])
    assert isinstance(answer.exception, InputError) and words in str(answer.exception)


def test_without_a_world_the_first_command_is_named(tmp_path: Path) -> None:
    answer = CliRunner().invoke(app, ["train", "--work", str(tmp_path)])
    assert isinstance(answer.exception, InputError) and "build-world" in str(answer.exception)


def test_the_shipped_pair_is_trained_further(tmp_path: Path, world_folder: Path) -> None:
    (tmp_path / "world").symlink_to(world_folder)
    at = ["--work", str(tmp_path), "--dry"]
    take = ["take-shipped", *at, "--further", "vae,teacher,student"]
    taken = CliRunner().invoke(app, take)
    assert taken.exit_code == 0, taken.output
    twice = CliRunner().invoke(app, take)
    assert isinstance(twice.exception, InputError) and "holds a training" in str(twice.exception)
    made = CliRunner().invoke(app, ["train", *at, "--device", "cpu", "--set", "teacher_steps=1"])
    assert made.exit_code == 0, made.output
    state, pair = tmp_path / "state-dry", shipped_pair()
    assert not (state / "clip.json").exists()  # kept, not trained
    assert json.loads((state / "teacher.json").read_text())["step"] == 1
    moved = []
    for name in ("clip", "vae", "teacher", "student"):
        shipped = pair.networks()[name].state_dict()
        for key, value in load_network(state, name).state_dict().items():
            assert torch.allclose(value, shipped[key], atol=1e-3), key
            if name == "vae" and not torch.equal(value, shipped[key]):
                moved.append(key)
    assert moved and all(key.startswith("decoder.") for key in moved)


def test_a_stage_that_is_made_anew_begins_from_nothing(tmp_path: Path) -> None:
    taken = CliRunner().invoke(app, ["take-shipped", "--work", str(tmp_path), "--anew", "student"])
    assert taken.exit_code == 0, taken.output
    left = {path.name for path in (tmp_path / "state").iterdir()}
    assert left == {f"final_{name}.safetensors" for name in ("clip", "vit", "vae", "teacher")}


def test_of_a_clip_that_is_trained_further_the_vision_tower_learns(
    tmp_path: Path, world: World, world_folder: Path
) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(world_folder / "tokenizer")
    start = shipped_pair().clip.state_dict()
    stage = Stage("clip", tmp_path, 2, Clock(1e9))
    made = train_clip(stage, world, tokenizer, torch.float32, 2, start).averaged().clip
    moved = [k for k, v in made.state_dict().items() if not torch.equal(v, start[k])]
    assert {key.split(".")[0] for key in moved} == {"vision_model", "visual_projection"}


@pytest.mark.parametrize("wrong", [["--further", "vit"], ["--anew", "nonsense"], []])
def test_what_cannot_be_taken_over_is_told(tmp_path: Path, wrong: list[str]) -> None:
    answer = CliRunner().invoke(app, ["take-shipped", "--work", str(tmp_path), *wrong])
    assert isinstance(answer.exception, InputError) and "--further" in str(answer.exception)


@pytest.mark.parametrize("wrong", ["teacher_step=5", "latents=many", "compiled=1", "vit_batch=0"])
def test_a_recipe_takes_whole_numbers_of_its_own_names(wrong: str) -> None:
    assert adjusted(Recipe(), ["latents=5", "latents=7"]).latents == 7
    with pytest.raises(InputError, match="one of clip_steps"):
        adjusted(Recipe(), [wrong])
