"""The members of a pack: their data, and the states that they start or go on from."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from components.ingest import store
from components.ingest.concept_folder import Concept, concept_digest, load_images
from components.spec import RunSpec, spec_digest
from components.train import ranks
from components.train.checkpoint import ConceptState, read_state, state_folders
from components.train.job import STATES, PackJob
from model.batch import ConceptData, EchoSample
from model.concept import initial_row
from model.discriminators import DiscriminatorHeads
from model.errors import AwayError, EchoDistillError, InputError
from model.iteration import Frozen
from model.views import ConceptText

log = logging.getLogger(__name__)


@dataclass
class Member:
    """One concept of a pack.

    Attributes:
        concept: what was asked for.
        digest: of concept, spec and base.
        data: what training sees; None when it could not be loaded.
        state: where it is; the last good state once it failed.
        error: why it failed, or None.

    """

    concept: Concept
    digest: str
    data: ConceptData | None = None
    state: ConceptState | None = None
    error: str | None = None


def load_members(job: PackJob, frozen: Frozen, checkpoint: Path | None) -> list[Member]:
    """Load the pack's images and states; what is wrong with one member is that member's error.

    Args:
        job: the run.
        frozen: the frozen networks.
        checkpoint: this run's own last checkpoint, as a local folder, or None.

    Raises:
        InputError: when a checkpoint that was given holds no state that a member can use.
        AwayError: on every rank, when the storage is out of reach of one: no member's fault.

    """
    digest, base = spec_digest(job.spec), job.base or frozen.pair.hash
    members = [Member(c, concept_digest(c, digest, base)) for c in job.concepts]
    away = None
    for member in members:
        try:
            member.data = _data(member.concept, job.spec)
            member.state = _initial_state(member, job.spec, frozen)
        except AwayError as error:
            away = str(error)
            break
        except EchoDistillError as error:
            member.error = str(error)
    told = ranks.gathered((away, [member.error for member in members]))
    for away, _ in told:
        if away is not None:
            raise AwayError(away)
    for place, member in enumerate(members):
        member.error = next((errors[place] for _, errors in told if errors[place]), None)
    for uri in job.states:
        _take_given(members, uri)
    if checkpoint is not None:
        _take_states(members, checkpoint)
    return members


def _data(concept: Concept, spec: RunSpec) -> ConceptData:
    captions = tuple(image.caption for image in concept.images)
    text = ConceptText(concept.class_noun, concept.token, captions)
    side = math.ceil(spec.resolution * spec.views.crop_max)
    images = load_images(concept, shorter_side=side)
    return ConceptData.build(concept.id, text, images, spec.resolution, spec.views)


def _initial_state(member: Member, spec: RunSpec, frozen: Frozen) -> ConceptState:
    """Start at the base, with the token at its initializer's row."""
    pair, concept = frozen.pair, member.concept
    rows = initial_row(pair, concept.initializer or concept.class_noun).cpu()[None]
    own = {} if spec.method.shared_text else {"rows": rows.clone()}
    dims = [backbone.dim for backbone in frozen.backbones]
    heads = DiscriminatorHeads(dims, [concept.id], spec.seed)
    return ConceptState(
        concept_id=concept.id,
        digest=member.digest,
        iteration=0,
        groups={
            "teacher": {"kv": pair.teacher_kv.cpu().clone(), "rows": rows},
            "student": {"kv": pair.student_kv.cpu().clone(), **own},
            "heads": {name: p.detach()[0].clone() for name, p in heads.named_parameters()},
        },
    )


def _take_given(members: Sequence[Member], uri: str) -> None:
    """Take the states of a checkpoint of another run; it must serve one member at least."""
    places = tuple(f"{prefix}{m.concept.id}/" for m in members for prefix in ("", f"{STATES}/"))
    with store.fetched_folder(uri, lambda name: name.startswith(places)) as root:
        folder = root / STATES if (root / STATES).is_dir() else root
        usable, problems = _take_states(members, folder)
    if problems and not usable:
        raise InputError(problems[0])
    if not usable and any(member.state is not None for member in members):
        raise InputError(f"{uri} holds no state of this pack's concepts: give a checkpoint")


def _take_states(members: Sequence[Member], folder: Path) -> tuple[int, list[str]]:
    """Let members go on from the states in a folder, where those are further than their own.

    Returns:
        how many states could be used, and what was wrong with the others.

    """
    found = state_folders(folder)
    usable, problems = 0, []
    for member in members:
        place = found.get(member.concept.id)
        if place is None or member.state is None:
            continue
        try:
            state = read_state(place, member.digest)
        except InputError as error:
            log.warning("%s; %s does not go on from it", error, member.concept.id)
            problems.append(str(error))
            continue
        usable += 1
        if state.iteration > member.state.iteration:
            go_on(member, state)
    return usable, problems


def go_on(member: Member, state: ConceptState) -> None:
    """Put a member where a state is."""
    assert member.data is not None
    member.state = state
    echo: tuple[EchoSample, ...] = ()
    if state.echo_images is not None:
        pairs = zip(state.echo_images, state.echo_prompts, strict=True)
        echo = tuple(EchoSample(image, prompt) for image, prompt in pairs)
    data = member.data
    member.data = ConceptData(data.id, data.text, data.images, echo)


def echo_of(data: ConceptData) -> tuple[torch.Tensor | None, tuple[str, ...]]:
    """Give a concept's echo samples as its state keeps them: uint8 [E, 3, S, S] and prompts."""
    if not data.echo:
        return None, ()
    return torch.stack([each.image for each in data.echo]), tuple(e.prompt for e in data.echo)
