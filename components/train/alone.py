"""Trains a pack in this process alone: no Ray, no registry, no checkpoints."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.distributed

from components.ingest.concept_folder import Concept
from components.spec import RunSpec
from components.train.base_hash import base_hash
from components.train.engines import start_deepspeed
from components.train.export import export_adapters
from components.train.finished import adapters_folder
from components.train.job import BasePaths, PackJob, TrainedConcept, pack_name
from components.train.loop import Run, train_members
from components.train.members import load_members
from components.train.progress import TrainEvent
from components.train.worker import load_frozen
from model.iteration import Frozen


def train_alone(
    spec: RunSpec,
    concepts: Sequence[Concept],
    *,
    progress: Callable[[TrainEvent], None] | None = None,
) -> list[TrainedConcept]:
    """Train concepts together, from their start to their end.

    It is the loop that Ray Train's workers run, on one device, where nothing has to go on after a
    death: benchmarks and searches on a bare machine.

    Args:
        spec: the resolved run spec; `train.workers` is 1.
        concepts: 1 or more, with different ids.
        progress: called when each is done.

    Returns:
        one result a concept, in the order given.

    Raises:
        InputError: when settings or base are wrong.
        ServiceError: when a model can't be fetched.

    """
    cuda = spec.train.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    _join(device)
    bases = BasePaths.from_spec(spec)
    settings = spec.train
    frozen = _frozen(bases, settings.precision, device, spec.resolution, settings.checkpointing)
    name = pack_name(spec, concepts)
    job = PackJob(spec, tuple(concepts), bases, name, None, base=base_hash(spec))
    run = Run(spec, frozen, load_members(job, frozen, None))
    began = time.monotonic()
    train_members(run)
    seconds = (time.monotonic() - began) / len(concepts)
    out = adapters_folder(settings.storage_path, name)
    facts = export_adapters(run, bases, out)
    results = []
    for concept in concepts:
        own = facts[concept.id] | {"seconds": round(seconds, 3)}
        trained = own["state"] == "trained"
        place = out / concept.id if trained else None
        results.append(TrainedConcept(id=concept.id, adapter_dir=place, **own))
        if progress is not None:
            done, stage = int(own["iterations"]), "done" if trained else "failed"
            progress(TrainEvent(concept.id, done, done, stage, text=own["error"] or ""))
    return results


@lru_cache(maxsize=1)
def _frozen(
    bases: BasePaths, precision: str, device: torch.device, side: int, checkpointing: bool
) -> Frozen:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return load_frozen(bases, dtype, device, side, checkpointing)


def _join(device: torch.device) -> None:
    """Make this process a world of one rank."""
    if torch.distributed.is_initialized():
        return
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    start_deepspeed(device)
