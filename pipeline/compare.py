"""Methods of one-step personalization side by side, on the same concepts, prompts and seeds.

Every run is one Ray Train run a pack, as `train` makes them, but nothing is registered. What is
trained stays below the folder: the same command again only draws and measures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from components.evaluate.evaluate import FeatureModels, load_feature_models
from components.evaluate.fidelity import Fidelity, FidelityMeter, model_names
from components.evaluate.prompts import prompt_templates
from components.evaluate.truth import truth_prompts
from components.ingest.concept_folder import Concept, check_prefix, concept_digest
from components.ingest.store import resolve_model
from components.spec import RunSpec, spec_digest
from components.train.base_hash import base_hash
from components.train.job import ADAPTERS, BasePaths, TrainedConcept, pack_name
from components.train.pack import train_pack
from model.adapter import Adapter, load_adapter, prompt_for
from model.adapter_meta import META_FILE
from model.base_pair import BasePair, load_base_pair
from model.errors import EchoDistillError, InputError
from model.judge import load_judge
from model.sampler import draw, draw_teacher
from pipeline.methods import Method, run_spec, trains_student_as_teacher
from pipeline.progress import Event, Progress
from pipeline.run import packs, refuse_full_disk, relay

Cluster = Callable[[], AbstractContextManager[None]]
Train = Callable[..., list[TrainedConcept]]
_BATCH = 8


@dataclass(frozen=True)
class Question:
    """What every method is asked for.

    Attributes:
        prompts: P prompts by concept id, `{}` for the subject.
        seeds: K, pictures a prompt, of seeds 0, 1, ...
        guidance: of the teacher's pictures.
    """

    prompts: dict[str, list[str]]
    seeds: int
    guidance: float


@dataclass
class Outcome:
    """What one method did.

    Attributes:
        method: which.
        fidelity: by concept id.
        pictures: uint8 [P, K, 3, S, S] by concept id.
        failed: why there is no picture, by concept id.
        seconds: of training, over all concepts; None where nothing was trained for it alone.
    """

    method: Method
    fidelity: dict[str, Fidelity] = field(default_factory=dict)
    pictures: dict[str, torch.Tensor] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """Everything that a report shows.

    Attributes:
        concepts: those that were compared.
        question: what was asked for.
        outcomes: one a method.
        meters: hold references and truth, by concept id.
        models: names of the networks that measured.
    """

    concepts: list[Concept]
    question: Question
    outcomes: list[Outcome]
    meters: dict[str, FidelityMeter]
    models: str


def load_concepts(prefix: str | None, limit: int | None) -> list[Concept]:
    """Check the concepts to compare on; the samples that ship by default.

    Raises:
        InputError: when one is not valid, or there is none.
    """
    if prefix is None:
        from model.pocket import pocket_paths

        prefix = str(pocket_paths().concepts)
    checked = check_prefix(prefix)
    bad = [one for one in checked if one.concept is None]
    if bad:
        raise InputError(f"{bad[0].id}: {bad[0].problems[0]} (echodistill check lists everything)")
    concepts = [one.concept for one in checked if one.concept is not None]
    return spread(concepts, limit)


def spread(concepts: Sequence[Concept], limit: int | None) -> list[Concept]:
    """Take some of the concepts, spread over the list, so that kinds are mixed."""
    if limit is None or limit >= len(concepts):
        return list(concepts)
    return [concepts[index * len(concepts) // limit] for index in range(limit)]


def ask(concepts: Sequence[Concept], prompts: int, seeds: int, guidance: float) -> Question:
    """Choose the prompts: those with a true render for samples, else DreamBench's."""
    samples = {concept.id for concept in load_concepts(None, None)}
    chosen = {
        concept.id: truth_prompts(min(prompts, len(truth_prompts())))
        if concept.id in samples
        else prompt_templates(concept.live, prompts)
        for concept in concepts
    }
    return Question(chosen, seeds, guidance)


def compare(
    concepts: Sequence[Concept],
    methods: Sequence[Method],
    spec: RunSpec,
    question: Question,
    *,
    progress: Progress,
    cluster: Cluster,
    train: Train = train_pack,
) -> Comparison:
    """Train what is not trained yet, then draw and measure every method.

    Args:
        concepts: what is learned.
        methods: which to set side by side.
        spec: of the full method; the others differ from it by `methods.run_spec` alone.
        question: prompts and seeds.
        progress: listens; what it raises ends the comparison.
        cluster: opens the Ray that trains; asked only when there is something to train.
        train: trains a pack; `train_alone` needs no Ray.

    Raises:
        InputError: for wrong settings or base.
        ServiceError: when Ray or a model is out of reach, or the disk is full.
    """
    runs = {method.run: run_spec(method.run, spec) for method in methods if method.run}
    trained = _Runs(runs, concepts, progress)
    if trained.missing():
        with cluster():
            trained.train(train)
    painter = _Painter(spec, question)
    meters = {
        concept.id: FidelityMeter(concept, painter.models, painter.judge, spec.resolution)
        for concept in concepts
    }
    outcomes = []
    for number, method in enumerate(methods, 1):
        progress(Event("draw", "", method.words, number, len(methods)))
        outcome = Outcome(method, seconds=trained.seconds.get(method.run, 0.0))
        for concept in concepts:
            folder = trained.adapters.get((method.run, concept.id))
            if method.run and folder is None:
                outcome.failed[concept.id] = trained.errors[method.run, concept.id]
                continue
            pictures = painter.draw(method, concept, folder)
            outcome.pictures[concept.id] = pictures
            prompts = question.prompts[concept.id]
            outcome.fidelity[concept.id] = meters[concept.id].measure(prompts, pictures)
        outcomes.append(outcome)
    return Comparison(list(concepts), question, outcomes, meters, model_names(painter.models))


class _Runs:
    """The training runs of a comparison: which adapters are there, and how to make the others."""

    def __init__(
        self, runs: dict[str, RunSpec], concepts: Sequence[Concept], progress: Progress
    ) -> None:
        self._runs, self._concepts, self._progress = runs, concepts, progress
        self.adapters: dict[tuple[str, str], Path] = {}
        self.errors: dict[tuple[str, str], str] = {}
        self.seconds: dict[str, float] = {}
        for run in runs:
            for pack in self._packs(run):
                self._find(run, pack)

    def missing(self) -> bool:
        """Tell whether something is left to train."""
        return len(self.adapters) < len(self._runs) * len(self._concepts)

    def train(self, train: Train) -> None:
        """Train every pack that lacks an adapter."""
        for run, spec in self._runs.items():
            for pack in self._packs(run):
                if all((run, concept.id) in self.adapters for concept in pack):
                    continue
                names = ", ".join(concept.id for concept in pack)
                self._progress(Event("train", run, names))
                made = train(spec, pack, progress=relay(self._labelled(run)))
                refuse_full_disk(made, spec.train.storage_path)
                for one in made:
                    self.seconds[run] = self.seconds.get(run, 0.0) + one.seconds
                    if one.adapter_dir is None:
                        self.errors[run, one.id] = one.error or "training gave no adapter"
                    else:
                        self.adapters[run, one.id] = one.adapter_dir

    def _packs(self, run: str) -> list[Sequence[Concept]]:
        return list(packs(self._concepts, self._runs[run].pack.planned))

    def _find(self, run: str, pack: Sequence[Concept]) -> None:
        """Find the adapters that an earlier comparison left."""
        spec = self._runs[run]
        root = Path(spec.train.storage_path) / pack_name(spec, pack) / ADAPTERS
        own, base = spec_digest(spec), base_hash(spec)
        for concept in pack:
            folder = root / concept.id
            if not (folder / META_FILE).is_file():
                continue
            try:
                meta = load_adapter(folder).meta
            except EchoDistillError:
                continue  # not whole: it is trained again
            if meta["concept_digest"] == concept_digest(concept, own, base):
                self.adapters[run, concept.id] = folder

    def _labelled(self, run: str) -> Progress:
        """Say which run an event is of: the same concepts are trained many times."""
        return lambda event: self._progress(replace(event, subject=f"{run}: {event.subject}"))


class _Painter:
    """Draws what every method is asked for; the networks are loaded once."""

    def __init__(self, spec: RunSpec, question: Question) -> None:
        wanted = spec.train.device
        device = "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"
        paths = BasePaths.from_spec(spec)
        self._question = question
        self._pair: BasePair = load_base_pair(
            resolve_model(paths.teacher),
            resolve_model(paths.student),
            name=paths.name,
            device=device,
            resolution=spec.resolution,
        )
        base = spec.base
        self.models: FeatureModels = load_feature_models(
            resolve_model(base.metric_clip),
            resolve_model(base.metric_dino),
            clip_name=base.metric_clip,
            dino_name=base.metric_dino,
            device=device,
        )
        self.judge = load_judge(device)

    def draw(self, method: Method, concept: Concept, folder: Path | None) -> torch.Tensor:
        """Draw one concept by one method: uint8 [P, K, 3, S, S]."""
        plain = [p.format(concept.class_noun) for p in self._question.prompts[concept.id]]
        adapter: Adapter | None = None
        if folder is not None:
            adapter = load_adapter(folder)
            if trains_student_as_teacher(method.run):
                assert adapter.teacher_delta is not None
                adapter = replace(adapter, kv_delta=adapter.teacher_delta)
            plain = [prompt_for(adapter.meta, prompt) for prompt in plain]
        seeds = self._question.seeds
        rows = [(prompt, seed) for prompt in plain for seed in range(seeds)]
        drawn = []
        for start in range(0, len(rows), _BATCH):
            words, numbers = zip(*rows[start : start + _BATCH], strict=True)
            adapters = [adapter] * len(words)
            if method.drawer == "teacher":
                guidance = self._question.guidance
                part = draw_teacher(
                    self._pair, adapters, words, numbers, method.steps, guidance=guidance
                )
            else:
                part = draw(self._pair, adapters, words, numbers, method.steps)
            drawn.append(part)
        return torch.cat(drawn).unflatten(0, (len(plain), seeds))
