"""What a version's training took, and why it need not be trained again."""

from __future__ import annotations

from components.register.registry import RegisteredVersion
from components.train.job import TrainedConcept

# Tags of a version.
SECONDS_TAG, GPU_SECONDS_TAG, COST_TAG = "train_seconds", "train_gpu_seconds", "train_cost"


def training_tags(made: TrainedConcept) -> dict[str, str]:
    """Return the tags of a version that was trained so."""
    tags = {SECONDS_TAG: f"{made.seconds:.3f}", GPU_SECONDS_TAG: f"{made.gpu_seconds:.3f}"}
    return tags if made.cost is None else tags | {COST_TAG: repr(made.cost)}


def already_note(version: RegisteredVersion) -> str:
    """Say why a concept is not trained."""
    return f"version {version.version} was trained with the same images, settings and base"
