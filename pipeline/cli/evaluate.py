"""`echodistill evaluate`: the figures of registered versions, and what the gate says to them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from model.names import METRICS
from pipeline.cli.interruptible import Interruptible
from pipeline.cli.options import Base, Debug, Json, Sets, SpecFile, TrackingUri
from pipeline.cli.output import Output

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.evaluate import Evaluated, SpecOf

LOG = Path("runs/logs/evaluate.txt")


def evaluate(
    context: typer.Context,
    versions: Annotated[
        list[str],
        typer.Argument(
            metavar="CONCEPT[@VERSION]...",
            help="Concepts: their champions, or the versions or aliases that @ names.",
        ),
    ],
    concepts: Annotated[
        str | None,
        typer.Option(
            "--concepts",
            metavar="PLACE",
            help="Folder or s3:// prefix of the photos; by default where training found them.",
        ),
    ] = None,
    prompts: Annotated[
        int | None, typer.Option(min=1, max=25, help="How many of the 25 prompts.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, max=64, help="Pictures a prompt.")] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Where the pictures go.")
    ] = Path("runs/evaluate"),
    base: Base = None,
    spec: SpecFile = None,
    sets: Sets = None,
    tracking_uri: TrackingUri = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure registered versions anew: CLIP-I, DINO and CLIP-T, and those of the base before.

    Settings are those of the version's own run, but for --base, --spec and --set (such as
    base.metric_clip and base.metric_dino, the networks that measure). Figures are written to the
    version, pictures to its run. Exit code 1 when a version does not pass the gate.
    """
    output: Output = context.obj
    from pipeline.evaluate import evaluate as measure
    from pipeline.tracking import registry_to_read

    counts = {"evaluate.prompts": prompts, "evaluate.seeds": seeds}
    given = [f"{key}={value}" for key, value in counts.items() if value is not None]
    job = Interruptible(output)

    def work() -> list[Evaluated]:
        registry = registry_to_read(tracking_uri)
        return measure(
            versions,
            specs(base, spec, [*(sets or []), *given], registry),
            concepts=concepts,
            out=out,
            tracking_uri=registry,
            progress=job.progress,
        )

    with output.noise_to(LOG):
        found = job.run(work, lambda: None)
    passed = all(one.passed for one in found)
    document = {"versions": [one.as_json() for one in found], "passed": passed}
    output.finish(document, lambda console: _draw(console, found))
    raise typer.Exit(0 if passed else 1)


def specs(base: str | None, file: Path | None, sets: list[str], registry: str) -> SpecOf:
    """Return what gives a version's run spec: its own, or the one that the options name."""
    from pipeline.cli.train import _resolve
    from pipeline.versions import spec_of

    if base is not None or file is not None:
        chosen = _resolve(base, file, sets, None)
        return lambda version: chosen
    return lambda version: spec_of(version, sets, tracking_uri=registry)


def _draw(console: Console, found: list[Evaluated]) -> None:
    """Draw a table for all that was measured alike, with what it was measured by."""
    groups: dict[tuple[str, str], list[Evaluated]] = {}
    for one in found:
        groups.setdefault((one.found.feature_models, one.found.protocol), []).append(one)
    for (models, protocol), members in groups.items():
        console.print(_table(members))
        console.print(f"measured by {models}", markup=False, soft_wrap=True)
        console.print(f"on {protocol} (prompts x seeds); in brackets the base, asked for the class")
    for one in found:
        for note in (*one.against, *filter(None, [one.photos.note])):
            console.print(f"{_name(one)}: {note}", markup=False, soft_wrap=True)
        for path in one.found.pictures.values():
            console.print(str(path), markup=False, soft_wrap=True)


def _table(members: list[Evaluated]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for title in ("version", "", *METRICS.values(), "gate"):
        right = title in METRICS.values()
        table.add_column(title, justify="right" if right else "left", no_wrap=True)
    for one in members:
        figures = one.found.figures()
        table.add_row(
            Text(_name(one)),
            "champion" if one.champion else "",
            *(f"{figures[name]:.3f} ({figures[f'before_{name}']:.3f})" for name in METRICS),
            Text("passed") if one.passed else Text("not passed", style="red"),
        )
    return table


def _name(one: Evaluated) -> str:
    return f"{one.version.concept_id}@{one.version.version}"
