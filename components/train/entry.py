"""What a trainer is given: it loads the networks' libraries in a worker, and not in who asks."""

from __future__ import annotations

from typing import Any


def train_func(config: dict[str, Any]) -> None:
    """Train a pack on this worker; the entry point of Ray Train.

    Args:
        config: `{"job": PackJob}`.

    """
    from components.train.worker import train_func

    train_func(config)
