"""The content hash of a run spec's base, kept in the cache."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from components.ingest.cache import cache_root, replacing
from components.ingest.store import resolve_model
from components.spec import RunSpec


def base_hash(spec: RunSpec) -> str:
    """Return the content hash of a spec's base, over all that the student's picture depends on.

    Reading a large base takes a minute, so the answer is kept in the cache, under the names, sizes
    and times of the files that it was read from and the code that read them.

    Raises:
        InputError: when the base can't be used.
        ServiceError: when it can't be fetched.
    """
    from model import base_pair

    student = resolve_model(spec.base.student)
    files = sorted(path for path in student.rglob("*") if path.is_file())
    facts = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    method = hashlib.sha256(Path(base_pair.__file__).read_bytes()).hexdigest()
    key = hashlib.sha256(json.dumps([method, facts]).encode()).hexdigest()
    kept = cache_root() / "base-hashes" / key
    if kept.is_file():
        return kept.read_text().strip()
    # The teacher is not part of the hash, so the student stands in for it here.
    found = base_pair.load_base_pair(student, student, name=spec.base.name).hash
    with replacing(kept) as temporary:
        temporary.write_text(found)
    return found
