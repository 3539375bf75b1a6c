"""What every Ray Train worker runs: load, train, report, leave the results."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from components.ingest import store
from components.ingest.cache import disk_error
from components.ingest.store import resolve_model
from components.spec import spec_yaml
from components.train import ranks
from components.train.checkpoint import ConceptState, write_state
from components.train.delivery import Entry, read_unlogged, write_unlogged
from components.train.engines import start_deepspeed
from components.train.export import export_adapters
from components.train.job import (
    ADAPTERS,
    RESULTS,
    STATES,
    BasePaths,
    PackJob,
    learning_rates,
    main_iterations,
    total_iterations,
)
from components.train.loop import Block, Run, Segment, Watcher, block_losses, train_members
from components.train.members import Member, load_members
from components.train.preview import PREVIEW_PROMPTS
from components.train.progress import TrainEvent
from components.train.tracking import Tracker, without_password
from model.acceleration import accelerate
from model.base_pair import load_base_pair
from model.checkpointing import save_memory
from model.discriminators import load_backbone
from model.echo import EchoRound
from model.errors import DISK_FULL, EchoDistillError, InputError
from model.identity import load_image_projection
from model.iteration import Frozen
from model.sampler import picture_noise, sample_student, to_uint8
from model.text import cat, tokenize

_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def train_func(config: dict[str, Any]) -> None:
    """Train a pack on this worker; the entry point of Ray Train.

    Args:
        config: `{"job": PackJob}`.

    """
    job: PackJob = config["job"]
    if _has_given_up(job):
        return
    try:
        _train(job)
    except OSError as error:
        # No restart makes room. The other ranks wait for this one in the middle of a step, so it
        # has to raise; the restart then ends at once.
        if error.errno in DISK_FULL:
            _give_up(job, disk_error(error, job.spec.train.storage_path))
        raise


def _train(job: PackJob) -> None:
    device = _prepare(job)
    start_deepspeed(device)
    try:
        run, unlogged = load(job, device)
    except EchoDistillError as error:
        # The same for every restart, so nothing is raised: the caller raises it.
        if ranks.rank() == 0:
            _give_up(job, error)
        return
    watcher = run.watcher = RayWatcher(job, run, unlogged)
    watcher.begin()
    train_members(run)
    watcher.end()


def _give_up(job: PackJob, error: EchoDistillError) -> None:
    """Leave the caller an error that ends the run."""
    if job.board is not None:
        import ray

        ray.get(job.board.fail.remote(type(error).__name__, str(error)))


def _has_given_up(job: PackJob) -> bool:
    if job.board is None:
        return False
    import ray

    return ray.get(job.board.fatal.remote()) is not None


def load_frozen(
    bases: BasePaths,
    dtype: torch.dtype,
    device: torch.device,
    resolution: int | None = None,
    checkpointing: bool = False,
) -> Frozen:
    """Load all frozen models, each once; with `checkpointing` they keep few activations.

    Raises:
        InputError: when one can't be used.
        ServiceError: when one can't be fetched.

    """
    teacher, student = resolve_model(bases.teacher), resolve_model(bases.student)
    pair = load_base_pair(
        teacher, student, name=bases.name, dtype=dtype, device=device, resolution=resolution
    )
    places = [resolve_model(ref) for ref in (*bases.backbones, bases.identity)]
    loaded = {place: load_backbone(place, dtype, device) for place in dict.fromkeys(places)}
    *backbones, identity = (loaded[place] for place in places)
    projection = None
    if bases.image_projection:
        entry = store.find(bases.image_projection)
        if entry is None:
            raise InputError(f"there is no file {bases.image_projection}: give an IP-Adapter's")
        projection = load_image_projection(store.fetch(entry), device)
    frozen = Frozen.build(pair, backbones, identity, projection)
    return save_memory(frozen) if checkpointing else frozen


def _prepare(job: PackJob) -> torch.device:
    """Give this worker its device and threads; returns the device."""
    import ray.train
    from ray.train.torch import get_device

    device = get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        return device
    # Ray gives a worker of one CPU one thread by OMP_NUM_THREADS, whatever the machine has.
    local = ray.train.get_context().get_local_world_size()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = job.spec.train.cpus_per_worker or max(1, (cores or 1) // local)
    torch.set_num_threads(threads)
    return torch.device("cpu")


def load(job: PackJob, device: torch.device) -> tuple[Run, list[Entry]]:
    """Load everything; returns the run, and what its last worker could not log.

    Raises:
        EchoDistillError: on every rank, when one can't load something.

    """
    # Members are loaded with words between the ranks, which one that has no base would not hear.
    frozen = ranks.all_or_none(lambda: _accelerated(job, device))
    return ranks.all_or_none(lambda: _with_members(job, frozen))


def _accelerated(job: PackJob, device: torch.device) -> Frozen:
    spec = job.spec
    dtype = _DTYPES[spec.train.precision]
    frozen = load_frozen(job.bases, dtype, device, spec.resolution, spec.train.checkpointing)
    accelerate(frozen, spec.train.channels_last, spec.train.compile)
    return frozen


def _with_members(job: PackJob, frozen: Frozen) -> tuple[Run, list[Entry]]:
    with _own_checkpoint() as folder:
        members = load_members(job, frozen, folder and folder / STATES)
        unlogged = read_unlogged(folder) if folder else []
    return Run(job.spec, frozen, members), unlogged


@contextlib.contextmanager
def _own_checkpoint() -> Iterator[Path | None]:
    """Yield this run's last checkpoint as a local folder, or None."""
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as folder:
        yield Path(folder)


class RayWatcher(Watcher):
    """Tells the caller, MLflow and Ray Train what the loop does; rank 0 alone speaks."""

    def __init__(self, job: PackJob, run: Run, unlogged: list[Entry]) -> None:
        """Start tracking, with what an earlier worker could not log."""
        self._job = job
        self._run = run
        self._first = ranks.rank() == 0
        self._tracker: Tracker | None = None
        if self._first and job.tracking is not None:
            self._tracker = Tracker(job.tracking, job.run_name, unlogged)
        self._total = total_iterations(job.spec)
        self._last_checkpoint = time.monotonic()
        self._warning: Any = None  # the last one of a spot node

    def begin(self) -> None:
        """Say that everything is loaded."""
        spec = without_password(self._job.spec)
        for member in self._run.members:
            if self._tracker:
                params = {
                    **_flat(spec.model_dump(mode="json")),
                    "concept_digest": member.digest,
                    "class_noun": member.concept.class_noun,
                    "n_images": len(member.concept.images),
                }
                self._tracker.start(member.concept.id, params, spec_yaml(spec))
                self._tracker.log_dataset(member.concept)
            self._tell(member, "failed" if member.error else "load", text=member.error or "")

    def block(self, members: list[Member], block: Block) -> None:
        """Tell losses, norms, learning rates and seconds per iteration."""
        if not self._first:
            return
        iterations = len(block.values)
        pace = block.seconds / iterations
        done = block.first + iterations
        stage = "main" if block.first < main_iterations(self._job.spec) else "echo"
        for n, member in enumerate(members):
            losses = block_losses(block, n)
            self._tell(member, stage, done, losses=losses, seconds_per_iteration=pace)
            if self._tracker:
                rows = _metric_rows(block, n)
                rows[done] |= {"seconds_per_iteration": pace, **self._rates(done - 1)}
                self._tracker.log(member.concept.id, rows)

    def echo(self, member: Member, iteration: int, drawn: EchoRound) -> None:
        """Tell an echo round: similarities, and the kept samples as a picture."""
        if not self._first:
            return
        kept = f"kept {len(drawn.kept)} of {len(drawn.drawn)} student samples"
        self._tell(member, "echo", iteration, text=kept)
        if self._tracker:
            similarities = torch.tensor(drawn.similarities)
            values = {
                "echo/similarity_mean": float(similarities.mean()),
                "echo/similarity_max": float(similarities.max()),
                "echo/kept": float(len(drawn.kept)),
            }
            finite = {name: v for name, v in values.items() if torch.tensor(v).isfinite()}
            self._tracker.log(member.concept.id, {iteration: finite})
            picture = torch.cat([sample.image for sample in drawn.kept], dim=2)
            self._tracker.log_picture(member.concept.id, f"echo/{iteration:06d}.png", picture)

    @torch.no_grad()
    def pictures(self, members: list[Member], iteration: int, segment: Segment) -> None:
        """Draw and log sample pictures; every rank draws, since ZeRO stage 3 gathers weights."""
        if self._job.tracking is None:
            return
        pair = self._run.frozen.pair
        for n, member in enumerate(members):
            phrase = f"{member.concept.token} {member.concept.class_noun}"
            prompts = [prompt.format(phrase) for prompt in PREVIEW_PROMPTS]
            token = member.concept.token
            tokens = cat([tokenize(pair.tokenizer, [p], [token]) for p in prompts])
            place = torch.full((len(prompts),), n)
            states, _ = segment.teacher.module(pair.text_encoder, tokens, place)
            kv = segment.student.module(pair.text_encoder, tokens, place, states)
            noise = picture_noise(pair, range(len(prompts)))
            images = to_uint8(sample_student(pair, kv, noise))
            if self._tracker:
                grid = torch.cat(list(images), dim=2)
                self._tracker.log_picture(member.concept.id, f"samples/{iteration:06d}.png", grid)

    def failed(self, member: Member) -> None:
        """Tell that a member left."""
        self._tell(member, "failed", text=member.error or "")

    def wants_checkpoint(self) -> bool:
        """Tell whether `train.checkpoint_seconds` have passed, or a node will be taken away."""
        import ray.train

        warning = ray.train.get_preemption_info()
        if warning is not None and warning != self._warning:
            self._warning = warning
            return True
        return time.monotonic() - self._last_checkpoint >= self._job.spec.train.checkpoint_seconds

    def checkpoint(self) -> None:
        """Report the members' states to Ray Train."""
        with tempfile.TemporaryDirectory(prefix="echodistill-") as work:
            if self._first:
                self._write_states(Path(work))
                self._write_unlogged(Path(work))
            self._report(Path(work))
        self._last_checkpoint = time.monotonic()

    def end(self) -> None:
        """Leave states, adapters and results as the last checkpoint, and end the MLflow runs."""
        with tempfile.TemporaryDirectory(prefix="echodistill-") as work:
            folder = Path(work)
            if self._first:
                self._write_states(folder)
                facts = export_adapters(self._run, self._job.bases, folder / ADAPTERS)
                run_ids = self._finish_tracking(folder / ADAPTERS)
                for member in self._run.members:
                    each = facts[member.concept.id]
                    each["run_id"] = run_ids.get(member.concept.id)
                    if member.state is not None:
                        each |= self._figures(member.state)
                self._write_unlogged(folder)
                (folder / RESULTS).write_text(json.dumps(facts))
            self._report(folder)

    def _finish_tracking(self, adapters: Path) -> dict[str, str]:
        for member in self._run.members:
            self._tell(member, "failed" if member.error else "done", text=member.error or "")
            if self._tracker:
                if member.state is not None:
                    done = {member.state.iteration: self._figures(member.state)}
                    self._tracker.log(member.concept.id, done)
                if member.error is None:
                    folder = adapters / member.concept.id
                    self._tracker.log_folder(member.concept.id, folder, "adapter")
                self._tracker.finish(member.concept.id, member.error)
        return self._tracker.close() if self._tracker else {}

    def _write_states(self, folder: Path) -> None:
        (folder / STATES).mkdir()
        for member in self._run.members:
            if member.state is not None and member.state.iteration:
                write_state(folder / STATES / member.concept.id, member.state)

    def _write_unlogged(self, folder: Path) -> None:
        if self._tracker:
            write_unlogged(folder, self._tracker.unlogged())

    def _report(self, folder: Path) -> None:
        import ray.train

        done = {m.concept.id: m.state.iteration for m in self._run.members if m.state}
        checkpoint = ray.train.Checkpoint.from_directory(str(folder)) if self._first else None
        ray.train.report({"iterations": done}, checkpoint=checkpoint)

    def _tell(self, member: Member, stage: str, done: int | None = None, **facts: Any) -> None:
        if not self._first or self._job.board is None:
            return
        if done is None:
            done = member.state.iteration if member.state else 0
        event = TrainEvent(
            member.concept.id, done, self._total, stage, worker=platform.node(), **facts
        )
        self._job.board.put.remote([event])

    def _figures(self, state: ConceptState) -> dict[str, float]:
        """Return what the training of a concept took."""
        gpu_seconds = round(state.gpu_seconds, 3)
        took = {"seconds": round(state.seconds, 3), "gpu_seconds": gpu_seconds}
        cost = self._job.spec.cost.of(gpu_seconds)
        return took if cost is None else took | {"cost": round(cost, 6)}

    def _rates(self, iteration: int) -> dict[str, float]:
        rates = learning_rates(self._job.spec, iteration)
        return {
            "lr/teacher": rates["teacher"]["kv"],
            "lr/token": rates["teacher"]["rows"],
            "lr/student": rates["student"]["kv"],
            "lr/heads": rates["heads"][""],
        }


def _metric_rows(block: Block, n: int) -> dict[int, dict[str, float]]:
    """Give member n's finite values by iterations done and name."""
    rows: dict[int, dict[str, float]] = {}
    for t, values in enumerate(block.values[:, :, n]):
        named = zip(block.names, values.tolist(), values.isfinite().tolist(), strict=True)
        rows[block.first + t + 1] = {name: value for name, value, finite in named if finite}
    return rows


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return flat
