"""An adapter as files that other programs read."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from components.ingest.cache import disk_error
from components.spec import MAX_RANK, AdapterSpec
from model.errors import InputError
from pipeline.export_card import Exported, readme
from pipeline.generate import base_of, load_version
from pipeline.progress import Event, Progress
from pipeline.tracking import registry_to_read
from pipeline.versions import find_version

if TYPE_CHECKING:
    import torch

    from model.adapter import Adapter
    from model.base_pair import BasePair

EXPORT_FILE = "export.json"
EXAMPLE_FILE = "example.png"
CARD_FILE = "README.md"


def export(
    concept: str | None,
    *,
    adapter_dir: Path | None,
    format: str,
    rank: str | None,
    out: Path,
    tracking_uri: str | None,
    base: dict[str, str] | None = None,
    progress: Progress,
) -> Exported:
    """Write an adapter in another program's format, with its error measured.

    Args:
        concept: `<id>`, which means its champion, or `<id>@<alias or version>`.
        adapter_dir: an adapter's folder in its place.
        format: a name of `model.export_formats.FORMATS`.
        rank: a number; `auto` or None is the rank that the adapter is stored in, or for a whole one
            the lowest that keeps the default bound, or else all of it.
        out: a folder; one that holds the same concept in the same format is replaced.
        tracking_uri: of the registry; None is the environment's, or the embedded one.
        base: `teacher` and `student` directories, by default what the adapter names.
        progress: listens.

    Raises:
        InputError: for an unknown concept, format or rank, a folder that holds other things, or a
            base that is not the adapter's.
        ServiceError: when the registry is out of reach or the disk is full.
    """
    from model.base_pair import load_base_pair
    from model.export_formats import FORMATS

    if format not in FORMATS:
        raise InputError(f"--format {format!r} is not known: give {', '.join(FORMATS)}")
    wanted = _rank(rank, format)
    adapter, version = _adapter(concept, adapter_dir, tracking_uri)
    concept_id, facts = adapter.meta["concept"]["id"], adapter.meta
    _check_folder(out, concept_id, format)
    name = facts["base"]["name"]
    progress(Event("load", concept_id, f"base {name}"))
    pair = load_base_pair(*base_of(adapter, base), name=name, resolution=facts["resolution"])
    adapter.check_base(pair)
    progress(Event("measure", concept_id, "weights and pictures"))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=out.parent) as scratch:
            work = Path(scratch) / "export"
            found = _write(work, pair, adapter, format, wanted, version)
            _move(work, out)
    except OSError as error:
        raise disk_error(error, out) from error
    progress(Event("write", concept_id, str(out)))
    return found


def _adapter(
    concept: str | None, folder: Path | None, tracking_uri: str | None
) -> tuple[Adapter, int | None]:
    """The adapter of a concept or a folder, and its version in the registry."""
    from model.adapter import load_adapter

    if folder is not None:
        return load_adapter(folder), None
    assert concept is not None
    registry = registry_to_read(tracking_uri)
    version = find_version(concept, registry)
    return load_version(version, registry), version.version


def _rank(rank: str | None, format: str) -> int | None:
    """The number that was asked for, or None for `auto`."""
    if rank is not None and format == "full":
        raise InputError("--rank has no meaning for --format full, which holds whole matrices")
    if rank in (None, "auto"):
        return None
    assert rank is not None
    if not rank.isdecimal() or not 1 <= int(rank) <= MAX_RANK:
        raise InputError(f"--rank {rank!r} is none: give auto or a number from 1 to {MAX_RANK}")
    return int(rank)


def _check_folder(out: Path, concept_id: str, format: str) -> None:
    """Refuse a folder that an export would not be the next version of."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    held = None
    with contextlib.suppress(OSError, ValueError):
        held = json.loads((out / EXPORT_FILE).read_text())
    if not isinstance(held, dict) or "format" not in held or "concept" not in held:
        raise InputError(f"{out} is there and is no export: give a new folder with -o")
    if (held["concept"], held["format"]) != (concept_id, format):
        raise InputError(
            f"{out} holds {held['concept']} for {held['format']}: give another folder with -o"
        )


def _lowered(pair: BasePair, adapter: Adapter, wanted: int | None) -> tuple[Adapter, int]:
    """The adapter in factors, and their rank."""
    from model.low_rank import Decomposition, whole
    from model.rank_choice import with_rank

    stored = adapter.meta.get("rank")
    if stored is not None and (wanted is None or wanted >= stored):
        return adapter, stored
    alone = replace(adapter, teacher_delta=None)
    found = with_rank(pair, alone, wanted or "auto", AdapterSpec().max_picture_error)
    if found.meta["rank"] is not None:
        return found, found.meta["rank"]
    everything = Decomposition.of(whole(adapter.kv_delta))
    rank = everything.full_rank
    return replace(adapter, kv_delta=everything.at_rank(rank)), rank


def _merged(pair: BasePair, adapter: Adapter) -> tuple[Adapter, dict[str, torch.Tensor]]:
    """The base's K/V matrices with the adapter in them, fp16, and what they leave of it."""
    from model.kv_layout import split

    matrices = split(pair.student_layout, adapter.student_weight(pair))
    merged = {name: matrix.half() for name, matrix in matrices.items()}
    bare = split(pair.student_layout, pair.student_kv)
    left = {name: (merged[name].float() - bare[name]).cpu() for name in merged}
    return replace(adapter, kv_delta=left), merged


def _write(
    work: Path,
    pair: BasePair,
    adapter: Adapter,
    format: str,
    wanted: int | None,
    version: int | None,
) -> Exported:
    """Write the export to a new folder."""
    from safetensors.torch import save

    from model.export_formats import FORMATS, embedding_paths, files
    from model.low_rank import weight_error
    from model.png import png
    from model.rank_choice import error_pictures, picture_error
    from model.sampler import draw

    kind, meta, rank = FORMATS[format], adapter.meta, None
    if kind.low_rank:
        made, rank = _lowered(pair, adapter, wanted)
        weights = made.kv_delta
    else:
        made, weights = _merged(pair, adapter)
    error = {
        "weights": weight_error(adapter.kv_delta, made.kv_delta),
        "pictures": picture_error(error_pictures(pair, adapter), error_pictures(pair, made)),
    }
    work.mkdir(mode=0o755)
    tensors = files(kind, adapter, weights)
    for path, held in tensors.items():
        (work / path).parent.mkdir(parents=True, exist_ok=True)
        (work / path).write_bytes(save(held, metadata={"format": "pt"}))
    prompt = f"a photo of a {' '.join(adapter.tokens)} {meta['concept']['class_noun']}"
    picture = draw(pair, [adapter], [prompt], [0])[0]
    (work / EXAMPLE_FILE).write_bytes(png(picture.permute(1, 2, 0).numpy()))
    found = Exported(
        concept=meta["concept"]["id"],
        version=version,
        sha256=adapter.sha256,
        format=format,
        rank=rank,
        error=error,
        stored_rank=meta.get("rank"),
        stored_error=meta.get("rank_error"),
        weights=next(iter(tensors)),
        embeddings=tuple(embedding_paths(kind, adapter)),
        tokens=adapter.tokens,
        prompt=prompt,
        base=meta["base"]["student"] or meta["base"]["name"],
        latent_shape=pair.latent_shape,
        noise_scale=pair.student_schedule.noise_scale,
        sizes={path: (work / path).stat().st_size for path in tensors},
    )
    (work / CARD_FILE).write_text(readme(found))
    (work / EXPORT_FILE).write_text(json.dumps(found.document(), indent=2) + "\n")
    return found


def _move(work: Path, out: Path) -> None:
    """Put a finished export in place; an older one stays until the new one is there."""
    if not out.exists():
        work.rename(out)
        return
    old = work.parent / "old"
    out.rename(old)
    try:
        work.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
