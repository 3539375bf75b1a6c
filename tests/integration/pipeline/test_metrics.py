"""A batch's metrics as Prometheus gets them: from the exporter of a real Ray node."""

from __future__ import annotations

import time
from typing import Any

import requests

from components.train.state import ConceptState
from pipeline.metrics import BatchMetrics
from pipeline.run import ConceptResult

DEADLINE = 240.0


def _exported(address: str, worker: str) -> dict[str, float]:
    """Our metrics of one process by name and own tag, without the tags that Ray adds."""
    found = {}
    for line in requests.get(address, timeout=10).text.splitlines():
        if line.startswith("ray_echodistill_") and worker in line:
            name, _, rest = line.partition("{")
            tags, _, value = rest.rpartition("} ")
            own = [tag for tag in tags.split(",") if tag.startswith(("state=", "name="))]
            found[" ".join([name, *own])] = float(value)
    return found


class _Driver:
    """Tells of a batch from a process of its own: other tests' drivers share that of the tests."""

    def begin(self) -> str:
        import ray

        self._metrics = BatchMetrics()
        return ray.get_runtime_context().get_worker_id()

    def tell(self) -> None:
        metrics = self._metrics
        metrics.ended(
            ConceptResult("a", "trained", seconds=10.0, gpu_seconds=20.0, cost=0.5, iterations=4)
        )
        metrics.ended(ConceptResult("b", "trained", seconds=5.0))  # on CPUs, without a price
        metrics.ended(ConceptResult("c", "failed", seconds=3.0, error="its loss is not finite"))
        metrics.ended(ConceptResult("d", "already", seconds=9.0, gpu_seconds=9.0))
        training: dict[str, Any] = {"state": "training", "iterations": 10}
        metrics.now(
            [
                ConceptState("a", "trained"),
                ConceptState("e", iteration=5, loss={"mse": 1.0, "rec": 2.0}, **training),
                ConceptState("f", iteration=0, loss={"mse": 3.0}, **training),
                ConceptState("g", "queued"),
            ]
        )


def test_a_batch_is_seen_by_prometheus(ray_cluster: None) -> None:
    import ray

    (node,) = (node for node in ray.nodes() if node["Alive"])
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    driver, fresh = (ray.remote(_Driver).options(num_cpus=0).remote() for _ in range(2))
    worker, quiet = ray.get([driver.begin.remote(), fresh.begin.remote()])
    ray.get(driver.tell.remote())
    wanted = {
        'ray_echodistill_concepts_total state="trained"': 2.0,
        'ray_echodistill_concepts_total state="failed"': 1.0,
        'ray_echodistill_concepts_total state="already"': 1.0,
        "ray_echodistill_training_seconds_total": 15.0,
        "ray_echodistill_gpu_seconds_total": 20.0,
        "ray_echodistill_cost_total": 0.5,
        'ray_echodistill_concepts_now state="training"': 2.0,
        'ray_echodistill_concepts_now state="queued"': 1.0,
        'ray_echodistill_concepts_now state="waiting"': 0.0,
        'ray_echodistill_loss name="mse"': 2.0,
        'ray_echodistill_loss name="rec"': 2.0,
        "ray_echodistill_progress": 0.375,
    }
    # What grows begins at 0: Prometheus sees no increase in the first number of a series.
    zero = {name: 0.0 for name in wanted if "_total" in name}
    deadline, seen, begun = time.monotonic() + DEADLINE, dict[str, float](), dict[str, float]()
    while not (wanted.items() <= seen.items() and zero.items() <= begun.items()):
        assert time.monotonic() < deadline, (seen, begun)
        time.sleep(0.5)  # Ray hands metrics on every few seconds
        seen, begun = _exported(address, worker), _exported(address, quiet)
