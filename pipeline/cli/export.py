"""`echodistill export`: an adapter as files that other programs read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from model.errors import InputError
from pipeline.cli.interruptible import Interruptible
from pipeline.cli.options import Debug, Json, TrackingUri
from pipeline.cli.output import Output
from pipeline.export_card import Exported


def export(
    context: typer.Context,
    format: Annotated[
        str, typer.Option("--format", metavar="NAME", help="diffusers, kohya, comfyui or full.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where the files go.")],
    concept: Annotated[
        str | None,
        typer.Argument(metavar="CONCEPT", help="A concept's id, or id@version or id@alias."),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option("--adapter", metavar="DIR", help="An adapter's folder, in place of CONCEPT."),
    ] = None,
    rank: Annotated[
        str | None,
        typer.Option("--rank", metavar="N", help="The rank of the factors; auto by default."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="A folder that holds the adapter's teacher/ and student/."),
    ] = None,
    tracking_uri: TrackingUri = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write an adapter for diffusers, kohya or ComfyUI, and measure what that costs.

    `full` is whole matrices for plain diffusers without peft. The folder's README says how to draw
    with it.
    """
    output: Output = context.obj
    from pipeline.base import own_base
    from pipeline.export import export as write_export

    if (concept is None) == (adapter is None):
        raise InputError("give a CONCEPT of the registry or a folder with --adapter, one of both")
    job = Interruptible(output)
    own = own_base(base) if base not in (None, "pocket") else None

    def work() -> Exported:
        return write_export(
            concept,
            adapter_dir=adapter,
            format=format,
            rank=rank,
            out=out,
            tracking_uri=tracking_uri,
            base=own,
            progress=job.progress,
        )

    with output.noise_to(Path("runs/logs/export.txt")):
        made = job.run(work, lambda: None)
    document = {**made.document(), "folder": str(out)}
    output.finish(document, lambda console: _say(output, made, out))


def _say(output: Output, made: Exported, out: Path) -> None:
    from pipeline.export_card import human

    for line in human(made, str(out)):
        output.say(line)
