"""DreamBench's prompts, evenly thinned out where fewer are asked for."""

from __future__ import annotations

import functools
from pathlib import Path

import yaml

from model.errors import InputError

_FILE = Path(__file__).parent / "dreambench.yaml"


@functools.cache
def _templates() -> dict[str, list[str]]:
    content: dict[str, list[str]] = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    return content


def prompt_templates(live: bool, count: int | None = None) -> list[str]:
    """Return ``count`` of the 25 templates for live subjects or objects; {} is the subject.

    Fewer than all are spread over the list, which begins with backgrounds and ends with
    changes of the subject itself. Raises InputError for a count outside 1..25.
    """
    found = _templates()["live" if live else "object"]
    count = len(found) if count is None else count
    if not 1 <= count <= len(found):
        raise InputError(f"{count} prompts were asked for: give 1 to {len(found)}")
    return [found[index * len(found) // count] for index in range(count)]
