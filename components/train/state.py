"""What the concepts of a batch are at, read from the batch's documents alone.

The driver writes what it knows; what that means once the driver is gone is worked out by the
reader, so that the end of a batch of thousands is one small write.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

from components.ingest import documents, store
from components.ingest.documents import Document
from components.train.batch import Batch, load_batch
from components.train.claims import LEASE, is_alive

State = Literal[
    "invalid",  # left out when it was submitted: `error` lists its problems
    "queued",  # waits for its turn, or for room in the cluster
    "waiting",  # for another batch, which trains the same digest, or for the registry: see `note`
    "training",
    "trained",
    "already",  # the registry had it
    "failed",
    "cancelled",  # the batch was, before its end
    "interrupted",  # nobody hears of its driver: `retry` goes on
]
BatchState = Literal["queued", "running", "done", "cancelled", "failed", "interrupted"]
OVER: tuple[State, ...] = ("invalid", "trained", "already", "failed")
FOUND, PACKS = "found.json", "packs"


@dataclass(frozen=True)
class ConceptState:
    """What one concept is at.

    Attributes:
        id: the concept's id.
        state: see `State`.
        digest: of concept, spec and base; None until a driver worked it out.
        version: of the registered model, or None.
        sha256: of the adapter, or None.
        seconds: of training.
        gpu_seconds: its share of the GPUs' time; 0 on CPUs.
        cost: of those, or None without a price.
        iteration: iterations done.
        iterations: of how many.
        loss: the last losses by name.
        worker: the machine that trains it.
        run_id: its MLflow run, or None.
        promoted: whether the version is the champion.
        note: what a person should know.
        error: why there is no adapter, and what to do.
    """

    id: str
    state: State = "queued"
    digest: str | None = None
    version: str | None = None
    sha256: str | None = None
    seconds: float = 0.0
    gpu_seconds: float = 0.0
    cost: float | None = None
    iteration: int = 0
    iterations: int = 0
    loss: dict[str, float] = field(default_factory=dict)
    worker: str = ""
    run_id: str | None = None
    promoted: bool = False
    note: str = ""
    error: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Give the shape of `--json`."""
        return asdict(self)

    @property
    def losses(self) -> str:
        """Return the losses that tell a person most: the teacher's and the student's."""
        shown = (name for name in ("rec", "mse") if name in self.loss)
        return " ".join(f"{name} {self.loss[name]:.3g}" for name in shown)

    @property
    def over(self) -> bool:
        """Whether nothing is left to do for it."""
        return self.state in OVER

    @property
    def good(self) -> bool:
        """Whether it is trained and through its gate, or was there already."""
        return self.state == "already" or (self.state == "trained" and self.promoted)


@dataclass(frozen=True)
class BatchStatus:
    """A batch and its concepts, by id; `error` says why the driver could not go on."""

    batch: Batch
    state: BatchState
    concepts: tuple[ConceptState, ...]
    job: str | None = None
    registry: str | None = None
    error: str | None = None

    @property
    def over(self) -> bool:
        """Whether nothing goes on any more."""
        return self.state not in ("queued", "running")

    @property
    def counts(self) -> dict[str, int]:
        """Return how many concepts are in each state."""
        return dict(sorted(Counter(one.state for one in self.concepts).items()))

    def as_json(self) -> dict[str, Any]:
        """Give the shape of `--json`."""
        return {
            "batch": self.batch.id,
            "uri": self.batch.uri,
            "prefix": self.batch.prefix,
            "state": self.state,
            "job": self.job,
            "registry": self.registry,
            "error": self.error,
            "counts": self.counts,
            "concepts": [one.as_json() for one in self.concepts],
        }


class BatchView:
    """Reads a batch's status again and again; what has not changed is not read twice."""

    def __init__(self, uri: str) -> None:
        """Read what was submitted.

        Raises:
            InputError: when there is no such batch.
        """
        self.batch = load_batch(uri)
        self._found: Document | None = None
        self._packs: dict[str, Document] = {}

    def read(self) -> BatchStatus:
        """Read what it is at now."""
        uri = self.batch.uri
        lease = documents.read(store.join(uri, LEASE))
        if lease is None:  # no driver has begun, so there is nothing else
            concepts = concept_states(self.batch, {}, {})
            return BatchStatus(self.batch, "queued", tuple(concepts.values()))
        # A driver may have found more since an earlier one, so this is read until the end.
        self._found = documents.read(store.join(uri, FOUND))
        self._packs = documents.read_folder(store.join(uri, PACKS), self._packs)
        found = self._found.value if self._found else {}
        packs = {name: document.value for name, document in self._packs.items()}
        return status_of(self.batch, lease.value, found, packs)


def status_of(
    batch: Batch,
    lease: Mapping[str, Any],
    found: Mapping[str, Any],
    packs: Mapping[str, Mapping[str, Any]],
) -> BatchStatus:
    """Put a status together from a batch's documents."""
    state: BatchState = "running"
    if lease.get("ended"):
        state = lease["ended"]
    elif not is_alive(lease):
        state = "interrupted"
    concepts = concept_states(batch, found, packs)
    error = lease.get("error")
    if state == "queued":  # for its next driver
        concepts = {name: _queued(one) for name, one in concepts.items()}
    elif state not in ("running", "done"):
        concepts = {name: _left(one, state, batch, lease) for name, one in concepts.items()}
    return BatchStatus(
        batch, state, tuple(concepts.values()), lease.get("job"), found.get("registry"), error
    )


def concept_states(
    batch: Batch, found: Mapping[str, Any], packs: Mapping[str, Mapping[str, Any]]
) -> dict[str, ConceptState]:
    """Return every concept's state as it was written last, by id."""
    digests, already = found.get("digests", {}), found.get("already", {})
    written = {name: facts for pack in packs.values() for name, facts in pack.items()}
    states = {}
    for name in batch.concept_ids:
        if name in batch.invalid:
            one = ConceptState(name, "invalid", error="; ".join(batch.invalid[name]))
        else:
            facts = already.get(name) or written.get(name) or {}
            one = ConceptState(name, **{"digest": digests.get(name), **facts})
        states[name] = one
    return states


def as_facts(state: ConceptState) -> dict[str, Any]:
    """Return what is written of a state: what differs from a queued concept's, without the id."""
    plain = asdict(ConceptState(state.id))
    return {k: v for k, v in asdict(state).items() if k not in ("id", "digest") and v != plain[k]}


def write_states(batch: Batch, changed: Iterable[ConceptState]) -> None:
    """Write what some concepts are at once no driver works on their batch any more.

    Raises:
        InputError: when the storage refuses.
        ServiceError: when it is out of reach.
    """
    facts = {one.id: as_facts(one) for one in changed}
    for number, ids in enumerate(batch.packs):
        mine = {name: facts[name] for name in ids if name in facts}
        if mine:
            place = store.join(batch.uri, f"{PACKS}/{number}.json")
            there = documents.read(place)
            documents.write(place, {**(there.value if there else {}), **mine})


def _queued(one: ConceptState) -> ConceptState:
    return one if one.over else replace(one, state="queued", note="")


def _left(
    one: ConceptState, state: BatchState, batch: Batch, lease: Mapping[str, Any]
) -> ConceptState:
    """Say what a concept is at that no driver works on any more, as far as anybody heard."""
    if one.over:
        return one
    if state == "cancelled":
        return replace(one, state="cancelled", note="")
    # By URI: a name alone is looked for below this machine's own storage.
    told = f"{_why(state, lease)}: echodistill retry {batch.uri} goes on where it was"
    return replace(one, state="interrupted", error=told)


def _why(state: BatchState, lease: Mapping[str, Any]) -> str:
    if state != "interrupted":
        return "its driver could not go on"
    if "beat" not in lease:
        return "its driver never began"
    return f"its driver was last heard of at {datetime.fromtimestamp(lease['beat'], UTC):%FT%TZ}"
