"""Measuring a registered version and letting it take the champion's place."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from components.ingest.concept_folder import Concept
from components.promote.promote import GATE_TAG, Decision, promote
from components.register.registry import RegisteredVersion, get_version
from components.spec import RunSpec
from model.names import CHAMPION, MEASURED
from pipeline.progress import Event, Progress

if TYPE_CHECKING:  # the networks' libraries take seconds, and a version may be measured already
    from components.evaluate.evaluate import Metrics
    from components.evaluate.measure import Measurer


class Assessor:
    """Evaluates and promotes versions of one base; its models are loaded once, when needed."""

    def __init__(self, spec: RunSpec, registry: str, progress: Progress) -> None:
        self._spec = spec
        self._registry = registry
        self._progress = progress

    @cached_property
    def _measurer(self) -> Measurer:
        from components.evaluate.measure import Measurer

        return Measurer(self._spec, self._registry)

    def assess(
        self, version: RegisteredVersion, concept: Concept, adapter_dir: Path | None = None
    ) -> tuple[RegisteredVersion, Decision]:
        """Measure a version, record the figures and put it to the gate.

        Without `adapter_dir` the adapter comes from the registry.
        """
        version, _ = self.measure(version, concept, adapter_dir)
        return version, self._promote(version, concept)

    def measure(
        self,
        version: RegisteredVersion,
        concept: Concept,
        adapter_dir: Path | None = None,
        out: Path | None = None,
    ) -> tuple[RegisteredVersion, Metrics]:
        """Measure a version and record the figures; returns it with them (see `Measurer`)."""
        settings = self._spec.evaluate
        words = f"version {version.version}: {settings.prompts} prompts, {settings.seeds} seeds"
        self._progress(Event("evaluate", concept.id, words))
        return self._measurer.measure(version, concept, adapter_dir, out)

    def finish(
        self, version: RegisteredVersion, concept: Concept
    ) -> tuple[RegisteredVersion, Decision]:
        """Do what an interrupted run left undone: evaluation, or the gate.

        A version that the gate has seen is left as it is, also when it was rolled back since.
        """
        if MEASURED not in version.metrics:
            return self.assess(version, concept)
        champion = get_version(concept.id, CHAMPION, tracking_uri=self._registry)
        unseen = GATE_TAG not in version.tags
        if champion is None or (unseen and champion.version < version.version):
            return version, self._promote(version, concept)
        reigns = champion.version == version.version
        return version, Decision(reigns, (f"version {champion.version} is the champion",))

    def _promote(self, version: RegisteredVersion, concept: Concept) -> Decision:
        decision = promote(
            concept.id, version.version, self._spec.gate, tracking_uri=self._registry
        )
        stays = "is the champion" if decision.promoted else "stays a candidate"
        reasons = "; ".join(decision.reasons)
        self._progress(
            Event("promote", concept.id, f"version {version.version} {stays}: {reasons}")
        )
        return decision
