"""The report: whole, self-contained, and its curves where the numbers say."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from pipeline.report import (
    CHART_HEIGHT,
    CHART_WIDTH,
    LEFT,
    RIGHT,
    TOP,
    ConceptSection,
    Picture,
    Report,
    Row,
    chart,
    picture_grid,
    render,
    smoothed,
    write_report,
)


class Collector(HTMLParser):
    """Gathers attributes that could load something, and whether tags are balanced."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in {"src", "href", "srcset"}]
        if tag not in {"meta", "img", "br", "line", "polyline"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def report(tmp_path: Path) -> Report:
    red, blue = tmp_path / "red.png", tmp_path / "blue.png"
    Image.new("RGB", (400, 300), (200, 30, 30)).save(red)
    Image.new("RGBA", (64, 64), (30, 30, 200, 255)).save(blue)
    sections = tuple(
        ConceptSection(
            id=name,
            subtitle="a photo of a <new1> dog",
            facts=(("version", "1"),),
            rows=(Row("references", (Picture(red, "00.png"), Picture(blue, "01.png"))),),
            metrics={"CLIP-I": (0.5, 0.75), "DINO": (None, 0.25)},
            curves={"L_mse": [(0, 4.0), (5, 2.0), (10, 1.0)], "L_id": [(0, float("nan"))]},
        )
        for name in ("fox", "owl")
    )
    return Report("Title & more", "What it is.", (("seconds", "12"),), sections, ("A note.",))


def test_report_is_one_balanced_file_that_loads_nothing(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(report, path)
    text = path.read_text(encoding="utf-8")
    page = Collector()
    page.feed(text)
    assert page.open == []
    assert "script" not in page.tags
    assert len(page.links) == 4
    assert all(link.startswith("data:image/jpeg;base64,") for link in page.links)
    picture = Image.open(io.BytesIO(base64.b64decode(page.links[0].split(",")[1])))
    assert picture.size == (192, 144)
    assert picture.getpixel((90, 70))[0] > 150
    assert "url(" not in text and "@import" not in text
    # Words from outside are escaped.
    assert "Title &amp; more" in text and "&lt;new1&gt;" in text
    assert "<td>CLIP-I</td><td>0.500</td><td>0.750</td>" in text
    assert "<td>DINO</td><td>–</td><td>0.250</td>" in text
    assert [p.name for p in tmp_path.iterdir() if "part" in p.name] == []


def test_report_draws_a_chart_for_every_loss_that_has_values(report: Report) -> None:
    text = render(report)
    assert re.findall(r'aria-label="(.*?) over', text) == ["L_mse"]
    assert text.count("<polyline") == 4  # two concepts, raw and smoothed


def test_chart_puts_points_where_the_numbers_say() -> None:
    drawn = chart("L", {"fox": [(0, 0.0), (50, 1.0), (100, 2.0)]}, {"fox": 0})
    points = [tuple(map(float, p.split(","))) for p in drawn.lines[0].raw.split()]
    bottom = CHART_HEIGHT - 22
    assert points == [
        (LEFT, bottom),
        ((LEFT + CHART_WIDTH - RIGHT) / 2, (bottom + TOP) / 2),
        (CHART_WIDTH - RIGHT, TOP),
    ]
    assert [label for _, label in drawn.x_ticks] == ["0", "50", "100"]
    assert [label for _, label in drawn.y_ticks] == ["0", "1", "2"]


def test_smoothing_keeps_a_constant_and_starts_unbiased() -> None:
    assert smoothed([3.0] * 5) == pytest.approx([3.0] * 5)
    assert smoothed([1.0, 3.0], weight=0.5) == pytest.approx([1.0, (0.25 * 1 + 0.5 * 3) / 0.75])


def test_picture_grid_holds_every_picture(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "grid.png"
    picture_grid(report.sections[0].rows * 2, path, cell=64)
    with Image.open(path) as sheet:
        assert sheet.width >= 150 + 2 * 64 and sheet.height >= 2 * 64
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(1 << 20)}
    assert (200, 30, 30) in colours and (30, 30, 200) in colours
