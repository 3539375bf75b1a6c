"""`echodistill compare`: methods side by side, with figures and pictures."""

from __future__ import annotations

import json as json_module
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.interruptible import Interruptible
from pipeline.cli.options import Base, Debug, Json, Sets, SpecFile
from pipeline.cli.output import Output
from pipeline.cli.train import cpus_at_once
from pipeline.progress import Event

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.compare import Comparison

QUICK_CONCEPTS, QUICK_PROMPTS, QUICK_SEEDS = 3, 5, 2
# With the echo round 80.
QUICK_SETTINGS = ["train.iterations=64", "pack.size=3"]


def compare(
    context: typer.Context,
    concepts: Annotated[
        str | None,
        typer.Argument(
            metavar="[CONCEPTS]", help="Folder or s3:// prefix; default: the samples that ship."
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option("--methods", metavar="NAME,NAME", help="Which methods; default: all."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Only so many concepts, spread.")
    ] = None,
    prompts: Annotated[
        int | None, typer.Option("--prompts", min=1, max=25, help="New prompts a concept.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, max=64, help="Pictures a prompt.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", min=0, help="Of the teacher's 25 steps.")
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="3 concepts, 80 iterations, six methods; minutes on a CPU."),
    ] = False,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Where everything is written.")
    ] = Path("runs/compare"),
    base: Base = None,
    spec: SpecFile = None,
    sets: Sets = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Train concepts by several methods with equal budgets and measure one-step pictures of each.

    Identity (by CLIP and by a judge that no training has seen), text agreement and distance to the
    true picture, with 95 % intervals over concepts (none with --quick); compare.json and grid.png
    are written. The same command again trains nothing that is trained.
    """
    output: Output = context.obj
    from components.spec import resolve_spec
    from pipeline.base import base_settings
    from pipeline.methods import QUICK, choose
    from pipeline.services import abort_training, local_ray, quiet_libraries

    quiet_libraries()
    start = time.monotonic()
    preset, own = base_settings(base)
    storage = f'train.storage_path="{out.resolve() / "train"}"'
    fast = QUICK_SETTINGS if quick else []
    resolved = resolve_spec(preset, spec, [*own, storage, *fast, *(sets or [])])
    chosen = choose(methods, QUICK if quick else None)
    # What can be refused without the networks' libraries is refused before they are loaded.
    from pipeline.compare import ask, compare, load_concepts
    from pipeline.compare_report import document, table, write_grid

    found = load_concepts(concepts, limit or (QUICK_CONCEPTS if quick else None))
    question = ask(
        found,
        prompts or (QUICK_PROMPTS if quick else 10),
        seeds or (QUICK_SEEDS if quick else 4),
        resolved.loss.guidance if guidance is None else guidance,
    )
    job = Interruptible(output)

    def cluster() -> AbstractContextManager[None]:
        job.progress(Event("ray", "", "start or connect"))
        return local_ray(cpus=cpus_at_once(resolved), echo=output.debug)

    def work() -> Comparison:
        return compare(found, chosen, resolved, question, progress=job.progress, cluster=cluster)

    with output.noise_to(out / "log.txt"):
        comparison = job.run(work, abort_training)
        write_grid(comparison, out / "grid.png")
    written = document(comparison, resolved, intervals=not quick) | {
        "quick": quick,
        "seconds": round(time.monotonic() - start, 1),
        "grid": str(out / "grid.png"),
    }
    (out / "compare.json").write_text(json_module.dumps(written, indent=2) + "\n")

    def draw(console: Console) -> None:
        console.print(table(comparison, intervals=not quick))
        for row in written["claims"]:
            if row["holds"] is not None:
                console.print(f"{'holds' if row['holds'] else 'FAILS'}  {row['claim']}")
        console.print(f"{out / 'grid.png'}\n{out / 'compare.json'}", markup=False, soft_wrap=True)

    output.finish(written, draw)
    raise typer.Exit(1 if any(each.failed for each in comparison.outcomes) else 0)
