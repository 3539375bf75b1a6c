"""A benchmark's document as tables for a person."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def draw_report(console: Console, document: dict[str, Any]) -> None:
    """Print what a benchmark found."""
    words = (
        f"{document['base']} at {document['resolution']} px, batch {document['batch_size']}, "
        f"{document['iterations']} iterations; {document['device_name']}, "
        f"{document['threads']} threads, torch {document['torch']}"
    )
    words = "; ".join([words, *document["settings"]])
    console.print(words, markup=False, soft_wrap=True)
    rows = [(f"plain {row['precision']}", row) for row in document["naive"]]
    rows += [(f"pack {row['size']} {document['precision']}", row) for row in document["packs"]]
    if rows:
        for table in (_speeds(rows), _work(rows), _parts(rows)):
            console.print()
            console.print(table)
        console.print()
    matmul, check, stopped = (document[name] for name in ("matmul", "check", "stopped"))
    if matmul:
        rate = _number(matmul["tflops"])
        console.print(f"matmul: {rate} TFLOP/s ({matmul['dtype']}, {matmul['size']} wide)")
    if check:
        colour = "green" if check["passed"] else "bold red"
        word = "agree" if check["passed"] else "DIFFER"
        errors = f"of a loss {check['loss_error']:.1e}, of the movement {check['move_error']:.1e}"
        console.print(Text(f"engine and plain loop {word}: relative error {errors}", colour))
    if stopped:
        words = f"no pack of {stopped['size']}: {stopped['reason']}"
        console.print(words, markup=False, soft_wrap=True)


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(names[0], no_wrap=True)
    for name in names[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _speeds(rows: list[tuple[str, dict[str, Any]]]) -> Table:
    """Times are for one iteration of one concept."""
    table = _table("", "ms", "min", "max", "speed", "concepts/h", "with echo", "peak GiB")
    for title, row in rows:
        hourly = row["concepts_per_hour"]
        table.add_row(
            title,
            f"{row['ms_per_concept']:.1f}",
            f"{row['ms_per_concept_min']:.1f}",
            f"{row['ms_per_concept_max']:.1f}",
            f"{row['speedup']:.2f}x" if "speedup" in row else "",
            _number(hourly["thousand_iterations"]),
            _number(hourly["recipe"]) if "recipe" in hourly else "",
            f"{row['peak_gib']:.2f}",
        )
    return table


def _work(rows: list[tuple[str, dict[str, Any]]]) -> Table:
    table = _table("", "TFLOP", "TFLOP/s", "of matmul")
    for title, row in rows:
        work, rate = _number(row["tflop_per_concept"]), _number(row["tflops"])
        table.add_row(title, work, rate, f"{row['share_of_matmul']:.1%}")
    return table


def _parts(rows: list[tuple[str, dict[str, Any]]]) -> Table:
    """Waiting after every part costs some time, so the sum is a little over the iteration's."""
    table = _table("ms by part", *(title for title, _ in rows))
    for name in dict.fromkeys(name for _, row in rows for name in row["parts_ms"]):
        times = [row["parts_ms"].get(name) for _, row in rows]
        table.add_row(name, *("" if each is None else f"{each:.1f}" for each in times))
    return table


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
