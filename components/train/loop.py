"""The training loop around the method's five functions.

Members of a pack that stand at the same iteration train together as a segment. A segment ends
when all are done, when one fails, or where a member that is further ahead waits; the next one is
built from the members' states, so a state can always go on anywhere.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from components.spec import RunSpec
from components.train import ranks
from components.train.checkpoint import ConceptState
from components.train.engines import (
    clip_per_concept,
    concept_slice,
    free,
    make_engines,
    move_parameter,
    read_state,
    set_rates,
    whole_parameter,
)
from components.train.graphs import Record, RecordedItems, cuda_graphs
from components.train.job import (
    echo_iterations,
    is_picture_time,
    learning_rates,
    main_iterations,
    next_boundary,
    taking_part,
    total_iterations,
)
from components.train.members import Member, echo_of, go_on
from components.train.memory import is_out_of_memory, measured_pack, release
from components.train.names import LOSS, NORM
from components.train.shards import Shards, sharded
from components.train.watcher import Block, Watcher, block_losses, mark_broken
from model.acceleration import uncompiled
from model.batch import Batch, ConceptData, draw_batch
from model.discriminators import DiscriminatorHeads
from model.echo import echo_round
from model.iteration import (
    Frozen,
    StudentLoss,
    alignment_target,
    discriminator_loss,
    student_draw,
    student_loss,
    teacher_loss,
)
from model.view_bank import with_bank

log = logging.getLogger(__name__)

OUT_OF_MEMORY = (
    "training it alone needs more memory than there is: set train.checkpointing=true or "
    "train.items_at_once=1, or lower the resolution"
)


@dataclass
class Run:
    """A run on this rank: settings, frozen networks and the pack.

    Attributes:
        spec: the resolved run spec.
        frozen: the frozen networks.
        members: the pack.
        watcher: hears what happens.
        ahead: draw the next iteration's batch in another thread meanwhile, which needs cores that
            training leaves idle; None: where a GPU trains.
        record: how the frozen networks' work is recorded; None: as CUDA graphs, where a GPU trains
            and the spec asks for them.
        shards: what of the frozen networks is kept in parts, while it trains.

    """

    spec: RunSpec
    frozen: Frozen
    members: list[Member]
    watcher: Watcher = field(default_factory=Watcher)
    ahead: bool | None = None
    record: Record | None = None
    shards: Shards = field(default_factory=Shards)


def train_members(run: Run) -> None:
    """Train every member to the end or to its failure; their states and errors say how far.

    Members that do not fit into memory together are trained in halves, one after the other; every
    half goes on from its members' last states.
    """
    with sharded(run.frozen, run.spec.train.zero_stage) as run.shards:
        _train_members(run)


def _train_members(run: Run) -> None:
    total, at_once = total_iterations(run.spec), _at_once(run)
    while True:
        waiting = [
            (member, member.state.iteration)
            for member in run.members
            if member.error is None and member.state and member.state.iteration < total
        ]
        if not waiting:
            return
        start = min(iteration for _, iteration in waiting)
        together = [member for member, iteration in waiting if iteration == start][:at_once]
        ahead = [iteration for _, iteration in waiting if iteration > start]
        if not _fits(run, together, start, min([total, *ahead])):
            release(run.frozen.pair.device)  # here, where the error and its frames are gone
            for member in together:
                assert member.state is not None
                go_on(member, member.state)  # an echo round may have begun since
            at_once = (len(together) + 1) // 2
            if len(together) > 1:
                log.warning("%d concepts need too much memory: %d now", len(together), at_once)
            else:
                together[0].error = OUT_OF_MEMORY
                run.watcher.failed(together[0])


def _at_once(run: Run) -> int:
    """Tell how many members to train together: all, or as `pack.size: auto` finds it."""
    if run.spec.pack.size != "auto":
        return len(run.members)
    ready = [m for m in run.members if m.error is None and m.state is not None]
    device = run.frozen.pair.device
    found = measured_pack(len(ready), device, lambda n: _try(run, ready[:n]))
    return min(ranks.gathered(found))


def _try(run: Run, members: list[Member]) -> None:
    """Do an iteration of some members, as if all stood where the first one does; forget it."""
    train = run.spec.train.model_copy(update={"cuda_graphs": False})
    spec = run.spec.model_copy(update={"train": train})
    segment = Segment(replace(run, spec=spec, ahead=False), members)
    try:
        with uncompiled(train.compile):
            segment.iterate(members[0].state.iteration if members[0].state else 0)
    finally:
        segment.free()
        release(run.frozen.pair.device)


def _fits(run: Run, together: list[Member], start: int, stop: int) -> bool:
    """Train some members together as far as they go; False when memory did not do."""
    segment: Segment | None = None
    try:
        segment = Segment(run, together)
        segment.train(start, stop)
    except RuntimeError as error:
        # Other ranks may be in the middle of a step, waiting for this one: only Ray ends them.
        if ranks.world_size() > 1 or not is_out_of_memory(error):
            raise
        return False
    finally:
        if segment is not None:
            segment.free()
    return True


class Segment:
    """Some members that train together from one iteration to another.

    Attributes:
        members: those that train.
        teacher: engine of `TeacherWeights`; its `module` is for use without gradient.
        student: engine of `StudentWeights`.
        heads: engine of `DiscriminatorHeads`.

    """

    def __init__(self, run: Run, members: list[Member]) -> None:
        """Build the engines from the members' states."""
        self.run = run
        self.members = members
        self._total = total_iterations(run.spec)
        ahead = run.frozen.pair.device.type == "cuda" if run.ahead is None else run.ahead
        self._ahead = ThreadPoolExecutor(1) if ahead else None
        for member in members:
            if member.data is not None:
                with uncompiled(run.spec.train.compile):
                    member.data = with_bank(run.frozen, member.data, run.spec.seed, run.spec.views)
        states = [member.state for member in members if member.state is not None]
        self.teacher, self.student, self.heads = make_engines(run.spec, run.frozen, states)
        self._recorded = _recorded(run, self.heads.module)

    def train(self, start: int, stop: int) -> None:
        """Train from `start` iterations done to `stop`, or until a member fails."""
        watcher, iteration, alive = self.run.watcher, start, True
        while iteration < stop and alive:
            with uncompiled(self.run.spec.train.compile):
                self._begin_echo_round(iteration)
            end = min(stop, next_boundary(self.run.spec, iteration))
            block = self._block(iteration, end)
            iteration = end
            watcher.block(self.members, block)
            for member in mark_broken(self.members, block):
                alive = False
                watcher.failed(member)
            if alive and is_picture_time(self.run.spec, iteration):
                with uncompiled(self.run.spec.train.compile):
                    watcher.pictures(self.members, iteration, self)
            due = iteration < self._total and ranks.from_first(watcher.wants_checkpoint())
            if due or not alive or iteration == stop:
                self._update_states(iteration, block)
            if due:
                watcher.checkpoint()

    def iterate(self, iteration: int) -> dict[str, torch.Tensor]:
        """Do one iteration, of which the members' states learn nothing."""
        return self._iterate(iteration, self._batches(iteration))

    def free(self) -> None:
        """Take the engines down."""
        if self._ahead is not None:
            self._ahead.shutdown(cancel_futures=True)
        self._recorded = None
        for engine in (self.teacher, self.student, self.heads):
            free(engine)

    def _block(self, first: int, end: int) -> Block:
        began = time.perf_counter()
        rows: list[torch.Tensor] = []
        names: tuple[str, ...] = ()
        upcoming: Future[list[Batch]] | None = None
        for iteration in range(first, end):
            batches = self._batches(iteration) if upcoming is None else upcoming.result()
            # What a batch is drawn from changes between blocks only. No other thread may use the
            # GPU while work is recorded.
            free = self._recorded is None or self._recorded.complete
            if self._ahead is not None and free and iteration + 1 < end:
                upcoming = self._ahead.submit(self._batches, iteration + 1)
            values = self._iterate(iteration, batches)
            names = tuple(values)
            rows.append(torch.stack([value.float() for value in values.values()]))
        values_tkn = ranks.mean(torch.stack(rows)).cpu()
        seconds = time.perf_counter() - began
        share = seconds / len(self.members)
        gpus = ranks.world_size() if self.run.frozen.pair.device.type == "cuda" else 0
        for member in self.members:
            if member.state is not None:
                member.state.seconds += share
                member.state.gpu_seconds += share * gpus
        return Block(first, names, values_tkn, seconds)

    def _iterate(self, iteration: int, batches: list[Batch]) -> dict[str, torch.Tensor]:
        """Do one iteration, METHOD.md's items 1 to 5; returns losses and norms, [N] each."""
        learns, distils = taking_part(self.run.spec, iteration)
        rates = learning_rates(self.run.spec, iteration)
        set_rates(self.teacher, rates["teacher"])
        set_rates(self.student, rates["student"])
        set_rates(self.heads, rates["heads"])
        values: dict[str, torch.Tensor] = {}
        if learns:
            text_states = self._learn(batches, values)
        else:
            text_states = [self._read(batch) for batch in batches]
        if distils:
            self._distil(batches, text_states, values)
        return values

    def _learn(self, batches: list[Batch], values: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Item 1: step the teacher, and the student where it follows.

        Returns each batch's text states from before the step.
        """
        learned = [self._teacher_loss(batch) for batch in batches]
        loss = _mean([loss for loss, _ in learned])
        values[f"{LOSS}rec"] = loss.detach()
        method = self.run.spec.method
        follows = method.follow > 0 and method.order != "teacher"
        before = whole_parameter(self.teacher, "kv") if follows else None
        values[f"{NORM}teacher"] = self._step(self.teacher, loss)
        if before is not None:
            moved = whole_parameter(self.teacher, "kv") - before
            move_parameter(self.student, "kv", method.follow * moved)
        return [text_states for _, text_states in learned]

    @torch.no_grad()
    def _read(self, batch: Batch) -> torch.Tensor:
        """Give a batch's text states where the teacher does not learn."""
        encoder = self.run.frozen.pair.text_encoder
        text_states, _ = self.teacher.module(encoder, batch.prompts, batch.concept)
        return text_states

    def _distil(
        self,
        batches: list[Batch],
        text_states: list[torch.Tensor],
        values: dict[str, torch.Tensor],
    ) -> None:
        """Items 2 to 5: step the student, then the heads."""
        heads = self.heads.module
        # The student's loss runs through the heads: what reached them would be taken for their own
        # gradient by their engine.
        heads.requires_grad_(False)
        rows = zip(batches, text_states, strict=True)
        answered = [self._student_loss(batch, states) for batch, states in rows]
        values[f"{NORM}student"] = self._step(
            self.student, _mean([loss.total for loss in answered])
        )
        heads.requires_grad_(True)
        for name in answered[0].parts:
            values[LOSS + name] = _mean([loss.parts[name] for loss in answered])
        if answered[0].fake_features:
            judged = [
                self._discriminator_loss(batch, loss)
                for batch, loss in zip(batches, answered, strict=True)
            ]
            loss = _mean(judged)
            values[f"{LOSS}disc"] = loss.detach()
            values[f"{NORM}heads"] = self._step(self.heads, loss)

    def _teacher_loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        if self._recorded:
            return self._recorded.teacher_loss(self.teacher, batch)
        return teacher_loss(self.run.frozen, self.teacher, batch, self.run.spec.loss)

    def _student_loss(self, batch: Batch, text_states: torch.Tensor) -> StudentLoss:
        settings, frozen, teacher = self.run.spec.loss, self.run.frozen, self.teacher.module
        if self._recorded:
            return self._recorded.student_loss(self.student, teacher, text_states, batch)
        drawn = student_draw(frozen, self.student, text_states, batch)
        target = alignment_target(frozen, teacher, text_states, drawn, batch, settings)
        return student_loss(frozen, self.heads.module, drawn, target, batch, settings)

    def _discriminator_loss(self, batch: Batch, loss: StudentLoss) -> torch.Tensor:
        if self._recorded:
            batch = self._recorded.seen(batch)
        return discriminator_loss(self.run.frozen, self.heads, batch, loss.fake_features)

    def _batches(self, iteration: int) -> list[Batch]:
        """Draw this rank's items of an iteration, in as many passes as the spec asks for."""
        spec = self.run.spec
        items = spec.batch_size // ranks.world_size()
        at_once = min(spec.train.items_at_once or items, items)
        passes = items // at_once
        return [
            draw_batch(
                self._data(),
                self.run.frozen.pair,
                seed=spec.seed,
                iteration=iteration,
                items=at_once,
                rank=ranks.rank() * passes + place,
                views=spec.views,
                echo=spec.echo,
                loss=spec.loss,
            )
            for place in range(passes)
        ]

    def _step(self, engine: Any, losses: torch.Tensor) -> torch.Tensor:
        engine.backward(losses.sum())
        self.run.shards.tidy()
        norms = clip_per_concept(engine, self.run.spec.train.clip_norm)
        engine.step()
        return norms.detach()

    def _data(self) -> list[ConceptData]:
        return [member.data for member in self.members if member.data is not None]

    def _begin_echo_round(self, iteration: int) -> None:
        """At the start of an echo round the student's samples join the references."""
        spec = self.run.spec
        into = iteration - main_iterations(spec)
        if into < 0 or not echo_iterations(spec) or into % echo_iterations(spec):
            return
        drawn = echo_round(
            self.run.frozen,
            self.teacher.module,
            self.student.module,
            self._data(),
            spec.echo,
            seed=spec.seed,
            iteration=iteration,
        )
        # The filter could decide otherwise on another rank, by round-off on an accelerator.
        for member, each in zip(self.members, ranks.from_first(drawn), strict=True):
            data = member.data
            assert data is not None
            echo = (*data.echo, *each.kept)
            member.data = with_bank(
                self.run.frozen, replace(data, echo=echo), spec.seed, spec.views
            )
            self.run.watcher.echo(member, iteration, each)

    def _update_states(self, iteration: int, block: Block) -> None:
        """Gather the engines' states into those of the members that have not failed."""
        whole = {
            "teacher": read_state(self.teacher),
            "student": read_state(self.student),
            "heads": read_state(self.heads),
        }
        for n, member in enumerate(self.members):
            if member.error is not None or member.state is None or member.data is None:
                continue
            images, prompts = echo_of(member.data)
            member.state = ConceptState(
                concept_id=member.concept.id,
                digest=member.digest,
                iteration=iteration,
                groups={name: concept_slice(state, n) for name, state in whole.items()},
                echo_images=images,
                echo_prompts=prompts,
                seconds=member.state.seconds,
                gpu_seconds=member.state.gpu_seconds,
                losses=block_losses(block, n),
            )


def _recorded(run: Run, heads: DiscriminatorHeads) -> RecordedItems | None:
    """Give what records the work on the frozen networks, where that is asked for and possible."""
    record = run.record
    if record is None and run.spec.train.cuda_graphs and run.frozen.pair.device.type == "cuda":
        record = cuda_graphs()
    return None if record is None else RecordedItems(run.frozen, heads, run.spec.loss, record)


def _mean(values: list[torch.Tensor]) -> torch.Tensor:
    """Average the passes' losses [N]."""
    return values[0] if len(values) == 1 else torch.stack(values).mean(0)
