"""`register` as a component of Kubeflow Pipelines."""

from typing import NamedTuple

from kfp import dsl
from kfp.dsl import Markdown, Output


@dsl.component(base_image="echodistill/train:0.1.0", install_kfp_package=False)
def register(
    batch: str,
    versions: Output[Markdown],
) -> NamedTuple("Registered", [("batch", str), ("registered", int)]):  # type: ignore[valid-type]
    """Register the trained adapters of a batch in MLflow, as candidates.

    Args:
        batch: URI of the batch.
        versions: version and sha256 of every concept.

    Returns:
        batch: the same batch.
        registered: how many concepts have a version.
    """
    from components.register.step import register_batch
    from components.steps import step

    with step("register") as say:
        status = register_batch(batch, say)
        known = [one for one in status.concepts if one.version is not None]
        rows = [f"| {one.id} | {one.version} | {one.sha256} |\n" for one in known]
        with open(versions.path, "w", encoding="utf-8") as file:
            file.write("| concept | version | sha256 |\n|---|---|---|\n" + "".join(rows))
        return batch, len(known)  # type: ignore[return-value]
