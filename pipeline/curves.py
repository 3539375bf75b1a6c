"""The losses of a training, read back from its MLflow run."""

from __future__ import annotations

from components.register.connection import connect, reaching
from components.train.names import LOSS


def curves_of(run_id: str, tracking_uri: str) -> dict[str, list[tuple[int, float]]]:
    """Return (iteration, value) by the loss's name.

    Raises:
        ServiceError: when the tracking server is out of reach.
    """
    client = connect(tracking_uri)
    with reaching(tracking_uri):
        curves = {}
        for name in client.get_run(run_id).data.metrics:
            if name.startswith(LOSS):
                history = client.get_metric_history(run_id, name)
                points = sorted((point.step, point.value) for point in history)
                curves[name.removeprefix(LOSS)] = points
    return curves
