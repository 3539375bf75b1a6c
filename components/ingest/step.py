"""The step `ingest`: check every concept below a prefix and plan them as a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from components.ingest import documents, store
from components.ingest.concept_folder import Concept, check_prefix
from components.register.connection import hide_password
from components.spec import RunSpec
from components.steps import Say, place_of, registry_of, run_document
from components.train.batch import (
    Batch,
    at_storage,
    batch_uri,
    content_id,
    is_saved,
    plan_batch,
    save_batch,
    upload_photos,
)
from model.errors import InputError


def ingest_prefix(
    prefix: str, spec: RunSpec, say: Say, *, storage: str = "", run: str = ""
) -> tuple[Batch, Mapping[str, Concept]]:
    """Check concepts, copy photos of folders to the storage, write the batch's documents.

    The batch is named after its content: the same photos under the same settings are the same
    batch, with whatever was done of it before.

    Args:
        prefix: a folder or s3:// prefix of concepts.
        spec: the run spec.
        say: hears of every problem.
        storage: where batches are kept; by default the spec's, or in the prefix's bucket.
        run: names the pipeline run.

    Returns:
        the batch and its valid concepts, by id.

    Raises:
        InputError: when no concept is valid, or a setting is wrong.
        ServiceError: when the storage is out of reach.
    """
    place = place_of(prefix, spec, storage)
    say(f"checks the concepts of {prefix}")
    checked = check_prefix(prefix)
    for one in checked:
        for problem in one.problems:
            say(f"{one.id}: {problem}")
    planned, concepts = plan_batch(
        prefix, checked, at_storage(spec, place), registry="", train_only=True
    )
    # In S3 there is no place for the registry's file: it stays where `train` has it.
    registry = registry_of(replace(planned, spec=spec) if store.is_s3(place) else planned)
    if hide_password(registry) != registry:
        raise InputError(
            f"{hide_password(registry)} holds a password, which the batch's documents would show: "
            "give it as MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    concepts = upload_photos(concepts, place)
    planned = replace(planned, registry=registry)
    name = content_id(planned, concepts)
    batch = replace(planned, id=name, uri=batch_uri(place, name))
    if not is_saved(batch.uri):
        save_batch(batch, concepts)
    if run:
        documents.write(run_document(place, run), {"batch": batch.uri})
    say(f"{len(concepts)} of {len(checked)} concepts are valid, {len(batch.packs)} packs")
    say(f"the batch is {batch.uri}")
    return batch, concepts
