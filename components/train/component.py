"""`train` as a component of Kubeflow Pipelines."""

from typing import NamedTuple

from kfp import dsl
from kfp.dsl import Metrics, Output


@dsl.component(base_image="echodistill/train:0.1.0", install_kfp_package=False)
def train(
    batch: str,
    training: Output[Metrics],
    backend: str = "rayjob",
    rayjob: str = "",
    namespace: str = "",
    run: str = "",
) -> NamedTuple("Trained", [("batch", str), ("trained", int), ("failed", int)]):  # type: ignore[valid-type]
    """Train what a batch has left to do, by a RayJob or in this process.

    Args:
        batch: URI of the batch.
        training: how many concepts ended how; seconds, GPU-seconds and cost.
        backend: "rayjob" (on a cluster of its own) or "local" (on this process's Ray).
        rayjob: YAML that holds one RayJob, with BATCH_URI in its entrypoint.
        namespace: of the RayJob; by default the pod's own.
        run: names the pipeline run.

    Returns:
        batch: the same batch, whose folder has the adapters now.
        trained: how many concepts are trained, now or before.
        failed: how many are not; the others go on.
    """
    from components.steps import step
    from components.train.step import train_batch

    with step("train") as say:
        status = train_batch(
            batch, say, backend=backend, rayjob=rayjob, namespace=namespace, run=run
        )
        for state, count in status.counts.items():
            training.log_metric(f"concepts/{state}", count)
        for name in ("seconds", "gpu_seconds", "cost"):  # without a price there is no cost
            known = [getattr(one, name) for one in status.concepts]
            if any(value is not None for value in known):
                training.log_metric(name, sum(value or 0.0 for value in known))
        good = sum(status.counts.get(state, 0) for state in ("trained", "already"))
        return batch, good, status.counts.get("failed", 0)  # type: ignore[return-value]
