"""`echodistill check`: every problem of every concept, before a GPU is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.options import Base, Debug, Json, Prefix, Sets, SpecFile
from pipeline.cli.output import Output
from pipeline.cli.train import _resolve

if TYPE_CHECKING:
    from rich.console import Console

    from components.ingest.concept_folder import CheckedConcept


def check(
    context: typer.Context,
    prefix: Prefix,
    grid: Annotated[
        Path | None,
        typer.Option(
            "--grid",
            metavar="PNG",
            help="Write what training will see: a row a photo, first the photo as it is, then "
            "random views of it. The darkened parts of a view do not count.",
        ),
    ] = None,
    base: Base = None,
    spec: SpecFile = None,
    sets: Sets = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Check concepts: images, class nouns, tokens. Exit code 1 when one is not valid.

    The run spec is for --grid: give the one that training will have.
    """
    from components.ingest.concept_folder import check_prefix

    output: Output = context.obj
    resolved = _resolve(base, spec, sets or [], None)
    checked = check_prefix(prefix)
    if grid is not None:
        from pipeline.preview import write_view_grid

        concepts = [one.concept for one in checked if one.concept is not None]
        write_view_grid(concepts, resolved, grid)
    document: dict[str, Any] = {"concepts": [as_json(one) for one in checked]}
    if grid is not None:
        document["grid"] = str(grid)
    output.finish(document, lambda console: _draw(console, checked, grid))
    raise typer.Exit(0 if all(one.valid for one in checked) else 1)


def as_json(checked: CheckedConcept) -> dict[str, Any]:
    """One checked concept in the shape of `--json`."""
    return {
        "id": checked.id,
        "valid": checked.valid,
        "class_noun": checked.class_noun,
        "n_images": checked.n_images,
        "problems": list(checked.problems),
    }


def _draw(console: Console, checked: list[CheckedConcept], grid: Path | None) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in ("concept", "class noun", "images", "problems"):
        table.add_column(name, justify="right" if name == "images" else "left", overflow="fold")
    for one in checked:
        problems = Text("\n".join(one.problems) or "none", style="" if one.valid else "red")
        table.add_row(Text(one.id), Text(one.class_noun or "?"), str(one.n_images), problems)
    console.print(table)
    valid = sum(one.valid for one in checked)
    console.print(f"{valid} of {len(checked)} concepts are valid")
    if grid is not None:
        console.print(f"views: {grid}", markup=False, soft_wrap=True)
        console.print("  a row a photo: the photo, then views of it; darkened parts do not count")
