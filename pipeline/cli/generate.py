"""`echodistill generate`: pictures from the registry, without a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.interruptible import Interruptible
from pipeline.cli.options import Debug, Json, TrackingUri
from pipeline.cli.output import Output

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.generate import Generated


def generate(
    context: typer.Context,
    concept: Annotated[
        str, typer.Argument(metavar="CONCEPT", help="A concept's id, or id@version or id@alias.")
    ],
    prompt: Annotated[str, typer.Argument(help='Such as "a photo of a dog on the beach".')],
    seed: Annotated[
        int,
        # What JSON holds exactly: the endpoint takes no more either.
        typer.Option(min=0, max=2**53 - 1, help="Of the first picture; the next has one more."),
    ] = 0,
    steps: Annotated[int, typer.Option(help="Network evaluations: 1, 2 or 4.")] = 1,
    n: Annotated[int, typer.Option("--n", "-n", help="How many pictures.")] = 1,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Where the pictures go.")
    ] = Path("runs/pictures"),
    base: Annotated[
        str | None,
        typer.Option("--base", help="A folder that holds the adapter's teacher/ and student/."),
    ] = None,
    tracking_uri: TrackingUri = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw a registered concept under a new prompt."""
    output: Output = context.obj
    from pipeline.base import own_base
    from pipeline.generate import generate as draw_pictures

    job = Interruptible(output)
    own = own_base(base) if base not in (None, "pocket") else None

    def work() -> Generated:
        return draw_pictures(
            concept,
            prompt,
            seed=seed,
            steps=steps,
            n=n,
            out=out,
            tracking_uri=tracking_uri,
            base=own,
            progress=job.progress,
        )

    with output.noise_to(Path("runs/logs/generate.txt")):
        made = job.run(work, lambda: None)
    output.finish(_document(made), lambda console: _draw(console, made))


def _document(made: Generated) -> dict[str, object]:
    return {
        "concept": made.concept,
        "version": str(made.version),
        "sha256": made.sha256,
        "prompt": made.prompt,
        "seeds": list(made.seeds),
        "image_paths": [str(path) for path in made.paths],
        "seconds": round(made.seconds, 3),
    }


def _draw(console: Console, made: Generated) -> None:
    for path in made.paths:
        console.print(str(path), markup=False, soft_wrap=True)
    console.print(
        f"{made.concept} version {made.version} ({made.sha256[:12]}): {made.prompt}",
        markup=False,
        soft_wrap=True,
    )
