"""What a run spec's models are, for digests: the same wherever they lie, kept in the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import model
from components.ingest.cache import cache_root, replacing
from components.ingest.store import is_local_model, local_path, resolve_model
from components.spec import RunSpec


def base_hash(spec: RunSpec) -> str:
    """Return the hash of everything frozen that training depends on.

    That is the student's base by its values (`BasePair.hash`); and teacher, backbones, identity and
    image projection by their bytes where they lie on this machine, by name where they come from S3
    or the hub, so that a driver needs not fetch what only workers use.

    Raises:
        InputError: when the base can't be used.
        ServiceError: when it can't be fetched.
    """
    base = spec.base
    student = resolve_model(base.student)
    found = [_kept("student", student, lambda: _pair_hash(student, base.name))]
    found += [_model(ref) for ref in (base.teacher, base.identity, *base.backbones)]
    if base.image_projection:
        found.append(_file(base.image_projection))
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def _pair_hash(student: Path, name: str) -> str:
    from model import base_pair

    # The teacher is not part of this hash, so the student stands in for it.
    return base_pair.load_base_pair(student, student, name=name).hash


def _model(ref: str) -> str:
    if not is_local_model(ref):
        return ref
    folder = resolve_model(ref)
    return _kept("bytes", folder, lambda: _bytes_hash(folder))


def _file(ref: str) -> str:
    place = local_path(ref) if is_local_model(ref) else None
    if place is None or not place.is_file():
        return ref  # the worker says what is wrong with it
    return _kept("bytes", place, lambda: _bytes_hash(place))


def _bytes_hash(place: Path) -> str:
    digest = hashlib.sha256()
    for path in _files(place):
        digest.update(f"{path.relative_to(place)}\n".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _files(place: Path) -> list[Path]:
    found = [place] if place.is_file() else place.rglob("*")
    return sorted(path for path in found if path.is_file())


def _kept(kind: str, place: Path, compute: Callable[[], str]) -> str:
    """Return a hash from the cache, or compute it: reading a large base takes a minute.

    It is kept under the names, sizes and times of the files and the code that reads them.
    """
    facts = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in _files(place)]
    readers = (Path(model.__file__).with_name("base_pair.py"), Path(__file__))
    code = [hashlib.sha256(path.read_bytes()).hexdigest() for path in readers]
    key = hashlib.sha256(json.dumps([kind, code, facts]).encode()).hexdigest()
    kept = cache_root() / "base-hashes" / key
    if kept.is_file():
        return kept.read_text().strip()
    found = compute()
    with replacing(kept) as temporary:
        temporary.write_text(found)
    return found
