"""`echodistill bench serve`: how fast the endpoint draws, against plain diffusers."""

from __future__ import annotations

import json as json_format
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.options import Debug, Json
from pipeline.cli.output import Output

if TYPE_CHECKING:
    from rich.console import Console


def serve(
    context: typer.Context,
    base: Annotated[
        str,
        typer.Option(help="pocket, sd-turbo (its shapes with random weights), or a base's folder."),
    ] = "pocket",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    concepts: Annotated[int, typer.Option(min=1, help="Different concepts in a batch.")] = 8,
    batches: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...", help="Batch sizes. Default: 1,8 on a CPU, 1,8,32 on a GPU."
        ),
    ] = None,
    clients: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="Also ask the endpoint over HTTP, so many at a time."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16. Default: float32, on a GPU float16."),
    ] = None,
    speeds: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="How networks run: eager, graphs, compile; behind it :channels_last, :benchmark. "
            "Default: eager, on a GPU the three.",
        ),
    ] = None,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Lay convolutions out as NHWC.")
    ] = False,
    rank: Annotated[int, typer.Option(min=1, help="Of the adapters.")] = 16,
    resident: Annotated[
        int, typer.Option(min=0, help="Adapters that are loaded and kept at once.")
    ] = 100,
    seconds: Annotated[float, typer.Option(min=0.0, help="Time of each measurement.")] = 2.0,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FILE", help="Write the JSON document here, as it grows."
        ),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Time pictures of many concepts in one batch. Exit code 1 when others change a picture.

    The adapters are made up: speed depends on their sizes, not on what they draw.
    """
    output: Output = context.obj
    from pipeline.bench_serve import ServeBenchSettings, bench_serve
    from pipeline.bench_serve_report import draw_report
    from pipeline.services import quiet_libraries

    quiet_libraries()
    settings = ServeBenchSettings(
        base=base,
        device=device,
        concepts=concepts,
        batches=numbers_of("--batches", batches),
        clients=numbers_of("--clients", clients) or (),
        dtype=dtype,
        speeds=None if speeds is None else tuple(speeds.split(",")),
        channels_last=channels_last,
        rank=rank,
        resident=resident,
        seconds=seconds,
    )

    write = writer(out)
    with output.noise_to(Path("runs/logs/bench.txt")):
        document = bench_serve(settings, output, write)
        if settings.clients:
            from pipeline.bench_serve_http import bench_http

            bench_http(settings, output, document, write)

    def human(console: Console) -> None:
        draw_report(console, document)
        if out is not None:
            console.print(str(out), markup=False, soft_wrap=True)

    output.finish(document, human)
    raise typer.Exit(0 if document["check"]["passed"] else 1)


def writer(out: Path | None) -> Callable[[dict[str, Any]], None]:
    """Return what writes a document to a file as it grows; nowhere without one.

    Raises:
        OSError: now, and not after all was measured, when it can't be written.
    """
    ready_to_write(out)

    def write(document: dict[str, Any]) -> None:
        if out is not None:
            out.write_text(json_format.dumps(document, indent=2) + "\n")

    return write


def ready_to_write(file: Path | None) -> None:
    """Make the folder of a file that a command will write, and see that it can (OSError)."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("a").close()


def numbers_of(
    option: str, text: str | None, what: str = "numbers", such_as: str = "1,8,32"
) -> tuple[int, ...] | None:
    """Read `1,8,32`.

    Raises:
        InputError: for anything else.
    """
    from model.errors import InputError

    if text is None:
        return None
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(1 <= number <= 256 for number in numbers):
        raise InputError(f"{option} {text!r} must be {what} from 1 to 256, like {such_as}")
    return numbers
