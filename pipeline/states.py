"""What the concepts of a batch are at, as its driver knows it and as the storage has it."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from components.ingest import documents, store
from components.train.batch import Batch
from components.train.state import PACKS, ConceptState, as_facts
from model.errors import EchoDistillError

log = logging.getLogger(__name__)


class States:
    """The states of one batch, written a document a pack.

    Attributes:
        by_id: every concept's state.

    """

    def __init__(self, batch: Batch, pool: ThreadPoolExecutor) -> None:
        self._batch = batch
        self._pool = pool
        self.by_id: dict[str, ConceptState] = {}
        self._changed: set[int] = set()

    def __getitem__(self, name: str) -> ConceptState:
        """Return what a concept is at."""
        return self.by_id[name]

    def set(self, pack: int, name: str, **facts: Any) -> None:
        """Change some facts of a concept."""
        self.put(pack, replace(self.by_id[name], **facts))

    def put(self, pack: int, state: ConceptState) -> None:
        """Take over a concept's state."""
        if state != self.by_id[state.id]:
            self.by_id[state.id] = state
            self._changed.add(pack)

    def save(self) -> bool:
        """Write the packs that changed; tells whether all are: the rest is written later."""
        numbers, self._changed = sorted(self._changed), set()

        def save(number: int) -> int | None:
            facts = {name: as_facts(self.by_id[name]) for name in self._batch.packs[number]}
            try:
                documents.write(store.join(self._batch.uri, f"{PACKS}/{number}.json"), facts)
            except EchoDistillError as error:
                log.warning("the state of pack %d could not be written: %s", number, error)
                return number
            return None

        unwritten = self._pool.map(save, numbers)
        self._changed |= {number for number in unwritten if number is not None}
        return not self._changed
