"""`echodistill demo`: the main job on this machine, with nothing given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.interruptible import Interruptible
from pipeline.cli.options import Base, Debug, Json, Sets
from pipeline.cli.output import Output

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.demo import DemoOutcome


def demo(
    context: typer.Context,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Where everything is written.")
    ] = Path("runs/demo"),
    base: Base = None,
    concepts: Annotated[
        Path | None,
        typer.Option("--concepts", metavar="DIR", help="Concepts of your own; the first two."),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt", metavar="TEXT", help="Ask for this; {} is the class noun; repeatable."
        ),
    ] = None,
    sets: Sets = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Train two sample concepts end to end, serve them and write a report.

    Starts an S3 server and a Ray of its own and stops them again. A second run trains nothing
    that is done. Exit code 1 when a concept failed or did not pass the gate against its champion.
    """
    output: Output = context.obj
    from components.spec import resolve_spec
    from pipeline.base import base_settings
    from pipeline.demo import ENDPOINT_PROMPTS, demo_concepts, demo_settings, run_demo
    from pipeline.services import abort_training

    if any(not prompt.strip() for prompt in prompts or []):
        raise typer.BadParameter("--prompt is empty: say what to draw, such as 'a {} in the snow'")
    preset, own = base_settings(base)
    spec = resolve_spec(preset, None, [*own, *demo_settings(out), *(sets or [])])
    chosen = demo_concepts(concepts)
    job = Interruptible(output)

    def work() -> DemoOutcome:
        return run_demo(
            spec,
            chosen,
            out,
            prompts=prompts or ENDPOINT_PROMPTS,
            echo=output.debug,
            progress=job.progress,
        )

    with output.noise_to(out / "log.txt"):
        outcome = job.run(work, abort_training)
    output.finish(outcome.summary, lambda console: _draw(console, outcome))
    raise typer.Exit(0 if outcome.all_good else 1)


def _draw(console: Console, outcome: DemoOutcome) -> None:
    summary = outcome.summary
    for concept in summary["concepts"]:
        told = concept["error"] or concept["note"]
        console.print(
            f"{concept['id']}: {concept['state']}, version {concept['version']}, "
            f"{concept['iterations']} iterations in {concept['seconds']:.0f} s"
            + (f" ({told})" if told else ""),
            markup=False,
            soft_wrap=True,
        )
    endpoint = summary["endpoint"]
    console.print(
        f"endpoint: {endpoint['n_answers']} answers, {endpoint['latency_ms']:.0f} ms (median)"
    )
    console.print(f"done in {summary['total_seconds']:.0f} s; look at")
    for path in (outcome.report, outcome.grid, outcome.folder / "summary.json"):
        console.print(f"  {path}", markup=False, soft_wrap=True)
