"""Trains a pack of concepts: one Ray Train run, from the caller's side."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.ingest import store
from components.ingest.cache import disk_error
from components.ingest.concept_folder import Concept
from components.spec import RunSpec
from components.train.base_hash import base_hash
from components.train.delivery import TrackingSettings
from components.train.finished import adapters_folder, read_results
from components.train.job import (
    BasePaths,
    PackJob,
    TrainedConcept,
    pack_name,
)
from components.train.progress import TrainEvent, make_board, relayed
from components.train.record import KEPT, mend_record
from model import errors
from model.errors import DISK_FULL, AwayError, EchoDistillError, InputError, ServiceError

# Read by a worker's libraries as they load. Threads that wait actively take the cores from the
# threads that they wait for as soon as anything else runs: an iteration then takes ten times as
# long.
_WORKER_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    # For some microseconds they do, which saves a third of the time where nothing else runs.
    "GOMP_SPINCOUNT": "10000",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
}

_AWS = "AWS Error"  # pyarrow says so of every answer of S3's, and of none at all
# What it says of those that asking again does not change.
_REFUSALS = (
    "ACCESS_DENIED",
    "INVALID_ACCESS_KEY_ID",
    "NO_SUCH_BUCKET",
    "NO_SUCH_KEY",
    "SIGNATURE_DOES_NOT_MATCH",
)

log = logging.getLogger(__name__)


def train_pack(
    spec: RunSpec,
    concepts: Sequence[Concept],
    *,
    bases: BasePaths | None = None,
    run_name: str | None = None,
    storage_path: str | None = None,
    tracking: TrackingSettings | None = None,
    states: Sequence[str] = (),
    progress: Callable[[TrainEvent], None] | None = None,
) -> list[TrainedConcept]:
    """Train concepts together on one worker group of the Ray cluster that is connected.

    A run that stopped goes on when it is called again with the same name and storage.

    Args:
        spec: the resolved run spec.
        concepts: 1 or more, with different ids.
        bases: the frozen models; by default the spec's.
        run_name: by default made from the content, so that the same pack resumes; give a new
            name to train anew.
        storage_path: folder or s3:// URI for states and adapters; by default the spec's.
        tracking: where to log, or None for nowhere (see `resolve_tracking`).
        states: checkpoint folders or URIs of other runs; a concept found there goes on from
            there, whatever their pack, world size or ZeRO stage.
        progress: called from another thread with what happens, in order.

    Returns:
        one result a concept, in the order given. A concept that failed does not stop the others.

    Raises:
        InputError: when settings, base or a given state are wrong.
        ServiceError: when a model can't be fetched, or storage or cluster are out of reach.
        EchoDistillError: when training broke for reasons of ours.

    """
    _check(spec, concepts)
    name = run_name or pack_name(spec, concepts)
    storage = store.absolute(storage_path or spec.train.storage_path)
    check_storage(storage)
    mend_record(storage, name)
    board = make_board()
    job = PackJob(
        spec=spec,
        concepts=tuple(concepts),
        bases=bases or BasePaths.from_spec(spec),
        run_name=name,
        tracking=tracking,
        states=tuple(store.absolute(uri) for uri in states),
        board=board,
        base=base_hash(spec),
    )
    try:
        with relayed(board, progress), _reading(storage):
            checkpoint = _fit(job, storage)
        _raise_fatal(board)
    finally:
        _end(board)
    if isinstance(checkpoint, str):
        return [TrainedConcept(concept.id, "failed", error=checkpoint) for concept in concepts]
    with _reading(storage):
        return _results(checkpoint, concepts, adapters_folder(storage, name))


def _check(spec: RunSpec, concepts: Sequence[Concept]) -> None:
    ids = [concept.id for concept in concepts]
    if not ids or len(set(ids)) != len(ids):
        raise InputError(f"a pack needs concepts with different ids, not {ids}: rename or split it")
    workers, at_once = spec.train.workers, spec.train.items_at_once
    if spec.batch_size % workers:
        raise InputError(
            f"batch_size = {spec.batch_size} is not a multiple of train.workers = {workers}: "
            "every worker takes an equal share of a concept's batch"
        )
    items = spec.batch_size // workers
    if at_once is not None and items % min(at_once, items):
        raise InputError(
            f"train.items_at_once = {at_once} does not divide the {items} items that a worker has "
            "of a concept's batch: take a divisor"
        )


def check_storage(storage: str) -> None:
    """Refuse a storage path that can't be written, before any worker is asked for.

    Raises:
        InputError: when it is wrong or may not be written.
        ServiceError: when it is out of reach, or full.

    """
    if store.is_s3(storage):
        store.exists(storage)  # raises for a bucket that is wrong or out of reach
        return
    try:
        Path(storage).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=storage).close()
    except OSError as error:
        raise disk_error(error, f"{storage} (train.storage_path)") from error


def _fit(job: PackJob, storage: str) -> Any:
    """Run the workers; return the last checkpoint, or a sentence when they could not finish."""
    from ray.exceptions import RayError
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train import TrainingFailedError as Failed
    from ray.train.torch import TorchConfig, TorchTrainer

    from components.train.entry import train_func

    settings = job.spec.train
    use_gpu = uses_cuda(settings.device)
    trainer = TorchTrainer(
        train_func,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=settings.workers,
            use_gpu=use_gpu,
            resources_per_worker=_resources(settings.cpus_per_worker, use_gpu),
        ),
        run_config=RunConfig(
            name=job.run_name,
            storage_path=storage,
            failure_config=FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=KEPT),
            worker_runtime_env={"env_vars": _WORKER_ENVIRONMENT},
        ),
    )
    try:
        return trainer.fit().checkpoint
    except RayError as error:  # the cluster or its controller broke, not the training
        check_storage(storage)
        raise _ray_broke(job, error) from error
    except Failed as error:
        log.error("training %s broke: %s", job.run_name, error)
        check_storage(storage)  # one that is away breaks every restart
        if isinstance(getattr(error, "controller_failure", None), RayError):
            # A node died while workers were started: Ray Train takes that for its own failure, and
            # does not try again, whatever restarts are left.
            raise _ray_broke(job, error) from error
        if _of_storage(error):
            raise _was_away(storage, error) from error
        return f"training broke and used up its restarts: {_reason(error)}"


def _ray_broke(job: PackJob, error: Exception) -> ServiceError:
    return ServiceError(f"Ray broke while it trained {job.run_name}: {_reason(error)}")


@contextmanager
def _reading(storage: str) -> Iterator[None]:
    """Turn what Ray Train and pyarrow raise of a storage in the block into our errors."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise disk_error(error, storage) from error
        check_storage(storage)
        if _AWS not in str(error):
            raise ServiceError(f"{storage}: {_reason(error)}") from error
        raise _was_away(storage, error) from error


def _was_away(storage: str, error: Exception) -> ServiceError:
    """Say so; AwayError unless S3 was there and refused, which it may do for ever."""
    said = " ".join(str(cause) for cause in _causes(error))
    kind = ServiceError if any(word in said for word in _REFUSALS) else AwayError
    return kind(f"{storage} was away for a while: {_reason(error)}")


def _of_storage(error: Any) -> bool:
    """Tell whether workers or their controller broke because of an answer of S3's."""
    return any(isinstance(each, OSError) and _AWS in str(each) for each in _causes(error))


def _causes(error: Any) -> list[Any]:
    """Return what broke workers or their controller, whole: Ray shortens it in its own error."""
    failures = [*getattr(error, "worker_failures", {}).values()]
    failures.append(getattr(error, "controller_failure", None))
    return [error, *(getattr(failure, "_base_exc", failure) for failure in failures)]


def uses_cuda(device: str) -> bool:
    """Tell whether a run with `train.device` asks Ray for GPUs."""
    if device != "auto":
        return device == "cuda"
    import ray

    return bool(ray.cluster_resources().get("GPU", 0))


def _resources(cpus: int | None, use_gpu: bool) -> dict[str, float]:
    return {"CPU": float(cpus or 1), **({"GPU": 1.0} if use_gpu else {})}


def _reason(error: Any) -> str:
    failures = getattr(error, "worker_failures", None) or {"": error}
    lines = [line.strip() for line in str(next(iter(failures.values()))).splitlines()]
    return ([line for line in lines if line] or [type(error).__name__])[-1][:300]


def _raise_fatal(board: Any) -> None:
    import ray

    fatal = ray.get(board.fatal.remote(), timeout=60)
    if fatal is not None:
        kind, message = fatal
        known = getattr(errors, kind, EchoDistillError)
        raise known(message)


def _end(board: Any) -> None:
    import ray

    if ray.is_initialized():
        ray.kill(board)


def _results(checkpoint: Any, concepts: Sequence[Concept], out: Path) -> list[TrainedConcept]:
    """Read the last checkpoint's results and put its adapters in place."""
    if checkpoint is None:
        raise EchoDistillError("training ended without a result: see the workers' log")
    with checkpoint.as_directory() as folder:
        return read_results(Path(folder), [concept.id for concept in concepts], out)
