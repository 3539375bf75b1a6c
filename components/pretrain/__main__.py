"""Command line: ``python -m components.pretrain build-world | train | evaluate | export ...``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import typer
from diffusers.utils import logging as diffusers_logging
from PIL import Image

from model.errors import EchoDistillError, InputError

if TYPE_CHECKING:
    from components.pretrain.pair import Painter, Pair
    from components.pretrain.world import World

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Make the pocket base pair that ships with the project.",
)


def _device(name: str) -> str:
    """Refuse a device that torch does not have (typer.BadParameter)."""
    kind = name.partition(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise typer.BadParameter(
            f"{name!r} is not there: take cpu, or cuda on a machine with a GPU"
        )
    return name


Work = Annotated[Path, typer.Option(help="Folder of the world, the downloads and the state.")]
Device = Annotated[str, typer.Option(help="cuda or cpu.", callback=_device)]
_WORK = Path("build/pocket")
# Other kinds of file take no notice. A wheat field is a desert where too little is kept.
_SAMPLES: dict[str, Any] = {"quality": 35, "method": 6}
_UNSEEN: dict[str, Any] = {"quality": 60, "method": 6}
_WIDTH = 1024  # of the samples: a page shows them no wider
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
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="Of the recipe: teacher_steps=60000.")
    ] = None,
) -> None:
    """Train the stages that are left; killed or out of time, the same command goes on."""
    from components.pretrain.recipe import DRY, Kitchen, Recipe, adjusted, chosen
    from components.pretrain.training import Clock, OutOfTime

    _built_world(work)
    state = _state(work, dry)
    recipe = adjusted(DRY if dry else Recipe(), sets or ())
    kitchen = Kitchen(recipe, work / "world", state, Clock(seconds), device)
    for stage in chosen(stages):
        try:
            kitchen.cook(stage)
        except OutOfTime as stop:
            typer.echo(f"Out of time at {stop}; run the same command again to go on.")
            raise typer.Exit(1) from None


@app.command("take-shipped")
def take_shipped(
    work: Work = _WORK,
    anew: Annotated[str, typer.Option(help="Stages to train from nothing, comma-separated.")] = "",
    further: Annotated[
        str, typer.Option(help="Stages to train from what is shipped: clip, vae, teacher, student.")
    ] = "",
    dry: Annotated[bool, typer.Option(help="For `train --dry`.")] = False,
) -> None:
    """Take the shipped networks over, so that `train` trains some stages and keeps the others."""
    from components.pretrain.pair import shipped_pair
    from components.pretrain.recipe import take_over

    state = _state(work, dry)
    stages = ([name for name in text.split(",") if name] for text in (anew, further))
    take_over(state, shipped_pair().networks(), *stages)
    typer.echo(f"{state}")


@app.command()
def evaluate(
    work: Work = _WORK,
    pair: Annotated[str, typer.Option(help="trained (in WORK/state) or shipped.")] = "shipped",
    device: Device = _DEVICE,
    count: Annotated[int, typer.Option(help="Compositions for text agreement; 0: none.")] = 96,
    samples: Annotated[Path | None, typer.Option(help="Write a grid of pictures there.")] = None,
    unseen: Annotated[
        Path | None,
        typer.Option(
            help="Write 40 one-step pictures of unseen combinations, drawn by lot; beside them "
            "the teacher's and the truth."
        ),
    ] = None,
    speed: Annotated[bool, typer.Option(help="Time the parts of one picture.")] = False,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: torch's choice.")] = 0,
) -> None:
    """Print the pair's figures as JSON; with --count 0 those that need no built world."""
    from components.pretrain import evaluate as of
    from components.pretrain.training import write_text

    if threads:
        torch.set_num_threads(threads)
    for file in (samples, unseen):
        _writable_picture(file)
    if unseen and not count:
        raise InputError("--unseen needs the world: give --count 1 or more.")
    apart = _world(work, device, drawn="unseen") if count else None
    networks, painter = _pair(pair, work, device)
    figures: dict[str, float] = dict(of.parameters(networks))
    if apart:
        figures |= of.measure(painter, networks.clip, apart, count)
        for kind, held_out in (("seen", False), ("held_out", True)):
            named = of.naming(painter, networks.clip, _world(work, device, held_out), 4 * count)
            figures |= {f"names_{kind}_{key}": value for key, value in named.items()}
    if unseen and apart:
        captions, grids = of.unseen(painter, apart)
        for which, picture in grids.items():
            picture.save(unseen.with_stem(unseen.stem + which), **_UNSEEN)
        write_text(unseen.with_suffix(".txt"), "\n".join(captions) + "\n")
    if speed:
        figures |= {"threads": torch.get_num_threads(), **of.latency(painter)}
    if samples:
        picture = of.samples(painter)
        picture.thumbnail((_WIDTH, _WIDTH))
        picture.save(samples, **_SAMPLES)
    typer.echo(json.dumps(figures, indent=2))


@app.command("export")
def export_pair(work: Work = _WORK, out: Path = Path("model/pocket")) -> None:
    """Pack the finished pair, its folders' configuration and the sample concepts into `out`."""
    from components.pretrain.export import export

    _built_world(work)
    export(work / "state", work / "world", out)
    typer.echo(f"{out}")


@app.command()
def average(
    files: Annotated[list[Path], typer.Argument(help="Packed networks of one origin.")],
    out: Annotated[Path, typer.Option(help="File of their mean.")],
) -> None:
    """Pack the mean of networks that were trained from the same one, such as two students."""
    from components.pretrain.export import mean_of
    from components.pretrain.training import write_tensors

    write_tensors(out, mean_of(files))
    typer.echo(f"{out}")


@app.command("export-judge")
def export_the_judge(
    work: Work = _WORK,
    out: Path = Path("model/judge"),
    truth: Path = Path("model/pocket/truth"),
) -> None:
    """Pack the networks that judge comparisons, and render the truth of the sample concepts."""
    from components.pretrain.judge import export_judge
    from components.pretrain.truth import write_truth
    from components.pretrain.world import World

    _built_world(work)
    export_judge(work / "state", work / "downloads", out)
    write_truth(World(work / "world", "cpu", held_out=True), truth)
    typer.echo(f"{out} {truth}")


def _writable_picture(path: Path | None) -> None:
    """Refuse a picture that can't be written, before anything is measured (InputError)."""
    if path is None:
        return
    if path.suffix.lower() not in Image.registered_extensions():
        raise InputError(f"{path}: name a kind of picture, such as .webp or .png.")
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}.")


def _state(work: Path, dry: bool) -> Path:
    return work / ("state-dry" if dry else "state")


def _built_world(work: Path) -> None:
    if not (work / "world" / "world.json").exists():
        raise InputError(f"No world is built in {work / 'world'}: run build-world first.")


def _world(
    work: Path,
    device: str,
    held_out: bool = False,
    drawn: Literal["all", "unseen"] = "all",
) -> World:
    from components.pretrain.world import World

    _built_world(work)
    return World(work / "world", device, held_out, drawn)


def _pair(which: str, work: Path, device: str) -> tuple[Pair, Painter]:
    from components.pretrain.pair import Painter, shipped_pair, trained_pair

    if which not in ("trained", "shipped"):
        raise InputError(f"--pair {which!r} is neither 'trained' nor 'shipped'.")
    if which == "shipped":
        networks = shipped_pair()
    else:
        networks = trained_pair(work / "state", work / "world")
    return networks, Painter(networks, device)


def main() -> None:
    """Run the command; errors of the project are one sentence and their exit code."""
    diffusers_logging.set_verbosity_error()  # it warns at every cast of a network, which is meant
    try:
        app()
    except EchoDistillError as error:
        typer.echo(f"Error: {error}", err=True)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
