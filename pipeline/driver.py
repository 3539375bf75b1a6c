"""The driver of a batch: takes its packs through a Ray cluster.

It starts a Ray Train run for one pack after the other, keeps a few of them waiting for room (their
placement groups are what an autoscaler sees), and writes what each concept is at. Only so few wait
that a batch that comes later waits behind those and not behind a whole batch: Ray gives room about
in the order in which it was asked for.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from threading import Event as Flag
from typing import Any

from components.ingest import documents, store
from components.ingest.concept_folder import Concept, concept_digest
from components.promote.promote import GATE_TAG
from components.register.connection import Patience, hide_password
from components.register.registry import find_versions
from components.register.took import already_note
from components.spec import spec_digest
from components.train.base_hash import base_hash
from components.train.batch import Batch, load_concepts
from components.train.claims import Claim, Claims, Lease
from components.train.state import FOUND, PACKS, ConceptState, as_facts, concept_states
from model.errors import AwayError, EchoDistillError, ServiceError
from model.names import MEASURED
from pipeline.metrics import BatchMetrics
from pipeline.orphans import remove_orphaned_groups
from pipeline.pack_run import PackOrder, PackRun
from pipeline.parent_run import end_with_batch, parent_of_batch
from pipeline.progress import Event, Progress
from pipeline.run import REGISTRY_SECONDS, ConceptResult, from_version
from pipeline.states import States
from pipeline.tracking import tracking_uri

LOOK_SECONDS = 3.0  # between two looks at the packs, and two writings of what changed
HELD_SECONDS = 15.0  # before a digest that another batch trains is looked at again
AWAY_SECONDS = 60.0  # before a pack asks again for a registry or storage that is away
START_SECONDS = 3600.0  # that a driver waits at its start for a registry or storage that is away
_WRITERS = 16

log = logging.getLogger(__name__)


@dataclass
class _Turn:
    """Some concepts of a pack that wait for their turn, or go on under the name of a run."""

    pack: int
    ids: tuple[str, ...]
    attempt: int = 1
    not_before: float = 0.0
    run: str = ""


@dataclass
class _Flight:
    """A pack that is under way."""

    turn: _Turn
    actor: Any
    claims: list[Claim]
    held: tuple[str, ...]
    began: bool = False
    since: float = field(default_factory=time.monotonic)


class Driver:
    """Takes the concepts of one batch to their ends."""

    def __init__(
        self,
        batch: Batch,
        lease: Lease,
        progress: Progress,
        stop: Flag,
        *,
        look_seconds: float = LOOK_SECONDS,
        held_seconds: float = HELD_SECONDS,
        away_seconds: float = AWAY_SECONDS,
        patience_seconds: float = REGISTRY_SECONDS,
    ) -> None:
        self._batch = batch
        self._lease = lease
        self._progress = progress
        self._stop = stop
        self._look_seconds = look_seconds
        self._held_seconds = held_seconds
        self._away_seconds = away_seconds
        self._patience_seconds = patience_seconds
        self._patience = Patience(START_SECONDS, self._tell_waiting, self._sleep, AwayError)
        self._claims = Claims(batch.storage, lease)
        self._registry = tracking_uri(spec=batch.spec)
        self._parent = parent_of_batch(batch, self._registry)
        self._concepts: dict[str, Concept] = {}
        self._digests: dict[str, str] = {}
        self._queue: deque[_Turn] = deque()
        self._flights: dict[Any, _Flight] = {}  # by the reference to what run() gives
        self._pool = ThreadPoolExecutor(_WRITERS)
        self._metrics = BatchMetrics()
        self._states = States(batch, self._pool)

    def run(self, *, failed: bool = False) -> dict[str, ConceptState]:
        """Take every concept that is not done to its end; returns all states, by id.

        With `failed` those that failed before get another try. Ends early when `stop` is set or
        the lease is lost.

        Raises:
            InputError: when spec, base or registry are wrong.
            ServiceError: when the registry or the storage stay out of reach at the start.
        """
        self._patience.ask(lambda: self._prepare(failed))
        looked = 0.0
        try:
            while (self._queue or self._flights) and not self._ended:
                self._launch()
                self._land()
                if time.monotonic() - looked >= self._look_seconds:
                    self._look()
                    self._save()
                    self._metrics.now(self._states.by_id.values())
                    _give_room_back()
                    looked = time.monotonic()
            # A batch whose end nobody could read would have to be driven once more.
            while not self._save() and not self._ended:
                self._stop.wait(self._away_seconds)
        finally:
            for flight in self._flights.values():
                _kill(flight.actor)
            self._save()
            self._metrics.now(self._states.by_id.values())
        return self._states.by_id

    def tell_end(self) -> None:
        """Tell MLflow how the batch ended, once its lease has ended."""
        end_with_batch(self._parent, self._batch.uri, self._registry)

    @property
    def _mend(self) -> str:
        return f"echodistill retry {self._batch.uri} --failed tries it again"

    @property
    def _ended(self) -> bool:
        return self._stop.is_set() or self._lease.lost.is_set()

    def _save(self) -> bool:
        """Write the states that changed; whoever holds the batch now knows better than we do."""
        return not self._lease.lost.is_set() and self._states.save()

    def _prepare(self, failed: bool) -> None:
        """Work out digests, look into the registry and queue what is left to do."""
        batch = self._batch
        self._concepts = load_concepts(batch)
        self._progress(Event("base", batch.spec.base.name, "load and verify"))
        own, hashed = spec_digest(batch.spec), base_hash(batch.spec)
        self._digests = {
            name: concept_digest(concept, own, hashed) for name, concept in self._concepts.items()
        }
        place = store.join(batch.uri, FOUND)
        before = documents.read(place)
        already = dict(before.value["already"]) if before else {}
        written = documents.read_folder(store.join(batch.uri, PACKS))
        packs = {name: document.value for name, document in written.items()}
        found: dict[str, Any] = {"digests": self._digests, "already": already}
        states = self._states.by_id = concept_states(batch, found, packs)
        rest = [
            name
            for name, one in states.items()
            if not one.over or (failed and one.state == "failed")
        ]
        if not batch.force and rest:
            there = self._patience.ask(lambda: self._registered(rest))
            already |= {name: as_facts(one.as_state()) for name, one in there.items()}
        found["registry"] = hide_password(self._registry)
        documents.write(place, found)
        for name in rest:
            facts = already.get(name, {})
            states[name] = ConceptState(name, **{"digest": self._digests[name], **facts})
        for number, ids in enumerate(batch.packs):
            left = tuple(name for name in ids if not states[name].over)
            if left:
                self._queue.append(_Turn(number, left))
        count = sum(len(turn.ids) for turn in self._queue)
        self._progress(
            Event("batch", batch.id, f"{count} concepts to do in {len(self._queue)} packs")
        )

    def _tell_waiting(self, text: str) -> None:
        """Say that the registry or the storage is away before anything could begin."""
        self._progress(Event("batch", self._batch.id, text))
        if not self._states.by_id:  # they could not be read yet
            return
        for number, ids in enumerate(self._batch.packs):
            for name in ids:
                if not self._states[name].over:
                    self._states.set(number, name, note=text)
        self._save()

    def _sleep(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise ServiceError("the driver was stopped while it waited for registry and storage")

    def _registered(self, names: Sequence[str]) -> dict[str, ConceptResult]:
        """Return the concepts that the registry has, measured and through the gate.

        One whose evaluation was interrupted goes through its pack, which finishes it.
        """
        wanted = {name: self._digests[name] for name in names}
        own = spec_digest(self._batch.spec)
        found = find_versions(wanted, own, tracking_uri=self._registry)
        results = {}
        for name, (version, champion) in found.items():
            if MEASURED not in version.metrics or champion is None:
                continue
            if GATE_TAG not in version.tags and champion < version.version:
                continue
            result = from_version(self._concepts[name], version, "already", already_note(version))
            results[name] = replace(result, promoted=champion == version.version)
        return results

    def _launch(self) -> None:
        """Start packs until enough of them wait for room."""
        waiting = sum(not flight.began for flight in self._flights.values())
        for _ in range(len(self._queue)):
            if waiting >= self._batch.waiting or self._ended:
                return
            turn = self._queue.popleft()
            if turn.not_before > time.monotonic():
                self._queue.append(turn)
            elif self._start(turn):
                waiting += 1

    def _start(self, turn: _Turn) -> bool:
        """Claim a pack's digests and start what was got; the rest is looked at again later."""
        run = turn.run or self._run_name(turn)
        try:
            taken = dict(
                zip(
                    turn.ids,
                    self._pool.map(lambda name: self._claims.take(self._key(name), run), turn.ids),
                    strict=True,
                )
            )
        except ServiceError as error:  # the storage may be back
            self._queue.append(replace(turn, not_before=time.monotonic() + self._held_seconds))
            log.warning("%s waits: %s", run, error)
            return False
        except EchoDistillError as error:
            self._fail(turn, str(error))
            return False
        claims = {name: claim for name, claim in taken.items() if claim is not None}
        held = tuple(name for name in turn.ids if name not in claims)
        for name in held:
            self._states.set(turn.pack, name, state="waiting", note="another batch trains it")
        if not claims:
            self._requeue(turn.pack, held)
            return False
        for name in claims:
            self._states.set(turn.pack, name, state="queued", note="waits for room in the cluster")
        order = PackOrder(
            spec=self._batch.spec,
            registry=self._registry,
            run_name=run,
            concepts=tuple(self._concepts[name] for name in claims),
            digests={name: self._digests[name] for name in claims},
            earlier={name: claim.runs for name, claim in claims.items()},
            force=self._batch.force,
            patience=self._patience_seconds,
            parent=self._parent.begin(),
            hand_over=self._batch.uri if self._batch.train_only else None,
        )
        actor = _actor(order)
        flown = replace(turn, ids=tuple(claims), run=run)
        self._flights[actor.run.remote()] = _Flight(flown, actor, list(claims.values()), held)
        return True

    def _run_name(self, turn: _Turn) -> str:
        """Return the name of a turn's run: the pack's, or its own while others of the pack wait.

        Two runs of one name would take each other's checkpoints away.
        """
        whole = self._batch.run_name(turn.pack)
        left = {name for name in self._batch.packs[turn.pack] if not self._states[name].over}
        if left <= set(turn.ids):
            return whole
        return f"{whole}-{hashlib.sha256(','.join(sorted(turn.ids)).encode()).hexdigest()[:8]}"

    def _key(self, name: str) -> str:
        """What is claimed: a digest, which a forced batch trains for itself alone."""
        digest = self._digests[name]
        return f"{digest}-{self._batch.id}" if self._batch.force else digest

    def _look(self) -> None:
        """Take over what the packs under way say."""
        import ray
        from ray.exceptions import RayError

        looks = {flight.actor.look.remote(): flight for flight in self._flights.values()}
        if not looks:
            return
        # A pack that does not answer (its process is still starting) is asked again.
        answered, _ = ray.wait(list(looks), num_returns=len(looks), timeout=self._look_seconds)
        for reference in answered:
            flight = looks[reference]
            try:
                look = ray.get(reference)
            except RayError:  # _land hears of it too
                continue
            if look.began and not flight.began:
                flight.began, flight.since = True, time.monotonic()
            if not look.began:
                continue
            seconds = round(time.monotonic() - flight.since, 1)
            for name in flight.turn.ids:
                facts = {"state": "training", "worker": look.worker, "note": "", "seconds": seconds}
                self._states.set(flight.turn.pack, name, **(facts | look.concepts.get(name, {})))

    def _land(self) -> None:
        """Take over the results of the packs that ended, for at most a moment's wait."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        if not self._flights:
            self._stop.wait(min(1.0, self._look_seconds))
            return
        ended, _ = ray.wait(list(self._flights), timeout=min(1.0, self._look_seconds))
        for reference in ended:
            flight = self._flights.pop(reference)
            turn = flight.turn
            try:
                self._take(turn, ray.get(reference))
            except RayTaskError as error:
                cause = error.cause
                if isinstance(cause, AwayError):  # however long that takes: nobody's fault
                    self._wait(turn, str(cause))
                elif isinstance(cause, ServiceError | RayError):  # perhaps on another node
                    self._again(turn, str(cause), seconds=self._away_seconds)
                else:
                    ours = isinstance(cause, EchoDistillError)
                    self._fail(turn, str(cause) if ours else f"{type(cause).__name__}: {cause}")
            except RayError as error:  # its machine or process died
                self._again(turn, f"its process died: {error}")
            _kill(flight.actor)
            self._release(flight.claims)
            self._requeue(turn.pack, flight.held)
            self._save()

    def _take(self, turn: _Turn, results: Iterable[ConceptResult]) -> None:
        """Take over what became of a pack; those that wait for the registry come again."""
        waiting = []
        for result in results:
            if result.state == "waiting":
                waiting.append(result.id)
                self._states.set(turn.pack, result.id, state="waiting", note=result.note)
                self._progress(Event("batch", result.id, result.note))
            else:
                self._settle(turn.pack, result)
        self._requeue(turn.pack, tuple(waiting), self._away_seconds)

    def _settle(self, pack: int, result: ConceptResult) -> None:
        self._metrics.ended(result)
        before = self._states[result.id]
        state = result.as_state()
        failed = state.state == "failed"
        settled = replace(
            state,
            digest=before.digest,
            worker=before.worker,
            loss=before.loss,
            iteration=before.iteration if failed else state.iteration,
            iterations=before.iterations or state.iterations,
            note=self._mend if failed else state.note,
        )
        self._states.put(pack, settled)
        told = state.error or state.note
        self._progress(Event("batch", result.id, ": ".join(filter(None, (state.state, told)))))

    def _fail(self, turn: _Turn, error: str) -> None:
        """Say of a pack's concepts that they failed, but for those that were done by then."""
        done: dict[str, ConceptResult] = {}
        if not self._batch.force:  # then what is registered may be older
            with suppress(EchoDistillError):
                done = self._registered(turn.ids)
        for name in turn.ids:
            failed = ConceptResult(name, "failed", error=error)
            self._settle(turn.pack, done.get(name, failed))

    def _again(self, turn: _Turn, reason: str, seconds: float = 0.0) -> None:
        """Put a pack that broke into the queue again, for its last checkpoint is there."""
        reason = (reason.strip().splitlines() or ["no reason given"])[0][:300]
        tries = self._batch.spec.train.max_failures
        if 0 <= tries < turn.attempt:
            self._fail(turn, f"the pack broke {turn.attempt} times: {reason}")
            return
        self._progress(Event("batch", self._batch.run_name(turn.pack), f"once more: {reason}"))
        for name in turn.ids:
            self._states.set(turn.pack, name, state="queued", note=f"once more: {reason}")
        not_before = time.monotonic() + seconds
        self._queue.appendleft(replace(turn, attempt=turn.attempt + 1, not_before=not_before))

    def _wait(self, turn: _Turn, reason: str) -> None:
        """Put a pack whose storage is away into the queue again, as often as it takes."""
        self._progress(Event("batch", self._batch.run_name(turn.pack), f"waits: {reason}"))
        for name in turn.ids:
            self._states.set(
                turn.pack, name, state="waiting", note=f"waits for the storage: {reason}"
            )
        self._queue.appendleft(replace(turn, not_before=time.monotonic() + self._away_seconds))

    def _requeue(self, pack: int, held: tuple[str, ...], seconds: float | None = None) -> None:
        wait = self._held_seconds if seconds is None else seconds
        if held:
            self._queue.append(_Turn(pack, held, not_before=time.monotonic() + wait))

    def _release(self, claims: Iterable[Claim]) -> None:
        def release(claim: Claim) -> None:
            try:
                self._claims.release(claim)
            except EchoDistillError as error:  # it ends with the lease
                log.warning("a claim could not be given back: %s", error)

        list(self._pool.map(release, claims))


def _actor(order: PackOrder) -> Any:
    import ray

    # Spread, for the machine of the driver would have to hold all packs' results otherwise.
    options = {"num_cpus": 0, "max_concurrency": 2, "scheduling_strategy": "SPREAD"}
    return ray.remote(PackRun).options(**options).remote(order)


def _give_room_back() -> None:
    """Free what packs that died have left taken; a pack never fails for this."""
    try:
        removed = remove_orphaned_groups()
    except Exception as error:  # Ray's head may be away: the next look tries again
        log.warning("placement groups could not be looked through: %s", error)
    else:
        if removed:
            log.warning("%d placement groups of processes that died were removed", removed)


def _kill(actor: Any) -> None:
    import ray

    ray.kill(actor)
