"""`evaluate` as a component of Kubeflow Pipelines."""

from typing import NamedTuple

from kfp import dsl
from kfp.dsl import Markdown, Metrics, Output


@dsl.component(base_image="echodistill/train:0.1.0", install_kfp_package=False)
def evaluate(
    batch: str,
    figures: Output[Metrics],
    table: Output[Markdown],
) -> NamedTuple("Evaluated", [("batch", str), ("measured", int)]):  # type: ignore[valid-type]
    """Measure the versions of a batch: CLIP-I, DINO and CLIP-T, and those of the base before.

    Args:
        batch: URI of the batch.
        figures: the means over all concepts.
        table: the figures of every concept.

    Returns:
        batch: the same batch.
        measured: how many versions have figures.
    """
    from components.evaluate.step import evaluate_batch, means
    from components.evaluate.step import table as table_of
    from components.steps import step

    with step("evaluate") as say:
        found = evaluate_batch(batch, say)
        for name, mean in means(found).items():
            figures.log_metric(name, mean)
        with open(table.path, "w", encoding="utf-8") as file:
            file.write(table_of(found))
        return batch, len(found)  # type: ignore[return-value]
