"""Options that several commands share, so that each has one name and one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Prefix = Annotated[
    str,
    typer.Argument(
        metavar="PREFIX",
        help="A folder or s3:// prefix of concept folders, or one concept's own folder.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, logs on stderr.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and what libraries say.")]
Base = Annotated[
    str | None,
    typer.Option(
        "--base",
        help="A base that ships (pocket), a preset, or a folder that holds teacher/ and student/.",
    ),
]
SpecFile = Annotated[Path | None, typer.Option("--spec", metavar="FILE", help="A run spec (YAML).")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="One setting of the run spec; repeatable."),
]
TrackingUri = Annotated[
    str | None,
    typer.Option(
        "--tracking-uri",
        envvar="MLFLOW_TRACKING_URI",
        help="MLflow server or database that tracks runs and registers adapters.",
    ),
]
Report = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="FILE",
        help="Write an HTML page: every concept with pictures (from the registry), figures, time "
        "and cost.",
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        envvar="RAY_API_SERVER_ADDRESS",
        metavar="URL",
        help="The Ray cluster's dashboard (http://127.0.0.1:8265); RAY_AUTH_TOKEN is its token.",
    ),
]
Storage = Annotated[
    str | None,
    typer.Option(
        "--storage",
        envvar="ECHODISTILL_STORAGE",
        metavar="URI",
        help="Where batches, checkpoints and uploaded photos are: s3://..., or a folder that every "
        "node sees.",
    ),
]
BatchName = Annotated[
    str | None,
    typer.Argument(metavar="BATCH", help="A batch's id or URI; the last one by default."),
]
