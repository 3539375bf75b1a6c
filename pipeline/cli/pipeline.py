"""`echodistill pipeline`: the Kubeflow pipeline, compiled for a cluster or run on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.interruptible import Interruptible
from pipeline.cli.options import Base, Debug, Json, Prefix, Sets, SpecFile, Storage, TrackingUri
from pipeline.cli.output import Output
from pipeline.cli.train import _resolve, cpus_at_once

if TYPE_CHECKING:
    from rich.console import Console

    from components.train.state import BatchStatus

LOG = Path("runs/logs/pipeline.txt")
# Of this source tree, which an image has too, whatever folder the command is typed in.
RAYJOB = Path(__file__).resolve().parents[2] / "infra/k8s/base/rayjob.yaml"

app = typer.Typer(help="The Kubeflow pipeline: compile it, or run its steps on this machine.")


@app.command("compile")
def compile_pipeline(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Where to write it.")],
    base: Base = None,
    spec: SpecFile = None,
    sets: Sets = None,
    rayjob: Annotated[
        Path,
        typer.Option(
            "--rayjob",
            metavar="FILE",
            help="The RayJob that the train step makes.",
            show_default="infra/k8s/base/rayjob.yaml",
        ),
    ] = RAYJOB,
    backend: Annotated[
        str, typer.Option("--backend", help="rayjob, or local: training in the step's own pod.")
    ] = "rayjob",
    image: Annotated[
        str, typer.Option("--image", help="Of the steps; by default that of the RayJob's head.")
    ] = "",
    namespace: Annotated[
        str, typer.Option("--namespace", help="Of the RayJob; by default the steps' own.")
    ] = "",
    storage: Storage = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the pipeline as the YAML that Kubeflow takes.

    Base, run spec, storage and manifest become its parameters' defaults; a run may give others.
    """
    output: Output = context.obj
    resolved = _resolve(base, spec, sets or [], None)
    from components.train.step import BACKENDS
    from model.errors import InputError
    from pipeline.kubeflow import NAME, Settings, compile_to, read_rayjob

    if backend not in BACKENDS:
        raise InputError(f"there is no backend {backend!r}: take {' or '.join(BACKENDS)}")
    if backend == "local" and not image:
        raise InputError("--backend local has no RayJob to take the image from: give --image")
    settings = Settings(
        resolved,
        backend=backend,
        rayjob=read_rayjob(rayjob) if backend == "rayjob" else "",
        image=image,
        namespace=namespace,
        storage=storage or "",
    )
    with output.noise_to(LOG):
        compile_to(settings, out)
    document = {"pipeline": NAME, "file": str(out), "base": resolved.base.name, "backend": backend}

    def human(console: Console) -> None:
        console.print(f"wrote {out}: upload it to Kubeflow Pipelines", markup=False, soft_wrap=True)

    output.finish(document, human)


@app.command("run")
def run_pipeline(
    context: typer.Context,
    prefix: Prefix,
    local: Annotated[
        bool, typer.Option("--local", help="Run every step on this machine, with kfp's runner.")
    ] = False,
    base: Base = None,
    spec: SpecFile = None,
    sets: Sets = None,
    storage: Storage = None,
    tracking_uri: TrackingUri = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Run every step of the pipeline, each in a process of its own.

    The steps are those of the cluster; training takes a local Ray in place of a RayJob. Exit code 1
    when a concept is not valid, failed or did not pass the gate. Ctrl-C or SIGTERM stops
    everything; run it again to go on.
    """
    output: Output = context.obj
    if not local:
        from model.errors import InputError

        raise InputError(
            "pipeline run knows this machine only: add --local, or upload what echodistill "
            "pipeline compile writes to Kubeflow and run it there"
        )
    resolved = _resolve(base, spec, sets or [], tracking_uri)
    from pipeline.kubeflow_local import end_steps, run_here

    job = Interruptible(output)

    def work() -> tuple[str, BatchStatus]:
        cpus = cpus_at_once(resolved)
        return run_here(prefix, resolved, job.progress, cpus=cpus, storage=storage)

    with output.noise_to(LOG):
        name, status = job.run(work, end_steps)
    from pipeline.cli.status import draw

    document = {"run": name, **status.as_json()}
    output.finish(document, lambda console: draw(console, list(status.concepts)))
    raise typer.Exit(0 if all(one.good for one in status.concepts) else 1)
