"""Trained adapters that wait in a batch's folder for the step that registers them.

<batch>/adapters/<concept id>/       the adapter
<batch>/trained/<concept id>.json    its facts, written last: with it the adapter is whole
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from components.ingest import documents, store
from components.train.job import ADAPTERS, TrainedConcept
from model.errors import InputError

_TRAINED = "trained"
# What is left to do of a concept, as its note says it from one step to the next.
TO_REGISTER = "is to be registered"
TO_MEASURE = "is registered, and is to be measured"
TO_JUDGE = "is measured, and is to be put to the gate"


def hand_over(made: TrainedConcept, batch_uri: str) -> None:
    """Put a trained concept into its batch's folder, in place of an earlier one.

    Raises:
        InputError: when the storage refuses.
        ServiceError: when it is out of reach or full.
    """
    if made.adapter_dir is None:
        raise InputError(f"{made.id} was not trained: there is nothing to hand over")
    store.put_folder(made.adapter_dir, store.join(batch_uri, f"{ADAPTERS}/{made.id}"))
    facts: dict[str, Any] = asdict(replace(made, adapter_dir=None))
    documents.write(store.join(batch_uri, f"{_TRAINED}/{made.id}.json"), facts)


def take_over(batch_uri: str, concept_id: str, folder: Path) -> TrainedConcept:
    """Fetch what was handed over; the adapter goes to `<folder>/<concept id>`.

    Raises:
        InputError: when it is not there.
        ServiceError: when the storage is out of reach or the disk is full.
    """
    found = documents.read(store.join(batch_uri, f"{_TRAINED}/{concept_id}.json"))
    if found is None:
        raise InputError(
            f"{batch_uri} holds no adapter of {concept_id} any more: submit the batch again"
        )
    place = folder / concept_id
    with store.fetched_folder(store.join(batch_uri, f"{ADAPTERS}/{concept_id}"), _all) as there:
        store.put_folder(there, str(place))
    facts = {**found.value, "unlogged": tuple(found.value["unlogged"])}
    return TrainedConcept(**{**facts, "adapter_dir": place})


def _all(name: str) -> bool:
    return True
