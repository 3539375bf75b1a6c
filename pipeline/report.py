"""The report of a run: one HTML file that holds its pictures, curves and numbers."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

from components.ingest.cache import replacing

# A curve is drawn in a box of this size (SVG user units), inside margins for its labels.
CHART_WIDTH, CHART_HEIGHT = 320, 150
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 22
SMOOTHING = 0.9
SHOWN_PIXELS = 192


@dataclass(frozen=True)
class Picture:
    """A picture on disk and the words under it."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Row:
    """Pictures that belong side by side, such as "student, before" under four prompts."""

    title: str
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class ConceptSection:
    """What the report shows of one concept. `metrics` maps a name to (before, after)."""

    id: str
    subtitle: str
    facts: tuple[tuple[str, str], ...]
    rows: tuple[Row, ...]
    metrics: dict[str, tuple[float | None, float | None]]
    curves: dict[str, list[tuple[int, float]]]
    note: str = ""


@dataclass(frozen=True)
class Summary:
    """A table at a report's head: titles, and a row a concept, which begins with its id."""

    titles: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Report:
    """A whole report.

    Attributes:
        title: its headline.
        introduction: a sentence or two.
        facts: label and value pairs, shown at its head.
        sections: of the concepts.
        footnotes: sentences at its end.
        summary: a table of all concepts, or None.
        failures: concept, and why it failed and what to do.
    """

    title: str
    introduction: str
    facts: tuple[tuple[str, str], ...]
    sections: tuple[ConceptSection, ...]
    footnotes: tuple[str, ...] = ()
    summary: Summary | None = None
    failures: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Line:
    """One concept's points of one chart, as SVG `points` strings, raw and smoothed."""

    concept: str
    colour: int
    raw: str
    smooth: str


@dataclass(frozen=True)
class Chart:
    """A loss over iterations for every concept that has it."""

    name: str
    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    width: int = CHART_WIDTH
    height: int = CHART_HEIGHT
    left: int = LEFT
    right: int = CHART_WIDTH - RIGHT
    bottom: int = field(default=CHART_HEIGHT - BOTTOM)


def data_uri(path: Path, pixels: int = SHOWN_PIXELS) -> str:
    """A picture as a data URI, scaled down to at most `pixels` on its longer side."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    image.thumbnail((pixels, pixels), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def smoothed(values: Sequence[float], weight: float = SMOOTHING) -> list[float]:
    """Exponential moving average, unbiased at its start."""
    mean, total, result = 0.0, 0.0, []
    for value in values:
        mean = weight * mean + (1 - weight) * value
        total = weight * total + (1 - weight)
        result.append(mean / total)
    return result


def chart(name: str, curves: dict[str, list[tuple[int, float]]], colours: dict[str, int]) -> Chart:
    """Lays out one chart; values that are not finite are left out."""
    finite = {
        concept: [(x, y) for x, y in points if math.isfinite(y)]
        for concept, points in curves.items()
    }
    finite = {concept: points for concept, points in finite.items() if points}
    every = [point for points in finite.values() for point in points]
    if not every:
        return Chart(name, (), (), ())
    last = max(max(x for x, _ in every), 1)
    low, high = min(y for _, y in every), max(y for _, y in every)
    low = min(0.0, low)
    span = (high - low) or 1.0

    def across(x: float) -> float:
        return LEFT + (CHART_WIDTH - LEFT - RIGHT) * x / last

    def up(y: float) -> float:
        return CHART_HEIGHT - BOTTOM - (CHART_HEIGHT - BOTTOM - TOP) * (y - low) / span

    lines = []
    for concept, points in finite.items():
        even = smoothed([y for _, y in points])
        lines.append(
            Line(
                concept,
                colours[concept],
                " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points),
                " ".join(
                    f"{across(x):.1f},{up(y):.1f}" for (x, _), y in zip(points, even, strict=True)
                ),
            )
        )
    return Chart(
        name,
        tuple(lines),
        tuple((across(x), str(x)) for x in dict.fromkeys((0, last // 2, last))),
        tuple((up(y), f"{y:.3g}") for y in (low, low + span / 2, low + span)),
    )


def charts(sections: Sequence[ConceptSection]) -> list[Chart]:
    """One chart per loss, in the order in which the concepts name them."""
    names = dict.fromkeys(name for section in sections for name in section.curves)
    colours = {section.id: index for index, section in enumerate(sections)}
    drawn = [
        chart(name, {s.id: s.curves[name] for s in sections if name in s.curves}, colours)
        for name in names
    ]
    return [one for one in drawn if one.lines]


def render(report: Report) -> str:
    """The HTML of a report: no script, no link to anything outside it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = data_uri
    environment.filters["number"] = lambda value: "–" if value is None else f"{value:.3f}"
    template = environment.get_template("report.html.j2")
    shown = {section.id for section in report.sections}
    return template.render(report=report, charts=charts(report.sections), shown=shown)


def write_report(report: Report, path: Path) -> None:
    """Write the report whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(render(report), encoding="utf-8")


def picture_grid(rows: Sequence[Row], path: Path, cell: int = 144) -> None:
    """Write one PNG with a line of pictures for every row, its title at the left."""
    columns = max((len(row.pictures) for row in rows), default=1)
    margin, title_width, text_height = 8, 150, 30
    step = cell + margin + text_height
    sheet = Image.new(
        "RGB", (title_width + columns * (cell + margin), len(rows) * step + margin), "white"
    )
    pen = ImageDraw.Draw(sheet)
    for index, row in enumerate(rows):
        top = margin + index * step
        title = _wrapped(pen, row.title, title_width - 2 * margin, lines=6)
        pen.multiline_text((margin, top + cell // 3), title, fill="black")
        for column, picture in enumerate(row.pictures):
            left = title_width + column * (cell + margin)
            with Image.open(picture.path) as opened:
                image = ImageOps.contain(opened.convert("RGB"), (cell, cell))
            sheet.paste(image, (left, top))
            caption = _wrapped(pen, picture.caption, cell, lines=2)
            pen.multiline_text((left, top + cell + 1), caption, fill="#555555", spacing=1)
    with replacing(path) as temporary:
        sheet.save(temporary, "PNG")


def _wrapped(pen: ImageDraw.ImageDraw, text: str, width: float, lines: int) -> str:
    """Break a text into lines of at most `width` pixels; what is too long is cut."""
    broken: list[str] = []
    for word in text.split():
        if broken and pen.textlength(f"{broken[-1]} {word}") <= width:
            broken[-1] += f" {word}"
        else:
            broken.append(word)
    return "\n".join(broken[:lines])
