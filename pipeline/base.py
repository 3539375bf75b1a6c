"""`--base`: the name of a preset, or a folder that holds a base pair of one's own."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from components.spec import preset_names
from model.errors import InputError

# What a folder of one's own holds, and which fields of the run spec each part fills.
PARTS = {
    "teacher": ("teacher",),
    "student": ("student",),
    "clip": ("identity", "metric_clip"),
    "dino": ("metric_dino",),
}


def own_base(base: str) -> dict[str, str]:
    """Name, teacher and student of a folder of one's own, as the endpoint's settings want them.

    Raises:
        InputError: when it is no such folder.
    """
    folder = _folder(base, ("teacher", "student"), ["pocket"])
    return {
        "base": _name(folder),
        "teacher": str(folder / "teacher"),
        "student": str(folder / "student"),
    }


def base_settings(base: str | None) -> tuple[str | None, list[str]]:
    """Turn `--base` into a preset's name and the `--set` settings that go on top of it.

    A folder holds `teacher/` and `student/` (diffusers), `clip/` and `dino/` (transformers), which
    serve as discriminators, identity encoder and metrics; other arrangements are written in a run
    spec. Its resolution is what the student was made for.

    Raises:
        InputError: for a name that no preset has, or a folder that lacks a part.
    """
    if base is None or base in preset_names():
        return base, []
    folder = _folder(base, tuple(PARTS), preset_names())
    sets = [f"base.name={json.dumps(_name(folder))}"]
    for part, keys in PARTS.items():
        sets += [f"base.{key}={json.dumps(str(folder / part))}" for key in keys]
    sets.append(f"base.backbones={json.dumps([str(folder / 'clip'), str(folder / 'dino')])}")
    sets.append(f"resolution={_resolution(folder / 'student')}")
    return None, sets


def _folder(base: str, parts: tuple[str, ...], ships: Sequence[str]) -> Path:
    folder = Path(base).expanduser()
    if not folder.is_dir():
        raise InputError(
            f"there is no base {base!r}: give one that ships ({', '.join(ships)}) or a "
            f"folder that holds {', '.join(f'{part}/' for part in parts)}"
        )
    missing = [part for part in parts if not (folder / part).is_dir()]
    if missing:
        raise InputError(
            f"the base folder {folder} has no {missing[0]}/: it needs "
            f"{', '.join(f'{part}/' for part in parts)}"
        )
    return folder.resolve()


def _name(folder: Path) -> str:
    name = re.sub(r"[^a-z0-9_.-]", "-", folder.name.lower()).lstrip("_.-")[:63]
    return name if name and name not in preset_names() else f"own-{name}"[:63].rstrip("-")


def _resolution(student: Path) -> int:
    """Side of the pictures in pixels, from the sizes that the student's configurations name."""
    try:
        unet = json.loads((student / "unet" / "config.json").read_text())
        vae = json.loads((student / "vae" / "config.json").read_text())
        return int(unet["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{student} is not a diffusers model (unet/config.json or vae/config.json can't be "
            f"read: {error}): give a whole one"
        ) from None
