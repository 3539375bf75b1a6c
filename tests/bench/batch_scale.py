"""What a batch of thousands costs beside its training: planning, states, status, resubmission.

    python -m tests.bench.batch_scale 10000 [--registry]

Photos are made up and nothing is trained; documents, claims, leases and (with --registry) the
MLflow registry in SQLite are the real ones, in a temporary folder. Prints seconds a stage and peak
memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

from components.ingest.concept_folder import CheckedConcept, Concept, ReferenceImage
from components.register.registry import find_versions, model_name
from components.spec import RunSpec, resolve_spec, spec_digest
from components.train.batch import Batch, at_storage, load_batch, plan_batch, save_batch
from components.train.claims import Claims, Lease
from components.train.state import BatchView
from model.names import CHAMPION, CONCEPT_DIGEST_TAG, SHA256_TAG, SPEC_DIGEST_TAG
from pipeline.driver import Driver
from pipeline.progress import silent
from pipeline.run import ConceptResult

PHOTOS = 5
seconds: dict[str, float] = {}


@contextmanager
def stage(name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - began, 3)


def checked(number: int) -> CheckedConcept:
    name = f"concept-{number:06d}"
    images = tuple(
        ReferenceImage(
            f"{n}.jpg",
            f"s3://bucket/photos/{name}/{n}.jpg",
            "",
            hashlib.sha256(f"{name}/{n}".encode()).hexdigest(),
            1024,
            1024,
        )
        for n in range(PHOTOS)
    )
    concept = Concept(name, "dog", "<new1>", "dog", True, images)
    return CheckedConcept(name, True, "dog", PHOTOS, (), concept)


def planned(count: int, spec: RunSpec, registry: str) -> Batch:
    every = [checked(number) for number in range(count)]
    batch, concepts = plan_batch("s3://bucket/photos", every, spec, registry=registry)
    save_batch(batch, concepts)
    return batch


def register(batch: Batch, digests: dict[str, str], uri: str) -> None:
    """Put a measured champion of every concept into the registry, without its files."""
    from mlflow import MlflowClient

    client = MlflowClient(uri, uri)
    run = client.create_run(client.create_experiment("scale")).info.run_id
    for name, digest in digests.items():
        client.create_registered_model(model_name(name))
        tags = {
            CONCEPT_DIGEST_TAG: digest,
            SPEC_DIGEST_TAG: spec_digest(batch.spec),
            SHA256_TAG: digest,
            "metric.clip_i": "0.5",
            "iterations": "1",
        }
        client.create_model_version(model_name(name), "file:///nowhere", run_id=run, tags=tags)
        client.set_registered_model_alias(model_name(name), CHAMPION, "1")


def measure(count: int, registry: bool, folder: Path) -> None:
    """Measure the stages of a batch of `count` concepts, below `folder`."""
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    spec = resolve_spec("pocket", None, ["pack.size=4", f'tracking.uri="{uri}"'])
    spec = at_storage(spec, str(folder))
    find_versions({}, "", tracking_uri=uri)  # makes the database
    with stage("plan and write"):
        batch = planned(count, spec, uri)
    lease = Lease(batch.uri, "job")
    driver = Driver(load_batch(batch.uri), lease, silent, Event())
    with stage("driver: digests, registry, queue"):
        driver._prepare(failed=False)
    claims = Claims(str(folder), lease)
    with stage("driver: claims and states of every pack"):
        for number, names in enumerate(batch.packs):
            taken = [claims.take(driver._digests[name], "run") for name in names]
            for name in names:
                driver._settle(number, ConceptResult(name, "trained", version="1"))
            driver._states.save()
            for claim in filter(None, taken):
                claims.release(claim)
    lease.end("done")
    view = BatchView(batch.uri)
    with stage("status"):
        status = view.read()
    with stage("status, nothing new"):
        view.read()
    assert status.counts == {"trained": count}
    if registry:
        register(batch, driver._digests, uri)
        again = planned(count, spec, uri)
        lease = Lease(again.uri, "job")
        with stage("resubmission: all found in the registry"):
            left = Driver(load_batch(again.uri), lease, silent, Event()).run()
        lease.end("done")
        assert {one.state for one in left.values()} == {"already"}


def main() -> None:
    """Measure one size."""
    parser = argparse.ArgumentParser()
    parser.add_argument("count", type=int)
    parser.add_argument("--registry", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(given.count, given.registry, Path(folder))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(json.dumps({"concepts": given.count, "seconds": seconds, "peak_mib": round(peak)}))


if __name__ == "__main__":
    main()
