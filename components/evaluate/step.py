"""The step `evaluate`: measure the versions of a batch that nobody has measured."""

from __future__ import annotations

from dataclasses import replace

from components.evaluate.measure import Measurer
from components.register.registry import get_version
from components.steps import Say, registry_of
from components.train.batch import load_batch, load_concepts
from components.train.handover import TO_JUDGE, TO_MEASURE
from components.train.state import BatchView, write_states
from model.errors import InputError
from model.names import MEASURED, METRICS

Figures = dict[str, dict[str, float]]


def evaluate_batch(batch_uri: str, say: Say) -> Figures:
    """Measure what a batch has registered; returns the figures of its versions, by concept.

    One step does them all, because the networks that draw and measure are loaded once: they weigh
    more than a concept's measuring. What is measured is kept concept by concept, so that a step
    that is started again goes on. A concept that can't be measured stays a candidate.

    Raises:
        InputError: when the base or the feature models can't be used.
        ServiceError: when registry or storage are out of reach, or the disk is full.
    """
    batch = load_batch(batch_uri)
    registry, concepts = registry_of(batch), load_concepts(batch)
    measurer = Measurer(batch.spec, registry)
    figures: Figures = {}
    for one in BatchView(batch_uri).read().concepts:
        if one.state not in ("trained", "already") or one.version is None:
            continue
        version = get_version(one.id, one.version, tracking_uri=registry)
        if version is not None and one.note != TO_MEASURE and MEASURED in version.metrics:
            figures[one.id] = dict(version.metrics)
            continue
        measurer.load()
        try:
            if version is None:
                raise InputError(f"version {one.version} is gone from the registry")
            version, found = measurer.measure(version, concepts[one.id])
        except InputError as error:
            say(f"{one.id}: is not measured: {error}")
            write_states(batch, [replace(one, note=f"is not measured: {error}")])
            continue
        figures[one.id] = found.figures()
        told = ", ".join(f"{title} {found.figures()[name]:.3f}" for name, title in METRICS.items())
        say(f"{one.id}: version {one.version}: {told}")
        write_states(batch, [replace(one, note=TO_JUDGE)])
    return figures


def means(figures: Figures) -> dict[str, float]:
    """Return the mean of each figure over all concepts."""
    names = sorted({name for each in figures.values() for name in each})
    found = {name: [each[name] for each in figures.values() if name in each] for name in names}
    return {name: sum(values) / len(values) for name, values in found.items()}


def table(figures: Figures) -> str:
    """Return the figures as a Markdown table."""
    head = f"| concept | {' | '.join(METRICS.values())} |\n|---{len(METRICS) * '|---:'}|\n"
    rows = (
        f"| {name} | {' | '.join(f'{each[key]:.3f}' for key in METRICS)} |\n"
        for name, each in sorted(figures.items())
        if all(key in each for key in METRICS)
    )
    return head + "".join(rows)
