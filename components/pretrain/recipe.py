"""The recipe: stages in order, with their sizes; every stage goes on where it was left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTokenizer

from components.pretrain import autoencoder, diffusion, distillation, networks, vision
from components.pretrain.adapters import let_move, train_adapters
from components.pretrain.latents import LatentSet, Lessons, encode_world
from components.pretrain.subject import train_subject
from components.pretrain.training import Clock, Stage, freeze, write_tensors
from components.pretrain.world import World
from model.errors import InputError
from model.judge.subject import SubjectNetwork

STAGES = ("clip", "vit", "vae", "teacher", "student")
FURTHER = ("clip", "vae", "teacher", "student")  # stages that can begin from a finished network
JUDGE = "subject"  # belongs to model/judge, not to the pair


@dataclass(frozen=True)
class Recipe:
    """Steps and batch sizes of the stages; model/pocket/README.md says what made the shipped pair.

    The steps of "student" count the regression and both kinds of step that come after it. Before
    them the teacher learns `concepts` made-up concepts, each from `concept_views` compositions.
    """

    clip_steps: int = 700
    clip_batch: int = 2048
    vit_steps: int = 700
    vit_batch: int = 256
    vae_steps: int = 5400
    vae_batch: int = 96
    vae_statistics: int = 512
    latents: int = 600_000
    teacher_steps: int = 58_000
    teacher_batch: int = 256
    concepts: int = 512
    concept_views: int = 192
    concept_steps: int = 128
    pairs: int = 49_152
    pair_steps: int = 12
    regression_steps: int = 2500
    student_steps: int = 15_000
    student_batch: int = 128
    subject_steps: int = 2500
    subject_batch: int = 16
    compiled: bool = True


DRY = Recipe(
    clip_steps=2,
    clip_batch=4,
    vit_steps=2,
    vit_batch=2,
    vae_steps=3,
    vae_batch=1,
    vae_statistics=4,
    latents=4,
    teacher_steps=2,
    teacher_batch=2,
    concepts=2,
    concept_views=3,
    concept_steps=2,
    pairs=2,
    pair_steps=2,
    regression_steps=2,
    student_steps=4,
    student_batch=2,
    subject_steps=2,
    subject_batch=2,
    compiled=False,
)


def adjusted(recipe: Recipe, sets: Iterable[str]) -> Recipe:
    """Give a recipe with some `name=number` settings in place of its own.

    Raises:
        InputError: for a name that it has none of, or something that is no whole number.
    """
    known = [field.name for field in fields(recipe) if field.name != "compiled"]
    for text in sets:
        name, _, value = text.partition("=")
        if name not in known or not value.isdecimal() or int(value) < 1:
            raise InputError(f"--set {text!r} must be name=number with one of {', '.join(known)}.")
        setting: dict[str, Any] = {name: int(value)}
        recipe = replace(recipe, **setting)
    return recipe


def chosen(stages: str) -> Sequence[str]:
    """Give the stages of a comma-separated list, by default all.

    Raises:
        InputError: for a name that no stage has.
    """
    known = (*STAGES, JUDGE)
    names = [name.strip() for name in stages.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise InputError(f"No stage is called {name!r}: give one of {', '.join(known)}.")
    return names or known


class Kitchen:
    """One call of the trainer: the world, the device, the recipe and the state folder."""

    def __init__(
        self, recipe: Recipe, world_folder: Path, state: Path, clock: Clock, device: str
    ) -> None:
        self.recipe, self.state, self.clock = recipe, state, clock
        self.device = torch.device(device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.world_folder = world_folder
        self.world = World(world_folder, self.device)
        self.tokenizer: Any = CLIPTokenizer.from_pretrained(world_folder / "tokenizer")
        self._latents: LatentSet | None = None
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
            torch.set_float32_matmul_precision("high")

    def cook(self, name: str) -> None:
        """Run one stage of `chosen` to its end, unless it is finished.

        Raises:
            InputError: when its forerunners are missing.
            OutOfTime: when the clock has run down; the state is saved.
        """
        stages: dict[str, Callable[[], nn.Module]] = {
            "clip": self._clip,
            "vit": self._vit,
            "vae": self._vae,
            "teacher": self._teacher,
            "student": self._student,
            JUDGE: self._subject,
        }
        path = finished(self.state, name)
        if not path.exists():
            write_tensors(path, stages[name]().state_dict())

    def _stage(self, name: str, total: int) -> Stage:
        return Stage(name, self.state, total, self.clock)

    def _clip(self) -> nn.Module:
        r, stage = self.recipe, self._stage("clip", self.recipe.clip_steps)
        trainee = vision.train_clip(
            stage, self.world, self.tokenizer, self.dtype, r.clip_batch, self._start("clip")
        )
        clip: nn.Module = trainee.averaged().clip
        return clip

    def _vit(self) -> nn.Module:
        stage = self._stage("vit", self.recipe.vit_steps)
        trainee = vision.train_vit(stage, self.world, self.dtype, self.recipe.vit_batch)
        vit: nn.Module = trainee.averaged().vit
        return vit

    def _vae(self) -> nn.Module:
        r, stage = self.recipe, self._stage("vae", self.recipe.vae_steps)
        start = self._start("vae")
        trainee = autoencoder.train_vae(stage, self.world, self.dtype, r.vae_batch, start)
        if start is not None:  # its statistics are folded in already
            further: nn.Module = trainee.averaged()
            return further
        folded: nn.Module = autoencoder.fold_statistics(
            trainee.averaged(), self.world, r.vae_statistics
        )
        return folded

    def _teacher(self) -> nn.Module:
        r, stage = self.recipe, self._stage("teacher", self.recipe.teacher_steps)
        trainee = diffusion.train_teacher(
            stage, self._data(), self.dtype, r.teacher_batch, r.compiled, self._start("teacher")
        )
        teacher: nn.Module = trainee.averaged()
        return teacher

    def _student(self) -> nn.Module:
        r, stage = self.recipe, self._stage("student", self.recipe.student_steps)
        teacher, lessons = self._network("teacher"), self._lessons()
        moved = self._network("teacher").to(self.dtype)
        let_move(moved)
        pairs = diffusion.teach_pairs(moved, lessons, r.pairs, r.pair_steps, self.dtype)
        start, weights = None, self._start("student")
        if weights is not None:
            start = networks.unet()
            start.load_state_dict(weights)
        student = distillation.Student(
            teacher,
            lessons,
            pairs,
            self.dtype,
            r.student_batch,
            r.regression_steps,
            r.compiled,
            start,
        )
        made: nn.Module = student.train(stage).averaged()
        return made

    def _lessons(self) -> Lessons:
        """The world's compositions and those of made-up concepts, with the teacher's adapters."""
        r, data = self.recipe, self._data()
        also, moves, which = train_adapters(
            self._stage("adapters", r.concept_steps),
            World(self.world_folder, self.device, drawn="seen"),
            self._network("teacher"),
            self._network("vae"),
            freeze(vision.text_encoder_of(self._network("clip"))),
            self.tokenizer,
            self.dtype,
            r.concepts,
            r.concept_views,
        )
        both = LatentSet(
            torch.cat([data.latents, also.latents]),
            torch.cat([data.cover, also.cover]),
            torch.cat([data.text, also.text]),
            data.empty,
        )
        return Lessons(both, moves, which)

    def _subject(self) -> nn.Module:
        r, stage = self.recipe, self._stage(JUDGE, self.recipe.subject_steps)
        # Small enough for any device; in float32 the CPU's result is reproducible.
        trainee = train_subject(stage, self.world, torch.float32, r.subject_batch)
        found: nn.Module = trainee.averaged()
        return found

    def _start(self, name: str) -> dict[str, torch.Tensor] | None:
        """The weights that a stage begins from, when it does not begin anew."""
        path = started(self.state, name)
        return load_file(path) if path.exists() else None

    def _network(self, name: str) -> Any:
        return load_network(self.state, name).to(self.device)

    def _data(self) -> LatentSet:
        """The world in latents; too big for the disk, so every process draws it anew, the same."""
        if self._latents is None:
            self._latents = encode_world(
                World(self.world_folder, self.device, drawn="seen"),
                self._network("vae"),
                freeze(vision.text_encoder_of(self._network("clip"))),
                self.tokenizer,
                self.recipe.latents,
                self.dtype,
            )
        return self._latents


def finished(state: Path, name: str) -> Path:
    """Where a finished network lies, float32."""
    return state / f"final_{name}.safetensors"


def started(state: Path, name: str) -> Path:
    """Where a network lies that its stage starts from, float32, when it does not start anew."""
    return state / f"start_{name}.safetensors"


def take_over(
    state: Path,
    networks_by_name: dict[str, Any],
    anew: Sequence[str] = (),
    further: Sequence[str] = (),
) -> None:
    """Put finished networks into `state`, so that only some stages are left to train.

    Those in `anew` begin from nothing (a student at its teacher). Those in `further` begin where
    the given ones are, and so that the other networks still fit them: of CLIP the vision tower
    learns, of the VAE the decoder.

    Raises:
        InputError: for a stage that there is none of or that cannot be trained further, or a state
            folder that holds something.
    """
    asked = [*anew, *further]
    if not asked or any(name not in networks_by_name for name in asked):
        raise InputError(f"--anew and --further take some of {', '.join(networks_by_name)}.")
    wrong = [name for name in further if name not in FURTHER or name in anew]
    if wrong:
        raise InputError(f"--further takes some of {', '.join(FURTHER)}, and none of --anew.")
    if state.exists() and any(state.iterdir()):
        raise InputError(f"{state} holds a training already: give another --work, or remove it.")
    for name, network in networks_by_name.items():
        if name in further:
            write_tensors(started(state, name), network.state_dict())
        elif name not in anew:
            write_tensors(finished(state, name), network.state_dict())


def load_network(state: Path, name: str) -> Any:
    """A finished network, frozen, float32, on the CPU.

    Raises:
        InputError: when its stage has not been trained.
    """
    path = finished(state, name)
    if not path.exists():
        raise InputError(f"{path} is missing: train the stage {name!r} first.")
    build: dict[str, Callable[[], Any]] = {
        "clip": networks.clip,
        "vit": networks.vit,
        "vae": networks.vae,
        "teacher": networks.unet,
        "student": networks.unet,
        JUDGE: SubjectNetwork,
    }
    net = build[name]()
    net.load_state_dict(load_file(path))
    return freeze(net.float())
