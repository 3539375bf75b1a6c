"""The document of a benchmark of serving as tables for a person."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def draw_report(console: Console, document: dict[str, Any]) -> None:
    """Print what a benchmark of serving found."""
    words = (
        f"{document['base']} in {document['dtype']}, {document['concepts']} concepts; "
        f"{document['device_name']}, {document['threads']} threads, torch {document['torch']}; "
        f"one step, to JPEG by {document['encoders']} threads"
    )
    console.print(words, markup=False, soft_wrap=True)
    console.print()
    console.print(_engine(document))
    console.print()
    if document["http"]:
        console.print(_http(document["http"]))
        console.print()
    resident, latency, check = (document[name] for name in ("resident", "latency_ms", "check"))
    if latency:
        steps = ", ".join(f"{n} steps {latency[f'steps_{n}']['ms']:.1f}" for n in (1, 2, 4))
        console.print(f"one picture to JPEG, in ms, {latency['speed']}: {steps}", markup=False)
    if resident:
        console.print(
            f"{resident['adapters']} adapters of rank {resident['rank']} in memory: "
            f"{resident['bytes'] / 2**20:.0f} MiB; loaded in {document['cold_load_ms']:.1f} ms",
            markup=False,
        )
    if check:
        word = "passed" if check["passed"] else "NOT PASSED"
        text = (
            f"check {word}: of 255 levels, {check['within_size']} apart within a padded size, "
            f"{check['across_sizes']} across sizes, {check['plain_diffusers']} from plain diffusers"
        )
        console.print(Text(text, "green" if check["passed"] else "bold red"))
    for name, error in document.get("failed", {}).items():
        console.print(f"not measured: {name}: {error.splitlines()[0]}", markup=False)


def _engine(document: dict[str, Any]) -> Table:
    table = _table("", "batch", "images/s", "mixed/one", "ms", "new prompts", "of matmul", "GiB")
    for row in document["plain_diffusers"]:
        table.add_row("plain diffusers", str(row["batch"]), f"{row['images_per_s']:.2f}")
    for row in document["engine"]:
        table.add_row(
            f"engine, {row['speed']}",
            str(row["batch"]),
            f"{row['images_per_s']:.2f}",
            f"{row['mixed_over_single']:.3f}",
            f"{row['draw_ms']['ms']:.1f}",
            f"{row['new_prompts_draw_ms']:.1f}",
            f"{row.get('share_of_matmul', 0):.1%}",
            f"{row['peak_gib']:.1f}",
        )
    return table


def _http(rows: list[dict[str, Any]]) -> Table:
    table = _table("HTTP clients", "images/s", "of engine", "ms, median", "ms, 95 %", "refused")
    for row in rows:
        table.add_row(
            str(row["clients"]),
            f"{row['images_per_s']:.2f}",
            f"{row['over_engine']:.0%}",
            f"{row['ms_median']:.0f}",
            f"{row['ms_95']:.0f}",
            str(row["refused"]),
        )
    return table


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(names[0], no_wrap=True)
    for name in names[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    return table
