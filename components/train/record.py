"""Ray Train's record of a run's checkpoints, which says what the run goes on from.

Ray writes it in place after every report: a kill at that moment leaves half of it, with which no
run of that name could begin any more.
"""

from __future__ import annotations

import logging

from components.ingest import documents, store

_RECORD = "checkpoint_manager_snapshot.json"
KEPT = 2  # checkpoints of a run

log = logging.getLogger(__name__)


def last_checkpoint(storage: str, run: str) -> str | None:
    """Return the URI of a run's last whole checkpoint, or None when it has none.

    Raises:
        InputError: when the run's record of its checkpoints is not whole.

    """
    folder = store.join(storage, run)
    found = documents.read(store.join(folder, _RECORD))
    latest = found.value.get("latest_checkpoint_result") if found else None
    return store.join(folder, latest["checkpoint_dir_name"]) if latest else None


def mend_record(storage: str, run: str) -> None:
    """Write a run's record anew from the checkpoints that are there when it is not whole.

    A checkpoint is there before it is recorded, so the newest is what the lost record named, or one
    that was just being written: a member whose state is not whole there starts anew.

    Raises:
        InputError: when the storage refuses.
        ServiceError: when it is out of reach.

    """
    folder = store.join(storage, run)
    place = store.join(folder, _RECORD)
    try:
        documents.read(place)
    except documents.NoJsonError as error:
        import ray

        names = [name for name in documents.list_folders(folder) if name.startswith("checkpoint_")]
        results = [{"checkpoint_dir_name": name, "metrics": {}} for name in names[-KEPT:]]
        record = {
            "ray_version": ray.__version__,
            "checkpoint_results": results,
            "checkpoint_report_indices": list(range(len(results))),
            "latest_checkpoint_result": results[-1] if results else None,
            "pending_training_results": [],
            "pending_validation_specs": [],
            "current_report_index": len(results),
            "validated_checkpoint_dir_names": [],
            "timed_out_validation_checkpoint_dir_names": [],
            "failed_validation_checkpoint_dir_names": [],
        }
        log.warning("%s: written anew, with %d checkpoints", error, len(results))
        documents.write(place, record)
