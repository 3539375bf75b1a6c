"""`promote` as a component of Kubeflow Pipelines."""

from typing import NamedTuple

from kfp import dsl


@dsl.component(base_image="echodistill/train:0.1.0", install_kfp_package=False)
def promote(batch: str) -> NamedTuple("Promoted", [("batch", str), ("champions", int)]):  # type: ignore[valid-type]
    """Put the measured versions of a batch to the gate; those that pass become champions.

    Args:
        batch: URI of the batch.

    Returns:
        batch: the same batch.
        champions: how many of its versions are served now.
    """
    from components.promote.step import promote_batch
    from components.steps import step

    with step("promote") as say:
        status = promote_batch(batch, say)
        return batch, sum(one.promoted for one in status.concepts)  # type: ignore[return-value]
