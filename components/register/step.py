"""The step `register`: trained adapters become candidates."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

from components.ingest.concept_folder import Concept
from components.register.connection import Patience, reaching
from components.register.registry import get_version, register_adapter, set_tags
from components.register.took import training_tags
from components.steps import Say, registry_of
from components.train.batch import Batch, load_batch, load_concepts
from components.train.delivery import TrackingSettings, deliver_late
from components.train.handover import TO_MEASURE, take_over
from components.train.state import BatchStatus, BatchView, ConceptState, write_states
from model.errors import InputError

REGISTRY_SECONDS = 90.0


def register_batch(batch_uri: str, say: Say) -> BatchStatus:
    """Register every trained concept of a batch that is not yet.

    Raises:
        RegistryAwayError: when MLflow stays away; asked again it goes on where it was.
        ServiceError: when the storage is out of reach or the disk is full.
    """
    batch = load_batch(batch_uri)
    registry, concepts = registry_of(batch), load_concepts(batch)
    patience = Patience(REGISTRY_SECONDS, say)
    for one in BatchView(batch_uri).read().concepts:
        if one.state != "trained":
            continue
        concept, version = concepts[one.id], one.version
        if version is not None and patience.ask(partial(_there, concept, version, registry)):
            continue
        try:
            state = patience.ask(partial(_registered, batch, concept, one, registry))
            say(f"{one.id}: version {state.version}, a candidate")
        except InputError as error:  # that concept's, and nobody else's
            state = replace(one, state="failed", error=str(error), note="")
            say(f"{one.id}: failed: {error}")
        write_states(batch, [state])
    return BatchView(batch_uri).read()


def _there(concept: Concept, version: str, registry: str) -> bool:
    return get_version(concept.id, version, tracking_uri=registry) is not None


def _registered(batch: Batch, concept: Concept, one: ConceptState, registry: str) -> ConceptState:
    with tempfile.TemporaryDirectory(prefix="echodistill-register-") as scratch:
        made = take_over(batch.uri, concept.id, Path(scratch))
        assert made.adapter_dir is not None
        run_id = made.run_id
        if made.unlogged:  # MLflow was away while it was trained
            settings = TrackingSettings(registry, batch.spec.tracking.experiment)
            with reaching(registry):
                run_id = deliver_late(settings, made.unlogged, made.adapter_dir)
        version = register_adapter(
            made.adapter_dir, concept, tracking_uri=registry, run_id=run_id, force=batch.force
        )
    set_tags(version, training_tags(made), tracking_uri=registry)
    return replace(
        one,
        version=str(version.version),
        sha256=version.sha256,
        run_id=version.run_id,
        promoted=False,
        note=TO_MEASURE,
    )
