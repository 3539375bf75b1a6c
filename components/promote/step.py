"""The step `promote`: the gate, and the champion's place behind it."""

from __future__ import annotations

from dataclasses import replace

from components.promote.promote import promote
from components.register.registry import get_version
from components.steps import Say, registry_of
from components.train.batch import load_batch
from components.train.handover import TO_JUDGE
from components.train.state import BatchStatus, BatchView, write_states
from model.names import CHAMPION, MEASURED


def promote_batch(batch_uri: str, say: Say) -> BatchStatus:
    """Put the versions of a batch that were measured to the gate.

    A version that was put to it before is left alone, unless its concept has no champion: what a
    person has rolled back since stays so.

    Raises:
        ServiceError: when registry or storage are out of reach.
    """
    batch = load_batch(batch_uri)
    registry = registry_of(batch)
    for one in BatchView(batch_uri).read().concepts:
        if one.state not in ("trained", "already") or one.version is None:
            continue
        version = get_version(one.id, one.version, tracking_uri=registry)
        if version is None or MEASURED not in version.metrics:
            say(f"{one.id}: version {one.version} was not measured, and stays as it is")
            continue
        champion = get_version(one.id, CHAMPION, tracking_uri=registry)
        if one.note == TO_JUDGE or champion is None:
            decision = promote(one.id, one.version, batch.spec.gate, tracking_uri=registry)
            promoted, reasons = decision.promoted, "; ".join(decision.reasons)
            stays = "is the champion" if promoted else "stays a candidate"
            say(f"{one.id}: version {one.version} {stays}: {reasons}")
            note = "" if promoted else f"stays a candidate: {reasons}"
            write_states(batch, [replace(one, promoted=promoted, note=note)])
        else:
            reigns = str(champion.version) == one.version
            say(f"{one.id}: version {champion.version} is the champion, as before")
            if reigns != one.promoted:
                write_states(batch, [replace(one, promoted=reigns)])
    return BatchView(batch_uri).read()
