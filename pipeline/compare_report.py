"""A comparison as JSON, as a table and as a grid of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw

from components.ingest.cache import replacing
from components.spec import RunSpec
from components.train.job import total_iterations
from model.errors import InputError
from pipeline.compare import Comparison, Outcome
from pipeline.methods import FULL
from pipeline.statistics import Estimate, estimate, paired

if TYPE_CHECKING:
    from rich.table import Table

FIGURES = ("identity", "identity_independent", "text", "truth")
NAIVE = ("textual_inversion", "custom_diffusion")
TEXT_MARGIN = 0.05  # of text agreement that one step may lose against the teacher's 25
COVERAGE = 0.9  # of the way from the class prompt to the teacher that one step is to go
_SHOWN_PROMPTS = 2
_HEADER, _GAP = 28, 6


def document(found: Comparison, spec: RunSpec, *, intervals: bool = True) -> dict[str, Any]:
    """Give the JSON of a comparison.

    Args:
        found: what was measured.
        spec: of the full method.
        intervals: whether there are enough concepts for intervals and for claims to hold or fail;
            `half` is half the width of a 95 % interval over concepts.
    """
    whole = {
        "base": spec.base.name,
        "iterations": total_iterations(spec),
        "models": found.models,
        "concepts": [
            {"id": each.id, "masked": found.meters[each.id].masked} for each in found.concepts
        ],
        "prompts": max(len(prompts) for prompts in found.question.prompts.values()),
        "seeds": found.question.seeds,
        "teacher_guidance": found.question.guidance,
        "methods": [_method(outcome) for outcome in found.outcomes],
        "differences": differences(found),
        "claims": claims(found),
    }
    return whole if intervals else _points(whole)


def _points(whole: dict[str, Any]) -> dict[str, Any]:
    """Take every interval out, and what is concluded from one."""
    for method in whole["methods"]:
        del method["intervals"]
    leads = whole["differences"].values()
    for value in [claim["value"] for claim in whole["claims"]] + [
        v for r in leads for v in r.values()
    ]:
        if value is not None:
            value["half"] = None
    for claim in whole["claims"]:
        claim["holds"] = None
    return whole


def _method(outcome: Outcome) -> dict[str, Any]:
    figures = {name: _figure(outcome, name) for name in FIGURES}
    return {
        "name": outcome.method.name,
        "words": outcome.method.words,
        "steps": outcome.method.steps,
        "seconds": round(outcome.seconds, 1),
        **{name: each and round(each.mean, 4) for name, each in figures.items()},
        "intervals": {name: each and each.as_json()["half"] for name, each in figures.items()},
        "by_concept": {
            concept: {name: _rounded(getattr(each, name)) for name in FIGURES}
            for concept, each in outcome.fidelity.items()
        },
        "failed": outcome.failed,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _values(outcome: Outcome, name: str, concepts: Sequence[str]) -> list[float]:
    return [getattr(outcome.fidelity[concept], name) for concept in concepts]


def _figure(outcome: Outcome, name: str) -> Estimate | None:
    values = [getattr(each, name) for each in outcome.fidelity.values()]
    known = [value for value in values if value is not None]
    return estimate(known) if known else None


def _both(found: Comparison, mine: str, theirs: str) -> tuple[Outcome, Outcome, list[str]] | None:
    """Give two methods' outcomes and the concepts that both have pictures of."""
    by_name = {outcome.method.name: outcome for outcome in found.outcomes}
    if mine not in by_name or theirs not in by_name:
        return None
    left, right = by_name[mine], by_name[theirs]
    shared = [concept for concept in left.fidelity if concept in right.fidelity]
    return (left, right, shared) if shared else None


def difference(found: Comparison, mine: str, theirs: str, name: str) -> Estimate | None:
    """Estimate how much more of a figure one method has than another, paired by concept."""
    both = _both(found, mine, theirs)
    if both is None:
        return None
    left, right, shared = both
    a, b = _values(left, name, shared), _values(right, name, shared)
    return None if None in a or None in b else paired(a, b)


def differences(found: Comparison) -> dict[str, dict[str, Any]]:
    """Give the full method's lead over every other, by figure, paired by concept."""
    table: dict[str, dict[str, Any]] = {}
    for outcome in found.outcomes:
        name = outcome.method.name
        if name == FULL:
            continue
        leads = {figure: difference(found, FULL, name, figure) for figure in FIGURES}
        table[name] = {figure: each and each.as_json() for figure, each in leads.items()}
    return table


def claims(found: Comparison) -> list[dict[str, Any]]:
    """Put the method's claims to the figures: what is claimed, what came out, whether it holds.

    `holds` is None where the comparison lacks a method or has too few concepts for an interval.
    """
    rows = []
    for naive in NAIVE:
        for figure in FIGURES[:2]:
            lead = difference(found, FULL, naive, figure)
            rows.append(_claim(f"{figure} beats {naive}", lead))
    text = difference(found, FULL, "teacher", "text")
    within = None if text is None or text.half is None else text.mean >= -TEXT_MARGIN
    rows.append(_claim(f"text is within {TEXT_MARGIN} of the teacher's", text, within))
    gain = difference(found, "teacher", "student_base", "identity_independent")
    rows.append(_claim("the teacher learned", gain))
    rows.append(_coverage(found))
    for part in ("no_adversarial", "separate_text", "no_follow", "no_echo", "no_echo_stage"):
        lead = difference(found, FULL, part, "identity_independent")
        rows.append(_claim(f"{part} costs identity", lead))
    for without, words in (("no_echo", "echo"), ("no_echo_stage", "the echo stage")):
        before = f"{without}_teacher"
        raised = difference(found, "echodistill_teacher", before, "identity_independent")
        rows.append(_claim(f"{words} raises the teacher's identity", raised))
    return rows


def _claim(words: str, value: Estimate | None, holds: bool | None = None) -> dict[str, Any]:
    if value is not None and value.half is not None and holds is None:
        holds = value.above_zero
    return {"claim": words, "value": value and value.as_json(), "holds": holds}


def _coverage(found: Comparison) -> dict[str, Any]:
    """Tell how far one step goes on the way from the class prompt to the 25-step teacher."""
    words = f"one step covers {COVERAGE:.0%} of the way to the teacher (independent judge)"
    mine = difference(found, FULL, "student_base", "identity_independent")
    whole = difference(found, "teacher", "student_base", "identity_independent")
    if mine is None or whole is None or whole.mean <= 0:
        return {"claim": words, "value": None, "holds": None}
    share = mine.mean / whole.mean
    holds = None if mine.half is None else share >= COVERAGE
    return {"claim": words, "value": {"mean": round(share, 4), "half": None}, "holds": holds}


def table(found: Comparison, *, intervals: bool = True) -> Table:
    """Give the table for a terminal, with 95 % intervals or without."""
    from rich.table import Table

    rows = Table(box=None, pad_edge=False)
    rows.add_column("method")
    rows.add_column("steps", justify="right")
    for name in FIGURES:
        rows.add_column(name.replace("_", " "), justify="right")
    for outcome in found.outcomes:
        figures = (_figure(outcome, name) for name in FIGURES)
        rows.add_row(
            outcome.method.words,
            str(outcome.method.steps),
            *(_words(each, intervals) for each in figures),
        )
    return rows


def _words(each: Estimate | None, intervals: bool) -> str:
    if each is None:
        return "-"
    half = each.half if intervals else None
    return f"{each.mean:.3f}" + ("" if half is None else f" ± {half:.3f}")


def write_grid(found: Comparison, path: Path) -> None:
    """Write a PNG: a row a concept and prompt; a reference, the truth, then a column a method."""
    if path.suffix.lower() != ".png":
        raise InputError(f"{path} must name a .png file")
    side = next(iter(found.meters.values())).references.shape[-1]
    titles = ["reference", "truth", *(outcome.method.name for outcome in found.outcomes)]
    rows = [
        (concept.id, place)
        for concept in found.concepts
        for place in range(min(_SHOWN_PROMPTS, len(found.question.prompts[concept.id])))
    ]
    width = len(titles) * (side + _GAP)
    sheet = Image.new("RGB", (width, _HEADER + len(rows) * (side + _HEADER)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((column * (side + _GAP) + 2, 8), title[: side // 6], fill="black")
    for row, (concept, place) in enumerate(rows):
        top = _HEADER + row * (side + _HEADER)
        prompt = found.question.prompts[concept][place]
        pen.text((2, top + side + 4), f"{concept}: {prompt.format('...')}", fill="black")
        for column, picture in enumerate(_row(found, concept, place)):
            if picture is not None:
                tile = Image.fromarray(picture.permute(1, 2, 0).numpy())
                sheet.paste(tile, (column * (side + _GAP), top))
    with replacing(path) as temporary:
        sheet.save(temporary, "PNG")


def _row(found: Comparison, concept: str, place: int) -> list[torch.Tensor | None]:
    meter = found.meters[concept]
    reference = meter.references[place % len(meter.references)]
    truth = None if meter.truth is None else meter.truth[place, 0]
    drawn = [outcome.pictures.get(concept) for outcome in found.outcomes]
    return [reference, truth, *(None if each is None else each[place, 0] for each in drawn)]
