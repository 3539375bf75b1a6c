"""Which photos a run was trained on: its dataset in MLflow, written and read back."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from typing import Any

from components.ingest import store
from components.ingest.concept_folder import Concept, ReferenceImage

CONTEXT = "training"  # of the dataset, among a run's inputs
_DIGEST_LENGTH = 36  # the most that MLflow takes


def source_of(concept: Concept) -> str:
    """Return the folder or prefix that holds a concept's photos."""
    uris = [image.uri for image in concept.images]
    scheme = "s3://" if uris and store.is_s3(uris[0]) else ""
    paths = [uri.removeprefix(scheme).rpartition("/")[0] for uri in uris]
    return scheme + os.path.commonpath(paths) if paths else ""


def dataset_input(concept: Concept) -> Any:
    """Return a concept as an MLflow dataset input: its folder, its photos' places and sha256."""
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    source = source_of(concept)
    profile = json.dumps({"digest": concept.digest, "concept": _portable(concept)})
    return DatasetInput(
        Dataset(
            name=concept.id,
            # MLflow keeps one dataset a name and digest, so the digest covers the places too.
            digest=hashlib.sha256(profile.encode()).hexdigest()[:_DIGEST_LENGTH],
            source_type="s3" if store.is_s3(source) else "local",
            source=json.dumps({"uri": source}),
            profile=profile,
        ),
        [InputTag(MLFLOW_DATASET_CONTEXT, CONTEXT)],
    )


def trained_on(run: Any) -> Concept | None:
    """Return the concept that an MLflow run was trained on, or None when the run does not say."""
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    for each in run.inputs.dataset_inputs if run.inputs else []:
        tags = {tag.key: tag.value for tag in each.tags}
        if tags.get(MLFLOW_DATASET_CONTEXT) == CONTEXT:
            facts = json.loads(each.dataset.profile)["concept"]
            images = tuple(_image(each) for each in facts["images"])
            return Concept(**{**facts, "images": images})
    return None


def _image(facts: dict[str, Any]) -> ReferenceImage:
    uri = facts["uri"]
    return ReferenceImage(path="" if store.is_s3(uri) else str(store.local_path(uri)), **facts)


def _portable(concept: Concept) -> dict[str, Any]:
    """Return a concept's facts without the places of its photos in one machine's cache."""
    facts = asdict(concept)
    for image in facts["images"]:
        del image["path"]
    return facts
