"""`echodistill bench`: how fast training is, against the plain loop of the same method.

`bench serve` is in `bench_serve.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.bench_serve import numbers_of, ready_to_write, serve, writer
from pipeline.cli.options import Debug, Json, Sets
from pipeline.cli.output import Output

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(no_args_is_help=True, help="Measure how fast the product is on this machine.")


@app.callback()
def _root() -> None:
    """Measure how fast the product is on this machine."""


app.command("serve")(serve)


@app.command("train")
def train(
    context: typer.Context,
    base: Annotated[
        str,
        typer.Option(help="pocket, sd-turbo (its shapes with random weights), or a base's folder."),
    ] = "pocket",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    packs: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Pack sizes; without: 1,2,4 on a CPU, up to the largest that fits on a GPU.",
        ),
    ] = None,
    iterations: Annotated[int, typer.Option(min=1, help="Timed, for each pack size.")] = 10,
    warmup: Annotated[int, typer.Option(min=0, help="Done before them.")] = 2,
    precision: Annotated[
        str | None, typer.Option(help="Of the engine: float32 or bf16. Default: the preset's.")
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(help="Side of a picture in pixels. Default: the preset's.")
    ] = None,
    sets: Sets = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FILE", help="Write the JSON document here, as it grows."
        ),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the torch profiler's tables of one iteration."),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Time the training engine by pack size. Exit code 1 when it and the plain loop disagree."""
    output: Output = context.obj
    from pipeline.bench import BenchSettings, bench_train
    from pipeline.bench_report import draw_report
    from pipeline.services import quiet_libraries

    quiet_libraries()
    settings = BenchSettings(
        base=base,
        device=device,
        packs=numbers_of("--packs", packs, "sizes", "1,2,4"),
        iterations=iterations,
        warmup=warmup,
        precision=precision,
        sets=tuple(sets or ()),
        resolution=resolution,
        profile=profile,
    )

    write = writer(out)
    ready_to_write(profile)
    with output.noise_to(Path("runs/logs/bench.txt")):
        document = bench_train(settings, output, write)

    def human(console: Console) -> None:
        draw_report(console, document)
        for path in (out, profile):
            if path is not None:
                console.print(str(path), markup=False, soft_wrap=True)

    output.finish(document, human)
    raise typer.Exit(0 if document["check"]["passed"] else 1)
