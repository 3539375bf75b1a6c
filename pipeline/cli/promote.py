"""`echodistill promote` and `rollback`: who is champion, which is what the endpoint serves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.evaluate import specs
from pipeline.cli.options import Base, Debug, Json, Sets, SpecFile, TrackingUri
from pipeline.cli.output import Output

if TYPE_CHECKING:
    from rich.console import Console


def promote(
    context: typer.Context,
    version: Annotated[
        str,
        typer.Argument(
            metavar="CONCEPT[@VERSION]",
            help="A concept: its candidate, or the version or alias that @ names.",
        ),
    ],
    force: Annotated[
        bool, typer.Option("--force", help="Make it champion whatever the gate says.")
    ] = False,
    base: Base = None,
    spec: SpecFile = None,
    sets: Sets = None,
    tracking_uri: TrackingUri = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Make a version champion when the gate lets it.

    The gate (gate.* of its run's spec, or of --spec and --set) wants identity nearer to the photos
    than the class alone, figures above its minima, and none much below the present champion's.
    Exit code 1 when it refuses, with every reason.
    """
    output: Output = context.obj
    from components.promote.promote import promote as put_to_gate
    from model.names import CANDIDATE
    from pipeline.tracking import registry_to_read
    from pipeline.versions import find_version

    registry = registry_to_read(tracking_uri)
    found = find_version(version, registry, default=CANDIDATE)
    gate = specs(base, spec, sets or [], registry)(found).gate
    concept, number = found.concept_id, found.version
    decision = put_to_gate(concept, number, gate, tracking_uri=registry, force=force)
    before = decision.champion_before
    document = {
        "concept": concept,
        "version": str(number),
        "sha256": found.sha256,
        "promoted": decision.promoted,
        "forced": decision.promoted and decision.reasons[0] == "forced",
        "reasons": list(decision.reasons),
        "champion": str(number if decision.promoted else before),
        "champion_before": None if before is None else str(before),
    }

    def human(console: Console) -> None:
        stays = "is the champion" if decision.promoted else "does not become champion"
        console.print(f"{concept} version {number} {stays}:", markup=False, soft_wrap=True)
        for reason in decision.reasons:
            console.print(f"  {reason}", markup=False, soft_wrap=True)
        if not decision.promoted:
            again = f"echodistill promote {concept}@{number} --force   # all the same"
            console.print(again, markup=False, soft_wrap=True)
        elif before not in (None, number):
            console.print(f"echodistill rollback {concept}   # back to version {before}")

    output.finish(document, human)
    raise typer.Exit(0 if decision.promoted else 1)


def rollback(
    context: typer.Context,
    concept: Annotated[str, typer.Argument(metavar="CONCEPT", help="A concept's id.")],
    tracking_uri: TrackingUri = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Make the version champion again that the present champion took the place of."""
    output: Output = context.obj
    from components.promote.promote import rollback as give_back
    from model.names import CANDIDATE
    from pipeline.tracking import registry_to_read
    from pipeline.versions import concept_id_of, find_version

    registry = registry_to_read(tracking_uri)
    find_version(concept_id_of(concept), registry, default=CANDIDATE)  # there is such a concept
    decision = give_back(concept, tracking_uri=registry)
    champion = find_version(concept, registry)
    document = {
        "concept": concept,
        "champion": str(champion.version),
        "champion_before": str(decision.champion_before),
        "sha256": champion.sha256,
        "reasons": list(decision.reasons),
    }

    def human(console: Console) -> None:
        for reason in decision.reasons:
            console.print(f"{concept}: {reason}", markup=False, soft_wrap=True)

    output.finish(document, human)
