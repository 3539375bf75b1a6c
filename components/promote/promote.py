"""The gate between candidate and champion, and the alias moves behind it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from components.evaluate.tags import BEFORE, MODELS_TAG, PHOTOS_TAG, PROTOCOL_TAG
from components.register.connection import code_of, connect, reaching
from components.register.registry import (
    RegisteredVersion,
    get_version,
    model_name,
    set_alias,
)
from components.spec import GateSpec
from model.errors import InputError
from model.names import CHAMPION

GATE_TAG = "gate"  # on a version that was put to the gate: passed or refused, at last
PREVIOUS_TAG = "replaced_champion"  # on a champion: the version it took the place of
_COMPARED = ("clip_i", "dino", "clip_t")
_IDENTITY = ("clip_i", "dino")


@dataclass(frozen=True)
class Decision:
    """Whether a version became champion, why, and who was champion before (None: nobody)."""

    promoted: bool
    reasons: tuple[str, ...]
    champion_before: int | None = None


def judge(
    candidate: RegisteredVersion, champion: RegisteredVersion | None, gate: GateSpec
) -> Decision:
    """Say whether a version may become champion.

    Without a champion it may: there is nothing to lose. Else nothing may be against it
    (see `failings`).
    """
    if champion is None:
        return Decision(True, ("there was no champion",))
    before = champion.version
    if champion.version == candidate.version:
        return Decision(True, (f"version {before} is the champion already",), before)
    against = failings(candidate, champion, gate)
    if against:
        return Decision(False, tuple(against), before)
    passed = f"it passed the gate against version {before}"
    photos = [each.tags.get(PHOTOS_TAG) for each in (candidate, champion)]
    if None not in photos and photos[0] != photos[1]:
        # Photos that were added make a new version, which must not wait for a person.
        passed += ", which was measured against other photos"
    return Decision(True, (passed,), before)


def failings(
    version: RegisteredVersion, champion: RegisteredVersion | None, gate: GateSpec
) -> list[str]:
    """Say everything that the gate has against a version; nothing: it passes.

    Its figures must reach the gate's minima, its identity must be nearer to the references than
    the class noun's alone, and no figure may fall more than ``max_drop`` below the champion's (of
    another version; None: there is none). Figures are compared only when the same feature models
    and prompts gave them.
    """
    figures = version.metrics
    missing = [name for name in _COMPARED if not math.isfinite(figures.get(name, math.nan))]
    if missing:
        return [
            f"version {version.version} has no {missing[0]}: evaluate it first "
            f"({_evaluate(version)})"
        ]
    worse = [] if champion is None else _worse(version, champion, gate.max_drop)
    return [*_below_minima(figures, gate), *_no_gain(figures), *worse]


def _evaluate(version: RegisteredVersion) -> str:
    return f"echodistill evaluate {version.concept_id}@{version.version}"


def _below_minima(figures: Mapping[str, float], gate: GateSpec) -> list[str]:
    minima = {"clip_i": gate.min_clip_i, "dino": gate.min_dino, "clip_t": gate.min_clip_t}
    return [
        f"{name} {figures[name]:.3f} is under the gate's {least:.3f}"
        for name, least in minima.items()
        if least is not None and figures[name] < least
    ]


def _no_gain(figures: Mapping[str, float]) -> list[str]:
    """Compare identity with what the base draws for the class noun alone."""
    if not all(BEFORE + name in figures for name in _IDENTITY):
        return []
    gain = sum(figures[name] - figures[BEFORE + name] for name in _IDENTITY) / len(_IDENTITY)
    if gain > 0:
        return []
    return [f"identity is no nearer to the references than the class noun's ({gain:+.3f})"]


def _worse(candidate: RegisteredVersion, champion: RegisteredVersion, max_drop: float) -> list[str]:
    """Say where a candidate falls behind the champion, or why they can't be compared."""
    for tag in (MODELS_TAG, PROTOCOL_TAG):
        mine, other = candidate.tags.get(tag), champion.tags.get(tag)
        if mine != other:
            return [
                f"versions {candidate.version} and {champion.version} were measured differently "
                f"({mine} and {other or 'not at all'}): evaluate version {champion.version} again "
                f"({_evaluate(champion)})"
            ]
    return [
        f"{name} {candidate.metrics[name]:.3f} is more than {max_drop:.3f} under the champion's "
        f"{champion.metrics[name]:.3f}"
        for name in _COMPARED
        if name in champion.metrics and candidate.metrics[name] < champion.metrics[name] - max_drop
    ]


def promote(
    concept_id: str, version: int | str, gate: GateSpec, *, tracking_uri: str, force: bool = False
) -> Decision:
    """Make a version champion when the gate lets it (or by ``force``).

    Raises InputError for a version that is not there, ServiceError when the MLflow server is
    out of reach.
    """
    candidate = _existing(concept_id, version, tracking_uri)
    champion = get_version(concept_id, CHAMPION, tracking_uri=tracking_uri)
    decision = judge(candidate, champion, gate)
    if force and not decision.promoted:
        reasons = ("forced", *decision.reasons)
        decision = Decision(True, reasons, decision.champion_before)
    if decision.promoted and decision.champion_before != candidate.version:
        _crown(candidate, decision.champion_before, tracking_uri)
    with reaching(tracking_uri):
        connect(tracking_uri).set_model_version_tag(
            candidate.name,
            str(candidate.version),
            GATE_TAG,
            "passed" if decision.promoted else "refused",
        )
    return decision


def rollback(concept_id: str, *, tracking_uri: str) -> Decision:
    """Give the alias back to the version that the champion took the place of.

    Raises InputError when there is no champion or it replaced nobody.
    """
    champion = get_version(concept_id, CHAMPION, tracking_uri=tracking_uri)
    if champion is None:
        raise InputError(f"{concept_id} has no champion: promote a version first")
    previous = champion.tags.get(PREVIOUS_TAG)
    if not previous:
        raise InputError(
            f"version {champion.version} of {concept_id} replaced no champion: "
            "promote the version you want"
        )
    target = _existing(concept_id, previous, tracking_uri)
    client = connect(tracking_uri)
    with reaching(tracking_uri):
        set_alias(client, target.name, CHAMPION, target.version)
    reason = f"version {champion.version} was rolled back to version {target.version}"
    return Decision(True, (reason,), champion.version)


def _existing(concept_id: str, version: int | str, tracking_uri: str) -> RegisteredVersion:
    found = get_version(concept_id, version, tracking_uri=tracking_uri)
    if found is None:
        raise InputError(f"{model_name(concept_id)} has no version {version}: check the number")
    return found


def _crown(candidate: RegisteredVersion, before: int | None, tracking_uri: str) -> None:
    """Move the alias; the version remembers whose place it took, before it is champion."""
    client = connect(tracking_uri)
    name, number = candidate.name, str(candidate.version)
    with reaching(tracking_uri):
        if before is not None:
            client.set_model_version_tag(name, number, PREVIOUS_TAG, str(before))
        else:
            try:  # of an earlier reign, when the champion was taken away since
                client.delete_model_version_tag(name, number, PREVIOUS_TAG)
            except Exception as error:
                if code_of(error) not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
        set_alias(client, name, CHAMPION, number)
