"""Command line: ``python -m components.pretrain build-world | train | evaluate | export``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from model.errors import EchoDistillError

app = typer.Typer(no_args_is_help=True, add_completion=False,
                  help="Make the pocket base pair that ships with the project.")
Work = Annotated[Path, typer.Option(help="Folder of the world, the downloads and the state.")]
Device = Annotated[str, typer.Option(help="cuda or cpu.")]
_WORK = Path("build/pocket")
_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@app.command("build-world")
def build_world(work: Work = _WORK) -> None:
    """Fetch the pinned packages (npm and pip) and build sprites, scenes and tokenizer."""
    from components.pretrain.build import build_world as build

    build(work / "world", work / "downloads")
    typer.echo(f"{work / 'world'}")


@app.command()
def train(
    work: Work = _WORK,
    stages: Annotated[str, typer.Option(help="Comma-separated; default: all.")] = "",
    seconds: Annotated[float, typer.Option(help="Stop after this long, to go on later.")] = 1e9,
    device: Device = _DEVICE,
    dry: Annotated[bool, typer.Option(help="A few steps of everything, to try the code.")] = False,
) -> None:
    """Train the stages that are left; killed or out of time, the same command goes on."""
    from components.pretrain.recipe import DRY, STAGES, Kitchen, Recipe
    from components.pretrain.training import Clock, OutOfTime

    kitchen = Kitchen(DRY if dry else Recipe(), work / "world", work / "state", Clock(seconds),
                      device)
    for stage in [s for s in stages.split(",") if s] or STAGES:
        try:
            kitchen.cook(stage)
        except OutOfTime as stop:
            typer.echo(f"Out of time at {stop}; run the same command again to go on.")
            raise typer.Exit(1) from None


@app.command()
def evaluate(work: Work = _WORK, device: Device = _DEVICE, count: int = 96) -> None:
    """Measure the finished pair; writes evaluation.json and grid.png."""
    from components.pretrain.evaluate import PROMPTS, grid, measure
    from components.pretrain.recipe import Recipe, finished_painter

    painter, clip, world = finished_painter(Recipe(), work, device)
    figures = measure(painter, clip, world, count)
    (work / "evaluation.json").write_text(json.dumps(figures, indent=2))
    rows = [painter.teach(PROMPTS, 1), painter.draw(PROMPTS, 1), painter.draw(PROMPTS, 1, 4)]
    grid(torch.cat(rows), 12).save(work / "grid.png")
    typer.echo(json.dumps(figures))


@app.command("export")
def export_pair(work: Work = _WORK, out: Path = Path("model/pocket")) -> None:
    """Pack the finished pair, its folders' configuration and the sample concepts into `out`."""
    from components.pretrain.export import export

    export(work / "state", work / "world", out)
    typer.echo(f"{out}")


def main() -> None:
    """Run the command; errors of the project are one sentence and their exit code."""
    try:
        app()
    except EchoDistillError as error:
        typer.echo(f"Error: {error}", err=True)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
