"""`ingest` as a component of Kubeflow Pipelines."""

from typing import NamedTuple

from kfp import dsl
from kfp.dsl import Dataset, Output


@dsl.component(base_image="echodistill/train:0.1.0", install_kfp_package=False)
def ingest(
    prefix: str,
    spec: str,
    concepts: Output[Dataset],
    storage: str = "",
    run: str = "",
) -> NamedTuple("Ingested", [("batch", str), ("valid", int), ("invalid", int)]):  # type: ignore[valid-type]
    """Check every concept below a prefix and plan them as a batch.

    Args:
        prefix: s3:// prefix of concept folders, or a folder that every step sees.
        spec: run spec (YAML).
        concepts: the checked concepts: words, photos and their sha256.
        storage: where batches, checkpoints and adapters are; by default the spec's, or the bucket.
        run: names the pipeline run.

    Returns:
        batch: URI of the batch, which is named after its content.
        valid: how many concepts it has.
        invalid: how many were left out; the log says why.
    """
    import json
    from dataclasses import asdict

    from components.ingest.step import ingest_prefix
    from components.steps import spec_of, step

    with step("ingest") as say:
        batch, found = ingest_prefix(prefix, spec_of(spec), say, storage=storage, run=run)
        facts = {name: asdict(concept) for name, concept in found.items()}
        with open(concepts.path, "w", encoding="utf-8") as file:
            json.dump(facts, file)
        concepts.metadata.update(batch=batch.uri, prefix=prefix, base=batch.spec.base.name)
        return batch.uri, len(found), len(batch.invalid)  # type: ignore[return-value]
